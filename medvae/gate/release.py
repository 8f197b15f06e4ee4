"""The gate: looks at a run, generates from its model, and writes the one folder that may leave.

All of it is post-processing of a differentially private model: nothing here reads a scan, and of the run only the
public claim, the model, the ledger's receipt and the signing key are opened.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medvae.config import ReleaseConfig
from medvae.errors import ConfigError, InputError
from medvae.gate import bids, canary, card, certificate, manifest, sign
from medvae.gate.checks import check_claim, check_run
from medvae.gate.croissant import croissant
from medvae.gate.evidence import Evidence, read_evidence, read_privacy
from medvae.gate.hub import write_hub_card
from medvae.gate.licences import Licence, licence_of
from medvae.gate.outcome import Check, overridden
from medvae.gate.reports import AUDIT_FILE
from medvae.schemas import check, version
from medvae.synth import sample
from medvae.synth.staging import staged_folder
from medvae.synth.write_dicom import write_dicom
from medvae.synth.write_huggingface import write_huggingface
from medvae.synth.write_nifti import write_nifti
from medvae.synth.write_npz import write_npz
from medvae.synth.write_png import write_png
from medvae.synth.write_viewer import write_viewer
from medvae.types import Condition, ConditionValue, ImageSpace, Progress, SyntheticCohort

Render = Callable[[Mapping[str, Any], Path], None]
Rows = Sequence[Mapping[str, ConditionValue]]

WRITERS = {
    "nifti": write_nifti,
    "dicom": write_dicom,
    "png": write_png,
    "npz": write_npz,
    "huggingface": write_huggingface,
    "viewer": write_viewer,
}
UNIFORM_WORDS = "uniform over the classes and ranges"
TABLE_WORDS = "from a table given by the data holder, who declares it public"


def release(
    run: Path,
    out: Path,
    config: ReleaseConfig,
    report: Path | None = None,
    render: Render | None = None,
    render_audit: Render | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check a finished run and write the release folder `out`; return a summary.

    Guarantee: what is written is post-processing of a model that is (epsilon, delta)-DP as its certificate states.
    render writes certificate.html and .pdf into a folder, from the certificate; render_audit does so for the public
    audit.json, into which `config.override` is printed where it let a check pass. `out` appears complete or not at all.
    Raises RunError for a run, report or `out` that cannot be used, ConfigError for a table or key that cannot, and
    NotReleasable, naming the check, where the gate stays closed.
    """
    config = config.model_copy(update={"formats": tuple(dict.fromkeys(config.formats))})
    terms = licence_of(config.licence)
    evidence, checks, override = judge(run, config, report)
    planted = canary.published(run, evidence.mechanisms, evidence.privacy["delta"])
    asked = _rows(config, evidence.space)
    key = sign.signing_key(config.key, run)
    with staged_folder(out.resolve(), durable=True) as folder:
        rows = _write_images(folder, evidence, asked, config, progress)
        words = UNIFORM_WORDS if config.conditions is None else TABLE_WORDS
        proof = certify(evidence, checks, config, key, override, config.count, config.formats, words)
        _write_documents(folder, evidence, proof, rows, config, terms, render)
        if planted is not None:
            write_json(folder / canary.FILE, planted)
        if report is not None:
            write_audit(report / "public", folder / "audit", override, render_audit)
        files = seal(folder, proof, key)
    return {
        "count": config.count,
        "formats": list(config.formats),
        **certificate.short_claim(evidence.privacy),
        "files": files,
        "key_id": proof["signer"]["key_id"],
        "checks": proof["checks"],
        "override": proof["override"],
        "plain_words": proof["plain_words"],
    }


def judge(run: Path, config: ReleaseConfig, report: Path | None) -> tuple[Evidence, list[Check], dict[str, Any] | None]:
    """Return what the gate knows of a run, its answers, and what `config.override` let pass, if anything.

    Raises RunError for a run or report that cannot be used, and NotReleasable where the gate stays closed.
    """
    privacy = read_privacy(run)
    checks = check_claim(privacy)
    evidence = read_evidence(run, privacy, report)
    checks += check_run(evidence, config.override)
    return evidence, checks, overridden(checks, config.override)


def _rows(config: ReleaseConfig, space: ImageSpace) -> list[dict[str, ConditionValue]]:
    """Return one row of conditions an image: uniform, or the user's table repeated to the count."""
    if config.conditions is None:
        return sample.spread_conditions(space, config.count, config.seed)
    table = _read_table(config.conditions, space.conditions)
    return [table[i % len(table)] for i in range(config.count)]


