"""A cohort and a model so small that a whole private training, canaries included, takes a fraction of a second."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from medvae.config import DpSgdConfig
from medvae.dp import onerun
from medvae.dp.accounting import calibrate_noise, pld_epsilon
from medvae.dp.canaries import ACCUSATION_LEVEL, CONFORMANCE_LEVEL
from medvae.dp.conformance import ANSWERS, Watch, answers
from medvae.dp.tradeoff import miss_bound
from medvae.dp.walks import WALK_ANSWERS, WalkWatch, walk_answers
from medvae.errors import MedvaeError
from medvae.train import loop, moment_shapes, moments
from medvae.train.canary import ReleaseCanaries, StepCanaries
from medvae.train.patterns import ReleaseWalks, StepWalks, make_patterns, walk_steps
from medvae.train.randomness import make_randomness
from medvae.train.sampler import PatientSampler
from medvae.types import Batch, Condition, ImageSpace, Intensity, Mechanism, PrivacyPlan

EPSILON, DELTA, RATE, STEPS, SCANS = 8.0, 1e-5, 0.1, 30, 4
PATIENTS, SIDE, LATENT, CLIP = 60, 6, 2, 0.5
CONDITION = Condition("side", "class", ("a", "b"))
SPACE = ImageSpace((SIDE, SIDE), (1.0, 1.0), "MR", Intensity("percentile", 1, 99), (CONDITION,))
SHAPES = moment_shapes.MomentShapes(basis=(3, 3), coarse=(2, 2), latent_dim=2, spectrum_weight=0.5)


class Net(nn.Module):
    """A loss a scan, through a convolution, a norm and a linear layer."""

    def __init__(self, norm: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.GroupNorm(2, 4) if norm is None else norm(4)
        self.linear = nn.Linear(4 * (SIDE - 2) ** 2, 3)

    def forward(self, x: Tensor, condition: Tensor, latent: Tensor) -> Tensor:
        return (self.linear(self.norm(self.conv(x)).tanh().flatten(1)) + latent.sum(1, keepdim=True)).square().sum(1)


class Scans:
    """Patients with 1 to 5 random scans of two classes."""

    space = SPACE

    def __init__(self, patients: int = PATIENTS, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.patient = np.repeat(np.arange(patients), 1 + np.arange(patients) % 5)
        self.x = rng.random((len(self.patient), 1, SIDE, SIDE)).astype(np.float32)
        self.condition = np.stack([CONDITION.encode("ab"[p % 2]) for p in self.patient]).astype(np.float32)

    def rows(self, patients: np.ndarray) -> np.ndarray:
        return np.flatnonzero(np.isin(self.patient, patients))

    def load(self, rows: np.ndarray) -> Batch:
        return Batch(self.x[rows], self.condition[rows], self.patient[rows])


@dataclass(frozen=True)
class Outcome:
    """What the checks said of one run: accused by scores, failing answers, or the refusal to run.

    failing: of conformance on the canaries' coordinates; walked: of patterned patients on the model's own path.
    """

    accused: bool = False
    failing: tuple[str, ...] = ()
    walked: tuple[str, ...] = ()
    refused: str = ""

    @property
    def found(self) -> bool:
        return self.accused or bool(self.failing) or bool(self.walked) or bool(self.refused)


@cache
def claim(rate: float = RATE, steps: int = STEPS) -> Mechanism:
    """DP-SGD with all of epsilon."""
    noise = calibrate_noise(lambda z: [Mechanism("dpsgd", z, rate, steps)], EPSILON, DELTA)
    return Mechanism("dpsgd", noise, rate, steps)


@cache
def release_claim() -> tuple[Mechanism, ...]:
    """The five releases of the closed form with all of epsilon between them."""
    noise = calibrate_noise(lambda z: [Mechanism(n, z) for n in moment_shapes.RELEASES], EPSILON, DELTA)
    return tuple(Mechanism(n, noise) for n in moment_shapes.RELEASES)


def outcome(watches: Sequence[Watch], walks: Sequence[WalkWatch] = ()) -> Outcome:
    """Judge what was seen as `medvae.dp.canaries.judge` does, without the estimates, which take longer."""
    coins, mechanisms = watches[0].coins, [w.mechanism for w in watches]
    scores = np.clip(np.sum([w.scores for w in watches], axis=0), -1e12, 1e12)
    threshold, tested, tossed = onerun.calibrated(scores, coins)
    rows = onerun.accusation(tested, tossed, [threshold], ACCUSATION_LEVEL, lambda a: miss_bound(mechanisms, a))
    each, included = CONFORMANCE_LEVEL / ((ANSWERS + WALK_ANSWERS) * len(watches)), int(coins.sum())
    found = [a for w in watches for a in answers(w.record(), w.mechanism, included, len(coins) - included, each)]
    due = {m.name: len(walk_steps(m.count)) for m in mechanisms}
    walked = [a for w in walks for a in walk_answers(w.record(), w.mechanism, due[w.mechanism.name], each)]
    failing = [tuple(a.name for a in answered if not a.ok) for answered in (found, walked)]
    return Outcome(any(r.accuses for r in rows), *failing)


def plan() -> PrivacyPlan:
    mechanism = claim()
    epsilon = pld_epsilon([mechanism], DELTA)
    noise, rate, steps = mechanism.noise_multiplier, mechanism.sample_rate, mechanism.count
    return PrivacyPlan(epsilon, DELTA, PATIENTS, rate, noise, CLIP, steps, (mechanism,))


def toss(count: int) -> np.ndarray:
    return np.random.default_rng().random(count) < 0.5


def patterns():
    return make_patterns(SPACE, 8, SCANS)


def train_dpsgd(count: int = 1000, norm: type[nn.Module] | None = None, source: str = "os_entropy") -> Outcome:
    """Train for real, by the loop as it ships (or as a test has patched it), and judge the canaries."""
    canaries = StepCanaries(toss(count), claim(), CLIP, SCANS, StepWalks(patterns(), claim(), CLIP))
    sampler = PatientSampler(Scans(), np.arange(PATIENTS), RATE, SCANS)
    config = DpSgdConfig(enabled=True, steps=STEPS, sample_rate=RATE, learning_rate=1e-3, checkpoint_every=STEPS)
    with tempfile.TemporaryDirectory() as folder:
        try:
            loop.train_dpsgd(
                Net(norm),
                sampler,
                plan(),
                config,
                LATENT,
                randomness=make_randomness(source, 0),
                folder=Path(folder),
                canaries=canaries,
            )
        except MedvaeError as error:
            return Outcome(refused=str(error))
    return outcome([canaries.watch], [canaries.walks.watch])


def train_moments(count: int = 1000) -> Outcome:
    """Release the five sums of the closed form for real and judge the canaries."""
    randomness = make_randomness("os_entropy", 0)
    source = randomness.source("moments")
    walks = ReleaseWalks(patterns(), release_claim(), randomness.source("patterns"))
    canaries = ReleaseCanaries(toss(count), release_claim(), SCANS, walks)
    noise = {m.name: m.noise_multiplier for m in release_claim()}
    moments.fit_moments(Scans(), np.arange(PATIENTS), noise, SHAPES, noise=source, canaries=canaries)
    return outcome(list(canaries.watches.values()), list(walks.watches.values()))


def fresh_net() -> Net:
    torch.manual_seed(0)
    return Net()
