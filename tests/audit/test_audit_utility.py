"""Utility learners: what can be learned is learned, what cannot is not, and intervals count patients."""

from __future__ import annotations

import numpy as np
import pytest
from audit_world import phantom_scans

from medvae.audit.material import Scans, resized, shrink, synthetic_scans
from medvae.audit.quality import matched
from medvae.audit.utility import (
    Budget,
    class_means,
    classify,
    dice,
    mean_auc,
    regress,
    segment,
    segment_floor,
)
from medvae.types import SyntheticCohort

BUDGET = Budget(steps=60, confidence=0.95, replicates=50, seed=0)
RNG = np.random.default_rng


def planted(dims: int, seed: int) -> Scans:
    """Scans whose class and masks can be seen: a bright block where the class is 1."""
    scans = phantom_scans(dims, 24, seed, 16)
    x = RNG(seed).uniform(0, 0.2, scans.x.shape).astype(np.float32)
    x[:, 1:] = 0
    block = (slice(4, 10),) * dims
    x[(slice(None), 1, *block)] = 1
    bright = 0.3 + 0.5 * scans.labels(scans.space.conditions[0])
    x[(slice(None), 0, *block)] += bright.reshape(-1, *[1] * dims).astype(np.float32) / 2
    return Scans(np.clip(x, 0, 1), scans.condition, scans.patient, scans.space)


@pytest.mark.parametrize("dims", [2, 3])
def test_classifier_learns_a_visible_class_and_not_a_shuffled_one(dims: int) -> None:
    train, test = planted(dims, 1), planted(dims, 2)
    lesion = train.space.conditions[0]
    found = classify(train, test, lesion, BUDGET)
    assert found["auc"].value > 0.95
    assert found["auc"].n == len(test.patients)
    mixed = Scans(test.x, test.condition[RNG(3).permutation(len(test))], test.patient, test.space)
    assert classify(train, mixed, lesion, BUDGET)["auc"].value < 0.8


@pytest.mark.parametrize("dims", [2, 3])
def test_segmenter_beats_nothing_and_floor_is_the_mean_mask(dims: int) -> None:
    train, test = planted(dims, 4), planted(dims, 5)
    assert segment(train, test, BUDGET)[1].value > 0.8
    assert segment_floor(train, test, BUDGET)[1].value == 1.0  # the same block in everyone
    moved = Scans(np.roll(test.x, 6, axis=2), test.condition, test.patient, test.space)
    assert segment_floor(train, moved, BUDGET)[1].value < 0.3


def test_dice_closed_forms() -> None:
    a = np.zeros((3, 4, 4), dtype=bool)
    b = a.copy()
    a[0, :2], b[0, 1:3] = True, True
    a[1, 0], b[1, 3] = True, True
    assert dice(a, b).tolist() == [0.5, 0.0, 1.0]


def test_mean_auc_of_several_classes() -> None:
    truth = np.asarray([0, 1, 2, 0, 1, 2])
    assert mean_auc(np.eye(3)[truth], truth) == 1.0
    assert mean_auc(np.full((6, 3), 1 / 3), truth) == 0.5
    assert np.isnan(mean_auc(np.ones((3, 3)), np.zeros(3, dtype=np.int64)))


def test_ridge_finds_a_linear_covariate() -> None:
    rng = RNG(6)
    x = rng.normal(size=(120, 10))
    y = 3 * x[:, 0] + 50 + 0.1 * rng.normal(size=120)
    found = regress(x[:80], y[:80], x[80:], y[80:], np.arange(40), BUDGET)
    assert found["r2"].value > 0.9
    assert found["mean absolute error"].value < 1.0


def test_class_means_hold_nothing_but_means() -> None:
    scans = planted(2, 7)
    lesion = scans.space.conditions[0]
    means = class_means(scans, lesion, 5, 0)
    assert len(means) == 10
    of_one = scans.x[scans.labels(lesion) == 1].mean(0)
    np.testing.assert_allclose(means.x[means.labels(lesion) == 1].mean(0), of_one, atol=0.12)


def test_matching_follows_the_conditions_of_real_scans() -> None:
    made, real = phantom_scans(2, 60, 8, 16), phantom_scans(2, 20, 9, 16)
    lesion = real.space.conditions[0]
    real = real.take(real.labels(lesion) == 1)
    rows = matched(made, real)
    assert len(set(rows.tolist())) == len(real)
    assert (made.take(rows).labels(lesion) == 1).all()


def test_shrink_averages_blocks_and_keeps_the_field_of_view() -> None:
    scans = phantom_scans(3, 2, 0, 32)
    small = shrink(scans, 16)
    assert small.x.shape[2:] == (16, 16, 16)
    np.testing.assert_allclose(small.images[0, 0, 0, 0], scans.images[0, :2, :2, :2].mean(), rtol=1e-5)
    assert set(np.unique(small.x[:, 1:])) <= {0.0, 1.0}
    assert small.space.spacing_mm == tuple(2 * s for s in scans.space.spacing_mm)
    assert shrink(scans, 32) is scans


def test_synthetic_scans_split_labels_into_channels() -> None:
    scans = phantom_scans(2, 3, 0, 16)
    space = resized(scans.space, (16, 16))
    masks = np.where(scans.x[:, 2] > 0, 2, np.where(scans.x[:, 1] > 0, 1, 0)).astype(np.uint8)
    rows = tuple({"lesion": "present", "age": 55.0} for _ in range(len(scans)))
    found = synthetic_scans(SyntheticCohort(scans.images, masks, rows, space))
    np.testing.assert_array_equal(found.x[:, 2], scans.x[:, 2])
    assert found.condition[0].tolist() == [0.0, 1.0, 0.0]
