"""The fitted priors over codes against quadrature and Monte Carlo: divergence from a posterior, and what is drawn."""

from __future__ import annotations

import math

import pytest
import torch

from medvae.config import PriorConfig
from medvae.nets.codes import CodeFlow, CodeMixture, code_radius, make_code_prior
from medvae.types import Condition, ImageSpace, Intensity

SPACE = ImageSpace((8, 8), (1.0, 1.0), "MR", Intensity("percentile", 1, 99), (Condition("side", "class", ("a", "b")),))
DRAWS = 60_000
# A grid over the plane that holds all of a density, and the area of its cells.
AXIS = torch.linspace(-7, 7, 401, dtype=torch.float64)
PLANE = torch.cartesian_prod(AXIS, AXIS)
CELL = float(AXIS[1] - AXIS[0]) ** 2


def flow() -> CodeFlow:
    prior = make_code_prior(SPACE, 2, PriorConfig(kind="flow", layers=3, hidden=6))
    assert isinstance(prior, CodeFlow)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return prior.double()


def mixture(kind: str) -> CodeMixture:
    prior = make_code_prior(SPACE, 2, PriorConfig(kind=kind, components=3))
    assert isinstance(prior, CodeMixture)
    g = torch.Generator().manual_seed(4)
    part, scale = prior.mixture, code_radius(2)
    part.weights.copy_(torch.rand(part.weights.shape, generator=g) + 0.2)
    part.means.copy_(torch.randn(part.means.shape, generator=g) / scale)
    part.factors.copy_((torch.randn(part.factors.shape, generator=g) * 0.3 + 0.5 * torch.eye(2)) / scale)
    return prior


def mixture_log_density(prior: CodeMixture, z: torch.Tensor, label: int) -> torch.Tensor:
    """log p(z | class) by its definition: weights, means and F' F, in units of the radius."""
    part, scale = prior.mixture, code_radius(2)
    terms = []
    weights = part.weights[label] / part.weights[label].sum()
    for w, mean, factor in zip(weights, part.means[label], part.factors[label], strict=True):
        covariance = (factor.T @ factor).double() * scale**2
        normal = torch.distributions.MultivariateNormal(mean.double() * scale, covariance)
        terms.append(w.double().log() + normal.log_prob(z))
    return torch.logsumexp(torch.stack(terms), 0)


def log_density(kind: str, label: int):
    """The prior's log density over the plane, and draws from the prior."""
    condition = torch.eye(2)[[label]]
    generator = torch.Generator().manual_seed(5)
    if kind == "flow":
        net = flow()
        z = torch.randn(DRAWS, 2, generator=generator, dtype=torch.float64)
        for coupling in net.couplings:
            z = coupling(z, condition.double().expand(DRAWS, -1))
        return (lambda x: net.log_density(x, condition.double().expand(len(x), -1))), z
    prior = mixture(kind)
    drawn = prior.sample(condition.expand(DRAWS, -1), generator).double()
    return (lambda x: mixture_log_density(prior, x, label)), drawn


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "flow"])
@pytest.mark.parametrize("label", [0, 1])
def test_kl_of_a_posterior_by_monte_carlo_equals_quadrature(kind, label):
    density, _ = log_density(kind, label)
    mean, sd = torch.tensor([0.4, -0.3], dtype=torch.float64), torch.tensor([0.6, 0.9], dtype=torch.float64)

    def log_q(z: torch.Tensor) -> torch.Tensor:
        return -(0.5 * ((z - mean) / sd).square() + sd.log() + 0.5 * math.log(2 * math.pi)).sum(1)

    with torch.no_grad():
        p = density(PLANE)
        assert float(p.exp().sum() * CELL) == pytest.approx(1.0, abs=5e-3)
        q = log_q(PLANE)
        exact = float((q.exp() * (q - p)).sum() * CELL)
        z = mean + sd * torch.randn(DRAWS, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        terms = log_q(z) - density(z)
    assert exact > 0
    assert float(terms.mean()) == pytest.approx(exact, abs=5 * float(terms.std()) / math.sqrt(DRAWS) + 1e-3)


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "flow"])
@pytest.mark.parametrize("label", [0, 1])
def test_draws_follow_the_density(kind, label):
    density, drawn = log_density(kind, label)
    other, _ = log_density(kind, 1 - label)
    with torch.no_grad():
        p = density(PLANE)
        negative_entropy = float((p.exp() * p).sum() * CELL)
        own, wrong = density(drawn), other(drawn)
    error = 5 * float(own.std()) / math.sqrt(DRAWS) + 1e-3
    assert float(own.mean()) == pytest.approx(negative_entropy, abs=error)
    assert float(wrong.mean()) < negative_entropy - error  # draws of the other class would be seen
