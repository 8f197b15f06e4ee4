"""Two independent accountants agree within 1 %: the upper bounds of PLD and of PRV are compared."""

from __future__ import annotations

import math

import pytest

import medvae.crosscheck as crosscheck
from medvae.crosscheck import agree, prv_epsilon
from medvae.dp.accounting import gaussian_epsilon, pld_epsilon
from medvae.errors import ConfigError
from medvae.types import Mechanism

PLANS = {
    "mnist": [Mechanism("dpsgd", 1.1, 256 / 60000, 3000)],
    "usual": [Mechanism("moments", 1.1), Mechanism("dpsgd", 1.78, 0.1, 500)],
    "small cohort": [Mechanism("moments", 0.65), Mechanism("dpsgd", 6.8, 0.25, 200)],
    "three stages": [Mechanism("moments", 3.0), Mechanism("labels", 8.0), Mechanism("dpsgd", 2.2, 0.5, 30)],
    "two trainings": [Mechanism("a", 1.2, 0.02, 300), Mechanism("b", 2.0, 0.3, 40)],
    "strong": [Mechanism("dpsgd", 8.0, 0.1, 300)],
    "weak": [Mechanism("dpsgd", 0.6, 0.1, 60), Mechanism("moments", 0.5)],
}


@pytest.mark.parametrize("delta", [1e-5, 1e-7])
@pytest.mark.parametrize("name", list(PLANS))
def test_pld_and_prv_agree_within_one_percent(name: str, delta: float) -> None:
    pld, prv, ok = agree(PLANS[name], delta)
    assert ok
    assert abs(pld - prv) <= 0.01 * pld
    assert prv >= 0.999 * pld  # both bound from above: PRV's stated error is on top


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.7, 30.0, 300.0])
def test_unsampled_gaussians_enter_exactly(noise: float) -> None:
    """Opacus's formulas hold at sample rate 1: compared with the closed form of Balle & Wang 2018."""
    exact = gaussian_epsilon(noise, 1e-5)
    prv = prv_epsilon([Mechanism("moments", noise)], 1e-5)
    assert exact - 1e-6 <= prv <= 1.005 * exact + 2 * crosscheck.SMALLEST_ERROR
    assert agree([Mechanism("moments", noise)], 1e-5).ok


def test_a_wrong_claim_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PLANS["usual"]
    for factor in (0.98, 1.02):
        monkeypatch.setattr(crosscheck, "pld_epsilon", lambda m, d, f=factor: f * pld_epsilon(m, d))
        assert not agree(plan, 1e-5).ok
    monkeypatch.setattr(crosscheck, "pld_epsilon", lambda _m, _d: math.inf)
    assert not agree(plan, 1e-5).ok


def test_no_noise_and_nothing() -> None:
    assert agree([Mechanism("moments", 0.0)], 1e-5) == (math.inf, math.inf, True)
    assert agree([], 1e-5) == (0.0, 0.0, True)
    with pytest.raises(ConfigError, match="delta"):
        prv_epsilon(PLANS["usual"], 0.0)
    with pytest.raises(ConfigError, match="sample rate"):
        prv_epsilon([Mechanism("dpsgd", 1.0, 1.5, 10)], 1e-5)
