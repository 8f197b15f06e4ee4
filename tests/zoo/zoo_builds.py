"""Broken builds, each switched on by a patch, and what they look like to a simulation where that is simple.

A build is one fault in a program that says that it is private. `run` says which small run shows it; `finder` which
check is meant for it: "scores" (the accusation test), "conformance" (noise, draws and lengths on the canaries'
coordinates), "patterns" (patterned patients on the model's own path), "structure" (a check before the first scan, at
the gate or of the claim) or "leak test".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from medvae.dp.noise import NoiseSource
from medvae.train import loop, noisy_sums
from medvae.train.canary import PhantomLoss
from medvae.train.engine import module
from medvae.train.optimizer import PatientDPOptimizer
from medvae.train.randomness import Randomness
from medvae.train.sampler import PatientSampler
from medvae.types import Batch
from medvae.vault.store import CohortStore

Patch = Callable[[pytest.MonkeyPatch], None]
Finder = Literal["scores", "conformance", "patterns"]


@dataclass(frozen=True)
class Sim:
    """A fault in numbers: factors over the claim, the way patients are drawn, and the law of the noise."""

    noise: tuple[float, float] = (1.0, 1.0)
    signal: float = 1.0
    rate: float = 1.0
    steps: int = 1
    draw: Literal["poisson", "shuffle", "fixed", "in order", "same"] = "poisson"
    law: Literal["normal", "uniform", "tiled", "same"] = "normal"


@dataclass(frozen=True)
class Build:
    """One broken build that canaries are meant for. sim: the same fault in numbers, where it has such a form."""

    name: str
    finder: Finder
    run: Literal["dpsgd", "moments"]
    patch: Patch
    sim: Sim | None = None


def without_probe(patch: pytest.MonkeyPatch) -> None:
    """Switch the check of the engine before training off, so that canaries are all that is left to find a fault."""
    patch.setattr(module, "check_sampler", lambda *_: None)


def _noise_times(factor: float) -> Patch:
    def patch(mp: pytest.MonkeyPatch) -> None:
        original = PatientDPOptimizer.add_noise

        def add_noise(self: Any) -> None:
            planned, self.noise_multiplier = self.noise_multiplier, self.noise_multiplier * factor
            original(self)
            self.noise_multiplier = planned

        mp.setattr(PatientDPOptimizer, "add_noise", add_noise)

    return patch


def _unnoised(index: int) -> Patch:
    def patch(mp: pytest.MonkeyPatch) -> None:
        original = PatientDPOptimizer.add_noise

        def add_noise(self: Any) -> None:
            parameter = self.params[index]
            bare = parameter.summed_grad.clone()
            original(self)
            parameter.grad = bare.view_as(parameter)

        mp.setattr(PatientDPOptimizer, "add_noise", add_noise)

    return patch


@dataclass
class _Other:
    """A noise source with another law."""

    source: NoiseSource
    law: Callable[[NoiseSource, int], np.ndarray]

    def normal(self, n: int) -> np.ndarray:
        return self.law(self.source, n)


def _law(law: Callable[[NoiseSource, int], np.ndarray]) -> Patch:
    def patch(mp: pytest.MonkeyPatch) -> None:
        original = PatientDPOptimizer.add_noise

        def add_noise(self: Any) -> None:
            batch, latent, source = self._drawn
            self._drawn = (batch, latent, _Other(source, law))
            original(self)

        mp.setattr(PatientDPOptimizer, "add_noise", add_noise)

    return patch


def _uniform(source: NoiseSource, n: int) -> np.ndarray:
    return 12**0.5 * (source.integers(n, 2**52) / 2**52 - 0.5)


def _tiled(source: NoiseSource, n: int) -> np.ndarray:
    return np.resize(source.normal(64), n)


def _one_number(source: NoiseSource, n: int) -> np.ndarray:
    return np.full(n, source.normal(1)[0])


def _engine(change: Callable[[Callable[..., Any], Any, tuple[Any, ...]], Any]) -> Patch:
    """Patch the engine's clipped sum: change(original, engine, (inputs, weight, counts, max_norm, *rest))."""

    def patch(mp: pytest.MonkeyPatch) -> None:
        original = module.BookkeepingModule.clipped_sum
        mp.setattr(module.BookkeepingModule, "clipped_sum", lambda self, *given: change(original, self, given))

    return patch


