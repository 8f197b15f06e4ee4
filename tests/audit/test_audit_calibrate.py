"""Calibration and the closed form's scores against what is known exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from audit_world import phantom_scans
from scipy.stats import multivariate_normal, norm

from medvae.audit import linear_scores
from medvae.audit.attacks import CLOSED_FORM, Pool, control_pool, make_pool, patient_scores
from medvae.audit.calibrate import Calibrated, by_patient, lira, lira_online, rmia
from medvae.audit.closed_form_attack import family, prepare
from medvae.audit.intervals import auc
from medvae.audit.shadows import run_shadows, splits
from medvae.config import Recipe
from medvae.train.planning import moment_shapes
from medvae.train.rule import resolve

RNG = np.random.default_rng


def gaussian_world(shadows: int, scans: int, shift: float, seed: int) -> tuple[Calibrated, np.ndarray]:
    """Scores that are normal around a mean of each scan's own, moved by `shift` where the model saw the scan."""
    rng = RNG(seed)
    centre = rng.normal(0, 10, scans)
    included = splits(np.zeros(scans, dtype=int), 0.5, shadows, seed)
    member = rng.permutation(scans) < scans // 2
    shadow = centre + rng.normal(size=(shadows, scans)) + shift * included
    target = centre + rng.normal(size=scans) + shift * member
    return Calibrated(target, shadow, included, np.arange(scans)), member


@pytest.mark.parametrize("calibration", [lira, lira_online])
def test_calibration_reaches_the_optimum_that_raw_scores_miss(calibration: object) -> None:
    world, member = gaussian_world(128, 4000, 1.0, 0)
    found = calibration(world)  # type: ignore[operator]
    best = norm.cdf(1 / np.sqrt(2))  # AUC of the likelihood ratio test between N(0, 1) and N(1, 1)
    assert abs(auc(found[member], found[~member]) - best) < 0.03
    assert auc(world.target[member], world.target[~member]) < 0.56
    if calibration is lira:
        assert abs(found[~member].std() - 1) < 0.05


def test_the_online_ratio_is_the_log_ratio_of_the_two_normals() -> None:
    world, _ = gaussian_world(4000, 50, 1.0, 1)
    out = np.where(~world.included, world.shadows, np.nan)
    centre = np.nanmean(out, 0)
    exact = norm.logpdf(world.target, centre + 1, 1) - norm.logpdf(world.target, centre, 1)
    np.testing.assert_allclose(lira_online(world), exact, atol=0.15)


def test_rmia_counts_other_peoples_scans_that_are_favoured_less() -> None:
    target = np.asarray([3.0, 1.0, 0.0, 2.0, 5.0])
    shadows, included = np.zeros((2, 5)), np.zeros((2, 5), dtype=bool)
    patient = np.asarray([0, 1, 2, 3, 3])
    reference = np.asarray([False, True, True, True, True])
    found = rmia(Calibrated(target, shadows, included, patient), reference)
    assert found.tolist() == [0.75, 1 / 3, 0.0, 1.0, 1.0]


def test_by_patient_sums_averages_and_takes_the_strongest() -> None:
    values, patient = np.asarray([1.0, 3.0, 5.0]), np.asarray([4, 4, 2])
    assert by_patient(values, patient, "sum").tolist() == [5.0, 4.0]
    assert by_patient(values, patient, "mean").tolist() == [5.0, 2.0]
    assert by_patient(values, patient, "max").tolist() == [5.0, 3.0]


def test_constant_scores_calibrate_to_nothing() -> None:
    world = Calibrated(np.ones(4), np.ones((8, 4)), splits(np.zeros(4, dtype=int), 0.5, 8, 0), np.arange(4))
    assert lira(world).tolist() == [0.0] * 4
    few = Calibrated(np.ones(4), np.ones((2, 4)), np.ones((2, 4), dtype=bool), np.arange(4))
    assert not few.enough_out


def test_exact_likelihood_is_the_multivariate_normals() -> None:
    scans = phantom_scans(2, 3, 0, 16)
    rng, basis, d = RNG(2), (4, 4), 2
    part = {
        "mean_map": rng.normal(0, 0.2, (3, 3, *basis)).astype(np.float32),
        "directions": rng.normal(0, 0.3, (d, 3, *basis)).astype(np.float32),
        "spectrum": np.tile(0.5 * np.eye(3, dtype=np.float32), (12, 1, 1)),
    }
    full = linear_scores.cosines(scans.x)
    seen = linear_scores.of_scans(scans, basis)
    found = linear_scores.likelihood(part, seen, scans.space)
    inverse, _ = linear_scores._noise(part, scans.space)
    from medvae.nets.linear import shells

    shell = shells((16, 16)).ravel()
    noise = np.zeros((3 * 256, 3 * 256))
    for place, s in enumerate(shell):
        rows = np.arange(3) * 256 + place
        noise[np.ix_(rows, rows)] = np.linalg.inv(inverse[s])
    u = np.zeros((d, 3, 16, 16))
    u[:, :, :4, :4] = part["directions"]
    u = u.reshape(d, -1)
    for i in range(len(scans)):
        mean = np.zeros((3, 16, 16))
        mean[:, :4, :4] = np.tensordot(seen.design[i], part["mean_map"], axes=1)
        exact = multivariate_normal.logpdf(full[i].ravel(), mean.ravel(), noise + u.T @ u)
        assert abs(found[i] - exact) < 1e-3 * abs(exact)


