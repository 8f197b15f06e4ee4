"""A run that was asked for a risk records it, and its claim keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_cohort import small_config

from medvae.dp.tradeoff import advantage, reid_bound
from medvae.errors import RunError
from medvae.schemas import problem
from medvae.train.run import train
from medvae.types import Mechanism


@pytest.mark.parametrize("asked", [{"max_advantage": 0.3}, {"max_reid_risk": 0.09, "baseline": 0.01}, {"epsilon": 4.0}])
def test_the_claim_keeps_the_asked_risk(cohort: Path, tmp_path: Path, asked: dict[str, float]) -> None:
    goal = {"dp_epsilon": asked["epsilon"]} if "epsilon" in asked else {"dp_epsilon": None, **asked}
    claim = train(cohort, tmp_path / "run", small_config(2, **goal))
    assert claim["asked"] == asked
    assert json.loads((tmp_path / "run" / "privacy.json").read_text())["asked"] == asked
    assert problem("privacy", claim) is None
    charged = [Mechanism.from_json(m) for m in claim["mechanisms"]]
    assert len(charged) > 1
    if "max_advantage" in asked:
        assert 0.98 * asked["max_advantage"] <= advantage(charged) <= asked["max_advantage"]
    elif "max_reid_risk" in asked:
        assert reid_bound(charged, asked["baseline"]) <= asked["max_reid_risk"]
    else:
        assert claim["epsilon"] <= asked["epsilon"]


def test_a_run_is_not_resumed_with_another_goal(cohort: Path, tmp_path: Path) -> None:
    train(cohort, tmp_path / "run", small_config(2))
    with pytest.raises(RunError, match="another"):
        train(cohort, tmp_path / "run", small_config(2, dp_epsilon=None, max_advantage=0.3), resume=True)
