"""Mixtures by class: sensitivity in groups, what they recover, noisy counts, and the rule that chooses them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvae.config import Recipe, TrainConfig, build
from medvae.dp.noise import seeded_noise
from medvae.errors import ConfigError
from medvae.nets.linear import LinearPart, cosine_matrix
from medvae.nets.mixture import MixturePart, MixtureShapes, cell_count, cell_of
from medvae.train import mixture, noisy_sums
from medvae.train.mixture import Grouped, release_names
from medvae.train.moment_shapes import MomentShapes
from medvae.train.moments import fit_moments
from medvae.train.noisy_sums import grouped_sum
from medvae.train.planning import make_plan, moment_shapes
from medvae.types import Batch, Condition, ImageSpace, Intensity

SPACE = ImageSpace((16, 16), (1.0, 1.0), "XR", Intensity("window", 0, 1), (Condition("kind", "class", ("a", "b")),))
SHAPES = MomentShapes((6, 6), (3, 3), 4, 0.5, MixtureShapes(2, (4, 4)), lloyd_steps=4)


class Source:
    """An in-memory cohort with the store's interface."""

    def __init__(self, x, condition, patient, space=SPACE):
        self.x, self.condition, self.patient, self.space = x, condition, patient, space

    def rows(self, patients):
        return np.nonzero(np.isin(self.patient, patients))[0]

    def load(self, rows):
        return Batch(self.x[rows], self.condition[rows], self.patient[rows])


def two_kinds_of_each(patients: int, seed: int = 0) -> Source:
    """Each class has two shapes, four in all: +-u around the mean of a, +-v around the mean of b."""
    rng = np.random.default_rng(seed)
    kind, sign = rng.integers(0, 2, patients), rng.choice([-1.0, 1.0], patients)
    rows = cosine_matrix(4, 16)
    shapes = np.stack([np.outer(rows[1], rows[0]), np.outer(rows[0], rows[2])])
    x = 0.5 + 2.0 * sign[:, None, None] * shapes[kind] + 0.01 * rng.standard_normal((patients, 16, 16))
    return Source(x[:, None].astype(np.float32), np.eye(2, dtype=np.float32)[kind], np.arange(patients))


def fitted(source: Source, shapes: MomentShapes, sigma: float) -> LinearPart:
    noise = seeded_noise(1)
    return fit_moments(source, source.patient, dict.fromkeys(shapes.releases, sigma), shapes, noise=noise)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0, 1e6))
def test_a_patient_whose_scans_fall_into_several_groups_still_counts_as_one(seed, scans, size):
    rng = np.random.default_rng(seed)
    vectors = torch.as_tensor(rng.standard_normal((scans, 5)) * size)
    made = Grouped(vectors, torch.as_tensor(rng.integers(0, 4, scans)), 4)
    assert float(torch.linalg.vector_norm(grouped_sum(made, np.zeros(scans, np.int64)))) <= 1 + 1e-12


def test_the_worst_patient_reaches_the_bound_so_it_is_tight():
    made = Grouped(torch.full((3, 4), 7.0), torch.tensor([2, 2, 2]), 4)
    total = grouped_sum(made, np.zeros(3, np.int64)).view(4, 4)
    assert float(total[2].norm()) == pytest.approx(1.0)
    assert float(total[[0, 1, 3]].abs().max()) == 0.0


def test_two_shapes_of_a_class_become_two_components():
    part = fitted(two_kinds_of_each(600), SHAPES, 0.5)
    torch.testing.assert_close(part.mixture.weights, torch.full((2, 2), 0.5), atol=0.06, rtol=0)
    means = part.mixture.means.view(2, 2, 4, 4)
    # Of class a the coefficient (1, 0) is +-2, of class b it is (0, 2).
    torch.testing.assert_close(means[0, :, 1, 0].sort().values, torch.tensor([-2.0, 2.0]), atol=0.15, rtol=0)
    torch.testing.assert_close(means[1, :, 0, 2].sort().values, torch.tensor([-2.0, 2.0]), atol=0.15, rtol=0)
    one = fitted(two_kinds_of_each(600), replace(SHAPES, mixture=MixtureShapes(1, (4, 4))), 0.5)
    # One Gaussian has to say the same by a direction.
    assert float(one.mixture.means.abs().max()) < 0.3
    assert float(one.mixture.factors[0, 0, 0].view(4, 4)[1, 0].abs()) == pytest.approx(2.0, abs=0.3)


