"""What a run is asked to hold: an epsilon, or a risk in plain numbers from which the noise follows.

A risk is a bound on what any attacker achieves, read from the trade-off curve f of *all* stages together:
advantage = max TPR - FPR = delta at epsilon 0, and the success of reconstruction or attribute inference
1 - f(baseline) for an attacker whose best guess without the release is right with probability `baseline`
(Hayes et al. 2023, "Bounding Training Data Reconstruction in DP-SGD").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from medvae.config import TrainConfig
from medvae.dp.accounting import calibrate_noise, gaussian_noise_for, smallest_noise
from medvae.dp.tradeoff import advantage, noise_for_advantage, noise_for_reid, reid_bound
from medvae.errors import ConfigError
from medvae.types import Mechanism


@dataclass(frozen=True)
class Goal:
    """One promise that all stages of a run keep together.

    limit: epsilon at the run's delta, or the largest advantage, or the largest success at `baseline`.
    """

    kind: Literal["epsilon", "advantage", "reid"]
    limit: float
    baseline: float | None = None

    def gaussian_noise(self, delta: float) -> float:
        """Return the noise multiplier of the one Gaussian mechanism that meets the goal exactly."""
        if self.kind == "epsilon":
            return gaussian_noise_for(self.limit, delta)
        if self.kind == "advantage":
            return noise_for_advantage(self.limit)
        return noise_for_reid(self.limit, self._kappa)

    def calibrate(self, mechanisms: Callable[[float], Sequence[Mechanism]], delta: float) -> float:
        """Return the smallest noise multiplier z, to 1e-3, with which all of `mechanisms(z)` together keep the goal."""
        if self.kind == "epsilon":
            return calibrate_noise(mechanisms, self.limit, delta)
        words = f"a largest {'advantage' if self.kind == 'advantage' else 'risk'} of {self.limit:g}"
        return smallest_noise(mechanisms, self._risk, self.limit, words)

    def to_json(self) -> dict[str, Any]:
        """Return what was asked, under the names of the flags; an infinite epsilon is None."""
        if self.kind == "epsilon":
            return {"epsilon": self.limit if self.limit < float("inf") else None}
        if self.kind == "advantage":
            return {"max_advantage": self.limit}
        return {"max_reid_risk": self.limit, "baseline": self.baseline}

    @property
    def _kappa(self) -> float:
        if self.baseline is None:
            raise ConfigError("a largest risk needs a baseline: give --baseline K, the success of the best blind guess")
        return self.baseline

    def _risk(self, mechanisms: Sequence[Mechanism], cells: int) -> float:
        if self.kind == "advantage":
            return advantage(mechanisms, cells)
        return reid_bound(mechanisms, self._kappa, cells)


def goal_of(config: TrainConfig) -> Goal:
    """Return what a run's settings ask for; the settings name exactly one goal."""
    if config.max_advantage is not None:
        return Goal("advantage", config.max_advantage)
    if config.max_reid_risk is not None:
        return Goal("reid", config.max_reid_risk, config.baseline)
    if config.dp_epsilon is None:
        raise ConfigError("no privacy goal is set: give --dp-epsilon, --max-advantage or --max-reid-risk")
    return Goal("epsilon", config.dp_epsilon)
