"""Canaries: made-up patients that walk with the real ones, on coordinates of their own, so that a run audits itself.

Each canary has coordinates that no scan reaches. Its gradient there is far too long, spread over as many scans as a
patient may have, and passes what a patient's passes: the Poisson draw, the grouping of scans, the mean over them, the
clip, the sum over micro-batches, the noise. On the model's own coordinates it is zero, so the model is trained on the
very same sums as without canaries, and no real patient has anything on the canaries' coordinates: what is published
of them tells of no one. Half of them, by coins tossed and committed to before the ledger is charged, are left out.

For DP-SGD the coordinates are two layers, one before the model's parameters and one after, half of the squared norm
in each: a clip by layer, or noise that misses the first or the last parameter, is seen too.

Patterned patients (train/patterns.py) walk the model's own path beside them, by themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from medvae.config import CanaryConfig
from medvae.dp.canaries import Commitment, commit, document, register
from medvae.dp.conformance import Watch
from medvae.dp.noise import NoiseSource
from medvae.dp.onerun import Bools, Floats
from medvae.dp.staging import OVER_CODES, TRAINED
from medvae.errors import RunError
from medvae.train.checkpoint import write_json
from medvae.train.engine.memory import Limits
from medvae.train.engine.module import BookkeepingSampler
from medvae.train.engine.tuner import Tuner
from medvae.train.gradient import FunctorchSampler, GradSampler, StepStats
from medvae.train.mixture import Grouped
from medvae.train.patterns import STREAM, ReleaseWalks, StepWalks, joined, make_patterns, walk_steps
from medvae.train.sampler import IntArray, PatientSampler, Scans
from medvae.types import Batch, ImageSpace, Mechanism, PrivacyPlan, Private

OPENING = "canaries.json"
COMMITMENT = "canary_commitment.json"
# Canaries are numbered from here, as patients and as rows: beyond any cohort's own numbers.
FIRST = 2**40
# Norm of a canary's gradient before the clip, in units of the clip.
GRADIENT_NORM = 100.0
# Where a checkpoint keeps what walks of patterned patients showed.
WALKED = "walks/"
# Scans of canaries in one micro-batch: few, so that a step has several.
MAX_SCANS = 64


def open_commitment(folder: Path, private: Path, registration: dict[str, Any], source: NoiseSource) -> Commitment:
    """Return the run's coins: those it has committed to, or new ones, committed to before anything else happens.

    The coins and their salt go to the private folder, their digest to the run folder. Raises RunError where a run is
    resumed whose coins are lost, torn or of another plan: they cannot be tossed again.
    """
    opening, public = private / OPENING, folder / COMMITMENT
    if opening.exists() or public.exists():
        try:
            found = Commitment.from_json(json.loads(opening.read_text(encoding="utf-8")))
            whole = json.loads(public.read_text(encoding="utf-8")) == found.public() if public.exists() else True
        except (OSError, ValueError, KeyError, TypeError):
            found, whole = None, False
        if found is None or not whole or not found.holds or found.registration != registration:
            raise RunError("the canaries' coins of this run are lost or were altered: start a new run")
    else:
        found = commit(registration, source)
        write_json(opening, found.to_json())
    write_json(public, found.public())
    return found


@dataclass(frozen=True)
class RunCanaries:
    """The canaries of a run: one set of coins, watched in every mechanism that the run charges."""

    commitment: Commitment
    plan: PrivacyPlan
    releases: ReleaseCanaries
    steps: Mapping[str, StepCanaries]

    def document(self, binding: Mapping[str, str]) -> dict[str, Any]:
        """Return canary.json; the coins are opened here. binding: what the run's receipt and model are known by."""
        watches = dict(self.releases.watches)
        watches |= {name: canaries.watch for name, canaries in self.steps.items()}
        walked = dict(self.releases.walks.watches) if self.releases.walks else {}
        walked |= {name: own.walks.watch for name, own in self.steps.items() if own.walks is not None}
        mechanisms = self.plan.mechanisms
        return document(
            self.commitment,
            {name: watch.scores for name, watch in watches.items()},
            [watches[m.name].record() for m in mechanisms],
            mechanisms,
            self.plan.delta,
            binding,
            [walked[m.name].record() for m in mechanisms if m.name in walked],
        )


