"""The closed-form stage: sensitivity to one patient, what it recovers, and that noise is really added."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import idctn

from medvae.dp.noise import seeded_noise
from medvae.nets.linear import LinearPart, shells
from medvae.nets.mixture import MixtureShapes
from medvae.nets.shape import ramp
from medvae.synth.phantom import make_phantom
from medvae.train import denoise, moment_fit, moments, noisy_sums
from medvae.train.moment_shapes import RELEASES, MomentShapes
from medvae.train.moments import fit_moments
from medvae.train.noisy_sums import Pass, clip_rows, noisy_sum, patient_average
from medvae.train.norms import COARSE_EDGES, typical_norm
from medvae.train.occupancy import smooth_occupancy
from medvae.train.subspace import LowestCosines
from medvae.types import Batch, Condition, ImageSpace, Intensity

SPACE = ImageSpace(
    (12, 10),
    (1.0, 1.0),
    "MR",
    Intensity("percentile", 1, 99),
    (Condition("kind", "class", ("a", "b")), Condition("age", "continuous", range=(0.0, 1.0))),
    (1,),
)
SHAPES = MomentShapes(basis=(6, 5), coarse=(3, 3), latent_dim=3, spectrum_weight=0.5)
MIXED = replace(SHAPES, mixture=MixtureShapes(components=3, box=(3, 2)), lloyd_steps=2)
LONE = replace(SHAPES, mean_alone=True)
MOVED = replace(SHAPES, warped_pairs=2)
ALL_SHAPES = [SHAPES, MIXED, LONE, replace(LONE, public_clips=True), MOVED]


class Source:
    """An in-memory cohort with the store's interface."""

    def __init__(self, x, condition, patient, space=SPACE):
        self.x, self.condition, self.patient, self.space = x, condition, patient, space

    def rows(self, patients):
        return np.nonzero(np.isin(self.patient, patients))[0]

    def load(self, rows):
        rows = rows[np.argsort(self.patient[rows], kind="stable")]
        return Batch(self.x[rows], self.condition[rows], self.patient[rows])


class Silent:
    """No noise: shows the sums themselves."""

    name = "silent"

    def normal(self, n):
        return np.zeros(n)


def cohort(
    seed: int, patients: int = 12, extreme: bool = False, masks: bool = True, two_valued: bool = False
) -> Source:
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), rng.integers(1, 5, patients))
    count = len(patient)
    # Values far outside [0, 1] stand for the worst a broken reader could hand over.
    scale = rng.choice([0.0, 1.0, 1e6], count) if extreme else np.ones(count)
    x = (rng.random((count, 2, 12, 10)) * scale[:, None, None, None]).astype(np.float32)
    if two_valued:
        x = (x > 0.7).astype(np.float32)
    kind = np.eye(2)[rng.integers(0, 2, count)]
    condition = np.concatenate([kind, rng.uniform(-1, 1, (count, 1))], axis=1).astype(np.float32)
    if masks:
        return Source(x, condition, patient)
    return Source(x[:, :1], condition, patient, replace(SPACE, mask_labels=()))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(ALL_SHAPES))
def test_one_patient_moves_no_sum_by_more_than_one(seed, extreme, masks, two_valued, shapes):
    # Each release is checked given the outputs of the earlier ones, as adaptive composition asks: the contribution
    # functions of one run are replayed on the neighbouring cohort.
    source = cohort(seed, extreme=extreme, masks=masks, two_valued=two_valued)
    everyone = np.unique(source.patient)
    worst: list[float] = []
    original = noisy_sums.noisy_sum

    def check(scans, contribution, noise_multiplier, noise, *_):
        full = original(scans, contribution, 0.0, noise)
        for left_out in everyone[:4]:
            neighbour = Pass(scans.source, everyone[everyone != left_out])
            worst.append(float(np.linalg.norm(full - original(neighbour, contribution, 0.0, noise))))
        return full

    try:
        noisy_sums.noisy_sum = check
        fit_moments(source, everyone, dict.fromkeys(shapes.releases, 0.0), shapes, noise=Silent())
    finally:
        noisy_sums.noisy_sum = original
    assert len(worst) == 4 * len(shapes.releases)
    # A float64 sum over a dozen patients keeps at least twelve digits.
    assert max(worst) <= 1 + 1e-9


