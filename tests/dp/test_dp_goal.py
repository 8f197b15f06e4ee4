"""From a risk to the noise: the curve of all stages together keeps what was asked, and hardly more than that."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvae.config import TrainConfig, build
from medvae.dp.accounting import pld_epsilon
from medvae.dp.goal import Goal, goal_of
from medvae.dp.staging import plan_stages
from medvae.dp.tradeoff import advantage, epsilon_for_advantage, epsilon_for_reid, in_short, reid_bound
from medvae.errors import ConfigError
from medvae.types import Mechanism

STAGES = [("means", 0.1), ("second", 0.2)]
SGD = st.sampled_from([None, (0.05, 200), (0.25, 60), (1.0, 20)])


@given(wanted=st.floats(0.02, 0.9), sgd=SGD)
@settings(max_examples=8, deadline=None)
def test_no_attack_on_the_whole_plan_has_more_than_the_asked_advantage(
    wanted: float, sgd: tuple[float, int] | None
) -> None:
    plan = plan_stages(Goal("advantage", wanted), 1e-5, STAGES, sgd)
    assert 0.98 * wanted <= advantage(plan) <= wanted


@given(baseline=st.sampled_from([0.001, 0.01, 0.2]), factor=st.floats(1.3, 4.5), sgd=SGD)
@settings(max_examples=8, deadline=None)
def test_no_guess_succeeds_above_the_asked_risk(baseline: float, factor: float, sgd: tuple[float, int] | None) -> None:
    wanted = baseline * factor
    plan = plan_stages(Goal("reid", wanted, baseline), 1e-5, STAGES, sgd)
    assert 0.98 * wanted <= reid_bound(plan, baseline) <= wanted


def test_without_sampling_the_goal_is_the_gaussian_mechanism_of_the_closed_form() -> None:
    """The curve of DP-SGD is another one, so there its epsilon differs from the closed form's."""
    delta = 1e-5
    for goal, epsilon in (
        (Goal("advantage", 0.2), epsilon_for_advantage(0.2, delta)),
        (Goal("reid", 0.09, 0.01), epsilon_for_reid(0.09, 0.01, delta)),
    ):
        assert pld_epsilon(plan_stages(goal, delta, STAGES, None), delta) == pytest.approx(epsilon, rel=5e-3)
        sampled = pld_epsilon(plan_stages(goal, delta, STAGES, (0.02, 100)), delta)
        assert sampled > 1.02 * epsilon  # a heavier tail at the same risk: why the mechanisms themselves are calibrated


def test_less_risk_needs_more_noise() -> None:
    noise = [plan_stages(Goal("advantage", a), 1e-5, STAGES, (0.1, 50))[-1].noise_multiplier for a in (0.1, 0.3, 0.6)]
    assert noise == sorted(noise, reverse=True)


def test_a_goal_that_cannot_be_met_is_one_sentence() -> None:
    charged = Mechanism("elsewhere", 1.0)
    with pytest.raises(ConfigError, match=r"no noise is enough for a largest advantage of 0\.1"):
        Goal("advantage", 0.1).calibrate(lambda z: [charged, Mechanism("dpsgd", z, 0.1, 50)], 1e-5)
    with pytest.raises(ConfigError, match="needs a baseline"):
        Goal("reid", 0.1).gaussian_noise(1e-5)


@pytest.mark.parametrize(
    ("given_", "asked"),
    [
        ({"dp_epsilon": 8.0}, {"epsilon": 8.0}),
        ({"dp_epsilon": math.inf}, {"epsilon": None}),
        ({"max_advantage": 0.2}, {"max_advantage": 0.2}),
        ({"max_reid_risk": 0.09, "baseline": 0.01}, {"max_reid_risk": 0.09, "baseline": 0.01}),
    ],
)
def test_what_was_asked_is_recorded_by_the_names_of_the_flags(
    given_: dict[str, float], asked: dict[str, float]
) -> None:
    assert goal_of(build(TrainConfig, **given_)).to_json() == asked


@pytest.mark.parametrize(
    "given_",
    [
        {},
        {"dp_epsilon": 8.0, "max_advantage": 0.2},
        {"dp_epsilon": 8.0, "max_reid_risk": 0.09, "baseline": 0.01},
        {"max_advantage": 0.2, "baseline": 0.01},
        {"max_reid_risk": 0.09},
        {"baseline": 0.01},
        {"max_reid_risk": 0.01, "baseline": 0.01},
    ],
)
def test_there_is_exactly_one_goal(given_: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        build(TrainConfig, **given_)


def test_the_short_line_beside_an_epsilon() -> None:
    line = in_short(8.0, [Mechanism("gaussian", 0.6)])
    assert "of 1,000 patients are named rightly" in line
    assert "a coin: 50 %" in line
    assert "a weak promise" in line
    assert "nothing is proven" in in_short(None, [])
    assert "nothing is proven" in in_short(math.inf, [])