def _on_the_model(change: Callable[[Callable[..., Any], Any, tuple[Any, ...]], Any]) -> Patch:
    """The same, for the model's engine alone: the canaries' own coordinates are treated as they should be."""

    def own(original: Callable[..., Any], self: Any, given: tuple[Any, ...]) -> Any:
        return original(self, *given) if isinstance(self._module, PhantomLoss) else change(original, self, given)

    return _engine(own)


def _wrong_layout(original: Callable[..., Any], self: Any, given: tuple[Any, ...]) -> Any:
    sums, norms, losses = original(self, *given)
    return [s.flip(0) if s is not None and s.dim() == 4 else s for s in sums], norms, losses


def _model_by_scan(mp: pytest.MonkeyPatch) -> None:
    original = module.BookkeepingSampler.clipped_sum

    def clipped_sum(self: Any, batch: Batch, latent: torch.Tensor) -> Any:
        if not isinstance(self._module._module, PhantomLoss):
            batch = batch._replace(patient=np.arange(len(batch.patient)))
        return original(self, batch, latent)

    mp.setattr(module.BookkeepingSampler, "clipped_sum", clipped_sum)


def _model_noise(change: Callable[[torch.Tensor, dict[int, torch.Tensor], int], torch.Tensor]) -> Patch:
    """Patch the noise of the parameters between the canaries' two layers: change(noise, memory, index)."""

    def patch(mp: pytest.MonkeyPatch) -> None:
        original, memory = PatientDPOptimizer.add_noise, dict[int, torch.Tensor]()

        def add_noise(self: Any) -> None:
            bare = [p.summed_grad.clone() for p in self.params]
            original(self)
            for index, parameter in list(enumerate(self.params))[1:-1]:
                noise = change(parameter.grad - bare[index].view_as(parameter), memory, index)
                parameter.grad = bare[index].view_as(parameter) + noise

        mp.setattr(PatientDPOptimizer, "add_noise", add_noise)

    return patch


def _loads(change: Callable[[Batch], Batch]) -> Patch:
    """Patch what the cohort's store loads."""

    def patch(mp: pytest.MonkeyPatch) -> None:
        original = CohortStore.load
        mp.setattr(CohortStore, "load", lambda self, rows: change(original(self, rows)))

    return patch


def _two_identifiers(batch: Batch) -> Batch:
    later = np.arange(len(batch.patient)) > np.searchsorted(batch.patient, batch.patient)
    return batch._replace(patient=2 * batch.patient + later)


def _next_condition(batch: Batch) -> Batch:
    return batch._replace(condition=np.roll(batch.condition, 1, axis=0))


def _centred(batch: Batch) -> Batch:
    return batch._replace(x=(batch.x - batch.x.mean()).astype(np.float32))


def _unclipped(original: Callable[..., Any], self: Any, given: tuple[Any, ...]) -> Any:
    return original(self, *given[:3], 1e30, *given[4:])


def _twice_the_bound(original: Callable[..., Any], self: Any, given: tuple[Any, ...]) -> Any:
    return original(self, *given[:3], 2 * given[3], *given[4:])


def _scan_twice(mp: pytest.MonkeyPatch) -> None:
    original = CohortStore.rows

    def rows(self: CohortStore, patients: Any) -> np.ndarray:
        found = original(self, patients)
        return np.concatenate([found[:1], found])

    mp.setattr(CohortStore, "rows", rows)


def _noise_behind_the_release(mp: pytest.MonkeyPatch) -> None:
    """Noise on the canaries' coordinates alone."""
    original = noisy_sums.noisy_sum

    def noisy_sum(scans: Any, contribution: Any, noise: float, source: Any, name: str, canaries: Any) -> Any:
        seen = 0 if canaries is None else len(canaries._coins)
        late = _Other(source, lambda s, n: np.concatenate([np.zeros(n - seen), s.normal(seen)]))
        return original(scans, contribution, noise, late, name, canaries)

    mp.setattr(noisy_sums, "noisy_sum", noisy_sum)