def test_a_contribution_over_the_bound_is_clipped_and_not_trusted():
    source = cohort(0)
    everyone = np.unique(source.patient)
    huge = noisy_sum(Pass(source, everyone), lambda b: torch.full((len(b.x), 4), 100.0), 0.0, Silent())
    assert np.linalg.norm(huge) <= len(everyone) + 1e-9


def test_two_scans_of_a_patient_weigh_as_one_patient():
    average = patient_average(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), np.array([4, 4, 9]))
    torch.testing.assert_close(average, torch.tensor([[0.5, 0.5], [1.0, 1.0]]))


def test_clip_rows_scales_to_at_most_one():
    out = clip_rows(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 2.0)
    torch.testing.assert_close(torch.linalg.vector_norm(out, dim=1), torch.tensor([1.0, 0.25]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_counts_as_zero(bad):
    out = clip_rows(torch.tensor([[bad, 1.0], [0.6, 0.8]]), 1.0)
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


def test_chunks_hold_whole_patients_and_miss_none(monkeypatch):
    source = cohort(3, patients=20)
    monkeypatch.setattr(noisy_sums, "CHUNK_VOXELS", 5 * 2 * 12 * 10)
    batches = list(Pass(source, np.unique(source.patient)))
    assert len(batches) > 3
    seen = [set(b.patient.tolist()) for b in batches]
    assert sum(len(s) for s in seen) == 20
    assert sum(len(b.x) for b in batches) == len(source.patient)


@pytest.mark.parametrize("planted", [1.0, 0.5])
def test_the_released_sum_carries_the_planned_noise(planted):
    # 4,000 coordinates: a chi-square test with false alarms at 1e-6 that must reject half of the planned sigma.
    source = cohort(1)
    everyone = np.unique(source.patient)
    sigma = 3.0
    released = noisy_sum(
        Pass(source, everyone), lambda b: torch.zeros(len(b.x), 4000), sigma * planted, seeded_noise(5)
    )
    statistic = np.square(released / sigma).sum()
    spread = 4.9 * np.sqrt(2 * 4000)
    assert (abs(statistic - 4000) < spread) == (planted == 1.0)


def test_without_noise_the_conditional_means_are_the_class_means():
    rng = np.random.default_rng(0)
    patients = 400
    kind = rng.integers(0, 2, patients)
    pattern = rng.random((2, 2, 12, 10)) * 0.5
    # Smooth patterns inside the basis.
    part_source = Source(
        np.zeros((patients, 2, 12, 10), np.float32),
        np.concatenate([np.eye(2)[kind], np.zeros((patients, 1))], axis=1).astype(np.float32),
        np.arange(patients),
    )
    basis = LinearPart(SPACE, SHAPES.basis, 1)
    smooth = basis.expand(basis.reduce(torch.tensor(pattern, dtype=torch.float32)))
    part_source.x = (smooth.numpy()[kind] + 0.01 * rng.standard_normal((patients, 2, 12, 10))).astype(np.float32)
    part = fit_moments(part_source, np.arange(patients), dict.fromkeys(RELEASES, 1e-9), SHAPES, noise=seeded_noise(0))
    fitted = part.expand(part.mean_coefficients(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])))
    error = (fitted - smooth).square().mean().sqrt()
    contrast = (smooth[0] - smooth[1]).square().mean().sqrt()
    assert error < 0.15 * contrast


