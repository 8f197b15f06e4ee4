"""One training run, from a cohort folder to a run folder that holds a released model and its claim.

The order is the privacy argument. The plan is fixed from public numbers; `run.json` is written with the run's id; the
ledger is charged for all of the plan; only then does a stage read a scan. Each leaves what resuming needs:

    canary_commitment.json   digest of the canaries' coins; the coins themselves are private/canaries.json
    private/run.json         the run's id: resumed, it gets the same receipt and never a second charge
    private/pretraining.json the network has been pretrained, on nothing private
    private/moments.json     the closed-form stage is done and never read from again
    private/checkpoint.json  so many steps are done; a flow and a teacher have files of their own beside it
    private/prior.json       the prior over codes is released, and never a second time
    model/, canary.json, privacy.json    finished; privacy.json is written last
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medvae.config import TrainConfig
from medvae.dp.canaries import unjudged_digest
from medvae.dp.ledger import Ledger, Receipt
from medvae.dp.ledger_place import ledger_facts, open_ledger
from medvae.dp.marks import end_note, start_note
from medvae.dp.staging import DPSGD
from medvae.errors import BudgetExceeded, ConfigError, RunError
from medvae.nets.build import TEACHER_PREFIX, build_model, make_card, state_arrays
from medvae.nets.cvae import ConditionalVAE
from medvae.nets.teacher import Teacher
from medvae.synth.store import write_release
from medvae.train.canary import RunCanaries, make_canaries
from medvae.train.checkpoint import load_checkpoint, save_checkpoint, write_json
from medvae.train.claim import SCHEMA, privacy_claim, public_cohort
from medvae.train.distributed import make_job
from medvae.train.loop import ALONE, OnStep, require_memory, train_dpsgd
from medvae.train.moments import fit_moments
from medvae.train.planning import TrainPlan, make_plan, moment_shapes
from medvae.train.pretraining import PublicCohort, open_public, pretraining_stage, with_public
from medvae.train.randomness import Randomness, make_randomness
from medvae.train.sampler import PatientSampler
from medvae.train.stages import Stage, prior_stage, robust_stage, teacher_stage
from medvae.train.team import Team
from medvae.types import ModelRelease, Progress
from medvae.vault.store import CohortStore, open_cohort

RUN_SCHEMA = "medvae.run/1"
MOMENTS = "moments"
# May differ between a start and a resume: they change how fast a run is and not what it does.
FREE_TO_CHANGE = {"threads", "device", "memory_gib"}


@dataclass(frozen=True)
class Made:
    """What a run has trained, and the public cohort that helped."""

    model: ConditionalVAE
    teacher: Teacher | None
    public: PublicCohort | None


@dataclass(frozen=True)
class RunFolder:
    """The run folder, the id the ledger knows the run by, and the keyed fingerprint of the cohort."""

    path: Path
    run_id: str
    fingerprint: str

    @property
    def private(self) -> Path:
        """Everything that must not leave."""
        return self.path / "private"


def train(
    cohort: Path,
    out: Path,
    config: TrainConfig,
    resume: bool = False,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
    team: Team = ALONE,
    public: Path | None = None,
) -> dict[str, Any]:
    """Train on a cohort and return what RUN/privacy.json holds.

    Guarantee: the model in RUN/model is (epsilon, delta)-DP as privacy.json states it, for the unit patient under
    add/remove; all that was charged to the cohort's ledger before the first scan was read. Other files of the run
    are private. public: a cohort that is declared public, to pretrain on; it is not protected. on_step sees private
    statistics. With several processes, call it on the team's leader.

    Raises RunError for an `out` in use, of another version, or (with `resume`) of other settings; ConfigError for
    settings that cannot work; BudgetExceeded, with nothing left behind, where the ledger has no room. Ctrl-C leaves
    a state that `resume` continues. PrivacyError for a public cohort that shares a scan with the private one.
    """
    config = config.model_copy(update={"recipe": with_public(config.recipe, public)})
    store: CohortStore = open_cohort(cohort).reveal()
    declared = None if public is None else open_public(public, store)
    facts = _run_facts(cohort, config, store, declared)
    if finished := _finished(out, facts, resume):
        return finished
    patients = store.patients("train")
    plan = make_plan(len(patients), store.space, config)
    device = _device(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    if plan.recipe.dpsgd.enabled:
        require_memory(build_model(store.space, plan.recipe), store.space, plan.recipe.dpsgd, config.memory_gib, device)

    ledger = open_ledger(cohort)
    with _open_run(out, facts, resume=resume) as run:
        randomness = make_randomness(config.noise_source, config.seed)
        canaries = _canaries(plan, store, run, randomness)
        receipt = _charge(ledger, run, plan, randomness, canaries)
        model = _initial_model(plan, store, config.seed)
        if plan.recipe.pretraining.source != "none":
            pretraining_stage(model, plan.recipe, declared, config.seed, run.private)
        if plan.recipe.moments.enabled:
            _moments_stage(model, plan, store, randomness, run, canaries)
        if plan.recipe.dpsgd.enabled:
            team.begin(make_job(plan, facts, config, str(device), randomness))
            _dpsgd_stage(model.to(device), plan, store, randomness, run, progress, on_step, team, canaries, config)
        rest = Stage(store, store.patients("train"), randomness, canaries, run.private)
        robust_stage(model.cpu(), plan, rest)
        prior_stage(model, plan, rest)
        teacher = teacher_stage(plan, store.space, config.seed, rest)
        made = Made(model, teacher, declared)
        return _finish(made, plan, store, randomness, ledger, run, receipt, team.size, canaries)


def _canaries(plan: TrainPlan, store: CohortStore, run: RunFolder, randomness: Randomness) -> RunCanaries | None:
    scans, source = plan.recipe.dpsgd.scans_per_patient, randomness.source("canaries")
    return make_canaries(plan.privacy, plan.recipe.canaries, store.space, scans, run.path, source)


def _charge(
    ledger: Ledger, run: RunFolder, plan: TrainPlan, randomness: Randomness, canaries: RunCanaries | None
) -> Receipt:
    """Charge the run; the ledger's note holds the digest of the canaries' coins, so they were tossed before."""
    coins = canaries.commitment.digest if canaries else None
    note = start_note(plan.recipe.name, randomness.name, plan.privacy.patients, coins)
    try:
        return ledger.reserve(run.run_id, plan.privacy.mechanisms, plan.privacy.delta, note)
    except BudgetExceeded:
        # Refused means nothing was begun.
        shutil.rmtree(run.path)
        raise


def _initial_model(plan: TrainPlan, store: CohortStore, seed: int) -> ConditionalVAE:
    """Build the untrained model; the seed fixes its random start and nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(store.space, plan.recipe)