def _bound_times(factor: float) -> Patch:
    return _engine(lambda original, self, given: original(self, *given[:3], given[3] * factor, *given[4:]))


def _clip_the_average(original: Callable[..., Any], self: Any, given: tuple[Any, ...]) -> Any:
    inputs, weight, counts, bound, *rest = given
    sums, norms, losses = original(self, inputs, weight, counts, 1e30, *rest)
    mean = torch.sqrt(sum(s.square().sum() for s in sums if s is not None)) / len(counts)
    scale = float(min(1.0, bound / max(float(mean), 1e-30)))
    return [None if s is None else s * scale for s in sums], norms, losses


def _clip_at_the_median(original: Callable[..., Any], self: Any, given: tuple[Any, ...]) -> Any:
    norms = original(self, *given[:3], 1e30, *given[4:])[1]
    return original(self, *given[:3], float(norms.median()), *given[4:])


def _clip_by_layer(original: Callable[..., Any], self: Any, given: tuple[Any, ...]) -> Any:
    inputs, weight, counts, bound, *rest = given
    starts = np.cumsum([0, *counts])
    total, norms, losses = [], [], []
    for start, count in zip(starts[:-1], counts, strict=True):
        part = slice(start, start + count)
        sums, norm, loss = original(self, tuple(i[part] for i in inputs), weight[part], (count,), 1e30, *rest)
        total.append([None if s is None else s * min(1.0, bound / max(float(s.norm()), 1e-30)) for s in sums])
        norms.append(norm)
        losses.append(loss)
    added = [None if s[0] is None else torch.stack(s).sum(0) for s in zip(*total, strict=True)]
    return added, torch.cat(norms), torch.cat(losses)


def _noise_by_micro_batch(mp: pytest.MonkeyPatch) -> None:
    noise = PatientDPOptimizer.add_noise

    def noisy(original: Callable[..., Any], self: Any, given: tuple[Any, ...]) -> Any:
        sums, norms, losses = original(self, *given)
        named = self._named
        sums = [torch.zeros_like(p) if s is None else s for s, (_, p) in zip(sums, named, strict=True)]
        return [s + self.std * torch.randn_like(s) for s in sums], norms, losses

    def add_noise(self: Any) -> None:
        planned, self.noise_multiplier = self.noise_multiplier, 0.0
        noise(self)
        self.noise_multiplier = planned

    def clip_and_accumulate(self: Any) -> None:
        module.BookkeepingModule.std = self.noise_multiplier * self.max_grad_norm
        accumulate(self)

    accumulate = PatientDPOptimizer.clip_and_accumulate
    mp.setattr(module.BookkeepingModule, "std", 0.0, raising=False)
    mp.setattr(PatientDPOptimizer, "clip_and_accumulate", clip_and_accumulate)
    mp.setattr(PatientDPOptimizer, "add_noise", add_noise)
    _engine(noisy)(mp)


