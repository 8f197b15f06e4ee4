"""Per-patient gradients against a plain loop over patients."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medvae.config import ModelConfig
from medvae.errors import ConfigError
from medvae.nets.cvae import ConditionalVAE
from medvae.train.gradient import (
    ROUNDING_MARGIN,
    FunctorchSampler,
    PlainSampler,
    check_sampler,
    clip_patients,
    micro_batches,
)
from medvae.types import Batch, Condition, ImageSpace, Intensity

LATENT = 3
CLASSES = 4


class ToyNet(nn.Module):
    """Conv, transposed conv, linear, GroupNorm and embedding; a loss a sample."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        up = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
        self.down = conv(1, 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.embed = nn.Embedding(CLASSES, 4)
        self.linear = nn.Linear(LATENT + 2, 4)
        self.up = up(4, 1, 2, stride=2)

    def forward(self, x: Tensor, condition: Tensor, latent: Tensor) -> Tensor:
        h = self.norm(self.down(x)).tanh()
        code = self.linear(torch.cat([latent, condition[:, 1:]], dim=1)) + self.embed(condition[:, 0].long())
        h = h * code.view(*code.shape, *[1] * (h.dim() - 2))
        return (self.up(h) - x).square().flatten(1).mean(1)


def make_batch(lengths: list[int], dims: int, seed: int = 0) -> tuple[Batch, Tensor]:
    rng = np.random.default_rng(seed)
    scans = sum(lengths)
    shape = (6, 8) if dims == 2 else (4, 6, 4)
    x = rng.random((scans, 1, *shape), dtype=np.float32) * 3
    condition = rng.random((scans, 3), dtype=np.float32)
    condition[:, 0] = rng.integers(0, CLASSES, scans)
    patient = np.repeat(np.arange(len(lengths), dtype=np.int64) * 7 + 3, lengths)
    return Batch(x, condition, patient), torch.from_numpy(rng.normal(size=(scans, LATENT)).astype(np.float32))


def plain_loop(model: nn.Module, batch: Batch, latent: Tensor, bound: float) -> tuple[list[Tensor], list[float]]:
    """The definition: one backward a patient, one norm over all parameters, clip at the bound less
    its margin, sum. In float64."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    norms = []
    for patient in np.unique(batch.patient):
        rows = np.flatnonzero(batch.patient == patient)
        x, condition = torch.from_numpy(batch.x[rows]), torch.from_numpy(batch.condition[rows])
        loss = model(x, condition, latent[rows]).mean()
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        exact = [torch.zeros_like(t) if g is None else g.double() for g, t in zip(gradient, total, strict=True)]
        norm = math.sqrt(sum(float(g.square().sum()) for g in exact))
        norms.append(norm)
        for t, g in zip(total, exact, strict=True):
            t += g * min(1.0, bound * (1 - ROUNDING_MARGIN) / norm)
    return total, norms


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    dims=st.sampled_from([2, 3]),
    max_scans=st.integers(1, 20),
    bound=st.sampled_from([0.05, 0.5, 1e6]),
    seed=st.integers(0, 1000),
)
def test_equals_a_plain_loop_over_patients(
    lengths: list[int], dims: int, max_scans: int, bound: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = ToyNet(dims)
    batch, latent = make_batch(lengths, dims, seed)
    expected, norms = plain_loop(model, batch, latent, bound)
    sums, stats = FunctorchSampler(model, max_grad_norm=bound, max_scans=max_scans).clipped_sum(batch, latent)
    assert stats.reveal().norms.tolist() == pytest.approx(norms, rel=1e-5)
    assert stats.reveal().scans == sum(lengths)
    assert float((flat(sums) - flat(expected)).norm() / flat(expected).norm()) < 1e-4
    assert all(p.grad is None and p.grad_sample is None for p in model.parameters())


@pytest.mark.parametrize("shape", [(8, 12), (6, 8, 4)])
def test_equals_a_plain_loop_on_the_conditional_vae(shape: tuple[int, ...]) -> None:
    space = ImageSpace(
        shape,
        (1.0,) * len(shape),
        "MR",
        Intensity("percentile", 1, 99),
        (Condition("side", "class", ("a", "b")),),
        (1,),
    )
    torch.manual_seed(1)
    model = ConditionalVAE(space, ModelConfig(latent_dim=LATENT, channels=(4, 8)))
    rng = np.random.default_rng(2)
    lengths = [1, 3, 2]
    x = rng.random((6, 2, *shape), dtype=np.float32)
    condition = np.eye(2, dtype=np.float32)[rng.integers(0, 2, 6)]
    batch = Batch(x, condition, np.repeat(np.arange(3), lengths))
    latent = torch.randn(6, LATENT)
    expected, norms = plain_loop(model, batch, latent, 0.1)
    sums, stats = FunctorchSampler(model, max_grad_norm=0.1, max_scans=3).clipped_sum(batch, latent)
    assert stats.reveal().norms.tolist() == pytest.approx(norms, rel=1e-5)
    assert float((flat(sums) - flat(expected)).norm() / flat(expected).norm()) < 1e-4


def test_empty_batch_gives_zeros() -> None:
    model = ToyNet(2)
    batch, latent = make_batch([], 2)
    sums, stats = FunctorchSampler(model, max_grad_norm=1.0, max_scans=4).clipped_sum(batch, latent)
    assert [s.shape for s in sums] == [p.shape for p in model.parameters()]
    assert float(flat(sums).abs().sum()) == 0.0
    assert math.isnan(stats.reveal().loss)


@pytest.mark.parametrize("bound", [1e-3, 0.1, 1.0, 7.0])
def test_one_patient_never_adds_more_than_the_bound(bound: float) -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-6, bound / 40, 1.0, 1e6, 1e18):
        samples = [torch.from_numpy(rng.normal(size=(5, n)).astype(np.float32) * scale) for n in (1000, 3, 50)]
        sums, _ = clip_patients(samples, torch.zeros(5, dtype=torch.int64), 1, bound)
        assert float(flat(sums).norm()) <= bound


def test_a_gradient_that_is_not_finite_counts_as_zero() -> None:
    good = torch.ones(3, 4)
    bad = good.clone()
    bad[1, 2] = float("nan")
    bad[2, 0] = float("inf")
    sums, norms = clip_patients([bad], torch.arange(3), 3, 1.0)
    assert torch.allclose(sums[0], clip_patients([good[:1]], torch.arange(1), 1, 1.0)[0][0])
    assert torch.isfinite(norms).tolist() == [True, False, False]


def test_two_scans_of_one_patient_are_not_two_patients() -> None:
    """Were they counted as two units, one person could move the sum by 2C and epsilon would mean something else."""
    model = ToyNet(2)
    batch, latent = make_batch([2], 2)
    bound = 1e-3
    sampler = FunctorchSampler(model, max_grad_norm=bound, max_scans=8)
    by_patient, _ = sampler.clipped_sum(batch, latent)
    by_scan, _ = sampler.clipped_sum(batch._replace(patient=np.arange(2)), latent)
    assert float(flat(by_patient).norm()) <= bound
    assert float(flat(by_scan).norm()) > 1.2 * bound


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), max_size=9), max_scans=st.integers(1, 12))
def test_micro_batches_never_cut_a_patient(lengths: list[int], max_scans: int) -> None:
    patient = np.repeat(np.arange(len(lengths)) * 2 + 1, lengths)
    parts = list(micro_batches(patient, max_scans))
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(len(patient)))
    seen = [set(patient[p]) for p in parts]
    assert all(a.isdisjoint(b) for i, a in enumerate(seen) for b in seen[i + 1 :])
    assert all(p.stop - p.start <= max_scans or len(s) == 1 for p, s in zip(parts, seen, strict=True))


def test_plain_sampler_is_the_plain_sum() -> None:
    model = ToyNet(2)
    batch, latent = make_batch([1, 3, 2], 2)
    expected, _ = plain_loop(model, batch, latent, math.inf)
    sums, _ = PlainSampler(model, max_scans=4).clipped_sum(batch, latent)
    assert torch.allclose(flat(sums), flat(expected), rtol=1e-4, atol=1e-6)


def test_batch_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match="BatchNorm2d"):
        FunctorchSampler(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), max_grad_norm=1.0, max_scans=4)


class Bypass(ToyNet):
    """Uses a layer's weight behind the layer's back, where per-sample hooks do not see it."""

    def forward(self, x: Tensor, condition: Tensor, latent: Tensor) -> Tensor:
        return super().forward(x, condition, latent) + latent @ self.linear.weight[:1, :LATENT].T.squeeze(1)


class Hidden(ToyNet):
    """Never calls one of its layers; only its weight is used."""

    def forward(self, x: Tensor, condition: Tensor, latent: Tensor) -> Tensor:
        plain = nn.functional.linear(torch.cat([latent, condition[:, 1:]], dim=1), self.linear.weight)
        return x.flatten(1).mean(1) * plain.sum(1)


@pytest.mark.parametrize("kind", [Bypass, Hidden])
def test_layers_with_wrong_gradients_are_refused_by_name(kind: type[ToyNet]) -> None:
    model = kind(2)
    batch, latent = make_batch([2, 1], 2)
    reference = copy.deepcopy(model)
    sampler = FunctorchSampler(model, max_grad_norm=0.1, max_scans=8)
    with pytest.raises(ConfigError, match=r"linear\.weight"):
        check_sampler(sampler, reference, batch, latent)


class Mixing(ToyNet):
    """Centres activations over the batch: one patient moves another's gradient."""

    def forward(self, x: Tensor, condition: Tensor, latent: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True) * 0.5, condition, latent)


def test_mixing_of_patients_is_refused() -> None:
    model = Mixing(2)
    batch, latent = make_batch([1, 1], 2)
    with pytest.raises(ConfigError, match="mixes patients"):
        check_sampler(FunctorchSampler(copy.deepcopy(model), max_grad_norm=0.1, max_scans=8), model, batch, latent)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_check_passes_for_a_sound_model(dims: int) -> None:
    model = ToyNet(dims)
    batch, latent = make_batch([2, 1], dims)
    check_sampler(FunctorchSampler(copy.deepcopy(model), max_grad_norm=0.1, max_scans=8), model, batch, latent)
