"""The step: noise of the planned size, once; the expected divisor; empty draws."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from noise_check import FALSE_ALARM, has_planned_noise
from scipy import stats
from torch import Tensor, nn

from medvae.dp.noise import NoiseSource, os_noise, seeded_noise
from medvae.errors import MedvaeError
from medvae.train.gradient import StepStats
from medvae.train.optimizer import PatientDPOptimizer, average_weights, inner_optimizer, rate_factor
from medvae.types import Batch, Private

SIGMA, BOUND, EXPECTED = 1.7, 0.3, 12.5
NOTHING = Batch(np.zeros((0, 1, 2, 2), np.float32), np.zeros((0, 0), np.float32), np.zeros(0, np.int64))


class FixedSampler:
    """An engine that returns the same sums whatever is drawn."""

    def __init__(self, model: nn.Module, value: float = 0.0) -> None:
        self.parameters = list(model.parameters())
        self.value = value
        self.calls = 0

    def clipped_sum(self, batch: Batch, latent: Tensor) -> tuple[list[Tensor], Private[StepStats]]:
        self.calls += 1
        sums = [torch.full_like(p, self.value) for p in self.parameters]
        return sums, Private(StepStats(torch.zeros(0), 0.0, float("nan"), 0))


def one_step(value: float, sigma: float, source: NoiseSource, size: int = 20_000) -> np.ndarray:
    """Return what one released step moved the weights by, undone of learning rate 1 and the divisor: sum + noise."""
    model = nn.Sequential(nn.Linear(1, size), nn.Linear(size, 1))
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()]).double()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = PatientDPOptimizer(
        inner, FixedSampler(model, value), noise_multiplier=sigma, max_grad_norm=BOUND, expected_patients=EXPECTED
    )
    optimizer.step_on(NOTHING, torch.zeros(0, 1), source)
    after = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    return ((before - after) * EXPECTED).numpy()


@pytest.mark.parametrize("source", [seeded_noise(0), os_noise()], ids=["seeded", "os"])
def test_a_released_step_has_the_planned_noise(source: NoiseSource) -> None:
    moved = one_step(0.0, SIGMA, source)
    assert has_planned_noise(moved, SIGMA * BOUND)
    assert stats.kstest(moved / (SIGMA * BOUND), "norm").pvalue > FALSE_ALARM


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 2**0.5])
def test_the_test_of_noise_rejects_other_noise(factor: float) -> None:
    """Half of it, a tenth too little or too much, or noise that was added twice."""
    assert not has_planned_noise(one_step(0.0, factor * SIGMA, seeded_noise(0)), SIGMA * BOUND)


def test_the_divisor_is_the_expected_number_of_patients() -> None:
    """Nobody was drawn, and still the sum is divided by the fixed public number."""
    assert one_step(3.0, 0.0, seeded_noise(0), size=10) == pytest.approx(3.0, rel=1e-5)


def test_an_empty_draw_moves_the_weights_by_noise() -> None:
    first, second = (one_step(0.0, SIGMA, seeded_noise(s), size=10) for s in (1, 2))
    assert (first != 0).all()
    assert not np.allclose(first, second)


def test_noise_is_not_shared_between_parameters() -> None:
    moved = one_step(0.0, SIGMA, seeded_noise(3), size=1000)
    assert len(np.unique(np.round(moved, 7))) > 0.99 * len(moved)


def test_a_batch_serves_one_step() -> None:
    model = nn.Linear(2, 2)
    sampler = FixedSampler(model)
    optimizer = PatientDPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        sampler,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_patients=1.0,
    )
    optimizer.step_on(NOTHING, torch.zeros(0, 1), seeded_noise(0))
    assert sampler.calls == 1
    for again in (optimizer.step, optimizer.add_noise, optimizer.clip_and_accumulate):
        with pytest.raises(MedvaeError, match="freshly drawn"):
            again()


def test_other_parameters_than_the_engines_are_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(MedvaeError, match="same parameters"):
        PatientDPOptimizer(
            inner_optimizer([model.weight], 0.1),
            FixedSampler(model),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_patients=1.0,
        )


def test_the_learning_rate_follows_a_fixed_schedule() -> None:
    factors = [rate_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2)
    assert max(factors) == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.1, abs=0.01)
    assert all(b <= a for a, b in pairwise(factors[5:]))


def test_averaged_weights_forget_where_they_began() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = {"weight": torch.full((1, 1), 100.0)}
    for step in range(300):
        with torch.no_grad():
            model.weight.fill_(float(step >= 100))
        average_weights(average, model, step, 0.95)
    assert float(average["weight"]) == pytest.approx(1.0, abs=1e-3)