def test_directions_find_a_planted_factor_and_noise_alone_gives_none():
    rng = np.random.default_rng(0)
    base = cohort(0, patients=500)
    rows = len(base.patient)
    wave = np.cos(np.pi * (np.arange(12) + 0.5) / 12)[:, None] * np.ones(10)
    factor = rng.standard_normal(rows)
    base.x = (0.5 + 0.1 * factor[:, None, None, None] * wave + 0.01 * rng.standard_normal(base.x.shape)).astype(
        np.float32
    )
    everyone = np.unique(base.patient)
    part = fit_moments(base, everyone, dict.fromkeys(RELEASES, 0.5), SHAPES, noise=seeded_noise(0))
    lengths = part.directions.flatten(1).norm(dim=1)
    assert lengths[0] > 0
    codes = part.encode(torch.from_numpy(base.x), torch.from_numpy(base.condition))[:, 0].numpy()
    assert abs(np.corrcoef(codes, factor)[0, 1]) > 0.95
    base.x[:] = 0.5
    nothing = fit_moments(base, everyone, dict.fromkeys(RELEASES, 0.5), SHAPES, noise=seeded_noise(0))
    # Constant scans: whatever directions are left are not longer than the clip floor lets noise be.
    assert nothing.directions.flatten(1).norm(dim=1).max() < 0.1 * lengths[0]


