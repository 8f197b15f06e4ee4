"""The private stages after DP-SGD of the model. Each has mechanisms of its own.

    robust                                DP-SGD of the model on scans that an attacker has perturbed
    prior_clusters_1 ..., prior_mixture   kind gaussian or mixture: noisy moments of the clipped codes by class, as
                                          train/mixture.py takes them of coefficients
    prior_flow                            kind flow: DP-SGD on the clipped codes
    teacher                               DP-SGD of a classifier on the scans

Codes are a function of a patient's scans and of weights that are already private, so a release of their sum has
sensitivity 1 like any other: clipped to norm 1 and averaged over a patient's scans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from medvae.config import Recipe
from medvae.dp.staging import FLOW, ROBUST, TEACHER, SampledStage
from medvae.errors import ConfigError
from medvae.nets.build import build_model, build_teacher
from medvae.nets.codes import CodeMixture, clip_codes
from medvae.nets.cvae import ConditionalVAE
from medvae.nets.robust import Smoothed, attack
from medvae.nets.teacher import Teacher, classes_of
from medvae.train.canary import RunCanaries
from medvae.train.checkpoint import load_checkpoint, save_checkpoint
from medvae.train.loop import train_dpsgd
from medvae.train.mixture import Grouped, fit_mixture, release_names
from medvae.train.noisy_sums import Pass, ScanSource, noisy_sum
from medvae.train.randomness import Randomness
from medvae.train.sampler import PatientSampler, Scans
from medvae.types import Batch, FloatArray, ImageSpace

if TYPE_CHECKING:
    from medvae.train.planning import TrainPlan

PRIOR = "prior"
# Part of a prior's share that looks for the centres of a mixture; the rest is its counts, means and second moments.
CLUSTER_SHARE = 0.15
# Expected patients of a step: an eighth of all, between these, and at most half, as for the model.
FEWEST, MOST = 16.0, 512.0

# Scans that are attacked together.
ATTACKED_AT_ONCE = 64

Ints = npt.NDArray[np.int64]


def prior_shares(recipe: Recipe) -> list[tuple[str, float]]:
    """Return (release name, share of the whole budget) of a prior that is fitted by moments, or nothing."""
    if recipe.prior.kind not in ("gaussian", "mixture"):
        return []
    *clusters, last = prior_releases(recipe)
    looking = CLUSTER_SHARE * recipe.prior.share if clusters else 0.0
    return [*((name, looking / len(clusters)) for name in clusters), (last, recipe.prior.share - looking)]


def prior_releases(recipe: Recipe) -> list[str]:
    """Return the names of the releases of a prior that is fitted by moments, in order."""
    components = 1 if recipe.prior.kind == "gaussian" else recipe.prior.components
    return [f"{PRIOR}_{name}" for name in release_names(components, recipe.prior.lloyd_steps)]


def trained_stages(recipe: Recipe, patients: int) -> list[SampledStage]:
    """Return the stages that are trained by DP-SGD beside the model, from public numbers only."""
    rate = sample_rate(patients)
    found = []
    if recipe.robust.enabled:
        found.append(SampledStage(ROBUST, recipe.robust.share, rate, recipe.robust.steps))
    if recipe.prior.kind == "flow":
        found.append(SampledStage(FLOW, recipe.prior.share, rate, recipe.prior.steps))
    if recipe.teacher.enabled:
        found.append(SampledStage(TEACHER, recipe.teacher.share, rate, recipe.teacher.steps))
    return found


def sample_rate(patients: int) -> float:
    """Return the share of patients that a step of such a stage draws."""
    expected = min(patients * 0.5, max(FEWEST, min(MOST, patients / 8)))
    return round(min(1.0, expected / patients), 6)


def check_stages(recipe: Recipe, space: ImageSpace) -> None:
    """Raise ConfigError for a stage that this image space has no use for: before anything is charged."""
    if recipe.teacher.enabled and not classes_of(space.conditions):
        raise ConfigError("a teacher tells classes and the cohort has none: ingest with --condition, or switch it off")


@dataclass(frozen=True)
class Stage:
    """What a stage works with: the training patients' scans, and the run's randomness, canaries and private folder."""

    scans: ScanSource
    patients: Ints
    randomness: Randomness
    canaries: RunCanaries | None
    folder: Path


@dataclass(frozen=True)
class CodeSource:
    """The clipped codes of the training patients in place of their scans, in memory only: x is (B, 1, d)."""

    space: ImageSpace
    x: FloatArray
    condition: FloatArray
    patient: Ints

    def rows(self, patients: Ints) -> Ints:
        """Return the rows of these patients, patient after patient."""
        starts = np.searchsorted(self.patient, patients)
        ends = np.searchsorted(self.patient, patients, side="right")
        parts = [np.arange(a, b) for a, b in zip(starts, ends, strict=True)]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)

    def load(self, rows: Ints) -> Batch:
        """Return the codes of these rows."""
        return Batch(self.x[rows], self.condition[rows], self.patient[rows])


def encode_patients(model: ConditionalVAE, source: ScanSource, patients: Ints) -> CodeSource:
    """Return the codes of all scans of these patients: posterior means around the prior mean, clipped to norm 1."""
    codes, conditions, owners = [], [], []
    with torch.no_grad():
        for batch in Pass(source, patients):
            condition = torch.from_numpy(batch.condition)
            mean, _ = model.encode(torch.from_numpy(batch.x), condition)
            codes.append(clip_codes(mean - model.prior_mean(condition)).numpy()[:, None])
            conditions.append(batch.condition)
            owners.append(batch.patient)
    space = replace(source.space, spatial_shape=(model.latent_dim,), spacing_mm=(1.0,), mask_labels=())
    return CodeSource(space, np.concatenate(codes), np.concatenate(conditions), np.concatenate(owners))


@dataclass(frozen=True)
class PerturbedSource:
    """Scans beside what an attacker on the model makes of them: x is (B, 2 C, *spatial), the clean channels first.

    `live` is the model in training, whose weights are private releases at every step; `copy` is attacked in its place,
    since an engine may sit in the layers of `live`.
    """

    scans: ScanSource
    live: ConditionalVAE
    copy: ConditionalVAE
    radius: float
    steps: int

    @property
    def space(self) -> ImageSpace:
        """The cohort's image space, with twice the channels."""
        space = self.scans.space
        return replace(space, mask_labels=tuple(range(1, 2 * space.channels)))

    def rows(self, patients: Ints) -> Ints:
        """Return the rows of these patients."""
        return self.scans.rows(patients)

    def load(self, rows: Ints) -> Batch:
        """Return the scans of these rows, attacked at the weights of this moment."""
        batch = self.scans.load(rows)
        with torch.no_grad():
            for own, now in zip(self.copy.parameters(), self.live.parameters(), strict=True):
                own.copy_(now)
        parts = []
        for start in range(0, len(batch.x), ATTACKED_AT_ONCE):
            x, condition = (torch.from_numpy(a[start : start + ATTACKED_AT_ONCE]) for a in (batch.x, batch.condition))
            parts.append(attack(self.copy, x, condition, self.radius, self.steps).numpy())
        return batch._replace(x=np.concatenate([batch.x, np.concatenate(parts)], axis=1))


