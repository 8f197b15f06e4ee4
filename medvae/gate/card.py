"""What people read first: README.md, DATASET_CARD.md, LICENSE and CITATION.cff of a release."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from medvae.gate.licences import Licence
from medvae.types import Condition, ImageSpace

_WHAT = {
    "nifti": "`nifti/`: images, and masks as `_dseg`, as NIfTI; a BIDS dataset of its own",
    "dicom": "`dicom/`: one folder a synthetic subject; masks as DICOM SEG",
    "png": "`png/`: pictures to look at, masks as `_mask`; of a volume, three middle slices",
    "huggingface": "`huggingface/`: a folder that Hugging Face's `datasets` loads, with a card of its own",
    "viewer": "`viewer.html`: some of the scans to look at in a browser, offline",
    "npz": "`cohort.npz`: `images` (N, *spatial) in [0, 1], `labels`, `conditions`, `masks`; open with numpy",
}


def readme(certificate: Mapping[str, Any], claim: str) -> str:
    """Return README.md. claim: epsilon in words, with delta, unit, neighbours and accountant."""
    release = certificate["release"]
    audit = (
        ["- `audit/`: the shareable part of the audit that was made before this release"]
        if certificate["audit"]
        else []
    )
    return _lines(
        f"# {certificate['title']}",
        "",
        f"{release['count']} synthetic medical images. **None shows a person**: each was drawn from a generator that "
        f"learned from patients' scans under differential privacy, with {claim}.",
        "",
        *_override(certificate["override"]),
        "What that means:",
        "",
        *(f"- {line}" for line in certificate["plain_words"]),
        "",
        "What it does not mean:",
        "",
        *(f"- {line}" for line in certificate["limits"]),
        "",
        "## Files",
        "",
        *(f"- {_WHAT[kind]}" for kind in release["formats"]),
        "- `participants.tsv`: the conditions asked of the generator, one row an image",
        "- `privacy/certificate.json` (`.html`, `.pdf`): the whole claim, to be recomputed by anyone",
        *audit,
        "- `DATASET_CARD.md`, `croissant.json`, `dataset_description.json`: what the data are and are for",
        "- `provenance.json`, `SHA256SUMS`, `statement.dsse.json`: how it was made, digests, signature",
        "",
        "## Check it",
        "",
        "`medvae verify FOLDER` needs no private data and no network: it checks every file, the signature, and "
        "recomputes epsilon with two accountants. `sha256sum -c SHA256SUMS` checks the files alone. Any edit, this "
        "README included, breaks the signature.",
        "",
        f"Signed by the key `{certificate['signer']['key_id']}`. The public key is in the certificate, so a signature "
        "alone shows that nothing changed since it was made, and not by whom: compare this key with one that the data "
        "holder published, or give theirs by `--public-key`.",
    )


def _override(override: Mapping[str, Any] | None) -> list[str]:
    """Say at the top that the gate was overridden, and why."""
    if override is None:
        return []
    failed = [f"- {line}" for line in override["overridden"]]
    return ["**Released against the gate**, on the data holder's own responsibility. Not passed:", "", *failed, "",
            f"Reason on record: {override['reason']}", ""]  # fmt: skip


def dataset_card(certificate: Mapping[str, Any], space: ImageSpace, claim: str, terms: Licence) -> str:
    """Return DATASET_CARD.md: composition, making, uses, limits."""
    release, privacy = certificate["release"], certificate["claim"]
    masks = f"labels {', '.join(str(m) for m in space.mask_labels)}" if space.mask_labels else "none"
    conditions = [f"- `{c.name}`: {_values(c)}" for c in space.conditions]
    return _lines(
        "---",
        f"license: {terms.hub_name}",
        f"pretty_name: {json.dumps(certificate['title'])}",
        "tags: [synthetic, medical, differential-privacy]",
        "---",
        "",
        f"# Dataset card: {certificate['title']}",
        "",
        "## Composition",
        "",
        f"- {release['count']} images of {' x '.join(str(n) for n in space.spatial_shape)}, spacing "
        f"{' x '.join(f'{s:g}' for s in space.spacing_mm)} mm, modality {space.modality}; masks: {masks}",
        f"- conditions: {release['conditions']}",
        *conditions,
        "",
        "## Making",
        "",
        f"- A conditional variational autoencoder trained on {privacy['patients']} patients with {claim}.",
        f"- Charged to the privacy budget: {', '.join(privacy['charged'])}.",
        f"- Declared public: {', '.join(privacy['declared_public']) or 'nothing'}.",
        f"- Released: {', '.join(privacy['released'])}; the generator's weights are not part of this folder.",
        "",
        "## Uses",
        "",
        "Software development, teaching, research on methods. Not for diagnosis, treatment or estimates of prevalence.",
        "",
        "## Limits",
        "",
        "- Fine detail and rare findings are lost or blurred by the noise that privacy needs.",
        "- The frequencies of the conditions are those asked for, never those of the cohort.",
        "- Groups with few patients are reproduced worse than large ones.",
        *(f"- {line}" for line in certificate["limits"]),
    )


def licence(certificate: Mapping[str, Any], terms: Licence) -> str:
    """Return LICENSE: the terms, granted by whoever signed."""
    return _lines(
        f"{certificate['title']}",
        f"Copyright {certificate['created'][:4]}, the institution that signed this release",
        f"(Ed25519 key {certificate['signer']['key_id']}).",
        "",
        terms.text,
    )


def citation(certificate: Mapping[str, Any], claim: str, terms: Licence) -> str:
    """Return CITATION.cff, version 1.2.0 (JSON strings are YAML strings); it can name SPDX licences only."""
    return _lines(
        "cff-version: 1.2.0",
        'message: "If you use this dataset, please cite it as below."',
        "type: dataset",
        f"title: {json.dumps(certificate['title'])}",
        f"abstract: {json.dumps(f'Synthetic medical images, generated under {claim}.')}",
        "authors:",
        f"  - name: {json.dumps('The signer of this release, key ' + certificate['signer']['key_id'])}",
        f"date-released: {json.dumps(certificate['created'])}",
        *([f"license: {terms.identifier}"] if terms.url else []),
        "keywords: [synthetic data, medical imaging, differential privacy]",
    )


def _values(condition: Condition) -> str:
    if condition.kind == "class":
        return ", ".join(condition.classes)
    return " to ".join(f"{bound:g}" for bound in condition.range or ())


def _lines(*lines: str) -> str:
    return "\n".join(lines) + "\n"
