"""PNG for looking at: a grey picture a 2D image, three middle slices side by side for a volume. No metadata chunks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.synth.identifiers import subject
from medvae.synth.staging import staged_folder
from medvae.types import Progress, SyntheticCohort


def write_png(
    cohort: SyntheticCohort, folder: Path, claim: Mapping[str, Any] | None = None, progress: Progress | None = None
) -> list[str]:
    """Write FOLDER/png/SYN0001.png (8-bit grey) and SYN0001_mask.png (mask labels), and return the paths.

    2D: rows and columns as they are. 3D: the middle axial, coronal and sagittal slices, which lose the volume.
    `claim` is not used: the files hold pixels only. Raises RunError where FOLDER/png is not empty.
    """
    written: list[str] = []
    with staged_folder(folder / "png") as out:
        for i, image in enumerate(cohort.images):
            name = subject(i, len(cohort))
            grey = np.rint(np.clip(image, 0.0, 1.0) * 255).astype(np.uint8)
            files = {f"{name}.png": grey}
            if cohort.masks is not None:
                files[f"{name}_mask.png"] = cohort.masks[i]
            for file, array in files.items():
                save_png(out / file, array if array.ndim == 2 else montage(array))
            written += [f"png/{file}" for file in files]
            if progress is not None:
                progress(i + 1, len(cohort))
    return written


def save_png(path: Path, array: npt.NDArray[np.uint8 | np.uint16]) -> None:
    """Write an array of shape (H, W) as 8-bit or 16-bit grey, as its type is."""
    from PIL import Image

    Image.fromarray(array).save(path)


def montage(volume: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the middle axial, coronal and sagittal slices of a (X, Y, Z) RAS volume side by side, head up.

    The patient's right is on the viewer's left, as radiologists hang pictures; the shape is (max(Y, Z), 2 X + Y).
    """
    x, y, z = (n // 2 for n in volume.shape)
    slices = [volume[::-1, :, z], volume[::-1, y, :], volume[x]]
    views = [s.T[::-1] for s in slices]
    height = max(v.shape[0] for v in views)
    return np.concatenate([np.pad(v, ((height - v.shape[0], 0), (0, 0))) for v in views], axis=1)
