"""Variants of the conditional VAE: each is per-sample, each passes the per-patient oracle, each does what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medvae.config import MixtureConfig, ModelConfig, MomentsConfig, Recipe, build
from medvae.errors import ConfigError
from medvae.nets.adversary import Critic, reverse
from medvae.nets.build import build_model, load_release, make_card, state_arrays
from medvae.nets.cvae import ConditionalVAE
from medvae.train.engine.memory import Limits
from medvae.train.engine.module import BookkeepingSampler
from medvae.train.engine.tuner import Tuner
from medvae.train.gradient import ROUNDING_MARGIN, FunctorchSampler, PlainSampler
from medvae.train.rule import resolve
from medvae.types import Batch, Condition, ImageSpace, Intensity, ModelRelease

VARIANTS: dict[str, dict[str, object]] = {
    "attention": {"attention": True},
    "class_decoders": {"class_decoders": True},
    "adversary": {"adversary": 0.1},
    "anneal": {"schedule": "anneal", "beta": 4.0},
    "capacity": {"schedule": "capacity", "capacity": 3.0},
    "field": {"latent": "field", "field": {"channels": 2}},
    "field, learned": {"latent": "field", "field": {"channels": 2, "correlation": "matern32", "learned": True}},
    "semi_supervised": {"semi_supervised": True, "label_weight": 2.0},
    "semi_supervised, field, class_decoders": {
        "semi_supervised": True,
        "latent": "field",
        "field": {"channels": 2},
        "class_decoders": True,
    },
    "all": {
        "attention": True,
        "class_decoders": True,
        "adversary": 0.1,
        "latent": "field",
        "field": {"channels": 2, "correlation": "gaussian"},
    },
}
SHAPES = [(8, 12), (6, 8, 4)]


def space(*shape: int, missing: bool = False) -> ImageSpace:
    side = Condition("side", "class", ("a", "b", "missing") if missing else ("a", "b"))
    return ImageSpace(shape, (1.0,) * len(shape), "MR", Intensity("percentile", 1, 99), (side,), (1,))


def variant(name: str, shape: tuple[int, ...]) -> tuple[ConditionalVAE, Recipe]:
    chosen = build(ModelConfig, channels=(4, 8), latent_dim=3, **VARIANTS[name])
    recipe = Recipe(model=chosen, moments=MomentsConfig(enabled=False), mixture=MixtureConfig(enabled=False))
    where = space(*shape, missing=chosen.semi_supervised)
    recipe = resolve(recipe, 100, where)
    torch.manual_seed(0)
    model = build_model(where, recipe)
    with torch.no_grad():  # off the zero start, where one layer hides another
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.progress.fill_(0.3)
    return model, recipe


def batch(model: ConditionalVAE, lengths: tuple[int, ...]) -> tuple[Batch, Tensor]:
    generator = torch.Generator().manual_seed(1)
    scans = sum(lengths)
    x = torch.rand(scans, 2, *model.space.spatial_shape, generator=generator)
    x[:, 1:] = (x[:, 1:] > 0.5).float()
    classes = model.space.condition_width
    condition = torch.eye(classes)[torch.randint(0, classes, (scans,), generator=generator)]
    patient = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    latent = torch.randn(scans, model.latent_dim, generator=generator)
    return Batch(x.numpy(), condition.numpy(), patient.numpy()), latent


def clipped_by_definition(
    model: ConditionalVAE, made: Batch, latent: Tensor, bound: float
) -> tuple[Tensor, list[float]]:
    """One plain backward a patient, one norm over all parameters, clip at the bound less its margin, sum."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total, norms = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64), []
    for patient in sorted(set(made.patient.tolist())):
        rows = (torch.from_numpy(made.patient) == patient).nonzero()[:, 0]
        loss = model(torch.from_numpy(made.x)[rows], torch.from_numpy(made.condition)[rows], latent[rows]).mean()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = [torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(found, parameters, strict=True)]
        gradient = torch.cat(flat).double()
        norms.append(float(gradient.norm()))
        total += gradient * min(1.0, bound * (1 - ROUNDING_MARGIN) / norms[-1])
    return total, norms


