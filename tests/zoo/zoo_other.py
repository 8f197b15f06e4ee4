"""Broken builds that canaries cannot see or need not: what refuses them before a scan is read, or finds the leak.

Each entry runs the broken build and returns whether the named check found it; with `broken=False` it runs the right
build through the same check, which must find nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo_world as world
from safetensors.torch import load_file
from torch import nn

from medvae.config import DpSgdConfig
from medvae.dp.canaries import commit, document, judge, register
from medvae.dp.noise import seeded_noise
from medvae.errors import ConfigError
from medvae.train import loop, moments, noisy_sums
from medvae.train.canary import StepCanaries
from medvae.train.claim import not_releasable
from medvae.train.engine import module
from medvae.train.gradient import PlainSampler, refuse_unsupported
from medvae.train.optimizer import PatientDPOptimizer
from medvae.train.randomness import make_randomness
from medvae.train.sampler import PatientSampler
from medvae.types import Batch, Mechanism
from medvae.vault.scan import Skipped
from medvae.vault.tally import Tally, fingerprint

GROUPS = {"weights", "average", "optimizer", "canaries"}


@dataclass(frozen=True)
class Other:
    """One broken build, the check that is meant for it, and a function that says whether the check found it."""

    name: str
    finder: str
    found: Callable[[pytest.MonkeyPatch, bool], bool]


def _batchnorm(mp: pytest.MonkeyPatch, broken: bool) -> bool:
    return _refused(lambda: refuse_unsupported(world.Net(nn.BatchNorm2d if broken else None)))


def _wrong_layout(mp: pytest.MonkeyPatch, broken: bool) -> bool:
    """A convolution's gradient with its output channels in another order."""
    original = module.BookkeepingModule.clipped_sum

    def clipped_sum(self: Any, *given: Any) -> Any:
        sums, norms, losses = original(self, *given)
        return [s.flip(0) if s is not None and s.dim() == 4 else s for s in sums], norms, losses

    if broken:
        mp.setattr(module.BookkeepingModule, "clipped_sum", clipped_sum)
    return _refused(_check_engine)


def _mixed_patients(mp: pytest.MonkeyPatch, broken: bool) -> bool:
    """Every patient's gradient holds a part of the others'."""
    original = module.segments
    if broken:
        mp.setattr(module, "segments", lambda p: original(np.zeros_like(p)))
    return _refused(_check_engine)


def _check_engine() -> None:
    loop.make_engine(world.fresh_net(), world.plan(), world.LATENT, world.SPACE, DpSgdConfig())


def _refused(run: Callable[[], object]) -> bool:
    try:
        run()
    except ConfigError:
        return True
    except RuntimeError:  # torch itself stops where shapes no longer fit
        return True
    return False


def _judged(claimed: Sequence[Mechanism]) -> bool:
    """Run a correct training, then state `claimed` for it."""
    honest, coins_source = [world.claim()], seeded_noise(1)
    commitment = commit(register(100, honest, world.SCANS), coins_source)
    canaries = StepCanaries(commitment.coins, honest[0], world.CLIP, world.SCANS)
    _train(Path(tempfile.mkdtemp()), canaries=canaries)
    watch = canaries.watch
    made = document(commitment, {"dpsgd": watch.scores}, [watch.record()], honest, world.DELTA, {})
    return judge(json.loads(json.dumps(made)), claimed, world.DELTA).verdict == "REFUTED"


def _claims(change: Callable[[Mechanism], Sequence[Mechanism]]) -> Callable[[pytest.MonkeyPatch, bool], bool]:
    return lambda mp, broken: _judged(change(world.claim()) if broken else [world.claim()])


def _coins_after_the_run(mp: pytest.MonkeyPatch, broken: bool) -> bool:
    """Coins that were chosen after the scores were known do not open the commitment."""
    honest = [world.claim()]
    commitment = commit(register(100, honest, world.SCANS), seeded_noise(1))
    canaries = StepCanaries(commitment.coins, honest[0], world.CLIP, world.SCANS)
    _train(Path(tempfile.mkdtemp()), canaries=canaries)
    if broken:
        commitment = replace(commitment, coins=~commitment.coins)
    made = document(commitment, {"dpsgd": canaries.watch.scores}, [canaries.watch.record()], honest, world.DELTA, {})
    return any(not a["ok"] and a["name"] == "commitment" for a in made["checks"])


