"""Sampling from a release: shapes, determinism, conditions, and what texture does to masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from medvae.config import ModelConfig, MomentsConfig, Recipe
from medvae.errors import InputError, RunError
from medvae.nets.build import build_model, make_card, state_arrays
from medvae.nets.linear import SHELLS, shells
from medvae.synth.sample import generate, spread_conditions
from medvae.synth.store import read_release, write_release
from medvae.synth.texture import draw_labels, make_texture
from medvae.types import Condition, ImageSpace, Intensity, ModelRelease

SPACE = ImageSpace(
    (16, 20),
    (1.0, 1.0),
    "MR",
    Intensity("percentile", 1, 99),
    (Condition("kind", "class", ("a", "b", "c")), Condition("age", "continuous", range=(0.0, 100.0))),
    (3, 7),
)


@pytest.fixture
def release() -> ModelRelease:
    torch.manual_seed(0)
    recipe = Recipe(model=ModelConfig(latent_dim=4, channels=(4, 8)), moments=MomentsConfig(basis_shape=(6, 6)))
    model = build_model(SPACE, recipe)
    model.linear.mean_map[:, :2, 0, 0] = 8.0
    model.linear.spectrum[:] = 0.05 * torch.eye(3)
    return ModelRelease(state_arrays(model), make_card(SPACE, recipe))


def test_generate_gives_what_the_space_says(release):
    rows = spread_conditions(SPACE, 7, seed=1)
    cohort = generate(release, rows, seed=2, batch_size=3)
    assert cohort.images.shape == cohort.masks.shape == (7, 16, 20)
    assert cohort.images.min() >= 0
    assert cohort.images.max() <= 1
    assert set(np.unique(cohort.masks)) <= {0, 3, 7}
    assert cohort.masks.any()
    assert len(cohort.conditions) == 7


def test_same_seed_same_cohort_other_seed_another(release):
    rows = spread_conditions(SPACE, 4, seed=1)
    first, again, other = (generate(release, rows, seed=s).images for s in (2, 2, 3))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_conditions_are_spread_evenly_and_within_their_public_range():
    rows = spread_conditions(SPACE, 30, seed=0)
    assert {k: sum(r["kind"] == k for r in rows) for k in "abc"} == {"a": 10, "b": 10, "c": 10}
    assert all(0 <= r["age"] <= 100 for r in rows)


def test_an_unknown_class_is_one_sentence(release):
    with pytest.raises(InputError, match="no class 'z'"):
        generate(release, [{"kind": "z", "age": 3.0}], seed=0)


def test_thresholded_fields_keep_each_voxels_probability():
    shape = (24, 24)
    spectrum = np.zeros((SHELLS, 2, 2), np.float32)
    spectrum[:6, 1, 1] = 1.0
    texture = make_texture(spectrum, np.zeros_like(spectrum), np.zeros(1, np.float32), shape)
    wanted = np.linspace(0.1, 0.9, 24, dtype=np.float32)[None, :, None] * np.ones((1, 24, 24), np.float32)
    rng = np.random.default_rng(0)
    drawn = np.mean([draw_labels(wanted, texture, rng) > 0 for _ in range(1500)], axis=0)
    # A unit field's variance is exact on average over voxels; at an edge it is up to twice that, hence the margin.
    assert np.abs(drawn.mean(1) - wanted[0].mean(1)).max() < 0.08
    assert shells(shape).shape == shape


def test_a_release_is_read_back_and_an_altered_one_is_refused(release, tmp_path):
    write_release(tmp_path, release)
    again = read_release(tmp_path)
    assert again.space == SPACE
    blob = bytearray((tmp_path / "weights.safetensors").read_bytes())
    blob[-1] ^= 1
    (tmp_path / "weights.safetensors").write_bytes(bytes(blob))
    with pytest.raises(RunError, match="do not match"):
        read_release(tmp_path)


def test_another_version_is_refused(release, tmp_path):
    write_release(tmp_path, release)
    card = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**card, "schema": "medvae.model/0"}))
    with pytest.raises(RunError, match="version"):
        read_release(tmp_path)


def test_no_model_is_refused(tmp_path):
    with pytest.raises(RunError, match="no finished model"):
        read_release(tmp_path)