def robust_stage(model: ConditionalVAE, plan: TrainPlan, run: Stage) -> None:
    """Train the model on in place on perturbed scans, where the recipe asks for it.

    Guarantee: the plan's mechanism "robust", by patient, add/remove. A scan's perturbation is made of that scan and of
    weights that are private releases already, so a patient still gives one clipped gradient a step.
    """
    config = plan.recipe.robust
    if not config.enabled:
        return
    # The engine of the first training sits in the layers of `model`.
    fresh, twin = (build_model(model.space, plan.recipe) for _ in range(2))
    for own in (fresh, twin):
        own.load_state_dict(model.state_dict())
    source = PerturbedSource(run.scans, fresh, twin.requires_grad_(False), config.radius, config.attack_steps)
    net = Smoothed(fresh, config.originality)
    _train(net, source, ROBUST, config.learning_rate, model.latent_dim, plan, run)
    model.load_state_dict(fresh.state_dict())


def prior_stage(model: ConditionalVAE, plan: TrainPlan, run: Stage) -> None:
    """Fit the model's prior over codes, or take up the releases of a run that was stopped.

    Guarantee: the plan's mechanisms of the prior, by patient, add/remove, and no other look at a scan.
    """
    prior = model.code_prior
    if prior is None:
        return
    done = load_checkpoint(run.folder, PRIOR) if isinstance(prior, CodeMixture) else None
    if done is not None:
        prior.load_state_dict(done[0])
        if run.canaries is not None:
            run.canaries.releases.restore(done[1].get("canaries", {}))
        return
    codes = encode_patients(model, run.scans, run.patients)
    if isinstance(prior, CodeMixture):
        _release_moments(prior, codes, plan, run)
        return
    # In a model a flow is frozen, so that training the model leaves it alone.
    flow = prior.requires_grad_(True)
    _train(flow, codes, FLOW, plan.recipe.prior.learning_rate, flow.latent_dim, plan, run)
    flow.requires_grad_(False)