def _repeatable_noise(mp: pytest.MonkeyPatch, broken: bool) -> bool:
    return bool(not_releasable(world.plan(), make_randomness("seeded" if broken else "os_entropy", 0)))


def _train(folder: Path, scans: world.Scans | None = None, canaries: StepCanaries | None = None) -> nn.Module:
    """Train by the loop with repeatable randomness and return the model, its weights averaged."""
    net = world.fresh_net()
    config = DpSgdConfig(enabled=True, steps=world.STEPS, sample_rate=world.RATE, learning_rate=1e-3)
    sampler = PatientSampler(scans or world.Scans(), np.arange(world.PATIENTS), world.RATE, world.SCANS)
    given = {"randomness": make_randomness("seeded", 0), "folder": folder, "canaries": canaries}
    loop.train_dpsgd(net, sampler, world.plan(), config, world.LATENT, **given)
    return net


def _checkpoint_with_gradients(mp: pytest.MonkeyPatch, broken: bool) -> bool:
    """Names of what a checkpoint stores: weights, averages, moments of the optimizer, canaries, and nothing else."""
    original = loop.save_checkpoint

    def save(folder: Path, name: str, tensors: Any, facts: Any) -> None:
        original(folder, name, {**tensors, "gradients/0": torch.zeros(3)}, facts)

    if broken:
        mp.setattr(loop, "save_checkpoint", save)
    folder = Path(tempfile.mkdtemp())
    _train(folder)
    names = {n.partition("/")[0] for path in folder.glob("*.safetensors") for n in load_file(path)}
    return not names <= GROUPS


def _same_with_pinned_steps(mp: pytest.MonkeyPatch) -> bool:
    """Whether two cohorts of other images train the same model where the clipped sums are pinned to constants."""

    def pinned(self: Any) -> None:
        batch, latent, _ = self._drawn
        _, self.stats = self._sampler.clipped_sum(batch, latent)
        for parameter in self.params:
            parameter.summed_grad = torch.ones_like(parameter)

    mp.setattr(PatientDPOptimizer, "clip_and_accumulate", pinned)
    models = [_train(Path(tempfile.mkdtemp()), world.Scans(seed=seed)).state_dict() for seed in (0, 1)]
    return all(torch.equal(models[0][k], models[1][k]) for k in models[0])


def _average_of_a_plain_model(mp: pytest.MonkeyPatch, broken: bool) -> bool:
    """The averaged weights come from steps that were neither clipped nor noised."""
    seen: list[tuple[Batch, torch.Tensor]] = []
    step_on, average = PatientDPOptimizer.step_on, loop.average_weights

    def spying(self: Any, batch: Batch, latent: torch.Tensor, source: Any) -> Any:
        seen.append((batch, latent))
        return step_on(self, batch, latent, source)

    def leaking(kept: Any, model: nn.Module, step: int, decay: float) -> None:
        average(kept, model, step, decay)
        gradients, _ = PlainSampler(model, max_scans=64).clipped_sum(*seen[-1])
        for value, gradient in zip(kept.values(), gradients, strict=True):
            value -= 1e-3 * gradient

    if broken:
        mp.setattr(PatientDPOptimizer, "step_on", spying)
        mp.setattr(loop, "average_weights", leaking)
    return not _same_with_pinned_steps(mp)


def _same_with_pinned_releases(mp: pytest.MonkeyPatch) -> bool:
    """Whether two cohorts of other images and labels fit the same linear part where the released sums are pinned."""

    def pinned(scans: Any, contribution: Any, *rest: Any) -> np.ndarray:
        width = contribution(next(iter(scans))).shape[1]
        return np.linspace(1.0, 2.0, width)

    mp.setattr(noisy_sums, "noisy_sum", pinned)
    fitted = []
    for seed in (0, 1):
        scans = world.Scans(seed=seed)
        if seed:
            scans.condition[:] = world.CONDITION.encode("a")
        noise = {m.name: m.noise_multiplier for m in world.release_claim()}
        fitted.append(moments.fit_moments(scans, np.arange(world.PATIENTS), noise, world.SHAPES, noise=seeded_noise(0)))
    one, two = (f.state_dict() for f in fitted)
    return all(torch.equal(one[k], two[k]) for k in one)


