"""The conditional VAE: shapes, the ELBO's terms against closed forms, and where the condition enters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from scipy.integrate import quad
from scipy.stats import logistic

from medvae.config import ModelConfig, MomentsConfig, Recipe
from medvae.errors import RunError
from medvae.nets.build import build_model, load_release, make_card, state_arrays
from medvae.nets.cvae import ConditionalVAE
from medvae.nets.likelihood import LIKELIHOODS
from medvae.nets.linear import LinearPart, design, shells
from medvae.types import Condition, ImageSpace, Intensity, ModelRelease

CONDITIONS = (
    Condition("lesion", "class", ("absent", "present")),
    Condition("age", "continuous", range=(0.0, 100.0)),
)


def space(*shape: int, masks: tuple[int, ...] = (1, 2)) -> ImageSpace:
    return ImageSpace(shape, (1.0,) * len(shape), "MR", Intensity("percentile", 1, 99), CONDITIONS, masks)


def model(where: ImageSpace, *, moments: bool = True, **options: object) -> ConditionalVAE:
    torch.manual_seed(0)
    basis = tuple(min(6, n) for n in where.spatial_shape) if moments else None
    recipe = Recipe(
        model=ModelConfig(latent_dim=4, channels=(4, 8), **options),
        moments=MomentsConfig(enabled=moments, basis_shape=basis),
    )
    return build_model(where, recipe)


def batch(where: ImageSpace, count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(count, where.channels, *where.spatial_shape, generator=g)
    x[:, 1:] = (x[:, 1:] > 0.5).float()
    condition = torch.tensor([[1.0, 0.0, 0.3], [0.0, 1.0, -0.5], [0.0, 1.0, 1.0]])[:count]
    return x, condition, torch.randn(count, 4, generator=g)


@pytest.mark.parametrize("shape", [(28, 28), (17, 23), (12, 16, 12), (9, 11, 7)])
@pytest.mark.parametrize("moments", [True, False])
@pytest.mark.parametrize("likelihood", sorted(LIKELIHOODS))
def test_loss_is_per_sample_and_reaches_every_parameter(shape, moments, likelihood):
    net = model(space(*shape), moments=moments, likelihood=likelihood)
    if moments:
        with torch.no_grad():  # away from the zero start, where a residual has no gradient beyond its last layer
            for parameter in net.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    x, condition, noise = batch(net.space)
    loss = net(x, condition, noise)
    assert loss.shape == (3,)
    assert torch.isfinite(loss).all()
    loss.sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_scan_does_not_change_its_neighbours_loss():
    net = model(space(16, 16))
    x, condition, noise = batch(net.space)
    together = net(x, condition, noise)
    alone = torch.cat([net(x[i : i + 1], condition[i : i + 1], noise[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_kl_equals_monte_carlo():
    net = model(space(16, 16), moments=False)
    x, condition, _ = batch(net.space)
    with torch.no_grad():
        mean, log_variance = net.encode(x, condition)
        kl = net.elbo(x, condition, torch.zeros(3, 4))["kl"]
        e = torch.randn(200_000, 3, 4, generator=torch.Generator().manual_seed(2))
        z = mean + (0.5 * log_variance).exp() * e
        log_q = -0.5 * (e.square() + log_variance).sum(-1)
        log_p = -0.5 * (z - net.prior_mean(condition)).square().sum(-1)
    torch.testing.assert_close(kl, (log_q - log_p).mean(0), rtol=0.02, atol=0.02)


def test_importance_weight_bounds_the_elbo():
    net = model(space(16, 16), moments=False)
    x, condition, _ = batch(net.space)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        weights = torch.stack([net.log_weight(x, condition, torch.randn(3, 4, generator=g)) for _ in range(256)])
        elbo = torch.stack([-net.elbo(x, condition, torch.randn(3, 4, generator=g))["loss"] for _ in range(256)])
    importance = torch.logsumexp(weights, 0) - math.log(256)
    assert (importance >= elbo.mean(0) - 0.05).all()
    torch.testing.assert_close(weights.mean(0), elbo.mean(0), rtol=0.02, atol=2.0)


@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_continuous_likelihoods_integrate_to_one(name):
    scale = torch.tensor(math.log(0.1))
    density = LIKELIHOODS[name]
    total, _ = quad(lambda v: math.exp(-density(torch.tensor(v), torch.tensor(0.4), scale).item()), -4, 5, limit=200)
    assert total == pytest.approx(1.0, abs=1e-3)


def test_discretised_logistic_is_a_distribution_over_256_levels():
    levels = torch.arange(256) / 255.0
    nats = LIKELIHOODS["discretised_logistic"](levels, torch.tensor(0.4), torch.tensor(math.log(0.05)))
    mass = torch.exp(-nats.double())
    assert mass.sum().item() == pytest.approx(1.0, abs=1e-4)
    expected = logistic.cdf(100.5 / 255, 0.4, 0.05) - logistic.cdf(99.5 / 255, 0.4, 0.05)
    assert mass[100].item() == pytest.approx(expected, rel=1e-3)


def test_cosine_basis_is_the_orthonormal_dct():
    part = LinearPart(space(8, 10), (8, 10), 2)
    x = torch.rand(2, 3, 8, 10)
    expected = dctn(x.numpy(), axes=(2, 3), norm="ortho")
    np.testing.assert_allclose(part.reduce(x).numpy(), expected, atol=1e-5)
    torch.testing.assert_close(part.expand(part.reduce(x)), x, rtol=1e-5, atol=1e-5)


def test_design_rows_never_exceed_norm_one():
    rows = design(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0], [0.0, 1.0, 0.0]]), CONDITIONS)
    assert torch.linalg.vector_norm(rows, dim=1).max() <= 1 + 1e-6
    only_age = design(torch.tensor([[1.0], [-1.0]]), CONDITIONS[1:])
    assert only_age.shape == (2, 2)
    assert torch.linalg.vector_norm(only_age, dim=1).max() <= 1 + 1e-6


def test_shells_cover_every_coefficient_from_low_to_high():
    shell = shells((12, 16, 12))
    assert shell.shape == (12, 16, 12)
    assert shell[0, 0, 0] == 0
    assert shell.max() == 11
    assert shell[11, 15, 11] >= shell[1, 1, 1]


def test_linear_part_reproduces_and_encodes_its_own_samples():
    part = LinearPart(space(16, 16), (6, 6), 2)
    g = torch.Generator().manual_seed(0)
    part.mean_map += torch.randn(part.mean_map.shape, generator=g)
    part.directions[0, 0, 1, 2], part.directions[1, 1, 0, 3] = 2.0, 0.5
    z = torch.randn(3, 2, generator=g)
    _, condition, _ = batch(part.space)
    torch.testing.assert_close(part.encode(part.decode(z, condition), condition), z, rtol=1e-4, atol=1e-4)


def test_a_release_walks_through_arrays_and_json_unchanged():
    where = space(16, 16)
    net = model(where).eval()
    recipe = Recipe(model=net.config, moments=MomentsConfig(basis_shape=(6, 6)))
    release = ModelRelease(state_arrays(net), make_card(where, recipe))
    again = load_release(release)
    x, condition, noise = batch(where)
    torch.testing.assert_close(again(x, condition, noise), net(x, condition, noise))


def test_weights_of_another_shape_are_refused_in_one_sentence():
    where = space(16, 16)
    net = model(where)
    card = make_card(where, Recipe(model=net.config, moments=MomentsConfig(basis_shape=(5, 5))))
    with pytest.raises(RunError, match="do not fit"):
        load_release(ModelRelease(state_arrays(net), card))


@pytest.mark.parametrize("shape", [(12, 10), (8, 8, 8)])
def test_a_decoder_that_was_never_trained_is_not_run_to_draw(shape, monkeypatch):
    """The draw is the same to the bit as with the network; and a trained network is run."""
    net = model(space(*shape))
    _, condition, _ = batch(net.space)
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = net.decode(net.prior_sample(condition, noise), condition)
    run = net.decoder.forward
    monkeypatch.setattr(net.decoder, "forward", None)
    assert torch.equal(net.draw(condition, torch.Generator().manual_seed(0)), expected)
    monkeypatch.setattr(net.decoder, "forward", run)
    with torch.no_grad():
        next(iter(net.decoder.final_parameters())).fill_(0.1)
    assert not torch.equal(net.draw(condition, torch.Generator().manual_seed(0)), expected)
