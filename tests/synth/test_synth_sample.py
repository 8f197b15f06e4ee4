"""Sampling from a release: shapes, determinism, conditions, and what texture does to masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.fft import dctn

from medvae.config import ModelConfig, MomentsConfig, Recipe, SamplingConfig
from medvae.errors import InputError, RunError
from medvae.nets.build import build_model, make_card, state_arrays
from medvae.nets.linear import SHELLS, shells
from medvae.nets.shape import grey_shares, ramp
from medvae.synth.phantom import make_phantom
from medvae.synth.sample import generate, spread_conditions
from medvae.synth.store import read_release, write_release
from medvae.synth.texture import ShapeLook, at_edges, draw_image, draw_labels, draw_shapes, make_texture
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


SHAPE = ImageSpace((24, 24, 24), (1.0,) * 3, "OT", Intensity("window", 0, 255), (), ())


def released_shapes(two_valued: bool) -> tuple[ModelRelease, np.ndarray]:
    """A closed form without noise of phantoms' ventricles, as images of their own; and those images."""
    made = make_phantom(3, 60, 0, size=24, scans=(1, 1))
    images = ((made.masks == 1) | (made.images > 0.35)).astype(np.float32)
    recipe = Recipe(
        model=ModelConfig(latent_dim=4, channels=(4,)),
        moments=MomentsConfig(basis_shape=(6, 6, 6)),
        sampling=SamplingConfig(warp=0.0),
    )
    model = build_model(SHAPE, recipe)
    linear = model.linear
    linear.mean_map[0] = linear.reduce(torch.from_numpy(images[:, None])).mean(0)
    mean = linear.expand(linear.mean_coefficients(torch.zeros(1, 0)))[0, 0].detach().numpy()
    linear.spectrum[:, 0, 0] = torch.as_tensor(power_by_shell(images - mean))
    linear.two_valued.fill_(two_valued)
    return ModelRelease(state_arrays(model), make_card(SHAPE, recipe)), images


def power_by_shell(x: np.ndarray) -> np.ndarray:
    """The mean square of a coefficient in each shell, of scans (N, *spatial)."""
    power = np.square(dctn(x, axes=(1, 2, 3), norm="ortho")).mean(0)
    shell = shells(SHAPE.spatial_shape).ravel()
    count = np.bincount(shell, minlength=SHELLS)
    return np.bincount(shell, power.ravel(), SHELLS) / np.maximum(count, 1)


def test_a_model_of_shapes_makes_images_of_two_values_and_of_the_released_spectrum():
    release, images = released_shapes(two_valued=True)
    made = generate(release, [{}] * 60, seed=0).images
    assert set(np.unique(made)) == {0.0, 1.0}
    assert abs(made.mean() - images.mean()) < 0.03
    energy = [power_by_shell(x - x.mean(0)) * np.bincount(shells(SHAPE.spatial_shape).ravel()) for x in (made, images)]
    share, expected = (e / e.sum() for e in energy)
    # Of the variance, so much lies in other shells than it should: 0.39 with fields as smooth as masks have.
    assert 0.5 * np.abs(share - expected).sum() < 0.2
    grey, _ = released_shapes(two_valued=False)
    assert len(np.unique(generate(grey, [{}], seed=0).images)) > 100


def test_shapes_with_soft_borders_are_sampled_so():
    release, _ = released_shapes(two_valued=True)
    release.weights["linear.border_width"] = np.asarray(2.0, dtype=np.float32)
    off, at = grey_shares(torch.from_numpy(generate(release, [{}] * 8, seed=0).images)).mean(0).tolist()
    assert off < 0.02
    assert at > 0.5


@pytest.mark.parametrize("level", [None, 0.5])
def test_each_shape_is_cut_where_its_ramp_has_the_drawn_sum(level):
    """Thin rings among thick ones, drawn too flat: at the border's level the thin are lost."""
    y, x = np.mgrid[:32, :32] - 15.5
    rings = [(np.abs(np.hypot(y, x) - 9) < half) for half in (0.9, 1.5, 2.5, 4.0)]
    ramps = ramp(torch.from_numpy(np.stack(rings).astype(np.float32)), 2)
    drawn = np.stack([ndimage.gaussian_filter(r, 1.5) for r in ramps.numpy()])
    made = draw_shapes(drawn, None, ShapeLook(0.0, level), np.random.default_rng(0))
    found = ramp(torch.from_numpy(made), 2).mean((1, 2)).numpy()
    off = np.abs(found / drawn.mean((1, 2)) - 1)
    assert bool(off.max() < 0.1) is (level is None)
    assert bool(made[0].sum() > 0.5 * rings[0].sum()) is (level is None)


def test_texture_lies_at_edges_and_keeps_the_released_power():
    rng = np.random.default_rng(0)
    spectrum = np.zeros((SHELLS, 1, 1), np.float32)
    spectrum[4:, 0, 0] = 0.002
    y = np.linspace(0, 1, 48, dtype=np.float32)
    draws = [
        np.broadcast_to(0.5 + a * np.tanh(20 * (y - 0.5))[:, None], (48, 48)).astype(np.float32) for a in (0.1, 0.3)
    ]
    texture = at_edges(make_texture(spectrum, np.zeros_like(spectrum), np.zeros(0), (48, 48)), np.stack(draws))
    nothing, labels = np.zeros((0, 48, 48), np.float32), np.zeros((48, 48), np.uint8)
    power = [
        np.mean([np.square(draw_image(mean, nothing, labels, texture, rng) - mean) for _ in range(40)], axis=0)
        for mean in draws
    ]
    released = float((spectrum[:, 0, 0] * np.bincount(shells((48, 48)).ravel(), minlength=SHELLS)).sum()) / 48**2
    assert abs(np.mean(power) / released - 1) < 0.1
    assert power[1][22:26].mean() > 100 * power[1][:8].mean()
    assert power[1].mean() > 4 * power[0].mean()


def test_where_a_mean_alone_was_released_labels_are_its_level_set_and_tissue_is_made_up():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    p = np.exp(-0.5 * (((y - 16) / 5) ** 2 + ((x - 16) / 5) ** 2))[None].astype(np.float32)
    spectrum = np.zeros((SHELLS, 2, 2))
    spectrum[:, 0, 0] = 0.1
    texture = make_texture(spectrum, np.zeros_like(spectrum), np.array([0.3]), (32, 32))
    labels = draw_labels(p, texture, rng)
    expected = np.where(p[0] < 0.1, 0, p[0])
    assert abs(labels.sum() - expected.sum()) < 0.1 * expected.sum()
    assert expected[labels == 1].min() >= expected[labels == 0].max()
    mean = np.full((32, 32), 0.4, dtype=np.float32)
    images = [draw_image(mean, p, labels, texture, rng) for _ in range(40)]
    assert min(i.min() for i in images) >= 0
    assert max(i.max() for i in images) <= 1
    # Tissue keeps the mean, differs from image to image, and says nothing of the label.
    assert abs(np.mean([i.mean() for i in images]) - 0.4) < 0.1
    assert np.std([i[2, 2] for i in images]) > 0.1
    apart = [i[labels == 1].mean() - i[labels == 0].mean() for i in images]
    assert abs(np.mean(apart)) < 4 * np.std(apart) / 40**0.5