def test_warped_copies_teach_directions_of_a_place_that_few_scans_show():
    """Balls all over a field, of which a dozen are seen: held-out ones are rebuilt better from warped copies too."""
    space = replace(SPACE, spatial_shape=(16, 16), conditions=(), mask_labels=())
    rng = np.random.default_rng(0)
    rows, columns = (np.arange(16)[:, None] - c for c in rng.normal(7.5, 1.0, (2, 1, 60)))
    x = np.exp(-0.1 * (rows[:, None] ** 2 + columns[None] ** 2)).transpose(2, 0, 1)[:, None].astype(np.float32)
    source = Source(x, np.zeros((60, 0), np.float32), np.arange(60), space)
    errors = []
    for pairs in (0, 8):
        shapes = MomentShapes((16, 16), (12, 12), 16, 0.5, warped_pairs=pairs)
        part = fit_moments(source, np.arange(12), dict.fromkeys(RELEASES, 1e-9), shapes, noise=seeded_noise(0))
        held, none = torch.from_numpy(x[12:]), torch.zeros(48, 0)
        errors.append(float((part.decode(part.encode(held, none), none) - held).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_contrast_is_kept_above_the_noise_and_dropped_below_it():
    total = np.array([[50.0, 8.0], [8.0, 20.0]])
    assert denoise.mask_contrast(total, 0.1)[0] == pytest.approx(0.4, rel=0.01)
    assert denoise.mask_contrast(total, 9.0)[0] == 0.0


def test_tamed_spectra_fall_with_frequency_and_are_covariances():
    rng = np.random.default_rng(0)
    noisy = np.stack([np.diag([s, s / 2]) for s in np.linspace(10, -1, 12)]) + rng.standard_normal((12, 2, 2))
    tamed = denoise.tame_spectra(noisy, np.linspace(2, 0.1, 12)[:, None].repeat(2, 1))
    assert np.linalg.eigvalsh(tamed).min() > -1e-9
    power = np.einsum("scc->sc", tamed)
    assert (np.diff(power, axis=0) <= 1e-6 + 0.05 * power[:-1]).all()


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("shapes", ALL_SHAPES)
def test_all_but_the_releases_is_post_processing(monkeypatch, shapes, masks):
    """Other scans under the same released numbers: the same model, bit by bit."""
    first, other = cohort(1, masks=masks), cohort(2, masks=masks)
    released: list[np.ndarray] = []
    original = noisy_sums.noisy_sum

    def record(*args):
        released.append(original(*args))
        return released[-1]

    noise = dict.fromkeys(shapes.releases, 0.3)
    monkeypatch.setattr(noisy_sums, "noisy_sum", record)
    expected = fit_moments(first, np.arange(12), noise, shapes, noise=seeded_noise(0))
    replayed = iter(released)
    monkeypatch.setattr(noisy_sums, "noisy_sum", lambda *_: next(replayed))
    found = fit_moments(other, np.arange(12), noise, shapes, noise=seeded_noise(1))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name


def shapes_of(patients: int, grey: float, seed: int = 0) -> Source:
    """Discs of many sizes: ones on zeros, or as grey as that."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:12, :10]
    radius = rng.uniform(2, 4, patients)[:, None, None]
    images = ((y - 5.5) ** 2 + (x - 4.5) ** 2 < radius**2).astype(np.float32)
    images = images * (1 - grey) + grey * 0.5
    condition = np.concatenate([np.eye(2)[rng.integers(0, 2, patients)], np.zeros((patients, 1))], axis=1)
    return Source(images[:, None], condition.astype(np.float32), np.arange(patients), replace(SPACE, mask_labels=()))


@pytest.mark.parametrize(("grey", "sigma", "found"), [(0.0, 5.0, True), (0.6, 5.0, False), (0.0, 100.0, False)])
def test_whether_images_are_shapes_is_read_off_a_charged_release(grey, sigma, found):
    """Two-valued or grey, at little noise; and where the noise hides it, the answer is no."""
    noise = {**dict.fromkeys(SHAPES.releases, 1.0), "norms": sigma}
    part = fit_moments(shapes_of(400, grey), np.arange(400), noise, SHAPES, noise=seeded_noise(3))
    assert bool(part.two_valued) is found


def test_shapes_are_summed_as_ramps_and_varied_where_they_are():
    """Without noise m(c) is the mean ramp, and a direction tells large discs from small ones."""
    source = shapes_of(400, 0.0)
    shapes = replace(SHAPES, basis=(12, 10), functions=9)
    part = fit_moments(source, np.arange(400), dict.fromkeys(RELEASES, 1e-9), shapes, noise=seeded_noise(3))
    ramps = ramp(torch.from_numpy(source.x), 2)
    condition = torch.from_numpy(source.condition)
    mean = part.expand(part.mean_coefficients(condition))
    # Clipped scans, a fifth of them, pull the mean a little.
    assert (mean.mean(0) - ramps.mean(0)).square().mean() < 0.01 * ramps.mean(0).square().mean()
    codes = part.encode(torch.from_numpy(source.x), condition)[:, 0].numpy()
    assert abs(np.corrcoef(codes, source.x.sum((1, 2, 3)))[0, 1]) > 0.95


def test_the_users_word_on_shapes_stands_where_noise_hides_them():
    """Declared shapes are asked for their borders alone; where it is denied, no part of a release is spent on it."""
    noise = dict.fromkeys(SHAPES.releases, 100.0)
    widths = {}
    original = noisy_sums.noisy_sum

    def seen(*args):
        out = original(*args)
        widths.setdefault(args[4], []).append(len(out))
        return out

    source = shapes_of(40, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noisy_sums, "noisy_sum", seen)
        for declared in (None, True, False):
            shapes = replace(SHAPES, two_valued=declared, functions=9)
            part = fit_moments(source, np.arange(40), noise, shapes, noise=seeded_noise(0))
            assert bool(part.two_valued) is (declared is True)
            assert float(part.border_width) == 0
    asked, told, denied = widths["norms"]
    assert asked == told == denied + 2


@pytest.mark.parametrize(("width", "sigma"), [(1.2, 1.0), (0.0, 1.0), (1.2, 200.0)])
def test_how_soft_borders_are_is_released_or_taken_as_sharp(width, sigma):
    source = shapes_of(400, 0.0)
    if width:
        y, x = np.mgrid[:12, :10]
        radius = np.random.default_rng(0).uniform(2, 4, 400)[:, None, None]  # those of `shapes_of`
        inside = radius - np.hypot(y - 5.5, x - 4.5)
        source.x = np.clip(0.5 + inside / width, 0, 1).astype(np.float32)[:, None]
    noise = {**dict.fromkeys(SHAPES.releases, 1.0), "norms": sigma}
    shapes = replace(SHAPES, two_valued=True, functions=9)
    part = fit_moments(source, np.arange(400), noise, shapes, noise=seeded_noise(3))
    expected = 1.5 * width if sigma == 1.0 else 0.0
    assert abs(float(part.border_width) - expected) < 0.5
    assert bool(part.border_width) == bool(expected)


def test_the_answer_follows_the_released_number_and_not_the_scans(monkeypatch):
    original = noisy_sums.noisy_sum

    def planted(*args):
        out = original(*args)
        if args[4] == "norms":
            out[-2] = 400.0
        return out

    monkeypatch.setattr(noisy_sums, "noisy_sum", planted)
    noise = dict.fromkeys(SHAPES.releases, 1.0)
    part = fit_moments(shapes_of(400, 0.0), np.arange(400), noise, SHAPES, noise=seeded_noise(3))
    assert not bool(part.two_valued)


def test_a_mean_alone_finds_the_masks_and_spends_on_nothing_else():
    source = shapes_of(400, 0.0)
    mask = source.x
    source.space, source.x = SPACE, np.concatenate([0.3 + 0.2 * mask, mask], axis=1)
    part = fit_moments(source, np.arange(400), dict.fromkeys(LONE.releases, 1.0), LONE, noise=seeded_noise(0))
    mean = part.expand(part.mean_coefficients(torch.from_numpy(source.condition[:1])))[0].detach().numpy()
    assert np.corrcoef(mean[1].ravel(), mask.mean((0, 1)).ravel())[0, 1] > 0.95
    assert LONE.releases == ("norms", "means")
    assert not part.directions.any()
    assert not part.contrast.any()


def test_occupancies_are_nearer_to_the_mean_masks_than_band_shrinkage():
    """Phantoms in 3D, noise from a little to more than the signal: the error against the true mean masks."""
    made = make_phantom(3, 40, 1, size=24, scans=(1, 1))
    true = np.stack([(made.masks == label).mean(0) for label in (1, 2)]).astype(np.float32)
    space = ImageSpace((24, 24, 24), (1.0,) * 3, "MR", Intensity("percentile", 1, 99), (), (1, 2))
    part = LinearPart(space, (7, 7, 7), 1)
    x = np.concatenate([np.zeros_like(true[:1]), true])[None]
    signal = part.reduce(torch.from_numpy(x))[0, 1:].double().numpy()
    shell, rng = shells(space.spatial_shape)[:7, :7, :7], np.random.default_rng(0)
    for share, better in ((0.3, 0.6), (0.6, 0.6), (1.0, 0.7), (2.0, 1.0)):
        noise_sd = share * np.sqrt(np.square(signal).mean())
        error = np.zeros(2)
        for _ in range(3):
            noisy = signal + noise_sd * rng.standard_normal(signal.shape)
            plain = denoise.shrink(noisy[None], np.asarray([noise_sd]), shell)[0]
            ours = smooth_occupancy(noisy, noise_sd, space.spatial_shape)
            error += [np.square(found - signal).sum() for found in (ours, plain)]
        assert error[0] < better * error[1], share


def test_occupancies_without_noise_are_the_means():
    x = np.zeros((1, 24, 20))
    x[0] = np.exp(-0.5 * ((np.arange(24)[:, None] - 12) ** 2 / 16 + (np.arange(20) - 9) ** 2 / 9)) * 0.9
    basis = LinearPart(replace(SPACE, spatial_shape=(24, 20)), (9, 8), 1)
    signal = basis.reduce(torch.as_tensor(np.stack([x[0], x[0]])[None], dtype=torch.float32))[0, 1:].double().numpy()
    found = smooth_occupancy(signal, 0.0, (24, 20))
    assert np.linalg.norm(found - signal) < 0.05 * np.linalg.norm(signal)


def test_a_mean_alone_asks_nobody_for_labels():
    """Everybody's labels changed: not a bit of the model moves, so no count of labels is in it."""
    first, other = cohort(4), cohort(4)
    other.condition[:, :2] = other.condition[:, 1::-1]
    noise = dict.fromkeys(LONE.releases, 0.3)
    parts = [fit_moments(s, np.arange(12), noise, LONE, noise=seeded_noise(0)).state_dict() for s in (first, other)]
    for name, tensor in parts[0].items():
        assert torch.equal(tensor, parts[1][name]), name


def test_a_typical_norm_is_near_and_not_moved_by_a_bin_that_shows_by_chance():
    rng, edges, off = np.random.default_rng(0), COARSE_EDGES, []
    for _ in range(500):
        true = rng.uniform(0.1, 0.8)
        norms = true * rng.normal(1, 0.05, 100)
        histogram = np.bincount(np.searchsorted(edges, norms), minlength=len(edges) + 1) + rng.normal(0, 12, 9)
        off.append(typical_norm(histogram, 1, 12.0, edges) / true)
    assert np.quantile(np.abs(np.log(off)), 0.98) < np.log(1.3)
    assert typical_norm(np.zeros(9), 1, 12.0, edges) > 0


def test_contrasts_are_shrunk_to_where_scans_vary():
    """The mean given the noise, where the model holds; and no noise left in a coefficient in which nothing varies."""
    rng = np.random.default_rng(0)
    direction = np.zeros((1, 2, 8, 8))
    direction[0, 0, :2, :2] = 2.0
    left = np.full((2, 8, 8), 1e-4)
    left[:, :3, :3] = 0.2
    noise_sd, errors = np.asarray([1.0, 0.3]), {"released": 0.0, "by band": 0.0, "along": 0.0}
    shell = shells((8, 8))
    for _ in range(40):
        true = rng.standard_normal((2, 1, 1, 1)) * direction + rng.standard_normal((2, 2, 8, 8)) * np.sqrt(left)
        released = true + noise_sd[:, None, None, None] * rng.standard_normal(true.shape)
        found = denoise.shrink_along(released, noise_sd, direction, left)
        made = {"released": released, "by band": denoise.shrink(released, noise_sd, shell), "along": found}
        for name, rows in made.items():
            errors[name] += float(np.square(rows - true).sum())
        assert np.abs(found[:, :, 4:, 4:]).max() < 0.05
    assert errors["along"] < 0.5 * errors["by band"] < 0.5 * errors["released"]


def test_contrasts_without_noise_are_left_as_they_are():
    rows = np.random.default_rng(0).standard_normal((2, 1, 4, 4))
    found = denoise.shrink_along(rows, np.zeros(2), np.ones((1, 1, 4, 4)), np.full((1, 4, 4), 0.1))
    np.testing.assert_allclose(found, rows, atol=1e-9)


def test_a_contrast_is_sought_where_scans_vary(monkeypatch):
    """Two classes that differ along the factor by which all scans vary: much of the noise elsewhere is gone."""
    rng = np.random.default_rng(1)
    factor = np.cos(np.pi * (np.mgrid[:12, :10][1] + 0.5) / 10)
    kind, codes = rng.integers(0, 2, 600), rng.standard_normal(600)
    images = 0.5 + 0.1 * (codes + kind)[:, None, None] * factor
    condition = np.concatenate([np.eye(2)[kind], np.zeros((600, 1))], axis=1).astype(np.float32)
    space = replace(SPACE, mask_labels=())
    source = Source(images[:, None].astype(np.float32), condition, np.arange(600), space)
    noise = {**dict.fromkeys(SHAPES.releases, 2.0), "means": 8.0}
    errors = np.zeros(2)

    def band_by_band(subspace, rows, noise_sd, *_):
        return denoise.shrink(rows, noise_sd, subspace.shell)

    for index, step in enumerate((LowestCosines.shrink, band_by_band)):
        monkeypatch.setattr(LowestCosines, "shrink", step)
        for seed in range(8):
            part = fit_moments(source, np.arange(600), noise, SHAPES, noise=seeded_noise(seed))
            ends = part.expand(part.mean_coefficients(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])))
            errors[index] += float((ends[0, 0] - ends[1, 0] - torch.from_numpy(0.1 * factor)).square().mean())
    assert errors[0] < 0.7 * errors[1]


