"""What a planned run would cost here: steps taken on made-up scans, with nothing private in them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from medvae.dp.noise import os_noise
from medvae.nets.build import build_model
from medvae.train.engine.memory import peak_bytes
from medvae.train.gradient import PlainSampler
from medvae.train.loop import make_engine
from medvae.train.moments import fit_moments
from medvae.train.noisy_sums import CHUNK_VOXELS
from medvae.train.optimizer import PatientDPOptimizer, average_weights, inner_optimizer
from medvae.train.patterns import walk_steps
from medvae.train.planning import TrainPlan, moment_shapes
from medvae.types import Batch, ImageSpace

# Larger steps are measured on so many scans, and scaled: from here on cost is linear in the batch.
PROBE_SCANS = 256
TURNS = 3
# About the scans of a patterned canary patient.
PATTERN_SCANS = 2.5


@dataclass(frozen=True)
class Cost:
    """Measured on this machine, of the DP-SGD stage.

    step_seconds: a whole step at the expected batch; total_seconds: all steps, the engine's check, its choice of
    strategies, and the walks of patterned canaries; memory_gb: peak of the process, over the closed form too, at the
    largest batch that is to be expected.
    """

    step_seconds: float
    total_seconds: float
    memory_gb: float


def step_cost(
    plan: TrainPlan,
    space: ImageSpace,
    scans_per_patient: float = 1.0,
    *,
    memory_gib: float | None = None,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost | None:
    """Take steps as the run would, on made-up scans, and add them up; None where nothing is trained.

    scans_per_patient: the mean over the cohort. A step is draw to update, without reading the scans. Draws differ in
    size; the engine chooses its strategies anew where a draw is of another order, which is counted twice. clock: in
    which seconds.
    """
    recipe, privacy = plan.recipe, plan.privacy
    if not recipe.dpsgd.enabled or recipe.model.latent_dim is None:
        return None
    device = device or torch.device("cpu")
    if recipe.moments.enabled:
        _take_moments(plan, space)
    began = clock()
    model = build_model(space, recipe).to(device)
    engine = make_engine(model, privacy, recipe.model.latent_dim, space, recipe.dpsgd, memory_gib=memory_gib)
    checked = clock() - began
    optimizer = PatientDPOptimizer(
        inner_optimizer(engine.parameters, 0.0),
        engine,
        noise_multiplier=privacy.noise_multiplier,
        max_grad_norm=privacy.max_grad_norm,
        expected_patients=max(1.0, privacy.sample_rate * privacy.patients),
    )
    average = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    source = os_noise()
    mean_scans = max(1.0, min(scans_per_patient, float(recipe.dpsgd.scans_per_patient)))

    def step(patients: float) -> float:
        """Return the seconds of a step on so many patients."""
        shown = max(1, min(round(patients), int(PROBE_SCANS / mean_scans)))
        return take(made_up_batch(space, shown, mean_scans))

    def take(batch: Batch) -> float:
        latent = torch.zeros(len(batch.patient), int(recipe.model.latent_dim or 0))
        began = clock()
        source.mask(privacy.patients, privacy.sample_rate)
        optimizer.step_on(batch, latent, source)
        average_weights(average, model, 0, recipe.dpsgd.average_decay)
        return clock() - began

    expected = max(1.0, privacy.sample_rate * privacy.patients)
    first = step(_largest_draw(expected, privacy.sample_rate, privacy.steps))
    choosing = first + step(expected)
    fixed = statistics.median(step(1) for _ in range(TURNS)) if expected * mean_scans > PROBE_SCANS else 0.0
    taken = statistics.median(step(expected) for _ in range(TURNS))
    scale = max(1.0, expected * mean_scans / PROBE_SCANS)
    seconds = fixed + (taken - fixed) * scale if scale > 1 else taken
    total = checked + max(0.0, choosing - 2 * taken) + privacy.steps * seconds
    if privacy.private and recipe.canaries.patterns:
        walks = len(walk_steps(privacy.steps))
        total += walks * _walk_seconds(take, plan, space, device, clock)
    return Cost(seconds, total, peak_bytes(device) / 1e9)


def _walk_seconds(
    take: Callable[[Batch], float], plan: TrainPlan, space: ImageSpace, device: torch.device, clock: Callable[[], float]
) -> float:
    """Return the seconds of one walk of patterned canaries: a step on them, and the gradient of each by itself."""
    recipe = plan.recipe
    scans = min(PATTERN_SCANS, recipe.dpsgd.scans_per_patient)
    patterned = made_up_batch(space, recipe.canaries.patterns, scans)
    plain = PlainSampler(build_model(space, recipe).to(device), max_scans=PROBE_SCANS)
    began = clock()
    take(patterned)
    for rows in np.split(np.arange(len(patterned.patient)), np.flatnonzero(np.diff(patterned.patient)) + 1):
        one = Batch(patterned.x[rows], patterned.condition[rows], patterned.patient[rows])
        plain.clipped_sum(one, torch.zeros(len(rows), int(recipe.model.latent_dim or 0)))
    return clock() - began


@dataclass(frozen=True)
class _MadeUp:
    """Random scans, one a patient, as the closed form reads a cohort."""

    space: ImageSpace

    def rows(self, patients: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return patients

    def load(self, rows: npt.NDArray[np.int64]) -> Batch:
        return made_up_batch(self.space, len(rows), 1.0)


def _take_moments(plan: TrainPlan, space: ImageSpace) -> None:
    """Release the closed form of made-up scans: its memory, which grows with what it reads at a time and no further."""
    at_once = max(1, CHUNK_VOXELS // (space.channels * math.prod(space.spatial_shape)))
    patients = np.arange(min(plan.privacy.patients, 2 * at_once + 1), dtype=np.int64)
    noise = {m.name: m.noise_multiplier for m in plan.privacy.mechanisms}
    fit_moments(_MadeUp(space), patients, noise, moment_shapes(plan.recipe), noise=os_noise())


def made_up_batch(space: ImageSpace, patients: int, mean_scans: float) -> Batch:
    """Return random scans of so many patients, some with one scan more than others so that the mean is right."""
    scans = max(patients, round(patients * mean_scans))
    counts = np.full(patients, scans // patients) + (np.arange(patients) < scans % patients)
    rng = np.random.default_rng(0)
    x = rng.random((scans, space.channels, *space.spatial_shape), dtype=np.float32)
    condition = np.zeros((scans, space.condition_width), dtype=np.float32)
    return Batch(x, condition, np.repeat(np.arange(patients, dtype=np.int64), counts))


def _largest_draw(expected: float, rate: float, steps: int) -> float:
    """Return about the most patients that `steps` Poisson draws bring: Gumbel's bound on a maximum of Gaussians."""
    return expected + math.sqrt(2 * math.log(max(2, steps)) * expected * (1 - rate))