def _read_table(path: Path, conditions: tuple[Condition, ...]) -> list[dict[str, ConditionValue]]:
    """Read the columns named like conditions, and no other; raises ConfigError without repeating a value."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise ConfigError("the conditions table cannot be read: give a CSV file with one column a condition") from None
    missing = [c.name for c in conditions if not lines or c.name not in lines[0]]
    if missing:
        raise ConfigError(f"the conditions table has no column {missing[0]!r}, or no row: add it")
    return [{c.name: _value(c, line[c.name], i) for c in conditions} for i, line in enumerate(lines, start=1)]


def _value(condition: Condition, text: str | None, line: int) -> ConditionValue:
    where = f"row {line} of the conditions table: {condition.name!r}"
    text = (text or "").strip()
    if condition.kind == "class":
        if text not in condition.classes:
            raise ConfigError(f"{where} is not a known class: use one of {', '.join(condition.classes)}")
        return text
    low, high = condition.range or (0.0, 0.0)
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise ConfigError(f"{where} is not a number from {low:g} to {high:g}: the model knows no other")
    return number


def _write_images(
    folder: Path, evidence: Evidence, rows: Rows, config: ReleaseConfig, progress: Progress | None
) -> Rows:
    """Write the images in every format; return their conditions, which a teacher may have renamed."""
    stages = 1 + len(config.formats)
    cohort = sample.generate(evidence.model, rows, config.seed, progress=_stage(progress, 0, stages, len(rows)))
    _must_fit(cohort, evidence.space, len(rows))
    if config.body_part is not None:
        cohort = dataclasses.replace(cohort, notes={"body_part": config.body_part})
    claim = certificate.short_claim(evidence.privacy)
    for i, name in enumerate(config.formats, start=1):
        WRITERS[name](cohort, folder, claim, progress=_stage(progress, i, stages, len(rows)))
    return cohort.conditions


def _stage(progress: Progress | None, stage: int, stages: int, count: int) -> Progress | None:
    """Return a progress for one stage of equal stages, in images."""
    if progress is None:
        return None
    return lambda done, total: progress(stage * count + round(done / max(total, 1) * count), stages * count)


def _must_fit(cohort: SyntheticCohort, space: ImageSpace, count: int) -> None:
    if cohort.images.shape != (count, *space.spatial_shape):
        raise InputError(f"the model made images of shape {cohort.images.shape}, not as its card says: train again")


def certify(
    evidence: Evidence,
    checks: Sequence[Check],
    config: ReleaseConfig,
    key: Ed25519PrivateKey,
    override: Mapping[str, Any] | None,
    count: int,
    formats: Sequence[str],
    conditions: str,
) -> dict[str, Any]:
    """Return the certificate of `count` images in these formats, checked against its schema."""
    public = key.public_key()
    proof = certificate.build(
        evidence,
        checks,
        title=_title(config),
        count=count,
        formats=formats,
        conditions=conditions,
        override=override,
        signer={"algorithm": "Ed25519", "key_id": sign.key_id(public), "public_key": sign.public_pem(public)},
    )
    check("certificate", proof)
    return proof


def _write_documents(
    folder: Path,
    evidence: Evidence,
    proof: Mapping[str, Any],
    rows: Rows,
    config: ReleaseConfig,
    terms: Licence,
    render: Render | None,
) -> None:
    space, claim = evidence.space, certificate.claim_words(proof["claim"])
    (folder / "privacy").mkdir()
    write_json(folder / "privacy" / "certificate.json", proof)
    if render is not None:
        render(proof, folder / "privacy")
    texts = {
        "README.md": card.readme(proof, claim),
        "DATASET_CARD.md": card.dataset_card(proof, space, claim, terms),
        "LICENSE": card.licence(proof, terms),
        "CITATION.cff": card.citation(proof, claim, terms),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    if "huggingface" in config.formats:
        write_hub_card(folder, proof, space, claim, terms)
    bids.write_bids(folder, proof["title"], terms.identifier, space.conditions, rows, claim)
    write_json(folder / "provenance.json", _provenance(evidence, proof, config))
    named = ("participants.tsv", "privacy/certificate.json", "cohort.npz")
    sums = {name: manifest.digest(folder / name) for name in named if (folder / name).exists()}
    write_json(folder / "croissant.json", croissant(proof, space.conditions, sums, claim, terms.address))


def _provenance(evidence: Evidence, proof: Mapping[str, Any], config: ReleaseConfig) -> dict[str, Any]:
    """Return provenance.json: what made the images, so that the same model and seed make them again. No path."""
    data = {
        "schema": version("provenance"),
        "created": proof["created"],
        "tool": proof["tool"],
        "software": proof["software"],
        "model": {
            "weights_sha256": evidence.model.card["weights_sha256"],
            "space": evidence.space.to_json(),
            "recipe": evidence.model.card["recipe"],
        },
        "receipt": proof["claim"]["receipt"],
        "synthesis": {
            "seed": config.seed,
            "count": config.count,
            "formats": list(config.formats),
            "conditions": proof["release"]["conditions"],
        },
    }
    check("provenance", data)
    return data


def write_audit(public: Path, target: Path, override: Mapping[str, Any] | None, render: Render | None) -> None:
    """Write the public report anew from its JSON, with an override printed into it.

    The pages that lie beside the JSON stay behind: what was checked is the JSON, and they may say something else.
    """
    audit = json.loads((public / AUDIT_FILE).read_text(encoding="utf-8"))
    if override is not None:
        audit["decision"] = {**audit["decision"], "override": dict(override)}
    check("audit", audit)
    target.mkdir()
    write_json(target / AUDIT_FILE, audit)
    if render is not None:
        render(audit, target)


def seal(folder: Path, proof: Mapping[str, Any], key: Ed25519PrivateKey) -> int:
    """Write SHA256SUMS and the signed statement over every file, and return the number of files."""
    sums = manifest.digests(folder)
    (folder / manifest.SUMS).write_bytes(manifest.render(sums))
    predicate = certificate.predicate(proof)
    (folder / manifest.STATEMENT).write_bytes(sign.seal(sign.statement(sums, predicate), key))
    return len(sums) + 2


def _title(config: ReleaseConfig) -> str:
    return " ".join(config.title.split()) or "Synthetic medical images"


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON for people, too; refuses infinity and not-a-number, which JSON does not have."""
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