def check_against_the_loop(net, made, latent, engine):
    """Hold an engine to clipped_by_definition, and its released norm to the bound; made has at least one patient."""
    expected, norms = clipped_by_definition(net, made, latent, 0.1)
    if engine == "functorch":
        sampler = FunctorchSampler(net, max_grad_norm=0.1, max_scans=4)
    else:
        sampler = BookkeepingSampler(net, max_grad_norm=0.1, limits=Limits(64, 2**30, 2.0**30), tuner=Tuner())
    sums, stats = sampler.clipped_sum(made, latent)
    found = torch.cat([s.double().flatten() for s in sums])
    assert stats.reveal().norms.tolist() == pytest.approx(norms, rel=1e-5)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    # The sum of three clipped patients, and of one: never more than the bound each.
    one = Batch(made.x[:1], made.condition[:1], made.patient[:1])
    alone, _ = sampler.clipped_sum(one, latent[:1])
    assert float(torch.cat([s.flatten() for s in alone]).norm()) <= 0.1


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("engine", ["bookkeeping", "functorch"])
def test_every_variant_equals_the_loop_over_patients(name, shape, engine):
    model, _ = variant(name, shape)
    check_against_the_loop(model, *batch(model, (1, 3, 2)), engine)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_scan_s_loss_does_not_see_its_neighbours(name):
    model, _ = variant(name, SHAPES[0])
    made, latent = batch(model, (1, 1, 1))
    x, condition = torch.from_numpy(made.x), torch.from_numpy(made.condition)
    together = model(x, condition, latent)
    alone = torch.cat([model(x[i : i + 1], condition[i : i + 1], latent[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_release_and_back(name):
    model, recipe = variant(name, SHAPES[0])
    again = load_release(ModelRelease(state_arrays(model), make_card(model.space, recipe)))
    condition = torch.eye(model.space.condition_width)
    drawn = [m.draw(condition, torch.Generator().manual_seed(5)).detach() for m in (model, again)]
    assert torch.equal(*drawn)
    assert float(drawn[0].min()) >= 0
    assert float(drawn[0].max()) <= 1


def test_a_class_decoder_is_moved_by_its_own_class_only():
    model, _ = variant("class_decoders", SHAPES[0])
    made, latent = batch(model, (1, 1, 1, 1))
    condition = torch.tensor([[1.0, 0.0]]).expand(4, 2).numpy()
    sums, _ = PlainSampler(model, max_scans=8).clipped_sum(made._replace(condition=condition), latent)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    moved = {n: float(s.abs().max()) for n, s in zip(names, sums, strict=True)}
    assert all(v == 0 for n, v in moved.items() if n.startswith("decoder.decoders.1."))
    assert any(v > 0 for n, v in moved.items() if n.startswith("decoder.decoders.0."))


def test_class_decoders_without_a_class_are_refused():
    where = ImageSpace((8, 8), (1.0, 1.0), "MR", Intensity("percentile", 1, 99), ())
    with pytest.raises(ConfigError, match="class_decoders needs a condition with classes"):
        ConditionalVAE(where, ModelConfig(latent_dim=2, channels=(4,), class_decoders=True))


def test_a_field_with_the_closed_form_is_refused():
    with pytest.raises(ConfigError, match="field latent has no closed form"):
        build(Recipe, model={"latent": "field"})


def test_schedules_weigh_the_kl_as_told():
    for name, at, weight in (("anneal", 0.25, 0.5 * 4.0), ("anneal", 0.9, 4.0)):
        model, _ = variant(name, SHAPES[0])
        model.progress.fill_(at)
        made, latent = batch(model, (2,))
        terms = model.elbo(torch.from_numpy(made.x), torch.from_numpy(made.condition), latent)
        expected = terms["reconstruction"] + weight * terms["kl"]
        assert torch.allclose(terms["loss"], expected, rtol=1e-5)
    model, _ = variant("capacity", SHAPES[0])
    made, latent = batch(model, (2,))
    terms = model.elbo(torch.from_numpy(made.x), torch.from_numpy(made.condition), latent)
    assert torch.allclose(terms["loss"], terms["reconstruction"] + (terms["kl"] - 0.3 * 3.0).abs(), rtol=1e-5)


def test_the_two_players_pull_in_opposite_directions():
    torch.manual_seed(0)
    critic = Critic(1, (8, 8), (4,), units=0, groups=2)
    real, made = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8, requires_grad=True)
    critic.loss(real, made, 1.0).sum().backward()
    pulled = made.grad
    plain = made.detach().clone().requires_grad_()
    torch.nn.functional.softplus(critic(plain)).sum().backward()
    assert pulled is not None
    assert plain.grad is not None
    assert torch.allclose(pulled, -plain.grad, atol=1e-7)
    assert torch.equal(reverse(real, 2.0), real)
