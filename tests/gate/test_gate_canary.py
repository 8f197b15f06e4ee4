"""The canary audit behind the gate: recomputed from scores and coins, and any other story of them is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from medvae.dp.canaries import commit, document, judge, register
from medvae.dp.conformance import Watch
from medvae.dp.noise import seeded_noise
from medvae.errors import ConfigError
from medvae.gate.canary import canary_check
from medvae.schemas import problem
from medvae.types import Mechanism

MECHANISMS = (Mechanism("means", 0.9), Mechanism("dpsgd", 1.2, 0.2, 20))
DELTA = 1e-5
CLAIM = {"receipt": {"digest": "a" * 64}, "weights_sha256": "b" * 64, "delta": DELTA}


@cache
def _made(factor: float, count: int) -> str:
    commitment = commit(register(count, MECHANISMS, 4), seeded_noise(count))
    rng, coins, watches = np.random.default_rng(0), commitment.coins, []
    for mechanism in MECHANISMS:
        watch = Watch(coins, mechanism)
        for _ in range(mechanism.count):
            drawn = coins & (rng.random(count) < mechanism.sample_rate)
            watch.see((drawn + factor * mechanism.noise_multiplier * rng.standard_normal(count))[None], drawn)
        watches.append(watch)
    scores = {w.mechanism.name: w.scores for w in watches}
    binding = {"receipt_digest": "a" * 64, "weights_sha256": "b" * 64}
    return json.dumps(document(commitment, scores, [w.record() for w in watches], MECHANISMS, DELTA, binding))


def made(factor: float = 1.0, count: int = 400) -> dict[str, Any]:
    return json.loads(_made(factor, count))


def test_an_honest_audit_passes_and_keeps_to_its_schema() -> None:
    found = made()
    assert problem("canary", found) is None
    assert found["verdict"] == "PASS"
    assert [r["part"] for r in found["results"]] == ["releases", "dpsgd", "all"]
    check = canary_check(found, CLAIM, MECHANISMS)
    assert check.ok
    assert "400 made-up patients" in check.detail


def test_too_little_noise_is_refuted_by_scores_and_by_conformance() -> None:
    found = made(0.4)
    assert found["verdict"] == "REFUTED"
    assert any(r["accused"] for r in found["results"])
    assert not all(c["ok"] for c in found["checks"])
    assert not canary_check(found, CLAIM, MECHANISMS).ok


def test_too_few_canaries_are_not_measurable_and_the_number_needed_is_said() -> None:
    found = made(count=8)
    assert found["verdict"] == "NOT_MEASURABLE"
    assert "1000" in found["reasons"][0]
    assert all("fdp_epsilon" not in r for r in found["results"])


def _flip(d: dict[str, Any]) -> None:
    d["flips"] = ("0" if d["flips"][0] == "1" else "1") + d["flips"][1:]
    d["included"] = d["flips"].count("1")


def _score(d: dict[str, Any]) -> None:
    part = d["parts"][0]
    part["scores"] = sorted(part["scores"])


def _claim_more_noise(d: dict[str, Any]) -> None:
    for m in d["registration"]["mechanisms"]:
        m["event"]["noise_multiplier"] *= 2


@pytest.mark.parametrize(
    "harm",
    [
        _flip,
        _score,
        _claim_more_noise,
        lambda d: d["commitment"].update(salt="0" * 64),
        lambda d: d.update(receipt_digest="c" * 64),
        lambda d: d.update(weights_sha256="c" * 64),
        lambda d: d.update(delta=1e-6),
        lambda d: d["results"][0].update(fdp_epsilon=0.01),
        lambda d: d["results"].pop(),
        lambda d: d["conformance"][0]["noise"].update(squares=1.0),
        lambda d: d["conformance"][1].update(steps=10),
        lambda d: d["conformance"].pop(),
        lambda d: d["parts"].pop(),
        lambda d: d["parts"][0]["scores"].pop(),
        lambda d: d.update(verdict="NOT_MEASURABLE"),
        lambda d: d.update(words=["nothing to see", "x" * 501]),
        lambda d: d.update(note="John Doe"),
    ],
)
def test_any_change_of_an_audit_is_seen(harm: Callable[[dict[str, Any]], None]) -> None:
    changed = copy.deepcopy(made())
    harm(changed)
    assert not canary_check(changed, CLAIM, MECHANISMS).ok


def test_a_refuted_audit_cannot_be_called_passed() -> None:
    assert not canary_check({**made(0.4), "verdict": "PASS"}, CLAIM, MECHANISMS).ok


@pytest.mark.parametrize("claimed", [MECHANISMS[:1], (*MECHANISMS, Mechanism("prior", 2.0)), MECHANISMS[::-1], ()])
def test_an_audit_of_another_claim_refutes(claimed: tuple[Mechanism, ...]) -> None:
    assert judge(made(), claimed, DELTA).verdict == "REFUTED"


@pytest.mark.parametrize("harm", [{"flips": "012"}, {"parts": None}, {"schema": "medvae.canary/9"}, {"count": 7}])
def test_a_torn_audit_is_one_sentence(harm: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        judge({**made(), **harm}, MECHANISMS, DELTA)
