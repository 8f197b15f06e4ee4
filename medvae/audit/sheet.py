"""A contact sheet of synthetic scans, and of nothing else."""

from __future__ import annotations

import base64
import io

import numpy as np

from medvae.audit.case import Figure
from medvae.audit.material import Scans
from medvae.types import Provenance, decode_conditions

SHEET = 24
COLUMNS = 8
TILE = 96
GAP = 2


def contact_sheet(made: Scans, provenance: Provenance) -> Figure:
    """Return up to 24 synthetic scans (of volumes, the middle slice) as one PNG, with a caption a tile.

    Tiles are taken in order and never chosen by comparison with real scans: a choice would be a private filter.
    """
    from PIL import Image

    shown = made.take(np.arange(min(SHEET, len(made))))
    tiles = [_tile(image) for image in shown.images]
    height, width = tiles[0].shape
    rows = -(-len(tiles) // COLUMNS)
    sheet = np.zeros((rows * (height + GAP) - GAP, COLUMNS * (width + GAP) - GAP), dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = (i // COLUMNS) * (height + GAP), (i % COLUMNS) * (width + GAP)
        sheet[top : top + height, left : left + width] = tile
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG", optimize=True)
    rows_of = [decode_conditions(made.space.conditions, c) for c in shown.condition]
    captions = [
        ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in r.items()) for r in rows_of
    ]
    data = {
        "png_base64": base64.b64encode(buffer.getvalue()).decode("ascii"),
        "columns": COLUMNS,
        "captions": captions,
        "alternative": f"{len(tiles)} synthetic scans side by side; none shows a real patient",
    }
    return Figure("Synthetic scans, in the order they were made", provenance, data)


def _tile(image: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Return a plane as bytes, its longer side brought near TILE by whole factors."""
    plane = image if image.ndim == 2 else image[:, :, image.shape[2] // 2].T[::-1]
    step = max(1, -(-max(plane.shape) // (2 * TILE)))
    small = plane[::step, ::step]
    grow = max(1, TILE // max(small.shape))
    return np.kron(np.round(np.clip(small, 0, 1) * 255), np.ones((grow, grow))).astype(np.uint8)