def make_canaries(
    plan: PrivacyPlan,
    config: CanaryConfig,
    space: ImageSpace,
    scans_per_patient: int,
    folder: Path,
    source: NoiseSource,
) -> RunCanaries | None:
    """Return a run's canaries, their coins committed to in `folder`; None where they are off or nothing is claimed.

    Call it before the ledger is charged. Raises RunError as `open_commitment`.
    """
    if not (config.enabled and plan.private):
        return None
    sampled = [m for m in plan.mechanisms if m.name in TRAINED]
    single = [m for m in plan.mechanisms if m.name not in TRAINED]
    patterns = make_patterns(space, config.patterns, scans_per_patient) if config.patterns else None
    # Patterned patients are scans: what sees codes in their place has only the canaries of its own coordinates.
    due = {m.name: len(walk_steps(m.count)) if m in sampled else 1 for m in plan.mechanisms if _sees_scans(m)}
    registration = register(config.count, plan.mechanisms, scans_per_patient, config.patterns, due)
    commitment = open_commitment(folder, folder / "private", registration, source)
    coins, clip = commitment.coins, plan.max_grad_norm
    after = ReleaseWalks(patterns, [m for m in single if _sees_scans(m)], source.fork(STREAM)) if patterns else None
    steps = {}
    for m in sampled:
        walks = StepWalks(patterns, m, clip) if patterns and _sees_scans(m) else None
        steps[m.name] = StepCanaries(coins, m, clip, scans_per_patient, walks)
    return RunCanaries(commitment, plan, ReleaseCanaries(coins, single, scans_per_patient, after), steps)


def _sees_scans(mechanism: Mechanism) -> bool:
    return not mechanism.name.startswith(OVER_CODES)


class PhantomLoss(nn.Module):
    """The canaries' loss: linear in two layers, so that a scan's gradient is its own one-hot vector, in each."""

    def __init__(self, canaries: int) -> None:
        super().__init__()
        self.first = nn.Linear(canaries, 1, bias=False)
        self.last = nn.Linear(canaries, 1, bias=False)

    def forward(self, x: Tensor, condition: Tensor, latent: Tensor) -> Tensor:
        """Return losses (B,) for made-up scans x (B, canaries)."""
        return torch.as_tensor((self.first(x) + self.last(x)).squeeze(1))


@dataclass(frozen=True)
class WithCanaries:
    """A cohort's scans with those of the canaries numbered behind them; a canary's scans need no loading."""

    store: Scans
    scans_per_patient: int

    @property
    def space(self) -> ImageSpace:
        """The cohort's image space."""
        return self.store.space

    def rows(self, patients: IntArray) -> IntArray:
        """Return the rows of all scans of these patients; canaries have as many scans as a patient may give."""
        real = patients[patients < FIRST]
        own = (patients[patients >= FIRST] - FIRST)[:, None] * self.scans_per_patient + np.arange(
            self.scans_per_patient
        )
        return np.concatenate([self.store.rows(real), FIRST + own.ravel()]) if len(real) else FIRST + own.ravel()

    def load(self, rows: IntArray) -> Batch:
        """Return the scans of patients; a canary's are made by `StepCanaries`."""
        return self.store.load(rows)


