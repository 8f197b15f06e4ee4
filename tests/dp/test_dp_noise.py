"""The noise source: a battery of distribution tests that it passes and broken sources fail.

Each check of the battery raises a false alarm with probability below 4e-8, all together below 1e-6.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from medvae.dp.noise import NoiseSource, os_noise, seeded_noise
from medvae.errors import ConfigError, PrivacyError

N = 2**18
LIMIT = 5.5  # standard errors: two-sided probability 3.8e-8
P_LIMIT = 3.8e-8
CHUNK = 8192
GOLDEN = [-0.8658311845707838, 0.6673891913021858, 0.6172277423322516]


def battery(x: np.ndarray) -> list[str]:
    """Return the names of the checks that a claimed standard normal sample of shape (N,) fails."""
    n = len(x)
    scores = {
        "mean": x.mean() * np.sqrt(n),
        "variance": ((x**2).mean() - 1) * np.sqrt(n / 2),
        "skewness": (x**3).mean() * np.sqrt(n / 15),
        "kurtosis": ((x**4).mean() - 3) * np.sqrt(n / 96),
    }
    for lag in (1, 2, CHUNK // 2, CHUNK):  # neighbours, the two halves of a pair, and chunks
        scores[f"correlation {lag}"] = (x[lag:] * x[:-lag]).mean() * np.sqrt(n - lag)
        square = x**2 - 1
        scores[f"correlation of squares {lag}"] = (square[lag:] * square[:-lag]).mean() / 2 * np.sqrt(n - lag)
    failed = [name for name, z in scores.items() if not abs(z) < LIMIT]
    if stats.kstest(x, "norm").pvalue < P_LIMIT:
        failed.append("Kolmogorov-Smirnov")
    for bound in (2.0, 3.5):
        if stats.binomtest(int((np.abs(x) > bound).sum()), n, 2 * stats.norm.sf(bound)).pvalue < P_LIMIT:
            failed.append(f"tail beyond {bound}")
    if len(np.unique(x)) < n - 3:  # 64-bit values: a single chance repeat has probability 2e-6, four have none
        failed.append("repeated values")
    return failed


def mask_z(source: NoiseSource, rate: float, n: int = 10**6) -> float:
    return float((source.mask(n, rate).sum() - n * rate) / np.sqrt(n * rate * (1 - rate)))


@pytest.mark.parametrize(
    "source", [os_noise(), seeded_noise(7), os_noise().fork("gradients")], ids=["os", "seed", "fork"]
)
def test_the_source_passes_the_battery(source: NoiseSource) -> None:
    assert battery(source.normal(N)) == []
    assert (
        battery(np.concatenate([source.normal(k) for k in [1, 2, 3, 1023, 8191, 8193, 2**17]] + [source.normal(N)])[:N])
        == []
    )


def _reference() -> np.random.Generator:
    return np.random.default_rng(3)


def _one_radius(g: np.random.Generator) -> np.ndarray:
    """Pairs whose two halves came from one radius and one angle, misused as r cos, r cos."""
    half = g.standard_normal(CHUNK // 2 * (N // CHUNK)).reshape(-1, 1, CHUNK // 2)
    return np.repeat(half, 2, axis=1).reshape(-1) + 1e-9 * g.standard_normal(N)


BROKEN: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "half of sigma": lambda g: 0.5 * g.standard_normal(N),
    "0.98 of sigma": lambda g: 0.98 * g.standard_normal(N),
    "sum of four, not halved": lambda g: g.standard_normal((4, N)).sum(axis=0),
    "mean of four": lambda g: g.standard_normal((4, N)).mean(axis=0),
    "constant": lambda _: np.zeros(N),
    "not a number": lambda _: np.full(N, np.nan),
    "shifted": lambda g: g.standard_normal(N) + 0.02,
    "correlated": lambda g: np.convolve(g.standard_normal(N + 1), [1.0, 0.05], "valid") / np.sqrt(1 + 0.05**2),
    "halves repeated": _one_radius,
    "one scale a pair": lambda g: (
        np.sqrt(g.exponential(1.0, (N // CHUNK, 1, CHUNK // 2)))
        * g.choice([-1.0, 1.0], (N // CHUNK, 2, CHUNK // 2))
        * np.sqrt(g.chisquare(1, (N // CHUNK, 2, CHUNK // 2)))
    ).reshape(-1),
    "a stream used twice": lambda g: np.tile(g.standard_normal(N // 2), 2),
    "uniform": lambda g: g.uniform(-np.sqrt(3), np.sqrt(3), N),
    "heavy tails": lambda g: g.standard_t(8, N) / np.sqrt(8 / 6),
    "cut tails": lambda g: np.clip(g.standard_normal(N), -3.4, 3.4),
    "bfloat16": lambda g: (g.standard_normal(N).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_the_battery_rejects_broken_sources(name: str) -> None:
    assert battery(BROKEN[name](_reference()).astype(np.float64)) != []


def test_the_battery_accepts_another_good_source() -> None:
    assert battery(_reference().standard_normal(N)) == []


@pytest.mark.parametrize("rate", [1e-4, 0.05, 0.5, 0.937])
def test_poisson_draws_have_their_rate_and_are_independent(rate: float) -> None:
    source = os_noise()
    assert abs(mask_z(source, rate)) < LIMIT
    drawn = source.mask(10**6, rate)
    together, expected = int((drawn[1:] & drawn[:-1]).sum()), 10**6 * rate**2
    if expected < 100:  # too few neighbours for a normal law: their number is Poisson's
        assert stats.poisson.sf(together - 1, expected) > P_LIMIT
    else:
        draws = drawn.astype(np.float64) - rate
        assert abs((draws[1:] * draws[:-1]).mean()) < LIMIT * rate * (1 - rate) / 1000
    wrong = (source.mask(10**6, 0.9 * rate).sum() - 10**6 * rate) / np.sqrt(10**6 * rate * (1 - rate))
    assert rate < 1e-3 or wrong < -LIMIT  # the same check rejects a wrong rate


def test_draws_at_the_ends() -> None:
    source = os_noise()
    assert not source.mask(10**5, 0.0).any()
    assert source.mask(10**5, 1.0).all()
    assert source.mask(0, 0.5).shape == source.normal(0).shape == source.integers(0, 5).shape == (0,)
    assert source.mask(3, 0.5).dtype == np.bool_
    assert source.normal(3).dtype == np.float64
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="sample rate"):
            source.mask(3, wrong)
    for method in (source.normal, lambda n: source.mask(n, 0.5), lambda n: source.integers(n, 5)):
        with pytest.raises(ConfigError, match="samples were asked"):
            method(-1)


@pytest.mark.parametrize("high", [1, 2, 7, 1000, 3 * 2**60])
def test_integers_are_uniform(high: int) -> None:
    x = os_noise().integers(200_000, high)
    assert x.min() >= 0
    assert x.max() < high
    bins = min(high, 24)
    counts = np.bincount((x.astype(object) * bins // high).astype(np.int64), minlength=bins)
    if bins > 1:
        expected = np.diff([-(-high * b // bins) for b in range(bins + 1)]) / high * len(x)
        assert stats.chisquare(counts, expected).pvalue > P_LIMIT
    for wrong in (0, -1, 2**62 + 1):
        with pytest.raises(ConfigError, match="upper bound"):
            os_noise().integers(3, wrong)


def test_the_seeded_source_repeats_and_says_so() -> None:
    a, b = seeded_noise(5), seeded_noise(5)
    np.testing.assert_array_equal(a.normal(1000), b.normal(1000))
    np.testing.assert_array_equal(a.mask(1000, 0.3), b.mask(1000, 0.3))
    np.testing.assert_array_equal(a.fork("x").normal(10), b.fork("x").normal(10))
    assert not np.array_equal(a.fork("x").normal(10), a.fork("y").normal(10))
    assert not np.array_equal(seeded_noise(6).normal(10), seeded_noise(5).normal(10))
    assert (a.name, a.releasable, a.fork("x").releasable) == ("seeded", False, False)
    np.testing.assert_allclose(seeded_noise(0).normal(3), GOLDEN, rtol=1e-9)


def test_two_sources_of_the_system_never_agree() -> None:
    a, b = os_noise(), os_noise()
    assert not np.isin(a.normal(1000), b.normal(1000)).any()
    assert not np.isin(a.fork("x").normal(1000), a.normal(1000)).any()
    assert (a.name, a.releasable) == ("os_entropy:chacha20", True)


def test_the_key_is_replaced_long_before_the_counter_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    import medvae.dp.noise as module

    plain = seeded_noise(1).normal(N)
    monkeypatch.setattr(module, "_REKEY_BYTES", 2**18)
    rekeyed = seeded_noise(1).normal(N)
    np.testing.assert_array_equal(plain[:1000], rekeyed[:1000])
    assert not np.isin(rekeyed[CHUNK:], plain).any()
    assert battery(rekeyed) == []


def test_the_state_is_never_shown_copied_or_carried_away() -> None:
    source = os_noise()
    source.normal(10)
    assert repr(source) == str(source) == "NoiseSource(os_entropy:chacha20, state hidden)"
    assert not hasattr(source, "__dict__")
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(PrivacyError, match="pickled"):
            attempt(source)
    child = os.fork()
    if child == 0:  # pragma: no cover - in the child
        try:
            source.normal(1)
        except PrivacyError:
            os._exit(42)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    source.normal(1)
