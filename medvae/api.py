"""The commands as functions, with the config models as arguments. Each walks its rooms and notes itself in MLflow.

Every function returns the object that `medvae COMMAND --json` prints, and raises the errors of `medvae.errors`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medvae.config import AuditConfig, Frozen, IngestConfig, ReleaseConfig, TrainConfig
from medvae.errors import CohortError, RunError
from medvae.types import Progress

Result = dict[str, Any]
Stage = Callable[[str], Progress | None]

DEFAULT_RUN = Path("run")
DEFAULT_DEMO = Path("demo")


def ingest(source: Path, out: Path, config: IngestConfig | None = None, *, progress: Progress | None = None) -> Result:
    """Read scans of any supported layout into the cohort folder `out`; return what cohort.json holds.

    Raises CohortError for a source that holds no usable scan, a table that does not fit, or an `out` in use.
    """
    from medvae import tracking
    from medvae.vault.ingest import ingest as read

    config = config or IngestConfig()
    with tracking.run("ingest", _params(config), private=True) as track:
        result: Result = read(source, out, config, progress=progress)
        track.metric("patients", result["patients"])
        track.metric("images", result["images"])
    return result


def train(
    cohort: Path | None,
    out: Path | None,
    config: TrainConfig,
    *,
    resume: bool = False,
    budget: float | None = None,
    stage: Stage | None = None,
) -> Result:
    """Train under patient-level differential privacy; return what privacy.json holds, with the run's path.

    Guarantee: the released model is (epsilon, delta)-DP for the unit patient under add/remove neighbours, as
    privacy.json states it. Without a cohort, the embedded phantoms are ingested beside `out` and trained on.
    Raises BudgetExceeded where the cohort's ledger has no room for it, and RunError for an `out` in use.
    """
    from medvae import tracking
    from medvae.train.run import train as fit

    stage = stage or _silent
    out = out or DEFAULT_RUN
    if not resume:
        _must_be_new(out)
    if cohort is None:
        cohort = _embedded_cohort(out, stage)
    _must_be_cohort(cohort)
    if budget is not None:
        _ledger_of(cohort).set_budget(budget)
    with tracking.run("train", _params(config), private=True) as track:
        result: Result = fit(cohort, out, config, resume, stage("train"))
        for name in ("epsilon", "delta", "noise_multiplier", "sample_rate", "max_grad_norm", "steps"):
            if result.get(name) is not None:
                track.metric(name, result[name])
    return {**result, "run": str(out)}


def audit(run: Path, out: Path, config: AuditConfig | None = None, *, progress: Progress | None = None) -> Result:
    """Score a finished run against real data; write the internal and the public report, return the internal one.

    The result holds private statistics: it belongs to the hospital, and only REPORT/public may leave.
    """
    from medvae import tracking
    from medvae.audit.run import audit as score
    from medvae.report.render import render_report
    from medvae.synth.staging import staged_folder

    config = config or AuditConfig()
    _must_be_run(run)
    with tracking.run("audit", _params(config), private=True) as track:
        with staged_folder(out) as folder:
            result: Result = score(run, folder, config, progress=progress)
            for side in ("internal", "public"):
                render_report(_read(folder / side / "audit.json"), folder / side)
        track.findings(result["findings"])
    return result


def release(
    run: Path,
    out: Path,
    config: ReleaseConfig | None = None,
    *,
    report: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Pass the gate and write a release folder; return a summary.

    Everything in the folder is post-processing of a differentially private model. Raises NotReleasable where a
    check of the gate fails.
    """
    from medvae import tracking
    from medvae.gate.release import release as write
    from medvae.report.render import render_certificate

    config = config or ReleaseConfig()
    _must_be_run(run)
    with tracking.run("release", _params(config), private=False) as track:
        result: Result = write(run, out, config, report=report, render=render_certificate, progress=progress)
        track.metric("scans", config.count)
        track.register(run / "model")
    return result


