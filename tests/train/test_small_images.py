"""Small images of many classes: real digits of 8x8 pixels, by which the rule for them was chosen (docs/quality.md)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from medvae.config import Recipe, TrainConfig, build
from medvae.dp.noise import seeded_noise
from medvae.train import moments as stage
from medvae.train.moments import fit_moments
from medvae.train.planning import make_plan, moment_shapes
from medvae.types import Batch, Condition, ImageSpace, Intensity

SPACE = ImageSpace(
    (8, 8), (1.0, 1.0), "OT", Intensity("window", 0, 16), (Condition("digit", "class", tuple("0123456789")),), ()
)
TRAIN = 1400


class Digits:
    """The digits that ship with scikit-learn, a patient each."""

    space = SPACE

    def __init__(self):
        digits = load_digits()
        self.x = (digits.images[:, None] / 16).astype(np.float32)
        self.condition = np.eye(10, dtype=np.float32)[digits.target]

    def rows(self, patients):
        return patients

    def load(self, rows):
        return Batch(self.x[rows], self.condition[rows], rows)


def accuracy(source: Digits, epsilon: float, moments: dict[str, object], seed: int) -> float:
    """The share of held-out digits that are nearest to the private mean of their class."""
    config = build(TrainConfig, dp_epsilon=epsilon, recipe=build(Recipe, moments=moments))
    plan = make_plan(TRAIN, SPACE, config)
    noise = {m.name: m.noise_multiplier for m in plan.privacy.mechanisms}
    part = fit_moments(source, np.arange(TRAIN), noise, moment_shapes(plan.recipe), noise=seeded_noise(seed))
    means = part.expand(part.mean_coefficients(torch.eye(10)))[:, 0].flatten(1).numpy()
    held = source.x[TRAIN:].reshape(-1, 1, 64)
    nearest = np.square(held - means).sum(2).argmin(1)
    return float((nearest == source.condition[TRAIN:].argmax(1)).mean())


@pytest.mark.parametrize(("side", "basis", "asked"), [(8, 8, False), (20, 12, None), (28, 13, None), (128, 32, None)])
def test_the_rule_keeps_the_detail_of_small_images_and_sees_no_shapes_in_them(side, basis, asked):
    moments = make_plan(
        TRAIN, replace(SPACE, spatial_shape=(side, side)), build(TrainConfig, dp_epsilon=8)
    ).recipe.moments
    assert moments.basis_shape == (basis, basis)
    assert moments.two_valued is asked


def test_ten_classes_of_small_images_are_told_apart_at_epsilon_1(monkeypatch):
    """Better than with the few cosines that larger images get, or with the weights that suit two classes."""
    source = Digits()
    by_rule = np.mean([accuracy(source, 1.0, {}, seed) for seed in range(6)])
    coarse = np.mean([accuracy(source, 1.0, {"basis_shape": [4, 4]}, seed) for seed in range(6)])
    monkeypatch.setattr(stage, "mean_weights", lambda *_: (0.66**0.5, 0.5))
    for_two = np.mean([accuracy(source, 1.0, {}, seed) for seed in range(6)])
    assert by_rule > 0.78 > max(coarse, for_two), (by_rule, coarse, for_two)
