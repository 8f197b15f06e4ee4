"""The DP-SGD loop: draw patients, take a private step, average the weights, leave a state to resume from.

On a crash the steps since the last checkpoint are lost and taken again with fresh draws. That costs nothing: the
plan charges `steps` releases, what is released is one trajectory of `steps` steps, and of the lost ones nothing left
the process but a line in the private log. (Whoever reads that log and stops a run for what it says makes a choice by
private data, as with choosing a seed by validation loss; the log is there for finding faults.)
"""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medvae.config import DpSgdConfig
from medvae.dp.staging import DPSGD
from medvae.errors import RunError
from medvae.nets.cvae import ConditionalVAE
from medvae.train.canary import StepCanaries
from medvae.train.checkpoint import load_checkpoint, save_checkpoint
from medvae.train.engine.memory import Need, limits, measure
from medvae.train.engine.module import checked_sampler
from medvae.train.engine.tuner import Tuner, load_choices, save_choices
from medvae.train.gradient import (
    Compute,
    FunctorchSampler,
    GradSampler,
    PlainSampler,
    StepStats,
    check_sampler,
)
from medvae.train.optimizer import PatientDPOptimizer, average_weights, inner_optimizer, rate_factor
from medvae.train.randomness import Randomness
from medvae.train.sampler import PatientSampler
from medvae.train.team import Team, TeamSampler
from medvae.types import Batch, ImageSpace, Mechanism, PrivacyPlan, Progress

STAGE = DPSGD
CHECKPOINT = "checkpoint"
LOG = "losses.jsonl"
SAME_PRESS_S = 1.0
ALONE = Team()
OnStep = Callable[[int, Mapping[str, float]], None]


def train_dpsgd(
    model: nn.Module,
    sampler: PatientSampler,
    plan: PrivacyPlan,
    config: DpSgdConfig,
    latent_dim: int,
    *,
    randomness: Randomness,
    folder: Path,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
    team: Team = ALONE,
    canaries: StepCanaries | None = None,
    memory_gib: float | None = None,
    stage: str = STAGE,
) -> None:
    """Train `model` in place for `plan.steps` steps; it ends with the averaged weights.

    Guarantee: `plan.steps` Poisson-sampled Gaussian mechanisms at `plan.sample_rate` with `plan.noise_multiplier`,
    unit patient, add/remove. Without noise in the plan nothing is clipped either: a run for comparison.

    stage: what the plan calls these steps; each stage has draws, checkpoints and a log of its own.
    folder: the run's private folder, for checkpoints and the log. on_step sees private statistics. Resumes where a
    checkpoint is found, whatever number of processes wrote it. Ctrl-C (and SIGTERM) writes one, then raises
    KeyboardInterrupt. Raises RunError for a checkpoint of another plan, or a broken one, or for a process of the
    team that was lost; ConfigError for a model that cannot be trained by patient. Called on the team's leader; the
    others run `medvae.train.distributed.follow`.
    """
    # A repeatable run repeats its arithmetic too, which timed choices would not.
    tuner = Tuner(load_choices(folder), fixed=None if randomness.releasable else "loop")
    walks = None if canaries is None else canaries.walks
    if walks is not None:
        walks.begin(model, config)
    engine = make_engine(model, plan, latent_dim, sampler.store.space, config, tuner, memory_gib)
    if team.size > 1:
        engine = TeamSampler(engine, team)
    joined: GradSampler = engine
    if canaries is not None:
        sampler, joined = canaries.join_sampler(sampler), canaries.join_engine(engine, config.grad_sampler, tuner)
    optimizer = PatientDPOptimizer(
        inner_optimizer(joined.parameters, _learning_rate(config)),
        joined,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
        expected_patients=sampler.expected_patients,
    )
    average = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    start = _restore(folder, model, average, optimizer, plan, canaries, stage)
    journal = folder / _named(LOG, stage)
    _keep_log_before(journal, start)
    set_progress(model, start / plan.steps)
    team.share_weights([*model.state_dict().values(), *progress_of(model)])

    with deferred_interrupt() as interrupted, journal.open("a", encoding="utf-8") as log:
        for step in range(start, plan.steps):
            if canaries is not None and walks is not None and walks.due(step):
                canaries.keep([])
                walks.walk(step, model, sampler, optimizer, team, randomness, latent_dim)
                team.share_weights([*engine.parameters, *progress_of(model)])
            source = randomness.source(stage, step)
            drawn = sampler.draw_patients(source)
            if canaries is not None:
                drawn = canaries.keep(drawn)
            latent = torch.randn(sum(map(len, drawn)), latent_dim, generator=randomness.latent(stage, step))
            rows, latent = team.deal(drawn, latent)
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(config) * rate_factor(step, plan.steps)

            stats = optimizer.step_on(sampler.load(rows), latent, source)
            if canaries is not None:
                canaries.observe(sampler.expected_patients)
            set_progress(model, (step + 1) / plan.steps)
            team.share_weights([*engine.parameters, *progress_of(model)])
            average_weights(average, model, step, config.average_decay)

            line = _summary(stats.reveal())
            log.write(_json_line({"step": step, **line}))
            log.flush()
            if on_step is not None:
                on_step(step, line)
            if progress is not None:
                progress(step + 1, plan.steps)

            stop = interrupted()
            if stop or (step + 1) % config.checkpoint_every == 0 or step + 1 == plan.steps:
                _save(folder, model, average, optimizer, plan, step + 1, canaries, stage)
                save_choices(folder, tuner.choices)
            if stop:
                raise KeyboardInterrupt

    team.stop()
    _set_weights(model, average)


