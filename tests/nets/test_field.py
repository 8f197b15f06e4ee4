"""The Gaussian random field prior: against dense linear algebra, Monte Carlo, and the plain VAE it must give back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from medvae.config import FieldConfig
from medvae.nets import field
from medvae.nets.prior import FieldPrior, NormalPrior

KINDS = ("identity", "exponential", "matern32", "gaussian")


def eigen(grid: tuple[int, ...], kind: str, length: float = 1.5, variance: float = 1.0) -> torch.Tensor:
    return field.eigenvalues(grid, kind, torch.tensor([length]), torch.tensor([variance]))


def dense_covariance(values: torch.Tensor) -> torch.Tensor:
    """The covariance matrix (n, n) over all cells that eigenvalues (1, *grid) stand for: shifts of the first row."""
    row = torch.fft.ifftn(values[0].double()).real
    grid = row.shape
    rows = []
    for cell in np.ndindex(*grid):
        rows.append(torch.roll(row, cell, dims=tuple(range(len(grid)))).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(4, 5), (3, 4, 5)])
def test_kl_equals_the_dense_formula(kind, grid):
    values = eigen(grid, kind, 1.2, 0.7)
    generator = torch.Generator().manual_seed(0)
    gap = torch.randn(2, 3, *grid, generator=generator)
    log_variance = torch.randn(2, 3, *grid, generator=generator) - 1
    k = dense_covariance(values)
    size = k.shape[0]
    inverse, log_det = torch.linalg.inv(k), torch.linalg.slogdet(k)[1]
    expected = []
    for sample in range(2):
        total = 0.0
        for channel in range(3):
            d = gap[sample, channel].double().flatten()
            s = log_variance[sample, channel].double().flatten()
            trace = float((inverse.diagonal() * s.exp()).sum())
            total += 0.5 * (trace + float(d @ inverse @ d) - size + float(log_det) - float(s.sum()))
        expected.append(total)
    found = field.kl(gap, log_variance, values.expand(2, *grid))
    assert found.tolist() == pytest.approx(expected, rel=2e-3 if kind == "gaussian" else 1e-4)


@pytest.mark.parametrize("grid", [(7, 7), (4, 4, 3)])
def test_identity_gives_the_plain_vae_back(grid):
    channels = 2
    prior = FieldPrior(3, grid, FieldConfig(channels=channels, correlation="identity")).double()
    plain = NormalPrior(3, channels * math.prod(grid)).double()
    generator = torch.Generator().manual_seed(1)
    size = channels * math.prod(grid)
    mean, log_variance, noise = (torch.randn(5, size, generator=generator, dtype=torch.float64) for _ in range(3))
    condition = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        cells = torch.repeat_interleave(prior.condition.weight, math.prod(grid), dim=0)
        plain.condition.weight.copy_(cells)
    for name, arguments in (
        ("kl", (mean, log_variance, condition)),
        ("sample", (condition, noise)),
        ("log_density", (mean, condition)),
    ):
        a, b = getattr(prior, name)(*arguments), getattr(plain, name)(*arguments)
        assert torch.allclose(a, b, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("kind", ["exponential", "matern32", "gaussian"])
@pytest.mark.parametrize("grid", [(12, 12), (8, 8, 8)])
def test_sampled_fields_have_the_set_correlation(kind, grid):
    values = eigen(grid, kind, 1.5, 2.0)
    draws = 4000
    generator = torch.Generator().manual_seed(2)
    sampled = field.colour(torch.randn(draws, 1, *grid, generator=generator), values.expand(draws, *grid))[:, 0]
    assert float(sampled.var()) == pytest.approx(2.0, rel=0.03)
    for shift in (1, 2, 3):
        along = float((sampled * torch.roll(sampled, shift, dims=1)).mean()) / 2.0
        wanted = float(field.correlation(torch.tensor([float(shift)]), torch.tensor([1.5]), kind)[0, 0])
        assert along == pytest.approx(wanted, abs=0.03)
    white = float((sampled * torch.roll(sampled, 1, dims=1)).mean()) / 2.0
    assert white > 0.3  # a field that ignored its correlation would fail here


@pytest.mark.parametrize("kind", KINDS)
def test_kl_against_monte_carlo(kind):
    grid = (3, 3)
    prior = FieldPrior(0, grid, FieldConfig(channels=2, correlation=kind, range=1.0, variance=1.5))
    generator = torch.Generator().manual_seed(3)
    mean, log_variance = torch.randn(1, 18, generator=generator), torch.full((1, 18), -0.5)
    draws = 40_000
    noise = torch.randn(draws, 18, generator=generator)
    z = mean + torch.exp(0.5 * log_variance) * noise
    none = torch.zeros(draws, 0)
    log_q = -0.5 * (noise.square() + log_variance + math.log(2 * math.pi)).sum(1)
    terms = log_q - prior.log_density(z, none)
    error = 5 * float(terms.std()) / math.sqrt(draws)
    assert float(terms.mean()) == pytest.approx(float(prior.kl(mean, log_variance, torch.zeros(1, 0))), abs=error)


def test_a_learned_range_has_a_gradient_a_scan():
    prior = FieldPrior(0, (4, 4), FieldConfig(channels=1, learned=True))
    mean = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    losses = prior.kl(mean, torch.zeros_like(mean), torch.zeros(3, 0))
    each = [torch.autograd.grad(loss, prior.shape.weight, retain_graph=True)[0] for loss in losses]
    assert all(bool(g.abs().min() > 0) for g in each)
    assert not torch.allclose(each[0], each[1])
