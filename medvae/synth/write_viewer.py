"""One HTML page in which anyone can look at synthetic scans, with no server, no network and nothing to install.

The page holds NiiVue (assets/README.md) and a few scans as 8-bit NIfTI. Its own content security policy lets it load
and run nothing else. The audit report keeps its smaller viewer, which draws without WebGL in a page of below 2 MB.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.synth.identifiers import subject
from medvae.synth.staging import staged_file
from medvae.synth.values import grid_affine
from medvae.synth.write_dicom import claim_statements
from medvae.types import Progress, SyntheticCohort

FILE = "viewer.html"
MAX_SCANS = 24
MAX_CHARACTERS = 24_000_000  # of all scans in the page: more, and browsers take long to open it


def write_viewer(
    cohort: SyntheticCohort, folder: Path, claim: Mapping[str, Any] | None = None, progress: Progress | None = None
) -> list[str]:
    """Write FOLDER/viewer.html with the first scans of the cohort, and return its name.

    As many as fit: at most MAX_SCANS, and MAX_CHARACTERS of text; the page says how many of how many. Values are
    quantised to 0..255, for looking and not for measuring. Raises RunError where the file exists.
    """
    import jinja2

    scans: list[dict[str, str | None]] = []
    for i, image in enumerate(cohort.images[:MAX_SCANS]):
        grey = np.rint(np.clip(image, 0.0, 1.0) * 255).astype(np.uint8)
        mask = None if cohort.masks is None else _nifti(cohort.masks[i], cohort.space.spacing_mm)
        scans.append(
            {
                "label": _label(i, len(cohort), cohort.conditions[i]),
                "image": _nifti(grey, cohort.space.spacing_mm),
                "mask": mask,
            }
        )
        if sum(len(s["image"] or "") + len(s["mask"] or "") for s in scans) > MAX_CHARACTERS and len(scans) > 1:
            scans.pop()
            break
        if progress is not None:
            progress(i + 1, len(cohort))
    flat = cohort.space.spatial_dims == 2
    template = jinja2.Environment(autoescape=True).from_string(_asset("viewer.html.j2"))
    library, program = _asset("niivue.min.js"), _asset("viewer.js")
    text = template.render(
        claim=". ".join(claim_statements(claim)) + ".",
        told=f"The first {len(scans)} of {len(cohort)} are shown, in 256 shades of grey.",
        labels=[s["label"] for s in scans],
        flat=flat,
        masks=cohort.masks is not None,
        licences=_asset("niivue.LICENSES.txt"),
        digests=" ".join(f"'sha256-{_digest(script)}'" for script in (library, program)),
        scans=_safe(json.dumps({"flat": flat, "scans": scans})),
        library=library,
        program=program,
    )
    with staged_file(folder / FILE) as path:
        path.write_text(text, encoding="utf-8", newline="")
    if progress is not None:
        progress(len(cohort), len(cohort))
    return [FILE]


def _nifti(array: npt.NDArray[np.uint8], spacing_mm: tuple[float, ...]) -> str:
    import nibabel as nib

    image = nib.Nifti1Image(array[..., None] if array.ndim == 2 else array, grid_affine(array.shape, spacing_mm))
    image.header.set_xyzt_units("mm", "sec")
    return base64.b64encode(gzip.compress(image.to_bytes(), mtime=0)).decode()


def _label(index: int, total: int, row: Mapping[str, Any]) -> str:
    values: Iterable[str] = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    return ", ".join([subject(index, total), *values])


def _asset(name: str) -> str:
    return resources.files("medvae.synth").joinpath("assets", name).read_bytes().decode("utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _safe(data: str) -> str:
    """JSON for a script element: no `<` survives, so nothing in it can end the element."""
    return data.replace("<", "\\u003c")