def verify(release: Path, *, public_key: Path | None = None) -> Result:
    """Check a release with no private data: hashes, signature, and epsilon by two accountants.

    Raises VerificationFailed, which names the first check that failed.
    """
    from medvae import tracking
    from medvae.gate.verify import verify as check

    with tracking.run("verify", {}, private=False) as track:
        result: Result = check(release, public_key=public_key)
        track.metric("checks", len(result["checks"]))
    return result


def ledger(cohort: Path, *, budget: float | None = None, delta: float | None = None) -> Result:
    """Return what was spent on a cohort, by which run, and its budget; sets the budget where one is given."""
    from medvae import tracking
    from medvae.dp.delta import default_delta

    info = _must_be_cohort(cohort)
    book = _ledger_of(cohort)
    with tracking.run("ledger", {"budget": budget}, private=True) as track:
        if budget is not None:
            book.set_budget(budget)
        delta = delta or default_delta(info["patients"])
        spent = book.spent(delta)
        track.metric("spent", spent)
    return {"spent": spent, "delta": delta, "budget": book.budget(), "events": book.events()}


def doctor() -> Result:
    """Return versions, devices, optional parts found and problems of this machine."""
    from medvae.doctor import check

    return check()


def demo(out: Path | None = None, *, stage: Stage | None = None) -> Result:
    """Walk the whole way on embedded phantoms, in one new folder; return where the report and the release are."""
    from medvae.demo import audit_config, ingest_config, release_config, train_config, write_scans

    stage = stage or _silent
    out = out or DEFAULT_DEMO
    _must_be_new(out)
    labels = write_scans(out / "scans", stage("scans"))
    ingest(out / "scans", out / "cohort", ingest_config(labels), progress=stage("ingest"))
    privacy = train(out / "cohort", out / "run", train_config(), stage=stage)
    report = audit(out / "run", out / "report", audit_config(), progress=stage("audit"))
    release(
        out / "run",
        out / "release",
        release_config(),
        report=out / "report",
        progress=stage("release"),
    )
    checked = verify(out / "release")
    return {
        "privacy": privacy,
        "decision": report["decision"],
        "verified": checked["ok"],
        "report": str(out / "report" / "internal" / "audit.html"),
        "release": str(out / "release"),
    }


def _embedded_cohort(out: Path, stage: Stage) -> Path:
    """Ingest the phantoms beside the run, once: a resumed run finds its cohort again."""
    from medvae.demo import ingest_config, write_scans

    scans, cohort = out.with_name(f"{out.name}-phantoms"), out.with_name(f"{out.name}-cohort")
    if not cohort.exists():
        if not scans.exists():
            write_scans(scans, stage("scans"))
        ingest(scans, cohort, ingest_config(scans / "labels.csv"), progress=stage("ingest"))
    return cohort


def _silent(title: str) -> None:
    return None


def _params(config: Frozen) -> dict[str, Any]:
    """Return a config as MLflow parameters; paths are left out, because folder names may carry identifiers."""
    return {k: v for k, v in config.model_dump().items() if not isinstance(v, Path)}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _must_be_new(out: Path) -> None:
    """Refuse an output folder in use before any work is done."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"the output folder {out.name!r} is not empty: choose a new one with -o")


def _must_be_cohort(cohort: Path) -> Any:
    """Return what cohort.json holds."""
    try:
        info = _read(cohort / "cohort.json")
    except (OSError, ValueError):
        raise CohortError("this folder is no cohort: make one with `medvae ingest SOURCE -o COHORT`") from None
    if not isinstance(info, Mapping) or info.get("schema") != "medvae.cohort/1":
        raise CohortError("this cohort is of another version: ingest the scans again with this medvae")
    return info


def _must_be_run(run: Path) -> None:
    if not (run / "privacy.json").is_file():
        raise RunError("this folder is no finished run: train with `medvae train COHORT -o RUN`, or give it --resume")


def _ledger_of(cohort: Path) -> Any:
    from medvae.dp.ledger import Ledger

    return Ledger(cohort / "ledger.db")
