"""Patterned canary patients: made-up scans that walk the model's own path, and the sums that must come out.

Their scans are waves made from public facts, written into a store of the cohort's own format. A walk takes them, and no
patient, through the sampler's choice of scans, the store's arrays, the grouping by patient, the model's gradient by
patient, the clip and the noise of the run's own code, over all processes of the run. It moves no weight: what comes
out is compared with sums taken one patient at a time by plain autograd on a copy of the model, from the patterns as
they were made, and then forgotten. So it costs neither privacy nor utility, and shows what coordinates of its own
cannot: a clip, a grouping, a gradient or a noise that is wrong on the model's own parameters.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from medvae.config import DpSgdConfig
from medvae.dp.noise import NoiseSource
from medvae.dp.onerun import Floats
from medvae.dp.walks import COARSE_TOLERANCE, TOLERANCE, WalkWatch
from medvae.errors import RunError
from medvae.train import noisy_sums
from medvae.train.gradient import ROUNDING_MARGIN, Compute, PlainSampler
from medvae.train.mixture import Grouped
from medvae.train.optimizer import PatientDPOptimizer
from medvae.train.randomness import Randomness
from medvae.train.sampler import IntArray, PatientSampler, Scans
from medvae.train.team import Team
from medvae.types import Batch, FloatArray, ImageSpace, Mechanism
from medvae.vault.store import LEVELS, SCHEMA, CohortStore, CohortWriter, open_cohort

# Patterned patients and their rows are numbered from here: beyond the cohort's and the canaries' own numbers.
FIRST = 2**41
# A patterned patient has no more scans than this, whatever a patient may give, and one.
MOST_SCANS = 16
# Walks of a training by DP-SGD, spread over its steps.
WALKS = 10
STREAM = "patterns"
# Latent draws of a walk over those of training: long gradients, so that the clip has something to do.
LATENT_SCALE = 3.0


@dataclass(frozen=True)
class Patterns:
    """Made-up patients. store: their scans as a cohort holds them; levels, masks (N, *spatial), condition (N, K) and
    patient (N,): as they were made."""

    store: CohortStore
    levels: npt.NDArray[np.uint16]
    masks: npt.NDArray[np.uint8]
    condition: FloatArray
    patient: IntArray

    @property
    def patients(self) -> IntArray:
        """All of them, by their numbers in the store."""
        return np.unique(self.patient)

    def truth(self, patient: int, rows: IntArray) -> Batch:
        """Return the scans of one patient that are among these rows, as they were made and once each."""
        mine = np.unique(rows[self.patient[rows] == patient])
        labels = [self.masks[mine] == label for label in self.store.space.mask_labels]
        x = np.stack([self.levels[mine] / np.float32(LEVELS), *labels], axis=1).astype(np.float32)
        return Batch(x, self.condition[mine], self.patient[mine])


@cache
def make_patterns(space: ImageSpace, count: int, scans_per_patient: int) -> Patterns:
    """Make `count` patients, the first with one scan more than a patient may give, the others with 1 to 4.

    They are the same ones in every process.
    """
    rng = np.random.default_rng([count, scans_per_patient])
    scans = np.minimum(1 + np.arange(count) % 4, scans_per_patient)
    scans[0] = min(scans_per_patient, MOST_SCANS) + 1
    owner = np.repeat(np.arange(count), scans)
    patient: IntArray = rng.permutation(owner).astype(np.int64)  # a patient's scans do not lie together
    images = np.stack([_waves(space.spatial_shape, rng) for _ in patient])
    levels = np.rint(images * np.float32(LEVELS)).astype(np.uint16)
    labels = np.asarray((0, *space.mask_labels), dtype=np.uint8)
    masks = labels[(images * len(labels)).astype(np.int64).clip(0, len(labels) - 1)]
    condition = np.stack([_condition(space, rng) for _ in patient])
    folder = Path(tempfile.mkdtemp(prefix="medvae-patterns-"))
    try:
        with CohortWriter(folder / "cohort", space.spatial_shape, bool(space.mask_labels)) as writer:
            for image, mask, number, row in zip(levels, masks, patient, condition, strict=True):
                writer.append(image / np.float32(LEVELS), mask, int(number), row)
            info = {"schema": SCHEMA, "space": space.to_json(), "images": len(patient), "patients": count}
            writer.finish(info | {"masks": bool(space.mask_labels)}, dict.fromkeys(range(count), "train"))
        store = open_cohort(folder / "cohort").reveal()  # its arrays stay open when their names are gone
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Patterns(store, levels, masks, condition, patient)


def _waves(shape: tuple[int, ...], rng: np.random.Generator) -> FloatArray:
    """Return an image (*shape) in [0, 1] of three plane waves: unlike any scan, and unlike each other."""
    places = np.meshgrid(*(np.arange(n) / n for n in shape), indexing="ij")
    image = sum(np.sin(2 * np.pi * (sum(rng.integers(-4, 5) * p for p in places) + rng.random())) for _ in range(3))
    return np.clip(0.5 + 0.5 * np.asarray(image), 0, 1).astype(np.float32)


def _condition(space: ImageSpace, rng: np.random.Generator) -> FloatArray:
    parts = [
        np.eye(c.width)[rng.integers(c.width)] if c.kind == "class" else rng.uniform(-1, 1, 1) for c in space.conditions
    ]
    return np.concatenate([*parts, np.zeros(0)]).astype(np.float32)


@dataclass(frozen=True)
class WithPatterns:
    """A cohort's scans with those of patterned patients numbered behind them; a load is of one kind or the other."""

    store: Scans
    patterns: Patterns

    @property
    def space(self) -> ImageSpace:
        """The cohort's image space."""
        return self.store.space

    def rows(self, patients: IntArray) -> IntArray:
        """Return the rows of all scans of these patients."""
        if len(patients) and patients[0] >= FIRST:
            return FIRST + self.patterns.store.rows(patients - FIRST)
        return self.store.rows(patients)

    def load(self, rows: IntArray) -> Batch:
        """Return the scans in the given order."""
        return self.patterns.store.load(rows - FIRST) if len(rows) and rows[0] >= FIRST else self.store.load(rows)


