"""The zoo: every broken build is found by the check that is meant for it, and correct builds are left alone.

The default tier runs each broken build once, and four times more after a miss; `-m slow` shows the probabilities, as
docs/audit-zoo.md does.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import zoo_world as world
from scipy import stats
from zoo_builds import ALL, DPSGD, Build, without_probe
from zoo_other import ALL as OTHERS
from zoo_other import Other
from zoo_simulate import simulate
from zoo_world import Outcome

SIMULATED = [b for b in DPSGD if b.sim is not None]


def train(build: Build, patch: pytest.MonkeyPatch) -> Outcome:
    with patch.context() as mp:
        without_probe(mp)
        build.patch(mp)
        return world.train_dpsgd() if build.run == "dpsgd" else world.train_moments()


def by_its_finder(build: Build, outcome: Outcome) -> bool:
    found = {"scores": outcome.accused, "conformance": bool(outcome.failing), "patterns": bool(outcome.walked)}
    return found[build.finder]


def found(build: Build, run: Callable[[], Outcome]) -> bool:
    """Return whether a run is found, or after a miss three of four more.

    A build that is found with probability 0.99 fails this 6 times in a million; one found in 5 % of runs passes in 5 %.
    """
    return by_its_finder(build, run()) or sum(by_its_finder(build, run()) for _ in range(4)) >= 3


def as_many_as(probability: float, runs: int) -> int:
    """Return the number of finds below which a build of that probability falls once in 10,000 tests."""
    return int(stats.binom.ppf(1e-4, runs, probability))


@pytest.mark.parametrize("build", ALL, ids=lambda b: b.name)
def test_a_broken_build_is_found_by_its_canaries(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(build, lambda: train(build, monkeypatch))


@pytest.mark.parametrize("other", OTHERS, ids=lambda o: o.name)
@pytest.mark.parametrize("broken", [True, False], ids=["broken", "right"])
def test_a_broken_build_is_found_by_its_check(other: Other, broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as mp:
        assert other.found(mp, broken) is broken


def test_the_zoo_is_large_and_has_no_twins() -> None:
    names = [b.name for b in (*ALL, *OTHERS)]
    assert len(names) == len(set(names)) >= 25


@pytest.mark.parametrize("build", SIMULATED, ids=lambda b: b.name)
def test_a_simulated_fault_is_found(build: Build) -> None:
    assert build.sim is not None
    sim = build.sim
    assert found(build, lambda: simulate(sim))


def test_correct_builds_are_left_alone() -> None:
    runs = [simulate().found for _ in range(20)] + [world.train_dpsgd().found, world.train_moments().found]
    assert sum(runs) <= stats.binom.isf(1e-4, len(runs), 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("build", SIMULATED, ids=lambda b: b.name)
def test_a_simulated_fault_is_found_with_probability_099(build: Build) -> None:
    assert build.sim is not None
    runs = [by_its_finder(build, simulate(build.sim)) for _ in range(300)]
    assert sum(runs) >= as_many_as(0.99, len(runs))


@pytest.mark.slow
@pytest.mark.parametrize("build", ALL, ids=lambda b: b.name)
def test_a_broken_training_is_found_in_tens_of_runs(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [by_its_finder(build, train(build, monkeypatch)) for _ in range(20)]
    assert sum(runs) >= as_many_as(0.99, len(runs))


@pytest.mark.slow
def test_correct_builds_are_found_within_the_level() -> None:
    simulated = [simulate().found for _ in range(1000)]
    real = [world.train_dpsgd().found for _ in range(50)] + [world.train_moments().found for _ in range(50)]
    for runs in (simulated, real):
        assert sum(runs) <= stats.binom.isf(0.01, len(runs), 0.05)
