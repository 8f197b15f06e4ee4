"""Copies, synthetic-only attacks, attribute risks and subgroups: what is planted is found, what is not is not."""

from __future__ import annotations

import numpy as np
import pytest
from audit_world import phantom_scans
from scipy import stats

from medvae.audit import copies, inference, synthetic_only
from medvae.audit.inference import Table
from medvae.audit.intervals import Estimate, auc, clopper_pearson
from medvae.audit.material import Scans
from medvae.audit.membership import Scores
from medvae.audit.risks import search_copies
from medvae.audit.shadows import splits
from medvae.audit.subgroups import subgroups
from medvae.audit.verdicts import copies_part

RNG = np.random.default_rng


def textures(count: int, seed: int) -> np.ndarray:
    """Smooth random images (count, 24, 24) around one shape, as scans of one organ are."""
    from scipy.ndimage import gaussian_filter

    rng = RNG(seed)
    base = gaussian_filter(RNG(0).normal(size=(24, 24)), 3)
    noise = gaussian_filter(rng.normal(size=(count, 24, 24)), (0, 1.5, 1.5))
    return np.clip(0.5 + base + 0.8 * noise, 0, 1).astype(np.float32)


def scans_of(images: np.ndarray, first: int = 0) -> Scans:
    space = phantom_scans(2, 1, 0, 16).space
    patients = np.arange(first, first + len(images))
    return Scans(images[:, None], np.zeros((len(images), space.condition_width), np.float32), patients, space)


def test_planted_copies_are_found_and_strangers_are_not() -> None:
    train, held, fresh = textures(100, 1), textures(60, 2), textures(3000, 3)
    planted = copies.planted(train, 300, 0)
    far, _ = copies.nearest(np.concatenate([held, fresh, planted]), train)
    limit = copies.threshold(far[:60])
    assert (far[60:3060] < limit).mean() <= copies.FALSE_FLAGS
    assert (far[3060:] < limit).mean() >= 0.99


def test_every_mirror_image_and_small_shift_is_a_copy() -> None:
    train = textures(20, 1)
    moved = copies.shifted(train[:, ::-1, :], (1, -2))
    far, which = copies.nearest(moved, train)
    assert far.max() < copies.IDENTICAL
    assert which.tolist() == list(range(20))
    assert copies.nearest(textures(20, 9), train)[0].min() > 0.05


def test_a_scan_is_not_compared_with_its_own_patient() -> None:
    train = textures(30, 1)
    patients = np.arange(30) // 2
    far, which = copies.nearest(train, train, patients, patients)
    assert far.min() > 0.05
    assert (patients[which] != patients).all()


def test_the_threshold_keeps_its_rate_of_false_flags_whatever_the_tail() -> None:
    rng = RNG(4)

    def draw(n: int) -> np.ndarray:
        return np.exp(-rng.gumbel(2.5, 0.1, n))  # the least of many

    many = [(draw(100_000) < copies.threshold(draw(20_000))).mean() for _ in range(20)]
    assert copies.FALSE_FLAGS / 2 < np.mean(many) <= copies.FALSE_FLAGS
    rates = [(draw(20_000) < copies.threshold(draw(40))).mean() for _ in range(60)]
    assert (np.asarray(rates) <= copies.FALSE_FLAGS).mean() >= 0.85  # 0.95 of them, give or take
    heavy = [(rng.gamma(3, 1, 100_000) < copies.threshold(rng.gamma(3, 1, 20_000))).mean() for _ in range(20)]
    assert np.mean(heavy) <= copies.FALSE_FLAGS


def test_blocks_do_not_change_what_is_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    train, queries = textures(40, 1), textures(25, 2)
    patients, own = np.arange(40) // 2, np.arange(25)
    whole = [copies.nearest(queries, train, own, patients), copies.nearest(train, queries, patients, own)]
    monkeypatch.setattr(copies, "BLOCK", 7)
    pieces = [copies.nearest(queries, train, own, patients), copies.nearest(train, queries, patients, own)]
    for (far, which), (far_too, which_too) in zip(whole, pieces, strict=True):
        assert far == pytest.approx(far_too, abs=1e-5)
        assert which.tolist() == which_too.tolist()


