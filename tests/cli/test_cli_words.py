"""Every epsilon that is printed has its line in plain words beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from medvae import words
from medvae.dp.accounting import pld_epsilon
from medvae.dp.tradeoff import in_short, plain_words
from medvae.types import Mechanism

PLAN = [Mechanism("means", 2.0), Mechanism("dpsgd", 1.1, 0.1, 20)]
EPSILON = pld_epsilon(PLAN, 1e-5)
PLAIN = re.compile(r"of 1,000 patients|nothing is proven")
CLAIM: dict[str, Any] = {
    "epsilon": EPSILON,
    "delta": 1e-5,
    "unit": "patient",
    "neighboring": "add-remove",
    "accountant": "pld",
    "plain_words": plain_words(EPSILON, 1e-5, PLAN),
}
SHORT = in_short(EPSILON, PLAN)
RUN = {"utc": "2026-01-05T09:00:00+00:00", "run_id": "r", "ended": True, "note": ""}
RESULTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plan": (
        words.plan,
        {
            **CLAIM, "patients": 200, "steps": 20, "sample_rate": 0.1, "noise_multiplier": 1.1, "max_grad_norm": 1.0,
            "parameters": 9, "cost": None, "warnings": [], "asked": {"epsilon": 4.0},
            "table": [{"asked": e, "noise_multiplier": 1.0, "words": SHORT} for e in (1.0, 8.0)],
        },
    ),
    "train": (words.train, {**CLAIM, "run": "run", "releasable": True, "reasons": []}),
    "release": (lambda result: words.release(result, Path("release")), {**CLAIM, "override": None}),
    "demo": (words.demo, {"privacy": CLAIM, "report": "a", "release": "b", "verified": True}),
    "ledger": (
        words.ledger,
        {
            **CLAIM, "budget": 10.0, "remaining": 2.0, "spent": EPSILON, "words": SHORT,
            "runs": [RUN | {"epsilon": EPSILON, "words": SHORT}, RUN | {"epsilon": None, "words": in_short(None, [])}],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", RESULTS)
def test_an_epsilon_is_followed_by_what_it_means(command: str) -> None:
    say, result = RESULTS[command]
    lines = say(result)
    told = [i for i, line in enumerate(lines) if re.search(r"epsilon \d", line) and not PLAIN.search(line)]
    assert told
    for i in told:
        if "promise" in lines[i]:  # the meaning itself names the epsilon
            continue
        assert any(PLAIN.search(line) for line in lines[i + 1 : i + 7]), lines[i]


def test_what_was_asked_for_is_said() -> None:
    say, result = RESULTS["plan"]
    assert "an advantage (TPR - FPR) above 0.2" in say({**result, "asked": {"max_advantage": 0.2}})[1]
    risk = say({**result, "asked": {"max_reid_risk": 0.09, "baseline": 0.01}})[1]
    assert "right 1 % of the time without the release is right at most 9 % of the time with it" in risk


def test_an_override_is_said_with_its_reason() -> None:
    override = {"reason": "the board says so, on record", "overridden": ["attacks: none"]}
    lines = words.release({**CLAIM, "override": override}, Path("release"))
    assert "OVERRIDDEN: attacks: none" in lines
    assert any("the board says so, on record" in line for line in lines)
