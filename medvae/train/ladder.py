"""The same run planned at other epsilons: what more privacy, or less, would take."""

from __future__ import annotations

from typing import Any

from medvae.config import TrainConfig
from medvae.dp.tradeoff import in_short
from medvae.train.planning import make_plan
from medvae.types import ImageSpace

LADDER = (1.0, 2.0, 4.0, 8.0)


def ladder(patients: int, space: ImageSpace, config: TrainConfig) -> list[dict[str, Any]]:
    """Plan the run of `config` for so many training patients at each epsilon of LADDER, whatever it asks for."""
    open_goal = {"max_advantage": None, "max_reid_risk": None, "baseline": None}
    rows = []
    for epsilon in LADDER:
        asked = make_plan(patients, space, config.model_copy(update={**open_goal, "dp_epsilon": epsilon})).privacy
        noise, words = asked.noise_multiplier, in_short(asked.epsilon, asked.mechanisms)
        rows.append({"asked": epsilon, "epsilon": asked.epsilon, "noise_multiplier": noise, "words": words})
    return rows