def test_mixture_likelihood_is_the_mixture_of_multivariate_normals() -> None:
    scans = phantom_scans(2, 3, 0, 16)
    rng, basis, box = RNG(3), (5, 4), (3, 2)
    part = {
        "mean_map": rng.normal(0, 0.2, (3, 3, *basis)).astype(np.float32),
        "spectrum": np.tile(0.5 * np.eye(3, dtype=np.float32), (12, 1, 1)),
        "mixture.weights": np.asarray([[0.3, 0.7], [0.6, 0.4]], dtype=np.float32),
        "mixture.means": rng.normal(0, 0.5, (2, 2, 18)).astype(np.float32),
        "mixture.factors": rng.normal(0, 0.5, (2, 2, 4, 18)).astype(np.float32),
    }
    seen = linear_scores.of_scans(scans, basis)
    found = linear_scores.mixture_likelihood(part, seen, basis, box)
    for i in range(len(scans)):
        mean = np.tensordot(seen.design[i], part["mean_map"], axes=1)
        rest = (seen.low[i].reshape(3, *basis) - mean)[:, :3, :2].ravel()
        cell = int(scans.condition[i, :2].argmax())
        w, mu, f = (part[f"mixture.{k}"][cell].astype(float) for k in ("weights", "means", "factors"))
        noise = (0.5 + linear_scores.FLOOR**2) * np.eye(18)
        exact = np.log(sum(w[j] * multivariate_normal.pdf(rest, mu[j], f[j].T @ f[j] + noise) for j in range(2)))
        assert abs(found[i] - exact) < 1e-4 * max(1, abs(exact))


def attacked(noise: float, targets: int, *, shapes: bool = False) -> tuple[list[float], Pool]:
    """AUC of the primary attack on several closed-form targets of 32 people, of shapes or grey images; and the pool."""
    scans = phantom_scans(2, 64, 3, 16)
    if shapes:
        scans = replace(scans, x=scans.x[:, 1:2], space=replace(scans.space, mask_labels=()))
    areas = []
    for seed in range(targets):
        chosen = RNG(seed).permutation(64)
        pool = make_pool(scans.of(chosen[:32]), scans.of(chosen[32:]), 64, RNG(0))
        recipe = resolve(Recipe(), 32, scans.space)
        trainer = prepare(
            pool, linear_scores.cosines(pool.scans.x), recipe, dict.fromkeys(moment_shapes(recipe).releases, noise), 0
        )
        shadows = run_shadows(trainer, splits(np.zeros(64, dtype=int), 0.5, 8, seed), None)
        target = trainer.fit(10_000 + seed, np.flatnonzero(pool.member))
        found = family(pool, trainer.full.x, recipe, target, shadows, None, 0)
        primary = found.attacks[CLOSED_FORM[0].name]
        areas.append(auc(primary.members, primary.others))
    return areas, pool


def test_the_closed_form_attack_breaks_a_fit_without_noise_and_not_one_with_much() -> None:
    leaking, _ = attacked(0.0, 1)
    assert leaking[0] >= 0.95
    shapes, _ = attacked(0.0, 3, shapes=True)
    assert np.mean(shapes) >= 0.75  # a dozen voxels say less of a person than a grey image
    private, _ = attacked(20.0, 6)  # epsilon far below 1: the AUC is at most Phi(1 / (20 sqrt 2)) = 0.51 on average
    assert abs(np.mean(private) - 0.5) < 0.1  # six independent targets of 32 against 32: standard error 0.03


def test_too_few_shadows_give_no_attack_and_a_word() -> None:
    scans = phantom_scans(2, 32, 3, 16)
    pool = make_pool(scans.of(np.arange(16)), scans.of(np.arange(16, 32)), 64, RNG(0))
    recipe = resolve(Recipe(), 16, scans.space)
    trainer = prepare(
        pool, linear_scores.cosines(scans.x), recipe, dict.fromkeys(moment_shapes(recipe).releases, 1.0), 0
    )
    shadows = run_shadows(trainer, splits(np.zeros(32, dtype=int), 0.5, 2, 0), None)
    target = shadows.arrays[0]
    found = family(pool, trainer.full.x, recipe, target, shadows, None, 0)
    assert not found.attacks
    assert found.words == "needs 4 shadow models, there are 2"


def test_without_shadows_only_raw_attacks_are_made() -> None:
    scans = phantom_scans(2, 20, 3, 16)
    pool = make_pool(scans.of(np.arange(10)), scans.of(np.arange(10, 20)), 64, RNG(0))
    n = len(pool.scans)
    alone = Calibrated(np.arange(n, dtype=float), np.zeros((0, n)), np.zeros((0, n), dtype=bool), pool.scans.patient)
    found = patient_scores(CLOSED_FORM, {"mean map": alone}, pool)
    assert list(found) == ["mean map, raw, sum", "mean map, raw, max"]


def test_control_keeps_a_hundred_non_members_where_it_can() -> None:
    scans = phantom_scans(2, 131, 0, 16)
    pool = make_pool(scans.of(np.arange(103)), scans.of(np.arange(103, 131)), 500, RNG(0))
    found = control_pool(pool, 64, RNG(1))
    assert found is not None
    assert (int(found.member.sum()), int((~found.member).sum())) == (31, 100)
    few = make_pool(scans.of(np.arange(16)), scans.of(np.arange(16, 28)), 500, RNG(0))
    assert control_pool(few, 64, RNG(1)) is None