def progress_of(model: nn.Module) -> list[Tensor]:
    """Return the number, as a list, by which a model knows how much of training is done; other models have none."""
    return [b for name, b in model.named_buffers() if name == "progress"]


def set_progress(model: nn.Module, share: float) -> None:
    """Tell a model how much of its steps is done: the same for every scan, and public."""
    for number in progress_of(model):
        number.fill_(share)


def make_engine(
    model: nn.Module,
    plan: PrivacyPlan,
    latent_dim: int,
    space: ImageSpace,
    config: DpSgdConfig,
    tuner: Tuner | None = None,
    memory_gib: float | None = None,
) -> GradSampler:
    """Return the gradient engine for a model, checked on made-up scans against plain autograd.

    memory_gib: what the process may take; it decides how a batch is split. Raises ConfigError where one patient does
    not fit into it.
    """
    batch, latent = made_up_scans(space, latent_dim)
    split = limits(_need(model, batch, latent, config), memory_gib, config.scans_per_patient, _device(model))
    compute = Compute(config.precision == "bf16", config.channels_last)
    if not plan.private:
        return PlainSampler(model, max_scans=split.scans, compute=compute)
    # Layers that start at zero hide others from the check, so it runs on a copy moved off its start.
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    if config.grad_sampler == "bookkeeping":
        return checked_sampler(
            model,
            moved,
            batch,
            latent,
            max_grad_norm=plan.max_grad_norm,
            limits=split,
            tuner=tuner or Tuner(),
            compute=compute,
        )
    probe = FunctorchSampler(copy.deepcopy(moved), max_grad_norm=plan.max_grad_norm, max_scans=split.scans)
    check_sampler(probe, moved, batch, latent)
    return FunctorchSampler(model, max_grad_norm=plan.max_grad_norm, max_scans=split.scans)


def require_memory(
    model: ConditionalVAE, space: ImageSpace, config: DpSgdConfig, memory_gib: float | None, device: torch.device
) -> None:
    """Raise ConfigError where one patient of a run does not fit into `memory_gib`: before anything is charged."""
    if memory_gib is not None:
        need = _need(model, *made_up_scans(space, model.latent_dim), config)
        limits(need, memory_gib, config.scans_per_patient, device)