def _moments_stage(
    model: ConditionalVAE,
    plan: TrainPlan,
    store: CohortStore,
    randomness: Randomness,
    run: RunFolder,
    canaries: RunCanaries | None,
) -> None:
    """Put the closed-form solution into the model's linear part: from the run's own file, or by releasing it once."""
    if model.linear is None:
        raise ConfigError("the moments stage is on but its shapes are not chosen yet: resolve the recipe first")
    done = load_checkpoint(run.private, MOMENTS)
    if done is not None:
        model.linear.load_state_dict(done[0])
        if canaries is not None:
            canaries.releases.restore(done[1].get("canaries", {}))
        return
    shapes = moment_shapes(plan.recipe)
    charged = [m for m in plan.privacy.mechanisms if m.name in shapes.releases]
    part = fit_moments(
        store,
        store.patients("train"),
        {m.name: m.noise_multiplier for m in charged},
        shapes,
        noise=randomness.source(MOMENTS),
        canaries=canaries.releases if canaries else None,
    )
    model.linear.load_state_dict(part.state_dict())
    facts: dict[str, Any] = {"spent": [m.to_json() for m in charged]}
    if canaries is not None:
        facts["canaries"] = canaries.releases.state()
    save_checkpoint(run.private, MOMENTS, part.state_dict(), facts)


def _dpsgd_stage(
    model: ConditionalVAE,
    plan: TrainPlan,
    store: CohortStore,
    randomness: Randomness,
    run: RunFolder,
    progress: Progress | None,
    on_step: OnStep | None,
    team: Team,
    canaries: RunCanaries | None,
    config: TrainConfig,
) -> None:
    settings = plan.recipe.dpsgd
    sampler = PatientSampler(store, store.patients("train"), plan.privacy.sample_rate, settings.scans_per_patient)
    train_dpsgd(
        model,
        sampler,
        plan.privacy,
        settings,
        model.latent_dim,
        randomness=randomness,
        folder=run.private,
        progress=progress,
        on_step=on_step,
        team=team,
        canaries=canaries.steps[DPSGD] if canaries else None,
        memory_gib=config.memory_gib,
    )


