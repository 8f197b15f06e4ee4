"""A run as its canaries see it, in numpy: the faults of `zoo_builds.Sim`, judged by the code that ships."""

from __future__ import annotations

import numpy as np
from zoo_builds import Sim
from zoo_world import PATIENTS, Outcome, claim, outcome, toss

from medvae.dp.conformance import Watch
from medvae.types import Mechanism

RIGHT = Sim()


def simulate(
    sim: Sim = RIGHT, count: int = 1000, mechanism: Mechanism | None = None, patients: int = PATIENTS
) -> Outcome:
    """Return the outcome of one simulated run of DP-SGD with `count` canaries."""
    return outcome([watched(sim, count, mechanism or claim(), patients)])


def watched(sim: Sim, count: int, mechanism: Mechanism, patients: int = PATIENTS) -> Watch:
    rng, coins = np.random.default_rng(), toss(count)
    watch = Watch(coins, mechanism, coordinates=2)
    draws = _draws(sim, rng, patients + int(coins.sum()), mechanism)
    drawn, once = np.zeros(count, dtype=np.bool_), rng.standard_normal((2, count))
    factors = mechanism.noise_multiplier * np.asarray(sim.noise)[:, None]
    for _step in range(sim.steps * mechanism.count):
        drawn[coins] = next(draws)[patients:]
        noise = once if sim.draw == "same" else _noise(sim, rng, count)
        watch.see(factors * noise + drawn * sim.signal / 2**0.5, drawn)
    return watch


def _noise(sim: Sim, rng: np.random.Generator, count: int) -> np.ndarray:
    if sim.law == "uniform":
        return 12**0.5 * (rng.random((2, count)) - 0.5)
    if sim.law == "tiled":
        return np.resize(rng.standard_normal(64), (2, count))
    if sim.law == "same":
        return np.full((2, count), rng.standard_normal())
    return rng.standard_normal((2, count))


def _draws(sim: Sim, rng: np.random.Generator, everyone: int, mechanism: Mechanism):
    """Yield who of everyone (patients, then canaries) is drawn, step by step."""
    rate = sim.rate * mechanism.sample_rate
    size, left, at, first = round(rate * everyone), np.zeros(0, dtype=int), 0, rng.random(everyone) < rate
    while True:
        chosen = np.zeros(everyone, dtype=np.bool_)
        if sim.draw == "shuffle":
            left = rng.permutation(everyone) if len(left) < size else left
            chosen[left[:size]], left = True, left[size:]
        elif sim.draw == "fixed":
            chosen[rng.permutation(everyone)[:size]] = True
        elif sim.draw == "in order":
            chosen[(np.arange(size) + at) % everyone], at = True, at + size
        elif sim.draw == "same":
            chosen = first
        else:
            chosen = rng.random(everyone) < rate
        yield chosen