def test_false_flags_are_measured_on_scans_that_set_no_limit() -> None:
    train, held = scans_of(textures(2100, 1)), scans_of(textures(300, 2), 9000)
    found = search_copies(textures(200, 3), train, held, 0.95, 0)
    assert found.planted_found.value >= 0.99
    assert found.false_flags is not None
    assert 1000 <= found.false_flags.n < 2000
    assert found.false_flags.value <= copies.FALSE_FLAGS
    assert found.share.value == 0
    assert search_copies(copies.planted(train.images, 50, 7), train, held, 0.95, 0).share.value >= 0.99


def test_too_few_scans_for_false_flags_say_how_many_are_needed() -> None:
    found = search_copies(textures(30, 3), scans_of(textures(100, 1)), scans_of(textures(45, 2), 900), 0.95, 0)
    assert found.false_flags is None
    assert found.words == "not measurable: needs 1000 scans that had no part in setting the limit, there are 72"
    line = next(f for f in copies_part(found).findings if f.name == "copies, false flags")
    assert line.value is None
    assert line.verdict == found.words
    assert found.planted_found.value >= 0.99


def test_scans_that_a_cohort_holds_twice_are_counted_and_are_no_chance() -> None:
    """One person under two identifiers would otherwise put the limit at zero, and hide every copy."""
    images = textures(2100, 1)
    images[:40] = images[40:80]
    held = textures(300, 2)
    held[:5] = images[100:105]
    found = search_copies(textures(50, 3), scans_of(images), scans_of(held, 9000), 0.95, 0)
    assert found.twins == 85
    assert "85 scans that the training data hold twice" in found.words
    assert found.planted_found.value >= 0.99


def test_synthetic_only_attacks_find_a_generator_that_repeats_and_spare_one_that_does_not() -> None:
    scans = phantom_scans(2, 60, 7, 16)
    from medvae.audit.embedding import embed

    patient, images = scans.patient, scans.images
    member = patient < 30
    included = splits(np.zeros(60, dtype=int), 0.5, 8, 0)[:, patient]
    others = [synthetic_only.repeating(images[row], 3, 0.05, i) for i, row in enumerate(included)]
    queries = embed(images)
    leaking = synthetic_only.scores(queries, synthetic_only.repeating(images[member], 3, 0.05, 9), others, included)
    assert set(leaking) == {"nearest", "nearest, calibrated", "monte carlo", "density ratio"}
    for name, least in (("nearest", 0.8), ("nearest, calibrated", 0.85), ("density ratio", 0.75)):
        assert auc(leaking[name][member], leaking[name][~member]) > least
    stranger = phantom_scans(2, 120, 8, 16).images
    spared = synthetic_only.scores(queries, embed(stranger), others, included)
    for values in spared.values():
        assert abs(auc(values[member], values[~member]) - 0.5) < 0.2
    assert set(synthetic_only.scores(queries, embed(stranger), [], included[:0])) == {"nearest", "monte carlo"}


def test_projection_is_white_and_at_most_32_wide() -> None:
    x = RNG(0).normal(size=(500, 60)) @ RNG(1).normal(size=(60, 60))
    view = synthetic_only.projection(x)
    assert view.axes.shape == (60, 32)
    np.testing.assert_allclose(np.cov(view(x).T), np.eye(32), atol=1e-6)


