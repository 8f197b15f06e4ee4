"""A small finished run, made by hand: real mechanisms, ledger and model files, and no scan anywhere."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from medvae.config import CanaryConfig, Recipe, ReleaseConfig
from medvae.crosscheck import Agreement, agree
from medvae.dp.accounting import pld_epsilon
from medvae.dp.ledger import Ledger
from medvae.dp.marks import end_note, start_note
from medvae.dp.tradeoff import plain_words
from medvae.gate import release as gate
from medvae.synth.store import write_release
from medvae.types import Condition, ImageSpace, Intensity, Mechanism, ModelRelease, SyntheticCohort

SPACE = ImageSpace(
    spatial_shape=(8, 10, 6),
    spacing_mm=(1.0, 1.0, 1.5),
    modality="MR",
    intensity=Intensity("percentile", 1.0, 99.0),
    conditions=(
        Condition("size_class", "class", ("small", "large")),
        Condition("age", "continuous", range=(20.0, 90.0)),
    ),
    mask_labels=(1, 2),
)
MECHANISMS = (Mechanism("moments", 2.0), Mechanism("dpsgd", 1.1, sample_rate=0.1, count=20))
DELTA = 1e-5
PATIENTS = 200
NOISE = "os_entropy:chacha20"
PLANTED = ("PLANTED-JANSEN", "19470823", "/srv/ward7/scans")


@functools.cache
def _agree_once(mechanisms: tuple[Mechanism, ...], delta: float, tolerance: float) -> Agreement:
    return agree(mechanisms, delta, tolerance)


def agree_once(mechanisms: Sequence[Mechanism], delta: float, tolerance: float = 0.01) -> Agreement:
    """The real accountants, asked once for each claim: PRV takes a second."""
    return _agree_once(tuple(mechanisms), delta, tolerance)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")


def build_run(
    folder: Path,
    *,
    space: ImageSpace = SPACE,
    model: ModelRelease | None = None,
    commit: bool = True,
    mechanisms: Sequence[Mechanism] = MECHANISMS,
) -> Path:
    """Write FOLDER/run and FOLDER/cohort/ledger.db, and return the run."""
    run, book = folder / "run", folder / "cohort" / "ledger.db"
    book.parent.mkdir(parents=True)
    ledger = Ledger(book)
    receipt = ledger.reserve("run-7f3a", mechanisms, DELTA, note=start_note(PLANTED[0], NOISE, PATIENTS, None))
    weights = {"decoder.weight": np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)}
    recipe = Recipe(canaries=CanaryConfig(enabled=False)).model_dump(mode="json")
    card = {"space": space.to_json(), "recipe": recipe}
    written = write_release(run / "model", model or ModelRelease(weights, card))
    if commit:
        ledger.commit("run-7f3a", end_note(written["weights_sha256"], None))
    epsilon = pld_epsilon(mechanisms, DELTA)
    write_json(
        run / "privacy.json",
        {
            "schema": "medvae.privacy/1",
            "epsilon": epsilon,
            "delta": DELTA,
            "unit": "patient",
            "neighboring": "add-remove",
            "accountant": "pld",
            "sample_rate": 0.1,
            "noise_multiplier": 1.1,
            "max_grad_norm": 1.0,
            "steps": 20,
            "mechanisms": [m.to_json() for m in mechanisms],
            "noise_source": NOISE,
            "releasable": True,
            "patients": PATIENTS,
            "reasons": [],
            "receipt": receipt.to_json(),
            "crosscheck": {"accountant": "prv", "epsilon": agree_once(mechanisms, DELTA).prv},
            "fingerprint": "hmac-sha256:" + "ab" * 32,
            "declared_public": ["number of patients", "class names"],
            "plain_words": plain_words(epsilon, DELTA, mechanisms),
            "versions": {"medvae-dp": "0.1.0", "torch": "2.13.0"},
        },
    )
    write_json(run / "private" / "run.json", {"cohort": PLANTED[2], "ledger": str(book), "config": {"who": PLANTED[0]}})
    (run / "private" / "losses.jsonl").write_text(f'{{"step": 1, "loss": 0.25, "patient": "{PLANTED[1]}"}}\n')
    write_report(run)
    return run


def charge_anew(run: Path, coins: str | None = None, noise: str = NOISE) -> None:
    """Give the run another ledger, which notes that digest of coins and that source of noise; `end_anew` ends it."""
    book = ledger_of(run)
    book.unlink()
    note = start_note(PLANTED[0], noise, PATIENTS, coins)
    edit_json(run / "privacy.json", receipt=Ledger(book).reserve("run-7f3a", MECHANISMS, DELTA, note=note).to_json())


def end_anew(run: Path, seen: str | None = None) -> None:
    """Note the run's end, with the digest of what canaries saw, and write the report that fits."""
    card = json.loads((run / "model" / "model.json").read_text())
    Ledger(ledger_of(run)).commit("run-7f3a", end_note(card["weights_sha256"], seen))
    write_report(run)