def _by_scan(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(module, "segments", lambda p: (torch.arange(len(p)), torch.ones(len(p), dtype=torch.int64)))


def _cut_patients(mp: pytest.MonkeyPatch) -> None:
    def micro_batches(patient: np.ndarray, max_scans: int) -> Iterator[slice]:
        size = min(6, max_scans)
        yield from (slice(i, min(i + size, len(patient))) for i in range(0, len(patient), size))

    mp.setattr(module, "micro_batches", micro_batches)


def _draw(choose: Callable[[PatientSampler, np.ndarray, dict[str, Any], NoiseSource], np.ndarray]) -> Patch:
    """Patch the draw: choose(sampler, everyone, memory, source) returns those drawn."""

    def patch(mp: pytest.MonkeyPatch) -> None:
        memory: dict[str, Any] = {}

        def draw_patients(self: PatientSampler, source: NoiseSource) -> list[np.ndarray]:
            everyone = np.concatenate([self.patients, self.canaries])
            return [self._scans_of(p, source) for p in np.sort(choose(self, everyone, memory, source))]

        mp.setattr(PatientSampler, "draw_patients", draw_patients)

    return patch


def _shuffled(sampler: PatientSampler, everyone: np.ndarray, memory: dict[str, Any], source: NoiseSource) -> np.ndarray:
    size = round(sampler.sample_rate * len(everyone))
    if len(memory.get("left", ())) < size:
        memory["left"] = everyone[np.argsort(source.normal(len(everyone)))]
    drawn, memory["left"] = memory["left"][:size], memory["left"][size:]
    return drawn


def _fixed(sampler: PatientSampler, everyone: np.ndarray, memory: dict[str, Any], source: NoiseSource) -> np.ndarray:
    size = round(sampler.sample_rate * len(everyone))
    return everyone[np.argsort(source.normal(len(everyone)))[:size]]


def _in_order(sampler: PatientSampler, everyone: np.ndarray, memory: dict[str, Any], source: NoiseSource) -> np.ndarray:
    size = round(sampler.sample_rate * len(everyone))
    memory["at"] = memory.get("at", 0) + 1
    return everyone[(np.arange(size) + (memory["at"] - 1) * size) % len(everyone)]


def _twice_the_rate(
    sampler: PatientSampler, everyone: np.ndarray, memory: dict[str, Any], source: NoiseSource
) -> np.ndarray:
    return everyone[source.mask(len(everyone), 2 * sampler.sample_rate)]


def _twice_the_steps(mp: pytest.MonkeyPatch) -> None:
    original = loop.train_dpsgd

    def train(model: Any, sampler: Any, plan: Any, *rest: Any, **named: Any) -> None:
        original(model, sampler, replace(plan, steps=2 * plan.steps), *rest, **named)

    mp.setattr(loop, "train_dpsgd", train)


def _same_stream(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(Randomness, "source", lambda self, stage, step=0: self.root.fork(stage))


def _realised_divisor(mp: pytest.MonkeyPatch) -> None:
    def scale_grad(self: Any) -> None:
        drawn = max(1, len(np.unique(self._drawn[0].patient)))
        for parameter in self.params:
            parameter.grad /= drawn

    mp.setattr(PatientDPOptimizer, "scale_grad", scale_grad)


def _release_noise(factor: float, only: str | None = None) -> Patch:
    def patch(mp: pytest.MonkeyPatch) -> None:
        original = noisy_sums.noisy_sum

        def noisy_sum(scans: Any, contribution: Any, noise: float, source: Any, name: str, canaries: Any) -> Any:
            changed = noise * factor if only in (None, name) else noise
            return original(scans, contribution, changed, source, name, canaries)

        mp.setattr(noisy_sums, "noisy_sum", noisy_sum)

    return patch


def _release_by_scan(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(noisy_sums, "clipped_sum", lambda vectors, patient: noisy_sums.clip_rows(vectors.double(), 1.0).sum(0))


def _release_unclipped(mp: pytest.MonkeyPatch) -> None:
    average = noisy_sums.patient_average
    mp.setattr(noisy_sums, "clipped_sum", lambda vectors, patient: average(vectors.double(), patient).sum(0))


DPSGD: tuple[Build, ...] = (
    Build("no noise", "scores", "dpsgd", _noise_times(0.0), Sim((0.0, 0.0))),
    Build("noise divided by 10", "scores", "dpsgd", _noise_times(0.1), Sim((0.1, 0.1))),
    Build("noise times 0.5", "scores", "dpsgd", _noise_times(0.5), Sim((0.5, 0.5))),
    Build("noise times 0.7", "scores", "dpsgd", _noise_times(0.7), Sim((0.7, 0.7))),
    Build("noise times 0.95", "conformance", "dpsgd", _noise_times(0.95), Sim((0.95, 0.95))),
    Build("clip by scan for a unit of patients", "scores", "dpsgd", _by_scan, Sim(signal=4)),
    Build("no clip", "scores", "dpsgd", _bound_times(1e30), Sim(signal=100)),
    Build("clip at twice the bound", "scores", "dpsgd", _bound_times(2.0), Sim(signal=2)),
    Build("clip at the batch's median norm", "scores", "dpsgd", _engine(_clip_at_the_median), Sim(signal=100)),
    Build("clip after averaging", "conformance", "dpsgd", _engine(_clip_the_average)),
    Build("clip by layer", "conformance", "dpsgd", _engine(_clip_by_layer), Sim(signal=2**0.5)),
    Build("patients cut by micro-batches", "conformance", "dpsgd", _cut_patients),
    Build("noise on every micro-batch", "conformance", "dpsgd", _noise_by_micro_batch, Sim((2.0, 2.0))),
    Build("no noise on the last parameter", "conformance", "dpsgd", _unnoised(-1), Sim((1.0, 0.0))),
    Build("no noise on the first parameter", "conformance", "dpsgd", _unnoised(0), Sim((0.0, 1.0))),
    Build("uniform noise of the right size", "conformance", "dpsgd", _law(_uniform), Sim(law="uniform")),
    Build("64 numbers of noise, repeated", "conformance", "dpsgd", _law(_tiled), Sim(law="tiled")),
    Build("one number of noise a step", "conformance", "dpsgd", _law(_one_number), Sim(law="same")),
    Build("the same randomness at every step", "conformance", "dpsgd", _same_stream, Sim(draw="same")),
    Build("twice the claimed sample rate", "conformance", "dpsgd", _draw(_twice_the_rate), Sim(rate=2)),
    Build("twice the claimed steps", "conformance", "dpsgd", _twice_the_steps, Sim(steps=2)),
    Build("shuffling claimed as Poisson", "conformance", "dpsgd", _draw(_shuffled), Sim(draw="shuffle")),
    Build("fixed number of patients a step", "conformance", "dpsgd", _draw(_fixed), Sim(draw="fixed")),
    Build("patients in fixed order", "conformance", "dpsgd", _draw(_in_order), Sim(draw="in order")),
    Build("divided by the patients drawn", "conformance", "dpsgd", _realised_divisor),
    Build("no clip on the model alone", "patterns", "dpsgd", _on_the_model(_unclipped)),
    Build("clip at twice the bound on the model alone", "patterns", "dpsgd", _on_the_model(_twice_the_bound)),
    Build("clip by scan on the model alone", "patterns", "dpsgd", _model_by_scan),
    Build("per-sample gradients wrong by layout, unchecked", "patterns", "dpsgd", _on_the_model(_wrong_layout)),
    Build("no noise on a parameter in the middle", "patterns", "dpsgd", _unnoised(2)),
    Build("noise times 0.9 on the model alone", "patterns", "dpsgd", _model_noise(lambda z, _m, _i: 0.9 * z)),
    Build(
        "the same noise at every step on the model alone",
        "patterns",
        "dpsgd",
        _model_noise(lambda z, memory, i: memory.setdefault(i, z)),
    ),
    Build("loader gives a scan twice", "patterns", "dpsgd", _scan_twice),
    Build("loader takes one patient for two", "patterns", "dpsgd", _loads(_two_identifiers)),
    Build("loader centres scans over the batch", "patterns", "dpsgd", _loads(_centred)),
)
RELEASES: tuple[Build, ...] = (
    Build("releases without noise", "scores", "moments", _release_noise(0.0)),
    Build("releases with noise times 0.7", "scores", "moments", _release_noise(0.7)),
    Build("one release without noise", "conformance", "moments", _release_noise(0.0, "norms")),
    Build("releases clipped by scan", "scores", "moments", _release_by_scan),
    Build("releases not clipped", "scores", "moments", _release_unclipped),
    Build("releases with noise on the canaries alone", "patterns", "moments", _noise_behind_the_release),
    Build("releases of a scan taken twice", "patterns", "moments", _scan_twice),
    Build("releases of one patient taken for two", "patterns", "moments", _loads(_two_identifiers)),
    Build("releases by the next scan's condition", "patterns", "moments", _loads(_next_condition)),
    Build("releases centred over the batch", "patterns", "moments", _loads(_centred)),
)
ALL = DPSGD + RELEASES