def joined(sampler: PatientSampler, patterns: Patterns | None) -> PatientSampler:
    """Return a sampler that can load patterned patients too; whom it draws stays as it is."""
    return sampler if patterns is None else replace(sampler, store=WithPatterns(sampler.store, patterns))


def walk_steps(steps: int) -> range:
    """Return the steps of DP-SGD before which a walk is made."""
    return range(0, steps, max(1, -(-steps // WALKS)))


class StepWalks:
    """Walks before some steps of DP-SGD, at the weights of that moment. Held by the process that leads."""

    def __init__(self, patterns: Patterns, mechanism: Mechanism, max_grad_norm: float) -> None:
        self.patterns, self.watch = patterns, WalkWatch(mechanism)
        self._clip, self._due = max_grad_norm, walk_steps(mechanism.count)
        self._stream = f"{STREAM}/{mechanism.name}"
        self._reference: PlainSampler | None = None

    def begin(self, model: nn.Module, config: DpSgdConfig) -> None:
        """Copy the model, before any engine is put into it."""
        compute = Compute(config.precision == "bf16", config.channels_last)
        self._copy = copy.deepcopy(model)
        self._reference = PlainSampler(self._copy, max_scans=2**30, compute=compute)
        self.watch.tolerance = COARSE_TOLERANCE if compute.bf16 else TOLERANCE

    def due(self, step: int) -> bool:
        """Whether a walk is made before this step."""
        return step in self._due

    def walk(
        self,
        step: int,
        model: nn.Module,
        sampler: PatientSampler,
        optimizer: PatientDPOptimizer,
        team: Team,
        randomness: Randomness,
        latent_dim: int,
    ) -> None:
        """Walk at the weights before this step; they and the step's own randomness stay as they are.

        The other processes of a team take their share as of any step, and then wait for weights.
        """
        source = randomness.source(self._stream, step)
        rows = sampler.choose_scans(FIRST + self.patterns.patients, source)
        latent = LATENT_SCALE * torch.randn(
            sum(map(len, rows)), latent_dim, generator=randomness.latent(self._stream, step)
        )
        own, share = team.deal(rows, latent)
        sums, noised = optimizer.rehearse(sampler.load(own), share, source)
        scale = sampler.expected_patients / self._clip
        wanted = {id(p) for p in _trained(model)}
        mine = [i for i, p in enumerate(optimizer.params) if id(p) in wanted]
        noise = [noised[i].double() * scale - sums[i].double() / self._clip for i in mine]
        true, lengths, clipped = self._true_sum(model, np.concatenate(rows) - FIRST, latent)
        gap = sum(float((sums[i].double() - t).square().sum()) for i, t in zip(mine, true, strict=True)) ** 0.5
        self.watch.see(gap / lengths, clipped, len(self.patterns.patients), [n.cpu().numpy() for n in noise])

    def _true_sum(self, model: nn.Module, rows: IntArray, latent: Tensor) -> tuple[list[Tensor], float, int]:
        """Return the sum of gradients clipped one patient at a time, the sum of lengths, and how many were cut."""
        if self._reference is None:
            raise RunError("the patterned patients have no copy of the model: begin first")
        with torch.no_grad():
            for own, live in zip(_tensors(self._copy), _tensors(model), strict=True):
                own.copy_(live)
        total = [torch.zeros_like(p, dtype=torch.float64) for p in self._reference.parameters]
        lengths, clipped = 0.0, 0
        for patient in self.patterns.patients:
            batch = self.patterns.truth(int(patient), rows)
            if not len(batch.x):
                continue
            mine = np.unique(rows[self.patterns.patient[rows] == patient], return_index=True)[1]
            places = np.flatnonzero(self.patterns.patient[rows] == patient)[mine]
            gradient, _ = self._reference.clipped_sum(batch, latent[torch.from_numpy(places)])
            norm = float(sum(float(g.double().square().sum()) for g in gradient)) ** 0.5
            factor = min(1.0, self._clip * (1 - ROUNDING_MARGIN) / max(norm, 1e-30))
            total = [t + factor * g.double() for t, g in zip(total, gradient, strict=True)]
            lengths, clipped = lengths + factor * norm, clipped + (norm > self._clip)
        return total, max(lengths, 1e-12), clipped


class ReleaseWalks:
    """One walk for each single release, right after it."""

    def __init__(self, patterns: Patterns, mechanisms: Sequence[Mechanism], source: NoiseSource) -> None:
        self.patterns = patterns
        self.watches = {m.name: WalkWatch(m) for m in mechanisms}
        self._source = source

    def walk(self, name: str, contribution: Callable[[Batch], Tensor | Grouped], noise_multiplier: float) -> None:
        """Release the patterned patients' sum, without noise and with it, as the patients' was released."""
        scans = noisy_sums.Pass(self.patterns.store, self.patterns.patients)
        bare, noised = (
            noisy_sums.noisy_sum(scans, contribution, z, self._source, name, None) for z in (0.0, noise_multiplier)
        )
        rows = np.arange(len(self.patterns.patient))
        truths = [_average(contribution, self.patterns.truth(int(p), rows)) for p in self.patterns.patients]
        norms = [float(np.linalg.norm(t)) for t in truths]
        true = sum(t / max(1.0, n) for t, n in zip(truths, norms, strict=True))
        fits = np.shape(true) == bare.shape
        gap = float(np.linalg.norm(bare - true)) / max(sum(min(1.0, n) for n in norms), 1e-12) if fits else np.inf
        self.watches[name].see(gap, sum(n > 1 for n in norms), len(norms), [noised - bare])

    def state(self) -> dict[str, dict[str, Any]]:
        """Return what was seen, as JSON."""
        return {n: {k: v.tolist() for k, v in watch.state().items()} for n, watch in self.watches.items()}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from `state`; raises KeyError, ValueError or TypeError where it is of other releases."""
        for name, watch in self.watches.items():
            watch.restore({k: np.asarray(v) for k, v in state[name].items()})


def _average(contribution: Callable[[Batch], Tensor | Grouped], batch: Batch) -> Floats:
    """Return what one patient adds before the clip, scan by scan: the mean of what the scans contribute alone."""
    total: Floats | float = 0.0
    for i in range(len(batch.x)):
        one = slice(i, i + 1)
        made = contribution(Batch(batch.x[one], batch.condition[one], batch.patient[one]))
        if isinstance(made, Grouped):
            vector = made.vectors[0].double().numpy()
            placed = np.zeros((made.groups, len(vector)))
            placed[int(made.group[0])] = vector / max(1.0, float(np.linalg.norm(vector)))
            total = total + placed.ravel()
        else:
            total = total + made[0].double().numpy()
    return np.asarray(total) / len(batch.x)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