def ledger_of(run: Path) -> Path:
    return run.parent / "cohort" / "ledger.db"


def release(run: Path, out: Path, config: ReleaseConfig, **given: Any) -> dict[str, Any]:
    """The gate's release, with the audit that lies beside the run unless another or none is given."""
    return gate.release(run, out, config, **{"report": run.parent / "report", **given})


def audit_of(run: Path, audience: str = "public", **changes: Any) -> dict[str, Any]:
    """A small audit of this run, made now, that its schema allows."""
    privacy = json.loads((run / "privacy.json").read_text())
    card = json.loads((run / "model" / "model.json").read_text())
    own = ("epsilon", "delta", "unit", "neighboring", "accountant", "mechanisms", "releasable", "patients")
    claim = {key: privacy.get(key) for key in own}
    claim |= {"receipt_digest": privacy["receipt"]["digest"], "weights_sha256": card["weights_sha256"]}
    empty = dict.fromkeys(("low", "high", "n", "baseline", "control"))
    findings = [
        {"name": "proven limit of membership advantage", "group": "privacy", "value": 0.3, "provenance": "public"},
        {"name": "membership, likelihood, auc", "group": "privacy", "value": 0.51, "provenance": "private"},
    ]
    shown = findings[: 1 if audience == "public" else 2]
    decision = {"verdict": "CONDITIONAL", "reasons": ["epsilon is a weak promise"], "provenance": "public"}
    audit = {
        "schema": "medvae.audit/1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool": {"name": "medvae-dp", "version": "0.1.0"},
        "tier": "quick",
        "settings": {},
        "claim": claim,
        "not_tested": [],
        "audience": audience,
        "findings": [{**f, **empty, "verdict": "seen"} for f in shown],
        "figures": {},
        "summary": [],
        "decision": decision,
    }
    return {**audit, **changes}


def write_report(run: Path, public: dict[str, Any] | None = None, internal: dict[str, Any] | None = None) -> Path:
    """Write RUN/../report with both sides, and a planted note that must stay behind."""
    report = run.parent / "report"
    write_json(report / "public" / "audit.json", public or audit_of(run))
    (report / "public" / "audit.html").write_text("<p>public</p>")
    (report / "public" / "notes.txt").write_text(PLANTED[0])
    write_json(report / "internal" / "audit.json", internal or audit_of(run, "internal"))
    return report


def fake_generate(model: ModelRelease, conditions: Any, seed: int, progress: Any = None, **_: Any) -> SyntheticCohort:
    """Stand in for the model: noise of the right shape. Tests of the model itself live with it."""
    rng = np.random.default_rng(seed)
    space = model.space
    shape = (len(conditions), *space.spatial_shape)
    masks = rng.integers(0, 3, shape).astype(np.uint8) if space.mask_labels else None
    if progress is not None:
        progress(len(conditions), len(conditions))
    return SyntheticCohort(rng.random(shape, dtype=np.float32), masks, tuple(map(dict, conditions)), space)


def fake_render(certificate: Mapping[str, Any], folder: Path) -> None:
    (folder / "certificate.html").write_text(f"<title>{certificate['title']}</title>")
    (folder / "certificate.pdf").write_bytes(b"%PDF-1.7 " + str(certificate["claim"]["epsilon"]).encode())


def fake_render_audit(audit: Mapping[str, Any], folder: Path) -> None:
    (folder / "audit.html").write_text(f"<p>{audit['decision']['verdict']}</p>")


def edit_json(path: Path, **changes: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **changes})
