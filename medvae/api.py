"""The commands as functions, with the config models as arguments. Each walks its rooms and notes itself in MLflow.

Every function returns the object that `medvae COMMAND --json` prints, and raises the errors of `medvae.errors`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvae.config import AuditConfig, IngestConfig, ReleaseConfig, TrainConfig
from medvae.errors import ConfigError, RunError
from medvae.types import Progress

if TYPE_CHECKING:
    from medvae.train.team import Team

Result = dict[str, Any]
Stage = Callable[[str], Progress | None]

CLAIM = {"unit": "patient", "neighboring": "add-remove", "accountant": "pld"}
DEFAULT_SHAPE = (64, 64)
DEFAULT_RUN = Path("run")
DEFAULT_DEMO = Path("demo")


def ingest(
    source: Path | str, out: Path, config: IngestConfig | None = None, *, progress: Progress | None = None
) -> Result:
    """Read scans of any supported layout into the cohort folder `out`; return what cohort.json holds.

    source: a folder, a file, or a PACS as dicomweb://HOST/PATH?SEARCH (medvae.vault.dicomweb).
    Raises CohortError for a source that holds no usable scan, a table that does not fit, or an `out` in use.
    """
    from medvae import tracking
    from medvae.vault.dicomweb import local_source
    from medvae.vault.ingest import ingest as read

    config = config or IngestConfig()
    with tracking.run("ingest", config.model_dump(), private=True) as track, local_source(source, out, progress) as at:
        result: Result = read(at, out, config, progress=progress)
        track.metric("patients", result["patients"])
        track.metric("images", result["images"])
    return result


def plan(
    cohort: Path | None, config: TrainConfig, *, patients: int | None = None, shape: tuple[int, ...] | None = None
) -> Result:
    """Plan a run without charging it: noise, steps, cost on this machine, warnings, bounds on attacks.

    For a cohort, or for a number of training patients with images of `shape`. Only public numbers are used.
    Raises ConfigError for a delta at or above 1/patients, or for neither a cohort nor a number of patients.
    """
    from medvae import tracking
    from medvae.dp.goal import goal_of
    from medvae.dp.tradeoff import plain_words
    from medvae.train.ladder import ladder
    from medvae.train.planning import make_plan
    from medvae.train.probe import step_cost
    from medvae.types import ImageSpace, Intensity
    from medvae.vault.store import open_cohort

    if cohort is not None and patients is None:
        store = open_cohort(cohort).reveal()
        patients, space, scans = len(store.patients("train")), store.space, len(store) / store.info["patients"]
    elif cohort is None and patients is not None:
        shape, scans = shape or DEFAULT_SHAPE, 1.0
        space = ImageSpace(shape, (1.0,) * len(shape), "OT", Intensity("percentile", 1.0, 99.0), ())
    else:
        raise ConfigError("a plan needs a cohort or a number of patients: give COHORT or --patients N, and not both")
    with tracking.run("plan", config.model_dump(), private=cohort is not None) as track:
        made = make_plan(patients, space, config)
        cost = step_cost(made, space, scans, memory_gib=config.memory_gib)
        for name in ("epsilon", "delta", "noise_multiplier", "sample_rate", "max_grad_norm", "steps"):
            track.metric(name, getattr(made.privacy, name))
    chosen = made.privacy
    return {
        "epsilon": chosen.epsilon if chosen.private else None,
        "delta": chosen.delta,
        **CLAIM,
        "asked": goal_of(config).to_json(),
        "patients": chosen.patients,
        "shape": list(space.spatial_shape),
        "sample_rate": chosen.sample_rate,
        "noise_multiplier": chosen.noise_multiplier,
        "max_grad_norm": chosen.max_grad_norm,
        "steps": chosen.steps,
        "parameters": made.parameters,
        "mechanisms": [mechanism.to_json() for mechanism in chosen.mechanisms],
        "recipe": made.recipe.model_dump(mode="json"),
        "table": ladder(chosen.patients, space, config) if chosen.private else [],
        "cost": None if cost is None else asdict(cost),
        "plain_words": plain_words(chosen.epsilon, chosen.delta, chosen.mechanisms),
        "warnings": list(made.warnings),
    }


def train(
    cohort: Path | None,
    out: Path | None,
    config: TrainConfig,
    *,
    resume: bool = False,
    budget: float | None = None,
    stage: Stage | None = None,
    public: Path | None = None,
) -> Result:
    """Train under patient-level differential privacy; return what privacy.json holds, with the run's path.

    Guarantee: the released model is (epsilon, delta)-DP for the unit patient under add/remove neighbours, as
    privacy.json states it. Without a cohort, the embedded phantoms are ingested beside `out` and trained on.
    public: a cohort that you declare public, to pretrain on; it is not protected. Raises BudgetExceeded where the
    cohort's ledger has no room for it, PrivacyError where both cohorts share a scan, and RunError for an `out` in use.

    Started by `torchrun` in several processes, the first one does all this, the others compute for it; all return
    the same.
    """
    from medvae.train.distributed import follow
    from medvae.train.joining import form_team

    out = out or DEFAULT_RUN
    with form_team(config.device) as team:
        if not team.leads:
            return {**follow(team), "run": str(out)}
        result = _lead(cohort, out, config, resume, budget, stage or _silent, team, public)
        team.conclude(result)
    return {**result, "run": str(out)}


def _lead(
    cohort: Path | None,
    out: Path,
    config: TrainConfig,
    resume: bool,
    budget: float | None,
    stage: Stage,
    team: Team,
    public: Path | None,
) -> Result:
    """Train as the first or the only process of a run."""
    from medvae import tracking
    from medvae.train.run import train as fit

    if not resume:
        _must_be_new(out)
    if cohort is None:
        cohort = _embedded_cohort(out, stage)
    if budget is not None:
        _set_budget(cohort, budget, config.dp_delta)
    with tracking.run("train", config.model_dump(), private=True) as track:

        def on_step(step: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items():
                track.metric(name, value, step)

        result: Result = fit(cohort, out, config, resume, stage("train"), on_step, team, public)
        for name in ("epsilon", "delta", "noise_multiplier", "sample_rate", "max_grad_norm", "steps"):
            if result.get(name) is not None:
                track.metric(name, result[name])
    return result


def audit(
    run: Path,
    out: Path,
    config: AuditConfig | None = None,
    *,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Result:
    """Score a finished run against real data; write the internal and the public report, return the internal one.

    The result holds private statistics: it belongs to the hospital, and only REPORT/public may leave.
    """
    from medvae import tracking
    from medvae.audit.run import audit as score
    from medvae.gate.reports import remember
    from medvae.report.dossier import complete
    from medvae.report.render import render_report, require_pdf
    from medvae.schemas import check
    from medvae.synth.staging import staged_folder

    config = config or AuditConfig()
    _must_be_run(run)
    require_pdf()
    with tracking.run("audit", config.model_dump(), private=True) as track:
        with staged_folder(out) as folder:
            score(run, folder, config, progress=progress, note=note)
            for side in ("internal", "public"):
                whole = complete(_read(folder / side / "audit.json"), run)
                check("audit", whole)
                _write(folder / side / "audit.json", whole)
                render_report(whole, folder / side)
            result: Result = _read(folder / "internal" / "audit.json")
        remember(run, out)
        track.findings(result["findings"])
        track.artifact(out / "internal")  # figures included; this experiment is the team's own
    return result


def release(
    run: Path,
    out: Path,
    config: ReleaseConfig | None = None,
    *,
    report: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Pass the gate and write a release folder; return a summary. Without a report, the run's latest audit is taken.

    Everything in the folder is post-processing of a differentially private model. Raises NotReleasable where a
    check of the gate fails.
    """
    from medvae import tracking
    from medvae.gate.release import release as write
    from medvae.gate.reports import latest
    from medvae.report.render import render_certificate, render_report, require_pdf

    config = config or ReleaseConfig()
    _must_be_run(run)
    require_pdf()
    with tracking.run("release", config.model_dump(), private=False) as track:
        result: Result = write(
            run,
            out,
            config,
            report=report or latest(run),
            render=render_certificate,
            render_audit=render_report,
            progress=progress,
        )
        track.metric("scans", config.count)
        track.artifact(out / "privacy")
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
    """Return what was spent on a cohort, by which run, and what is left; sets the budget where one is given.

    Epsilons are PLD totals at `delta` for the unit patient under add/remove neighbours; a run that crashed counts.
    """
    from medvae import tracking
    from medvae.dp.accounting import pld_epsilon
    from medvae.dp.delta import default_delta
    from medvae.dp.ledger_place import open_ledger
    from medvae.dp.tradeoff import in_short

    fallback = default_delta(_training_patients(cohort))
    with tracking.run("ledger", {"budget": budget}, private=True) as track:
        if budget is not None:
            _set_budget(cohort, budget, delta)
        book = open_ledger(cohort)
        limit = book.budget()
        delta = delta or (limit.delta if limit else fallback)
        events = book.events()
        ended = {event.run_id for event in events if event.kind == "commit"}
        runs = [
            {
                "run_id": event.run_id,
                "utc": event.utc,
                "epsilon": (cost := pld_epsilon(event.mechanisms, delta) if event.private else None),
                "words": in_short(cost, event.mechanisms),
                "ended": event.run_id in ended,
                "note": event.note,
            }
            for event in events
            if event.kind == "reserve"
        ]
        spent = book.spent(delta)
        charged = [m for event in events if event.kind == "reserve" and event.private for m in event.mechanisms]
        track.metric("spent", spent)
    return {
        "spent": spent,
        "budget": limit.epsilon if limit else None,
        "remaining": book.remaining(),
        "delta": delta,
        **CLAIM,
        "words": in_short(spent, charged),
        "runs": runs,
    }


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

    out = out.resolve()
    scans, cohort = out.with_name(f"{out.name}-phantoms"), out.with_name(f"{out.name}-cohort")
    if not cohort.exists():
        if not scans.exists():
            write_scans(scans, stage("scans"))
        ingest(scans, cohort, ingest_config(scans / "table.csv"), progress=stage("ingest"))
    return cohort


def _silent(title: str) -> None:
    return None


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _must_be_new(out: Path) -> None:
    """Refuse an output folder in use before any work is done."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError("the output folder is not empty: choose a new one with -o")


def _must_be_run(run: Path) -> None:
    if not (run / "privacy.json").is_file():
        raise RunError("this folder is no finished run: train with `medvae train COHORT -o RUN`, or give it --resume")


def _training_patients(cohort: Path) -> int:
    """Count the patients that training would use. Raises CohortError where the folder is no cohort."""
    from medvae.vault.store import open_cohort

    return len(open_cohort(cohort).reveal().patients("train"))


def _set_budget(cohort: Path, budget: float, delta: float | None) -> None:
    """Set a budget at a delta that keeps to the rule for this cohort: at a large delta a budget is no limit."""
    from medvae.dp.delta import check_delta, default_delta
    from medvae.dp.ledger_place import open_ledger

    patients = _training_patients(cohort)
    delta = delta or default_delta(patients)
    check_delta(delta, patients)
    open_ledger(cohort).set_budget(budget, delta)
