"""Synthetic scans for the viewer in the HTML report: a few volumes, small enough to travel inside one file."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from medvae.synth.sample import generate, spread_conditions
from medvae.types import ConditionValue, ModelRelease

COUNT = 6
MAX_VOXELS = 160_000  # of one scan: 160 kB, so that a report stays below 2 MB
SEED = 0


def volumes(release: ModelRelease, provenance: str) -> dict[str, Any]:
    """Draw a few scans from the released model; return {"provenance", "shape", "spacing_mm", "labels", "uint8_base64"}.

    Bytes are the scans in C order, (count, *shape), 0 black and 255 white; large scans are thinned by whole steps.
    Conditions are spread evenly and the seed is fixed: no scan is chosen by looking at a real one.
    """
    rows = spread_conditions(release.space, COUNT, SEED)
    images = generate(release, rows, SEED).images
    step = 1
    while images[0].size / step**release.space.spatial_dims > MAX_VOXELS:
        step += 1
    thinned = images[(slice(None), *(slice(None, None, step),) * release.space.spatial_dims)]
    codes = np.rint(255 * np.clip(np.nan_to_num(thinned), 0, 1)).astype(np.uint8)
    return {
        "provenance": provenance,
        "shape": list(codes.shape[1:]),
        "spacing_mm": [float(s) * step for s in release.space.spacing_mm],
        "labels": [_label(i, row) for i, row in enumerate(rows, start=1)],
        "uint8_base64": base64.b64encode(codes.tobytes()).decode(),
    }


def _label(number: int, row: dict[str, ConditionValue]) -> str:
    told = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    return f"synthetic scan {number}" + (f": {told}" if told else "")
