"""One epsilon over several stages."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvae.dp.accounting import gaussian_noise_for, pld_epsilon
from medvae.dp.goal import Goal
from medvae.dp.staging import plan_stages
from medvae.errors import ConfigError

shares = st.lists(st.sampled_from([0.0, 0.05, 0.2, 0.3]), min_size=0, max_size=3)


@given(
    epsilon=st.floats(0.3, 16),
    delta=st.sampled_from([1e-6, 1e-5, 1e-3]),
    parts=shares,
    sgd=st.sampled_from([None, (0.05, 200), (0.25, 100), (1.0, 20)]),
)
@settings(max_examples=10, deadline=None)
def test_all_stages_together_cost_what_was_asked_and_no_more(
    epsilon: float, delta: float, parts: list[float], sgd: tuple[float, int] | None
) -> None:
    one_shot = [(f"stage{i}", s) for i, s in enumerate(parts)]
    if sgd is None and not any(parts):
        one_shot.append(("moments", 0.4))
    plan = plan_stages(Goal("epsilon", epsilon), delta, one_shot, sgd)
    total = pld_epsilon(plan, delta)
    assert 0.99 * epsilon <= total <= epsilon
    assert [m.name for m in plan] == [n for n, s in one_shot if s] + (["dpsgd"] if sgd else [])


def test_a_share_is_a_part_of_the_precision() -> None:
    mu = 1 / gaussian_noise_for(8.0, 1e-5)
    first, second, _ = plan_stages(Goal("epsilon", 8.0), 1e-5, [("moments", 0.3), ("labels", 0.05)], (0.1, 100))
    assert first.noise_multiplier == pytest.approx(1 / (mu * math.sqrt(0.3)))
    assert second.noise_multiplier == pytest.approx(1 / (mu * math.sqrt(0.05)))
    assert first.sample_rate == 1.0
    assert first.count == 1


def test_shares_are_scaled_up_where_there_is_no_dpsgd() -> None:
    plan = plan_stages(Goal("epsilon", 8.0), 1e-5, [("moments", 0.3), ("labels", 0.1)], None)
    precision = [1 / m.noise_multiplier**2 for m in plan]
    assert precision[0] / precision[1] == pytest.approx(3.0)
    assert sum(precision) == pytest.approx(1 / gaussian_noise_for(8.0, 1e-5) ** 2, rel=2e-3)


def test_a_stage_left_out_gives_its_budget_to_the_rest() -> None:
    with_moments = plan_stages(Goal("epsilon", 4.0), 1e-5, [("moments", 0.3)], (0.1, 100))[-1]
    without = plan_stages(Goal("epsilon", 4.0), 1e-5, [("moments", 0.0)], (0.1, 100))
    assert without == plan_stages(Goal("epsilon", 4.0), 1e-5, [], (0.1, 100))
    assert without[-1].noise_multiplier < with_moments.noise_multiplier


def test_infinite_epsilon_adds_no_noise() -> None:
    plan = plan_stages(Goal("epsilon", math.inf), 1e-5, [("moments", 0.3)], (0.1, 100))
    assert [(m.name, m.noise_multiplier) for m in plan] == [("moments", 0.0), ("dpsgd", 0.0)]


@pytest.mark.parametrize(
    ("one_shot", "sgd", "word"),
    [
        ([], None, "no stage"),
        ([("moments", 0.0)], None, "no stage"),
        ([("moments", 1.0)], (0.1, 100), "leave nothing"),
        ([("moments", 0.6), ("labels", 0.5)], (0.1, 100), "leave nothing"),
        ([("moments", -0.1)], (0.1, 100), "share of 'moments'"),
        ([("moments", math.nan)], (0.1, 100), "share of 'moments'"),
        ([("moments", 0.1), ("moments", 0.1)], None, "one name"),
        ([("dpsgd", 0.1)], (0.1, 100), "one name"),
        ([("moments", 0.1)], (0.0, 100), "sample rate"),
        ([("moments", 0.1)], (0.1, 0), "count"),
    ],
)
def test_impossible_splits_are_refused(
    one_shot: list[tuple[str, float]], sgd: tuple[float, int] | None, word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        plan_stages(Goal("epsilon", 8.0), 1e-5, one_shot, sgd)
