"""BIDS: the table of synthetic participants and the descriptions around it.

RELEASE/nifti is a BIDS dataset of its own (type "derivative": generated, with discrete segmentations). The release
root carries the same table and a description too, and its `.bidsignore` names all that BIDS has no place for, so a
validator passes on either folder. BIDS knows no CT or X-ray: their images are listed in nifti/.bidsignore.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medvae.gate.certificate import TOOL
from medvae.synth.identifiers import subject
from medvae.types import Condition, ConditionValue

BIDS_VERSION = "1.10.0"
# Read by the root's validator: everything that is not the description, the README, the licence or the citation.
ROOT_IGNORES = (
    "nifti", "dicom", "png", "cohort.npz", "huggingface", "viewer.html", "participants.tsv", "participants.json",
    "privacy", "audit", "croissant.json", "provenance.json", "DATASET_CARD.md", "SHA256SUMS", "statement.dsse.json",
)  # fmt: skip
Rows = Sequence[Mapping[str, ConditionValue]]


def write_bids(
    folder: Path, title: str, licence: str, conditions: tuple[Condition, ...], rows: Rows, claim: str
) -> None:
    """Write dataset_description.json, participants.tsv and .json and .bidsignore, and the same for nifti/ if there.

    rows: one of condition values a scan, in the order in which the scans were written. claim: epsilon in words.
    """
    _write_table(folder, conditions, rows)
    _write_json(folder / "dataset_description.json", _description(title, licence))
    (folder / ".bidsignore").write_text("".join(f"{name}\n" for name in ROOT_IGNORES), encoding="utf-8")
    nifti = folder / "nifti"
    if nifti.is_dir():
        _write_table(nifti, conditions, rows)
        # The root names its authors in CITATION.cff, and BIDS wants them in one place only.
        authors = {"Authors": ["The signer of the release above"]}
        _write_json(nifti / "dataset_description.json", _description(title, licence) | authors)
        if any(nifti.rglob("*_T1w.nii.gz")):
            _write_json(nifti / "T1w.json", {"SkullStripped": False})
        (nifti / "README.md").write_text(_readme(title, claim), encoding="utf-8")
        (nifti / ".bidsignore").write_text("*_image.nii.gz\n", encoding="utf-8")


def _write_table(folder: Path, conditions: tuple[Condition, ...], rows: Rows) -> None:
    names = [c.name for c in conditions]
    lines = ["\t".join(["participant_id", *(_cell(n) for n in names)])]
    lines += [
        "\t".join([f"sub-{subject(i, len(rows))}", *(_cell(row[n]) for n in names)]) for i, row in enumerate(rows)
    ]
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    columns = {"participant_id": {"Description": "A synthetic participant, who never existed"}}
    _write_json(folder / "participants.json", columns | {_cell(c.name): _column(c) for c in conditions})


def _column(condition: Condition) -> dict[str, Any]:
    asked = {"Description": f"The {condition.name} that was asked of the generator"}
    if condition.kind == "class":
        return asked | {"Levels": {_cell(k): f"class {k}" for k in condition.classes}}
    return asked | {"Range": list(condition.range or ())}


def _description(title: str, licence: str) -> dict[str, Any]:
    return {
        "Name": title,
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "License": licence,
        "GeneratedBy": [
            {
                "Name": TOOL["name"],
                "Version": TOOL["version"],
                "Description": "Generated under patient-level differential privacy; no scan of a person",
            }
        ],
    }


def _readme(title: str, claim: str) -> str:
    return (
        f"# {title}\n\nSynthetic images in the folder names of BIDS. No file shows a person: each was drawn from a "
        f"generator trained with {claim}. The certificate, the licence and the signature are in the folder above, "
        "which is what `medvae verify` takes.\n"
    )


def _cell(value: ConditionValue) -> str:
    """Return a value as one cell: no tab or line break survives, and an empty one is BIDS's n/a."""
    text = f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
    return text or "n/a"


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