class StepCanaries:
    """The canaries of DP-SGD: their members of the sampled population, their gradients, and what comes out noised.

    Held by the process that leads. `join` puts their engine beside the model's; a step then is `keep` after the draw
    and `observe` once the gradients are noised.
    """

    def __init__(
        self,
        coins: Bools,
        mechanism: Mechanism,
        max_grad_norm: float,
        scans_per_patient: int,
        walks: StepWalks | None = None,
    ) -> None:
        self.watch, self.walks = Watch(coins, mechanism, coordinates=2), walks
        self.ids: IntArray = FIRST + np.flatnonzero(coins)
        self._clip, self._scans = max_grad_norm, scans_per_patient
        self._drawn: IntArray = np.zeros(0, dtype=np.int64)
        self._loss = PhantomLoss(len(coins))

    def join_sampler(self, sampler: PatientSampler) -> PatientSampler:
        """Return a sampler that draws the canaries beside the patients, and can load patterned ones."""
        drawing = replace(sampler, store=WithCanaries(sampler.store, self._scans), canaries=self.ids)
        return joined(drawing, self.walks.patterns if self.walks else None)

    def join_engine(self, engine: GradSampler, kind: Literal["bookkeeping", "functorch"], tuner: Tuner) -> GradSampler:
        """Return an engine for the model's parameters between the canaries', where both are clipped by one rule."""
        loss = self._loss.to(engine.parameters[0].device)
        own: GradSampler
        if kind == "bookkeeping":
            own = BookkeepingSampler(loss, max_grad_norm=self._clip, limits=Limits(MAX_SCANS), tuner=tuner)
        else:
            own = FunctorchSampler(loss, max_grad_norm=self._clip, max_scans=MAX_SCANS)
        return _Joined(engine, own, self)

    def keep(self, drawn: Sequence[IntArray]) -> list[IntArray]:
        """Take the canaries out of a draw, for this step's gradients, and return the patients."""
        rows = [r for r in drawn if len(r) and r[0] >= FIRST]
        self._drawn = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        return [r for r in drawn if not (len(r) and r[0] >= FIRST)]

    def batch(self) -> Batch:
        """Return the made-up scans of the canaries that were drawn."""
        canary = (self._drawn - FIRST) // self._scans
        x = np.zeros((len(canary), len(self.watch.coins)), dtype=np.float32)
        x[np.arange(len(canary)), canary] = GRADIENT_NORM * self._clip / 2**0.5
        return Batch(x, np.zeros((len(canary), 0), dtype=np.float32), canary)

    def observe(self, expected_patients: float) -> None:
        """Look at the noised gradients of the step just taken."""
        layers = (self._loss.first.weight, self._loss.last.weight)
        noised = torch.stack([_gradient(w).double().flatten().cpu() for w in layers])
        drawn = np.zeros(len(self.watch.coins), dtype=np.bool_)
        drawn[(self._drawn - FIRST) // self._scans] = True
        self.watch.see(noised.numpy() * (expected_patients / self._clip), drawn)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        walked = {WALKED + k: v for k, v in self.walks.watch.state().items()} if self.walks else {}
        return {k: torch.from_numpy(np.array(v)) for k, v in {**self.watch.state(), **walked}.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint; raises RunError where it holds another number of canaries, or none."""
        try:
            arrays = {k: v.numpy() for k, v in state.items()}
            self.watch.restore(arrays)
            if self.walks is not None:
                self.walks.watch.restore({k.removeprefix(WALKED): v for k, v in arrays.items() if WALKED in k})
        except (KeyError, ValueError):
            raise RunError("the checkpoint does not hold this run's canaries: start a new run") from None


class _Joined:
    """The canaries' first layer, the model's parameters and the canaries' last layer as one engine."""

    def __init__(self, patients: GradSampler, own: GradSampler, canaries: StepCanaries) -> None:
        self._patients, self._own, self._canaries = patients, own, canaries

    @property
    def parameters(self) -> list[nn.Parameter]:
        first, last = self._own.parameters
        return [first, *self._patients.parameters, last]

    def clipped_sum(self, batch: Batch, latent: Tensor) -> tuple[list[Tensor], Private[StepStats]]:
        sums, stats = self._patients.clipped_sum(batch, latent)
        made_up = self._canaries.batch()
        (first, last), _ = self._own.clipped_sum(made_up, torch.zeros(len(made_up.patient), 0))
        return [first, *sums, last], stats


class ReleaseCanaries:
    """The canaries of single releases over all patients: coordinates behind those of the vector that is released."""

    def __init__(
        self,
        coins: Bools,
        mechanisms: Sequence[Mechanism],
        scans_per_patient: int,
        walks: ReleaseWalks | None = None,
    ) -> None:
        self.watches, self.walks = {m.name: Watch(coins, m) for m in mechanisms}, walks
        self._coins, self._scans = coins, scans_per_patient

    def vectors(self) -> Iterator[tuple[Tensor, IntArray]]:
        """Yield the canaries' contributions before any clip, one a scan (B, m), and whose they are (B,)."""
        members = np.flatnonzero(self._coins)
        for start in range(0, max(1, len(members)), MAX_SCANS):
            canary = np.repeat(members[start : start + MAX_SCANS], self._scans)
            vectors = torch.zeros(len(canary), len(self._coins), dtype=torch.float64)
            vectors[torch.arange(len(canary)), torch.from_numpy(canary)] = GRADIENT_NORM
            yield vectors, canary

    def saw(self, name: str, noised: Floats) -> None:
        """Look at the noised sums (m,) of the release called `name`."""
        self.watches[name].see(noised[None], self._coins)

    def rehearse(self, name: str, contribution: Callable[[Batch], Tensor | Grouped], noise_multiplier: float) -> None:
        """Let the patterned patients walk the way of the release called `name`, by themselves."""
        if self.walks is not None:
            self.walks.walk(name, contribution, noise_multiplier)

    def state(self) -> dict[str, dict[str, Any]]:
        """Return what was seen, as JSON, to be stored with what was released."""
        seen = {n: {k: v.tolist() for k, v in watch.state().items()} for n, watch in self.watches.items()}
        return {**seen, WALKED: self.walks.state()} if self.walks is not None else seen

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from `state`; raises RunError where it is of other releases or another number of canaries."""
        try:
            for name, watch in self.watches.items():
                watch.restore(state[name])
            if self.walks is not None:
                self.walks.restore(state[WALKED])
        except (KeyError, ValueError, TypeError):
            raise RunError("the stored releases do not hold this run's canaries: start a new run") from None


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise RunError("the canaries saw no noised gradient: the step did not reach them")
    return parameter.grad