def test_drawn_samples_have_the_mixtures_moments():
    part = MixturePart(SPACE, MixtureShapes(2, (2, 2)))
    part.weights.copy_(torch.tensor([[0.25, 0.75], [1.0, 0.0]]))
    part.means[0, 0, 0], part.means[0, 1, 0], part.means[1, 0, 1] = -3.0, 1.0, 2.0
    part.factors[1, 0, 0, 2] = 0.5
    condition = torch.eye(2).repeat(20_000, 1)
    drawn = part.draw(condition, torch.Generator().manual_seed(3)).flatten(1)
    a, b = drawn[::2], drawn[1::2]
    assert float((a[:, 0] < 0).float().mean()) == pytest.approx(0.25, abs=0.015)
    assert float(a[:, 0].mean()) == pytest.approx(0.0, abs=0.06)
    torch.testing.assert_close(b.std(0), torch.tensor([0.0, 0.0, 0.5, 0.0]), atol=0.015, rtol=0)
    second = torch.einsum("ncd,ncd->cd", part.patterns().flatten(2), part.patterns().flatten(2))[0]
    torch.testing.assert_close(second, drawn.square().mean(0), atol=0.1, rtol=0)


def test_cells_are_the_combinations_of_classes_and_covariates_add_none():
    conditions = (
        Condition("kind", "class", ("a", "b")),
        Condition("age", "continuous", range=(0.0, 1.0)),
        Condition("site", "class", ("x", "y", "z")),
    )
    assert cell_count(conditions) == 6
    rows = torch.tensor([[1, 0, 0.3, 0, 0, 1.0], [0, 1, -1.0, 1, 0, 0]])
    assert cell_of(rows, conditions).tolist() == [2, 3]
    assert cell_count(()) == 1
    assert cell_of(torch.zeros(3, 0), ()).tolist() == [0, 0, 0]


@pytest.mark.parametrize("true_counts", [False, True])
def test_weights_are_noisy_and_a_build_with_the_true_shares_is_found(true_counts, monkeypatch):
    source = two_kinds_of_each(600)
    true = fitted(source, SHAPES, 0.0).mixture.weights
    if true_counts:
        monkeypatch.setattr(mixture, "_store", lambda part, *_: part.weights.copy_(true))
    found = fitted(source, SHAPES, 4.0).mixture.weights
    leaked = bool(((found.sort(1).values - true.sort(1).values).abs() < 1e-6).all())
    assert leaked == true_counts


def test_a_component_that_noise_hides_has_no_weight():
    part = fitted(two_kinds_of_each(40), SHAPES, 50.0)
    assert torch.isfinite(part.mixture.means).all()
    torch.testing.assert_close(part.mixture.weights.sum(1), torch.ones(2))
    assert float(part.mixture.factors.abs().max()) == 0.0


def test_lloyd_is_skipped_for_one_component():
    assert release_names(1, 4) == ("mixture",)
    assert release_names(2, 2) == ("clusters_1", "clusters_2", "mixture")


@pytest.mark.parametrize(
    ("patients", "epsilon", "mixture_on", "sgd_on"),
    [(100, 8, False, False), (5_000, 8, True, False), (60_000, 10, True, False), (60_000, 1, True, False)],
)
def test_the_rule_gives_a_mixture_where_a_class_can_carry_it(patients, epsilon, mixture_on, sgd_on):
    plan = make_plan(patients, replace(SPACE, spatial_shape=(28, 28)), build(TrainConfig, dp_epsilon=epsilon))
    assert plan.recipe.mixture.enabled is mixture_on
    assert plan.recipe.dpsgd.enabled is sgd_on
    assert plan.privacy.epsilon <= epsilon
    assert {m.name for m in plan.privacy.mechanisms} >= ({"mixture"} if mixture_on else set())


def test_components_grow_with_patients_and_epsilon():
    def components(patients: int, epsilon: float) -> int:
        plan = make_plan(patients, replace(SPACE, spatial_shape=(28, 28)), build(TrainConfig, dp_epsilon=epsilon))
        return plan.recipe.mixture.components or 0

    assert components(5_000, 8) <= components(20_000, 8) <= components(60_000, 8)
    assert components(60_000, 1) < components(60_000, 10)