def teacher_stage(plan: TrainPlan, space: ImageSpace, seed: int, run: Stage) -> Teacher | None:
    """Return a teacher trained on the scans by DP-SGD, as the plan's stage of that name; None where it is off."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = build_teacher(space, plan.recipe)
    if teacher is not None:
        _train(teacher, run.scans, TEACHER, plan.recipe.teacher.learning_rate, 1, plan, run)
    return teacher


def _release_moments(prior: CodeMixture, codes: CodeSource, plan: TrainPlan, run: Stage) -> None:
    scans, noise = Pass(codes, run.patients), run.randomness.source(PRIOR)
    charged = [m for m in plan.privacy.mechanisms if m.name in prior_releases(plan.recipe)]
    multipliers = {m.name.removeprefix(f"{PRIOR}_"): m.noise_multiplier for m in charged}
    watched = run.canaries.releases if run.canaries else None

    def release(name: str, contribution: Callable[[Batch], Grouped]) -> npt.NDArray[np.float64]:
        released = noisy_sum(scans, contribution, multipliers[name], noise, f"{PRIOR}_{name}", watched)
        return released.reshape(prior.mixture.weights.numel(), -1)

    def clipped(batch: Batch) -> torch.Tensor:
        return torch.from_numpy(batch.x).flatten(1)

    fit_mixture(prior.mixture, clipped, 1.0, release, multipliers, plan.recipe.prior.lloyd_steps)
    facts = {"spent": [m.to_json() for m in charged], **({"canaries": watched.state()} if watched else {})}
    save_checkpoint(run.folder, PRIOR, prior.state_dict(), facts)


def _train(net: nn.Module, source: Scans, name: str, rate: float, latent_dim: int, plan: TrainPlan, run: Stage) -> None:
    (mechanism,) = [m for m in plan.privacy.mechanisms if m.name == name]
    own = replace(
        plan.privacy,
        sample_rate=mechanism.sample_rate,
        noise_multiplier=mechanism.noise_multiplier,
        steps=mechanism.count,
    )
    config = plan.recipe.dpsgd.model_copy(
        update={
            "enabled": True,
            "steps": mechanism.count,
            "sample_rate": mechanism.sample_rate,
            "learning_rate": rate,
            "max_grad_norm": own.max_grad_norm,
        }
    )
    train_dpsgd(
        net,
        PatientSampler(source, run.patients, mechanism.sample_rate, config.scans_per_patient),
        own,
        config,
        latent_dim,
        randomness=run.randomness,
        folder=run.folder,
        canaries=run.canaries.steps[name] if run.canaries else None,
        stage=name,
    )