def _finish(
    made: Made,
    plan: TrainPlan,
    store: CohortStore,
    randomness: Randomness,
    ledger: Ledger,
    run: RunFolder,
    receipt: Receipt,
    processes: int,
    canaries: RunCanaries | None,
) -> dict[str, Any]:
    """Write the model, commit, then write the claim: a folder with privacy.json is a finished run."""
    card = make_card(store.space, plan.recipe)
    weights = state_arrays(made.model)
    if made.teacher is not None:
        weights |= state_arrays(made.teacher, TEACHER_PREFIX)
    written = write_release(run.path / "model", ModelRelease(weights=weights, card=card))
    binding = {"receipt_digest": receipt.digest, "weights_sha256": written["weights_sha256"]}
    seen = canaries.document(binding) if canaries is not None else None
    _commit(ledger, run.run_id, end_note(written["weights_sha256"], unjudged_digest(seen) if seen else None))
    claim = privacy_claim(plan.privacy, store.space, randomness, receipt, run.fingerprint, plan.warnings, plan.asked)
    claim["processes"] = processes
    if made.public is not None:
        claim |= public_cohort(claim, made.public.facts())
    if seen is not None:
        write_json(run.path / "canary.json", seen)
    write_json(run.path / "privacy.json", claim)
    return claim


def _commit(ledger: Ledger, run_id: str, note: str) -> None:
    """Mark the run as ended with these very weights: one charge pays for one model, however often it is resumed."""
    ledger.commit(run_id, note)
    ended = [e.note for e in ledger.events() if e.kind == "commit" and e.run_id == run_id]
    if ended != [note]:
        raise RunError(
            "this run has ended before with another model, and its charge paid for that one: start a new run"
        )


def _finished(out: Path, facts: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
    """Return the claim of a run that is done, where resuming is asked for."""
    path = out / "privacy.json"
    if not resume or not path.is_file():
        return None
    _read_run(out, facts)
    claim = _read_json(path)
    if claim.get("schema") != SCHEMA:
        raise RunError(f"the run is not of version {SCHEMA}: start a new run in another folder")
    return claim


@contextmanager
def _open_run(out: Path, facts: Mapping[str, Any], *, resume: bool) -> Iterator[RunFolder]:
    """Make or find the run folder, for this process alone."""
    if resume and not out.is_dir():
        raise RunError("there is no run to resume in this folder: leave --resume out to start one")
    if out.exists() and not out.is_dir():
        raise RunError("the output is a file: choose a new folder with -o")
    begun = out.is_dir() and any(out.iterdir())
    if begun and not resume:
        raise RunError("the output folder is not empty: choose a new one with -o, or continue its run with --resume")
    private = out / "private"
    if begun and not private.is_dir():
        raise RunError("this folder holds no run of ours: choose a new one with -o")
    private.mkdir(parents=True, exist_ok=True)
    with _alone(private):
        path = private / "run.json"
        if path.is_file():
            run_id = str(_read_run(out, facts)["run_id"])
        else:  # new, or stopped before it had an id, and so before it was charged
            run_id = secrets.token_hex(16)
            write_json(path, {**facts, "run_id": run_id})
        yield RunFolder(out, run_id, str(facts["fingerprint"]))


@contextmanager
def _alone(private: Path) -> Iterator[None]:
    """Hold the run's lock: two processes resuming one run would make two releases out of one charge."""
    with (private / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError("another process is training in this run folder: wait for it, or stop it first") from None
        yield


def _run_facts(cohort: Path, config: TrainConfig, store: CohortStore, public: PublicCohort | None) -> dict[str, Any]:
    location = Path(os.path.abspath(cohort))
    return {
        "schema": RUN_SCHEMA,
        "cohort": str(location),
        **ledger_facts(location),
        "fingerprint": store.fingerprint(),
        "config": json.loads(config.model_dump_json()),
        "public": None if public is None else public.fingerprint,
    }


def _read_run(out: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """Read private/run.json and check that it was begun with these settings on this cohort."""
    then = _read_json(out / "private" / "run.json")
    if then.get("schema") != RUN_SCHEMA:
        raise RunError(f"the run is not of version {RUN_SCHEMA}: start a new run in another folder")
    old, new = dict(then.get("config", {})), dict(now["config"])
    changed = sorted(k for k in new.keys() | old.keys() if k not in FREE_TO_CHANGE and new.get(k) != old.get(k))
    if changed:
        raise RunError(
            f"the run was begun with another {changed[0]}: resume with the settings of the first start, or start anew"
        )
    if then.get("fingerprint") != now["fingerprint"]:
        raise RunError("the run was begun on another cohort, or the cohort has changed: start a new run")
    if then.get("public") != now["public"]:
        raise RunError("the run was begun with another public cohort, or that one has changed: start a new run")
    return then


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict):
        raise RunError(f"{path.name} of this run is missing or torn: start a new run in another folder")
    return data


def _device(config: TrainConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for but none is found: use --device cpu, see `medvae doctor`")
    use_cuda = config.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")
