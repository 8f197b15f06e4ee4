"""NIfTI: one image a synthetic subject, a mask beside it, in the folder names of BIDS derivatives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.synth.identifiers import subject
from medvae.synth.staging import staged_folder
from medvae.synth.values import Scale, codes, grid_affine, scale_of
from medvae.types import FloatArray, Progress, SyntheticCohort

# BIDS has no suffix for a magnetic resonance image of unknown weighting, and none at all for other modalities.
_SUFFIX = {"MR": "T1w"}


def write_nifti(
    cohort: SyntheticCohort, folder: Path, claim: Mapping[str, Any] | None = None, progress: Progress | None = None
) -> list[str]:
    """Write FOLDER/nifti/sub-SYN0001/anat/sub-SYN0001_*.nii.gz and return the paths below FOLDER.

    Images are int16 (raw units where the intensity is a window, see `scale_of`), of shape (X, Y, Z), or (H, W, 1) for
    2D; masks (`_dseg`) uint8 of the same shape and affine. Headers hold geometry, units and the word "synthetic".
    `claim` is not used: NIfTI has no place for it. Raises RunError where FOLDER/nifti is not empty.
    """
    scale = scale_of(cohort.space.intensity)
    affine = grid_affine(cohort.space.spatial_shape, cohort.space.spacing_mm)
    suffix = _SUFFIX.get(cohort.space.modality, "image")
    written: list[str] = []
    with staged_folder(folder / "nifti") as out:
        for i, image in enumerate(cohort.images):
            array, slope = stored(image, scale)
            name = f"sub-{subject(i, len(cohort))}"
            anat = out / name / "anat"
            anat.mkdir(parents=True)
            save_nifti(anat / f"{name}_{suffix}.nii.gz", array, affine, slope=slope)
            files = [f"{name}_{suffix}.nii.gz"]
            if cohort.masks is not None:
                save_nifti(anat / f"{name}_dseg.nii.gz", cohort.masks[i], affine)
                files.append(f"{name}_dseg.nii.gz")
            written += [f"nifti/{name}/anat/{file}" for file in files]
            if progress is not None:
                progress(i + 1, len(cohort))
    return written


def stored(image: FloatArray, scale: Scale) -> tuple[npt.NDArray[np.int16], tuple[float, float]]:
    """Return the int16 that stand for an image in [0, 1], and (slope, intercept) from them to raw units."""
    array = codes(image, scale).astype(np.int16)
    if scale.integer:
        return array + np.int16(scale.intercept), (1.0, 0.0)
    return array, (scale.slope, scale.intercept)


def save_nifti(
    path: Path,
    array: npt.NDArray[Any],
    affine: npt.NDArray[np.float64],
    *,
    slope: tuple[float, float] = (1.0, 0.0),
) -> None:
    """Write one array of shape (X, Y, Z) or (H, W); raw = stored * slope[0] + slope[1]. No text but "synthetic"."""
    import nibabel as nib

    image = nib.Nifti1Image(array[..., None] if array.ndim == 2 else array, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_qform(affine, code=1)
    image.header.set_sform(affine, code=1)
    image.header["descrip"] = b"synthetic"
    # With a slope in the header nibabel writes the array as it is, and readers multiply.
    image.header.set_slope_inter(*slope)
    image.to_filename(path)