def _labels_counted_truly(mp: pytest.MonkeyPatch, broken: bool) -> bool:
    original = moments._means

    def means(fit: Any) -> None:
        original(fit)
        shares = np.mean(np.concatenate([b.condition[:20] for b in fit.scans]), axis=0)
        fit.part.mean_map[: len(shares)] *= torch.as_tensor(shares).view(-1, *[1] * (fit.part.mean_map.dim() - 1))

    if broken:
        mp.setattr(moments, "_means", means)
    return not _same_with_pinned_releases(mp)


def _data_in_the_spectra(mp: pytest.MonkeyPatch, broken: bool) -> bool:
    """A prior stage that is charged to nobody: the spectra of the cohort's mean image, without noise."""
    original = moments._second

    def second(fit: Any) -> None:
        original(fit)
        fit.part.spectrum += float(np.mean([b.x.std() for b in fit.scans]))

    if broken:
        mp.setattr(moments, "_second", second)
    return not _same_with_pinned_releases(mp)


def _cohort_statistics(mp: pytest.MonkeyPatch, broken: bool) -> bool:
    """Images standardised over the cohort: then one patient moves what all others add to a sum."""

    class Standardised(world.Scans):
        def load(self, rows: np.ndarray) -> Batch:
            batch, all_of = super().load(rows), self.x[np.isin(self.patient, self.members)]
            return batch._replace(x=((batch.x - all_of.mean()) / all_of.std()).astype(np.float32))

    scans = Standardised() if broken else world.Scans()
    scans.x[scans.patient == world.PATIENTS - 1] *= 30  # one patient unlike the rest
    noise = {m.name: m.noise_multiplier for m in world.release_claim()}
    worst = 0.0
    original = noisy_sums.noisy_sum

    def neighbours(of: Any, contribution: Any, _z: float, source: Any, *rest: Any) -> np.ndarray:
        nonlocal worst
        sums = []
        for members in (of.patients, of.patients[:-1]):
            scans.members = members
            sums.append(original(noisy_sums.Pass(scans, members), contribution, 0.0, source))
        worst = max(worst, float(np.linalg.norm(sums[0] - sums[1])))
        return sums[0]

    mp.setattr(noisy_sums, "noisy_sum", neighbours)
    moments.fit_moments(scans, np.arange(world.PATIENTS), noise, world.SHAPES, noise=seeded_noise(0))
    return worst > 1 + 1e-9


def _two_identifiers(mp: pytest.MonkeyPatch, broken: bool) -> bool:
    tally, image = Tally(Skipped()), np.ones((4, 4), np.float32)
    for patient, array in enumerate((image, image if broken else image / 2)):
        tally.take(fingerprint(array, array), [], patient, ())
    return bool(tally.notes())


ALL: tuple[Other, ...] = (
    Other("BatchNorm", "structure: layers that mix scans are refused", _batchnorm),
    Other("per-sample gradients wrong by layout", "structure: engine against autograd", _wrong_layout),
    Other("patients of a batch taken for one", "structure: engine against autograd", _mixed_patients),
    Other(
        "wrong q in the claim",
        "structure: claim against registration",
        _claims(lambda m: [replace(m, sample_rate=m.sample_rate / 2)]),
    ),
    Other(
        "wrong steps in the claim",
        "structure: claim against registration",
        _claims(lambda m: [replace(m, count=m.count // 2)]),
    ),
    Other(
        "larger noise in the claim",
        "structure: claim against registration",
        _claims(lambda m: [replace(m, noise_multiplier=1.2 * m.noise_multiplier)]),
    ),
    Other("a stage missing in the claim", "structure: claim against registration", _claims(lambda m: [])),
    Other("coins chosen after the run", "structure: commitment", _coins_after_the_run),
    Other("noise from a seed", "structure: noise source", _repeatable_noise),
    Other("a checkpoint that carries gradients", "leak test: names in checkpoints", _checkpoint_with_gradients),
    Other("averaged weights of a plain model", "leak test: pinned sums", _average_of_a_plain_model),
    Other("labels counted truly", "leak test: pinned sums", _labels_counted_truly),
    Other("a prior stage uncharged", "leak test: pinned sums", _data_in_the_spectra),
    Other("cohort statistics in preprocessing", "leak test: neighbouring cohorts", _cohort_statistics),
    Other("one patient under two identifiers", "structure: identical images at ingest", _two_identifiers),
)