def natural_images(count: int, shape: tuple[int, int] = (24, 20)) -> Source:
    """Images whose power falls as 1 / f^2, without conditions or masks."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    amplitude = 1 / np.sqrt(1 + rows**2 + columns**2)
    white = np.random.default_rng(5).standard_normal((count, *shape)) * amplitude
    images = 0.5 + idctn(white, axes=(1, 2), norm="ortho")
    space = replace(SPACE, spatial_shape=shape, conditions=(), mask_labels=())
    x = images[:, None].astype(np.float32)
    return Source(x, np.zeros((count, 0), np.float32), np.arange(count), space)


def test_weights_rise_with_frequency_and_leave_the_norm_of_images_about_as_it_is():
    """So clips and the edges of histograms mean what they did."""
    weights = moment_fit.rising_weights(shells((24, 20)))
    assert (np.diff(weights) > 0).all()
    power = moment_fit.falling_power(np.hypot(*np.mgrid[:24, :20]))
    assert (np.square(weights[shells((24, 20))]) * power).sum() == pytest.approx(power.sum(), rel=0.1)


def test_weights_that_rise_with_frequency_spare_noise_in_the_mean(monkeypatch):
    """The mean of natural images at the same noise, against no weights at all."""
    source, shapes = natural_images(400), MomentShapes((11, 9), (9, 9), 12, 0.4)
    noise, errors = dict.fromkeys(shapes.releases, 3.0), np.zeros(2)
    for index, exponent in enumerate((0.0, moment_fit.EMPHASIS)):
        monkeypatch.setattr(moment_fit, "EMPHASIS", exponent)
        for seed in range(8):
            part = fit_moments(source, np.arange(400), noise, shapes, noise=seeded_noise(seed))
            mean = part.expand(part.mean_coefficients(torch.zeros(1, 0)))[0, 0].numpy()
            errors[index] += np.square(mean - source.x[:, 0].mean(0)).sum()
    assert errors[1] < 0.95 * errors[0]


def test_without_noise_directions_are_the_principal_ones_whatever_the_weights():
    """Chosen where the noise is white, they are put in order where images are compared."""
    source, shapes = natural_images(400), MomentShapes((9, 9), (9, 9), 6, 0.4)
    part = fit_moments(source, np.arange(400), dict.fromkeys(shapes.releases, 0.0), shapes, noise=seeded_noise(0))
    low = part.reduce(torch.from_numpy(source.x)).flatten(1).double().numpy()
    # The clip that a fifth of the scans exceed shortens those; their directions stay.
    _, _, axes = np.linalg.svd(low - low.mean(0), full_matrices=False)
    found = np.linalg.svd(part.directions.flatten(1).double().numpy(), full_matrices=False)[2]
    assert np.linalg.svd(found @ axes[:6].T, compute_uv=False).min() > 0.9


@pytest.mark.parametrize(("classes", "expected"), [(0, 0.5), (2, 0.5), (10, 0.882)])
def test_contrasts_of_many_classes_get_more_of_the_release(classes, expected):
    kinds = (Condition("kind", "class", tuple("abcdefghij"[:classes])),) if classes else ()
    space = replace(SPACE, conditions=kinds, mask_labels=())
    overall, contrast = moments.mean_weights(space, SHAPES)
    assert overall**2 + contrast**2 + moments.COUNT_WEIGHT**2 == pytest.approx(1)
    assert contrast == pytest.approx(expected, abs=1e-3)
    for kept in (moments.mean_weights(replace(space, mask_labels=(1,)), SHAPES), moments.mean_weights(space, MIXED)):
        assert kept[1] == pytest.approx(0.5)