def test_switching_the_mixture_off_gives_its_budget_to_the_others():
    space = replace(SPACE, spatial_shape=(28, 28))
    on = make_plan(5_000, space, build(TrainConfig, dp_epsilon=8))
    off_recipe = build(Recipe, mixture={"enabled": False}, dpsgd={"enabled": False})
    off = make_plan(5_000, space, build(TrainConfig, dp_epsilon=8, recipe=off_recipe))
    noise = {m.name: m.noise_multiplier for m in on.privacy.mechanisms}
    alone = {m.name: m.noise_multiplier for m in off.privacy.mechanisms}
    assert set(noise) > set(alone)
    assert all(alone[name] < noise[name] for name in alone)
    assert off.privacy.epsilon == pytest.approx(8, rel=0.01) == on.privacy.epsilon


def test_a_chunk_of_any_size_gives_the_same_mixture(monkeypatch):
    source = two_kinds_of_each(60)
    whole = fitted(source, SHAPES, 0.0)
    monkeypatch.setattr(noisy_sums, "CHUNK_VOXELS", 7 * 256)
    parts = fitted(source, SHAPES, 0.0)
    torch.testing.assert_close(parts.mixture.means, whole.mixture.means, atol=1e-4, rtol=1e-4)


def test_clips_come_from_constants_where_a_histogram_would_be_all_noise():
    def plan(patients: int, epsilon: float):
        return make_plan(patients, SPACE, build(TrainConfig, dp_epsilon=epsilon))

    few, alone, many = plan(100, 0.5), plan(100, 1), plan(100, 8)
    assert few.recipe.moments.public_clips is True
    assert alone.recipe.moments.public_clips is many.recipe.moments.public_clips is False
    assert [m.name for m in few.privacy.mechanisms] == ["means"]
    assert [m.name for m in alone.privacy.mechanisms] == ["norms", "means"]
    assert len(many.privacy.mechanisms) == 5
    # What the histograms would have cost goes to the others: all of epsilon is used.
    assert few.privacy.epsilon == pytest.approx(0.5, rel=0.01)
    assert alone.privacy.epsilon == pytest.approx(1, rel=0.01)
    # Who asked for classes is told where they are asked for in vain.
    assert [any("in name only" in w for w in made.warnings) for made in (few, alone, many)] == [True, True, False]


def test_all_that_a_plan_charges_is_released_and_nothing_else():
    for patients, epsilon, masks in ((100, 0.5, ()), (100, 1, (1,)), (100, 8, (1,)), (9_000, 8, ())):
        plan = make_plan(patients, replace(SPACE, mask_labels=masks), build(TrainConfig, dp_epsilon=epsilon))
        charged = [m.name for m in plan.privacy.mechanisms if m.name != "dpsgd"]
        assert charged == list(moment_shapes(plan.recipe).releases)


def test_public_clips_bound_a_patient_as_the_histograms_do():
    shapes = replace(SHAPES, public_clips=True)
    source = two_kinds_of_each(50)
    source.x = source.x * np.float32(1e4)
    part = fitted(source, shapes, 1.0)
    assert shapes.releases == ("centre", "means", "second", *release_names(2, 4))
    assert torch.isfinite(part.mean_map).all()
    assert torch.isfinite(part.mixture.means).all()


@pytest.mark.parametrize("box", [(4,), (4, 400), (4, 4, 4)])
def test_a_box_that_does_not_fit_is_refused_in_a_sentence(box):
    recipe = build(Recipe, mixture={"enabled": True, "box": box})
    with pytest.raises(ConfigError, match=r"mixture\.box is"):
        make_plan(5_000, SPACE, build(TrainConfig, dp_epsilon=8, recipe=recipe))


def test_a_mixture_asked_for_with_hardly_any_patients_is_as_small_as_can_be():
    recipe = build(Recipe, mixture={"enabled": True})
    plan = make_plan(12, SPACE, build(TrainConfig, dp_epsilon=0.5, recipe=recipe))
    assert plan.recipe.mixture.box == (1, 1)
    assert plan.recipe.mixture.components == 1