@pytest.mark.parametrize(("a", "c", "n"), [(0.3, 0.1, 60), (0.5, 0.5, 40), (0.05, 0.02, 100), (0.9, 0.2, 30)])
def test_risk_intervals_cover(a: float, c: float, n: int) -> None:
    rng, truth, inside = RNG(5), (a - c) / (1 - c), 0
    for _ in range(400):
        hits, base = int(rng.binomial(n, a)), int(rng.binomial(n, c))
        attack = Estimate(hits / n, *clopper_pearson(hits, n, 0.95), n)
        control = Estimate(base / n, *clopper_pearson(base, n, 0.95), n)
        found = inference.risk_interval(attack, control)
        assert found.low <= found.value <= found.high
        inside += found.low <= truth <= found.high
    assert inside / 400 >= 0.935


def table_of(rng: np.random.Generator, n: int) -> Table:
    values = rng.normal(size=(n, 5))
    values[:, 0] = rng.integers(0, 3, n)
    return Table(values, ("class", "a", "b", "c", "d"), (True, False, False, False, False))


def jittered(table: Table, rng: np.random.Generator) -> Table:
    values = table.values.copy()
    values[:, 1:] += 0.01 * rng.normal(size=values[:, 1:].shape)
    return Table(values, table.names, table.nominal)


def test_records_that_repeat_patients_put_them_at_risk_and_others_do_not() -> None:
    rng = RNG(6)
    train, control, fresh = table_of(rng, 80), table_of(rng, 80), table_of(rng, 80)
    leaking = jittered(train, rng)
    for made, exposed in ((leaking, True), (fresh, False)):
        found = [
            inference.single_out(made, train, control, 400, 0.95, 0),
            inference.infer(0, made, train, control, 0.95),
            inference.infer(2, made, train, control, 0.95),
            inference.link(made.values[:, 1:], train.values[:, 1:], control.values[:, 1:], 0.95),
        ]
        assert [risk.risk.low > 0 for risk in found] == [exposed] * 4
        assert all(("exposed than others" in risk.verdict) == exposed for risk in found)


def test_singling_out_raises_no_false_alarm_with_few_people_and_many_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over exchangeable people; an interval over guesses alone, as it was once, alarms far too often."""
    monkeypatch.setattr(inference, "PERMUTATIONS", 400)
    rng, alarms, over_guesses, runs, people = RNG(8), 0, 0, 120, 20
    member = np.arange(2 * people) < people
    for _ in range(runs):
        values, limits = rng.normal(size=(2, 2 * people)), rng.normal(0.6, 0.4, size=(2, 5000, 1))
        held = (values[0] > limits[0]) & (values[1] > limits[1])
        risk, attack, control = inference.singled(held, member, 0.95, rng)
        assert risk.value == pytest.approx(inference.risk_interval(attack, control).value)
        alarms += risk.low > 0
        over_guesses += inference.risk_interval(attack, control).low > 0
    most = stats.binom.isf(1e-4, runs, 0.025)
    assert alarms <= most < over_guesses


def test_the_worst_subgroup_is_found_and_many_groups_are_corrected_for() -> None:
    scans = phantom_scans(2, 120, 0, 16)
    first = np.asarray([np.flatnonzero(scans.patient == p)[0] for p in scans.patients])
    lesion = scans.labels(scans.space.conditions[0])[first]
    member, rng = np.arange(120) % 2 == 0, RNG(7)
    values = rng.normal(size=120) + 2.5 * (member & (lesion == 1))
    found = subgroups(Scores(values[member], values[~member]), scans, member, 0.95)
    by = {g.value: g for g in found}
    assert by["present"].area is not None
    assert by["present"].area.low > 0.5
    assert "no better" in by["absent"].verdict
    alarms = 0
    for _ in range(200):
        calm = rng.normal(size=120)
        groups = subgroups(Scores(calm[member], calm[~member]), scans, member, 0.95)
        assert all(g.p_corrected is None or g.p is None or g.p_corrected >= g.p for g in groups)
        alarms += any(g.area is not None and g.area.low > 0.5 for g in groups)
    assert alarms / 200 <= 0.08
