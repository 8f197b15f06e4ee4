"""SRL-VAE: the attack, the second training by patient on both engines, and what it is charged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_variants import SHAPES, batch, check_against_the_loop, variant

from medvae.config import IngestConfig, ModelConfig, MomentsConfig, Recipe, TrainConfig, build
from medvae.crosscheck import agree
from medvae.nets.build import build_model, load_release
from medvae.nets.cvae import ConditionalVAE
from medvae.nets.robust import Smoothed, attack
from medvae.synth.store import read_release
from medvae.train.planning import make_plan
from medvae.train.run import train
from medvae.train.stages import PerturbedSource
from medvae.types import Batch, ImageSpace, Intensity
from medvae.vault.ingest import ingest
from medvae.vault.store import open_cohort

RADIUS = 0.05
BASES = ("anneal", "attention", "field, learned", "class_decoders", "adversary")


def perturbed(model: ConditionalVAE, made: Batch) -> Batch:
    x, condition = torch.from_numpy(made.x), torch.from_numpy(made.condition)
    moved = attack(model, x, condition, RADIUS, 2)
    return made._replace(x=torch.cat([x, moved], dim=1).numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_attack_stays_in_its_ball_and_hurts_more_than_chance(shape):
    model, _ = variant("anneal", shape)
    made, _ = batch(model, (1,) * 6)
    x, condition = torch.from_numpy(made.x), torch.from_numpy(made.condition)
    moved = attack(model, x, condition, RADIUS, 3)
    assert float((moved - x).abs().max()) <= RADIUS + 1e-6
    assert float(moved[:, 0].min()) >= 0
    assert float(moved[:, 0].max()) <= 1
    assert torch.equal(moved[:, 1:], x[:, 1:])

    def error(seen: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.reconstruction(x, model.encode(seen, condition)[0], condition)

    signs = torch.sign(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    chance = torch.cat([(x + RADIUS * signs)[:, :1].clamp(0, 1), x[:, 1:]], dim=1)
    gained, by_chance = error(moved) - error(x), error(chance) - error(x)
    assert bool((gained > 0).all())
    assert bool((gained > by_chance).all())


def test_a_scan_s_perturbation_does_not_see_its_neighbours():
    model, _ = variant("attention", SHAPES[0])
    made, _ = batch(model, (1, 1, 1))
    x, condition = torch.from_numpy(made.x), torch.from_numpy(made.condition)
    together = attack(model, x, condition, RADIUS, 3)
    alone = torch.cat([attack(model, x[[i]], condition[[i]], RADIUS, 3) for i in range(3)])
    # Where a slope is zero but for rounding, its sign may differ.
    assert float(((together - alone).abs() > 1e-6).float().mean()) < 0.01


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("engine", ["bookkeeping", "functorch"])
def test_the_second_training_equals_the_loop_over_patients(name, shape, engine):
    model, _ = variant(name, shape)
    net = Smoothed(model, 1.5)
    with torch.no_grad():  # away from the model it was, else the codes' distance has no gradient
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    made, latent = batch(model, (1, 3, 2))
    check_against_the_loop(net, perturbed(model, made), latent, engine)


def test_the_model_it_was_is_frozen_and_first_agrees_with_it():
    model, _ = variant("anneal", SHAPES[0])
    made, latent = batch(model, (1, 1))
    x, condition = torch.from_numpy(made.x), torch.from_numpy(made.condition)
    far, near = Smoothed(model, 100.0), Smoothed(model, 0.0)
    assert torch.allclose(far(x, condition, latent), near(x, condition, latent), rtol=1e-6)
    assert torch.allclose(near(x, condition, latent), model(x, condition, latent), rtol=1e-6)
    assert {n.split(".")[0] for n, p in far.named_parameters() if p.requires_grad} == {"model"}


def blobs(count: int) -> torch.Tensor:
    """Bright squares at four places."""
    x = torch.full((count, 1, 12, 12), 0.1)
    for i in range(count):
        a, b = divmod(i % 4, 2)
        x[i, 0, 1 + 6 * a : 5 + 6 * a, 1 + 6 * b : 5 + 6 * b] = 0.9
    return (x + 0.02 * torch.randn(x.shape)).clamp(0, 1)


def test_it_makes_reconstructions_stand_an_attack():
    torch.manual_seed(0)
    where = ImageSpace((12, 12), (1.0, 1.0), "MR", Intensity("percentile", 1, 99), ())
    recipe = Recipe(model=ModelConfig(latent_dim=3, channels=(8, 16)), moments=MomentsConfig(enabled=False))
    model, x = build_model(where, recipe), blobs(64)
    none = torch.zeros(64, 0)

    def descend(net: torch.nn.Module, steps: int, attacked: bool) -> None:
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(steps):
            seen = torch.cat([x, attack(model, x, none, 0.1, 3)], dim=1) if attacked else x
            optimizer.zero_grad()
            net(seen, none, torch.randn(64, 3)).mean().backward()
            optimizer.step()

    def errors() -> tuple[float, float]:
        with torch.no_grad():
            clean = model.decode(model.encode(x, none)[0], none)
            spoiled = model.decode(model.encode(attack(model, x, none, 0.1, 5), none)[0], none)
        return float((clean - x).square().mean()), float((spoiled - x).square().mean())

    descend(model, 80, attacked=False)
    clean, spoiled = errors()
    descend(Smoothed(model, 1.0), 40, attacked=True)
    clean_after, spoiled_after = errors()
    assert spoiled > 1.2 * clean
    assert spoiled_after < 0.8 * spoiled
    assert clean_after < 1.5 * clean


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robust")
    rng = np.random.default_rng(0)
    np.savez(folder / "source.npz", images=rng.integers(0, 255, (60, 12, 12), dtype=np.uint8))
    ingest(folder / "source.npz", folder / "cohort", build(IngestConfig, holdout=0.2))
    return folder / "cohort"


def config(enabled: bool = True, steps: int = 4) -> TrainConfig:
    recipe = {
        "model": {"latent_dim": 2, "channels": (4,)},
        "dpsgd": {"enabled": True, "steps": 3, "sample_rate": 0.5, "learning_rate": 1e-3},
        "robust": {"enabled": enabled, "steps": steps},
        "canaries": {"count": 50, "patterns": 4},
    }
    return TrainConfig(dp_epsilon=8.0, recipe=build(Recipe, **recipe), noise_source="seeded")


def test_its_steps_are_charged_like_any_others(cohort):
    space = open_cohort(cohort).reveal().space
    plan = make_plan(500, space, config(steps=100)).privacy
    (own,) = [m for m in plan.mechanisms if m.name == "robust"]
    assert own.count == 100
    assert own.noise_multiplier > 0
    found = agree(plan.mechanisms, plan.delta)
    assert found.ok
    assert found.pld == plan.epsilon <= 8
    plain = make_plan(500, space, config(enabled=False)).privacy
    noise = [next(m.noise_multiplier for m in p.mechanisms if m.name == "dpsgd") for p in (plain, plan)]
    assert noise[0] < noise[1]


def test_a_whole_run_with_canaries(cohort, tmp_path):
    claim = train(cohort, tmp_path / "run", config())
    assert "robust" in [m["name"] for m in claim["mechanisms"]]
    watched = json.loads((tmp_path / "run" / "canary.json").read_text())
    assert "robust" in json.dumps(watched)
    model = load_release(read_release(tmp_path / "run" / "model"))
    assert torch.isfinite(model.draw(torch.zeros(2, 0), torch.Generator().manual_seed(0))).all()


def test_the_source_attacks_at_the_weights_of_the_moment(cohort):
    store = open_cohort(cohort).reveal()
    model = build_model(store.space, Recipe(model=ModelConfig(latent_dim=2, channels=(4,)), moments={"enabled": False}))
    twin = build_model(store.space, Recipe(model=model.config, moments={"enabled": False}))
    source = PerturbedSource(store, model, twin, RADIUS, 2)
    rows = source.rows(np.arange(5))
    made = source.load(rows)
    assert made.x.shape == (5, source.space.channels, 12, 12)
    assert np.array_equal(made.x[:, :1], store.load(rows).x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    again = source.load(rows)
    assert not np.array_equal(made.x, again.x)
    x, none = torch.from_numpy(made.x[:, :1]), torch.zeros(5, 0)
    assert np.array_equal(again.x[:, 1:], attack(model, x, none, RADIUS, 2).numpy())
