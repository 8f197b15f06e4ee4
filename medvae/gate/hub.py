"""The card that a Hugging Face dataset folder needs: README.md with its YAML head, the licence, the certificate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medvae.gate import card
from medvae.gate.licences import Licence
from medvae.synth.values import scale_of
from medvae.synth.write_huggingface import FOLDER
from medvae.types import ImageSpace

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write_hub_card(
    release: Path, certificate: Mapping[str, Any], space: ImageSpace, claim: str, terms: Licence
) -> None:
    """Write README.md and LICENSE into RELEASE/huggingface and copy the certificate there: the folder travels alone.

    claim: epsilon in words, with delta, unit, neighbours and accountant.
    """
    folder = release / FOLDER
    (folder / "README.md").write_text(_card(certificate, space, claim, terms), encoding="utf-8")
    (folder / "LICENSE").write_text(card.licence(certificate, terms), encoding="utf-8")
    shutil.copyfile(release / "privacy" / "certificate.json", folder / "certificate.json")


def _card(certificate: Mapping[str, Any], space: ImageSpace, claim: str, terms: Licence) -> str:
    own = [] if terms.url else ["license_name: data-holder", "license_link: LICENSE"]
    count = certificate["release"]["count"]
    head = [
        "---",
        f"license: {terms.hub_name}",
        *own,
        f"pretty_name: {json.dumps(certificate['title'])}",
        "tags: [synthetic, medical, differential-privacy]",
        f"size_categories: [{json.dumps(next((name for limit, name in _SIZES if count < limit), 'n>1T'))}]",
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - split: train",
        '    path: "data/*"',
        "---",
        "",
    ]
    scale = scale_of(space.intensity)
    column, kind = ("image", "PIL image") if space.spatial_dims == 2 else ("nifti", "nibabel image")
    lines = [
        f"# {certificate['title']}",
        "",
        f"{count} synthetic medical images of {' x '.join(str(n) for n in space.spatial_shape)}, modality "
        f"{space.modality}. **None shows a person**: each was drawn from a generator that learned from patients' scans "
        f"under differential privacy, with {claim}. `certificate.json` holds the whole claim.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'scans = load_dataset("PATH_OF_THIS_FOLDER", split="train")',
        f'scans[0]["{column}"]  # a {kind}',
        "```",
        "",
        f"Columns: `{column}`{', `mask`' if space.mask_labels else ''}, `participant_id`"
        f"{''.join(f', `{c.name}`' for c in space.conditions)}. The conditions are those asked of the generator; their "
        "frequencies say nothing about the patients.",
        "",
        *_units(scale.slope, scale.intercept, space),
        "What the privacy means:",
        "",
        *(f"- {line}" for line in certificate["plain_words"]),
        "",
        "What it does not mean:",
        "",
        *(f"- {line}" for line in certificate["limits"]),
        "",
        "Not for diagnosis, treatment or estimates of prevalence.",
    ]
    return "\n".join([*head, *lines]) + "\n"


def _units(slope: float, intercept: float, space: ImageSpace) -> list[str]:
    """PNG has no place for a unit; NIfTI headers hold it."""
    if space.spatial_dims == 3 or (slope, intercept) == (1.0, 0.0):
        return []
    return [f"Raw value = {slope:.10g} x stored value + {intercept:.10g}.", ""]
