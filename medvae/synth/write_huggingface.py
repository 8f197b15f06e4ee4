"""A folder that Hugging Face's `datasets` loads: files beside a table, with no script and nothing to trust."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medvae.synth.identifiers import subject
from medvae.synth.staging import staged_folder
from medvae.synth.values import codes, grid_affine, scale_of
from medvae.synth.write_nifti import save_nifti, stored
from medvae.synth.write_png import save_png
from medvae.types import Progress, SyntheticCohort

FOLDER = "huggingface"
_GREY = 255


def write_huggingface(
    cohort: SyntheticCohort, folder: Path, claim: Mapping[str, Any] | None = None, progress: Progress | None = None
) -> list[str]:
    """Write FOLDER/huggingface/data/SYN0001.png or .nii.gz ... and metadata.jsonl; return the paths below FOLDER.

    2D: 8-bit PNG where the raw units are 0..255, else 16-bit codes (`scale_of`). 3D: NIfTI as `write_nifti` writes it.
    Each line of the table holds file_name, mask_file_name where there are masks, participant_id and the conditions,
    each with its own type. `claim` is not used: it stands in the card, which the gate writes. Raises RunError where
    FOLDER/huggingface is not empty.
    """
    space = cohort.space
    scale, affine = scale_of(space.intensity), grid_affine(space.spatial_shape, space.spacing_mm)
    extension = ".png" if space.spatial_dims == 2 else ".nii.gz"
    written: list[str] = []
    lines: list[str] = []
    with staged_folder(folder / FOLDER) as out:
        data = out / "data"
        data.mkdir()
        for i, image in enumerate(cohort.images):
            name = subject(i, len(cohort))
            files = {"file_name": f"{name}{extension}"}
            if space.spatial_dims == 2:
                grey = codes(image, scale)
                save_png(data / files["file_name"], grey.astype(np.uint8) if scale.top <= _GREY else grey)
            else:
                array, slope = stored(image, scale)
                save_nifti(data / files["file_name"], array, affine, slope=slope)
            if cohort.masks is not None:
                files["mask_file_name"] = f"{name}_mask{extension}"
                if space.spatial_dims == 2:
                    save_png(data / files["mask_file_name"], cohort.masks[i])
                else:
                    save_nifti(data / files["mask_file_name"], cohort.masks[i], affine)
            row = {**files, "participant_id": name, **_typed(cohort.conditions[i])}
            lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False))
            written += [f"{FOLDER}/data/{file}" for file in files.values()]
            if progress is not None:
                progress(i + 1, len(cohort))
        (data / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [*written, f"{FOLDER}/data/metadata.jsonl"]


def _typed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A condition called like one of our own columns gets another name; a number is a float in every row."""
    taken = ("file_name", "participant_id", "image", "nifti", "mask")
    clash = {key for key in row if key in taken or key.endswith(("_file_name", "file_names"))}
    names = {key: f"condition_{key.replace('file_name', 'file')}" if key in clash else key for key in row}
    return {names[k]: v if isinstance(v, str) else float(v) for k, v in row.items()}