def _need(model: nn.Module, batch: Batch, latent: Tensor, config: DpSgdConfig) -> Need:
    need = measure(model, batch, latent)
    if config.grad_sampler == "functorch":
        return Need(need.scan + 2 * need.gradient, need.gradient, need.state)  # gradients a scan, twice
    return need


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def made_up_scans(space: ImageSpace, latent_dim: int) -> tuple[Batch, Tensor]:
    """Return three random scans of two patients, made of nothing private, and their latent draws."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3, space.channels, *space.spatial_shape, generator=generator)
    condition = 2 * torch.rand(3, space.condition_width, generator=generator) - 1
    patient = torch.tensor([0, 0, 1])
    return Batch(x.numpy(), condition.numpy(), patient.numpy()), torch.randn(3, latent_dim, generator=generator)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM wait for the step in progress: yields whether one came. A second one does not wait.

    A launcher may pass on the Ctrl-C that the terminal sent already, so two within a second are one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: float | None = None

    def handler(_signal: int, _frame: object) -> None:
        nonlocal asked
        if asked is not None and time.monotonic() > asked + SAME_PRESS_S:
            raise KeyboardInterrupt
        asked = time.monotonic() if asked is None else asked

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked is not None
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _learning_rate(config: DpSgdConfig) -> float:
    if config.learning_rate is None:
        raise RunError("the learning rate is not chosen yet: resolve the recipe first")
    return config.learning_rate


def _summary(stats: StepStats) -> dict[str, float]:
    norm = float(stats.norms.median()) if len(stats.norms) else math.nan
    return {
        "loss": stats.loss,
        "patients": float(len(stats.norms)),
        "scans": float(stats.scans),
        "clipped": stats.clipped,
        "median_norm": norm,
    }


def _json_line(values: Mapping[str, float]) -> str:
    return json.dumps({k: v if math.isfinite(v) else None for k, v in values.items()}) + "\n"


def _named(name: str, stage: str) -> str:
    """Return a file's name for a stage; the model's own training has the plain one."""
    return name if stage == STAGE else name.replace(".", f"_{stage}.") if "." in name else f"{name}_{stage}"


def _facts(plan: PrivacyPlan, step: int, stage: str) -> dict[str, Any]:
    """Return what the checkpoint says of itself: how far it is, and what was spent at most to get there."""
    names = [m.name for m in plan.mechanisms]
    spent = list(plan.mechanisms[: names.index(stage) if stage in names else None])
    if step:
        spent.append(Mechanism(stage, plan.noise_multiplier, plan.sample_rate, step))
    return {
        "schema": "medvae.checkpoint/1",
        "step": step,
        "steps": plan.steps,
        "noise_multiplier": plan.noise_multiplier,
        "max_grad_norm": plan.max_grad_norm,
        "sample_rate": plan.sample_rate,
        "patients": plan.patients,
        "spent": [m.to_json() for m in spent],
    }


def _save(
    folder: Path,
    model: nn.Module,
    average: Mapping[str, Tensor],
    optimizer: PatientDPOptimizer,
    plan: PrivacyPlan,
    step: int,
    canaries: StepCanaries | None,
    stage: str,
) -> None:
    tensors: dict[str, Tensor] = {f"weights/{n}": p for n, p in model.named_parameters() if n in average}
    tensors |= {f"average/{n}": t for n, t in average.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in moments.items()}
    if canaries is not None:
        tensors |= {f"canaries/{n}": t for n, t in canaries.state().items()}
    save_checkpoint(folder, _named(CHECKPOINT, stage), tensors, _facts(plan, step, stage))


def _restore(
    folder: Path,
    model: nn.Module,
    average: dict[str, Tensor],
    optimizer: PatientDPOptimizer,
    plan: PrivacyPlan,
    canaries: StepCanaries | None,
    stage: str,
) -> int:
    """Load the checkpoint, where there is one, into all of these and return the next step."""
    found = load_checkpoint(folder, _named(CHECKPOINT, stage))
    if found is None:
        return 0
    tensors, facts = found
    step = int(facts.get("step", -1))
    if not 0 <= step <= plan.steps or facts != {**facts, **_facts(plan, step, stage)}:
        raise RunError("the checkpoint is of another plan: resume with the settings of the first start")
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "average": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = tensor
    if groups["weights"].keys() != average.keys() or groups["average"].keys() != average.keys():
        raise RunError("the checkpoint does not fit the model: resume with the settings of the first start")
    _set_weights(model, groups["weights"])
    for name, tensor in groups["average"].items():
        average[name].copy_(tensor)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in groups["optimizer"].items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = tensor
    if canaries is not None:
        canaries.restore(groups.get("canaries", {}))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def _set_weights(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])


def _keep_log_before(path: Path, step: int) -> None:
    """Drop log lines of steps that a crash undid, and a last line it tore."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
