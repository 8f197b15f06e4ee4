"""What a board's part of the report is made from: ledger, canaries, curve and attacks, each number an oracle's."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import hand_made_run as hand
import numpy as np
import pytest
from scipy.stats import beta, norm
from test_gate_findings import plant

from medvae.dp import canaries
from medvae.dp.accounting import pld_epsilon
from medvae.dp.ledger import Ledger
from medvae.dp.tradeoff import reid_bound
from medvae.errors import NotReleasable
from medvae.report import volumes
from medvae.report.dossier import LADDER_RATE, _attack_epsilon, _later, complete
from medvae.report.view import audit_view
from medvae.schemas import problem
from medvae.types import Mechanism


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "generate", hand.fake_generate)


def about(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": 40}


def attacks(**changes: Any) -> dict[str, Any]:
    rates = [
        {"fpr": 0.1, **about(0.3, 0.18, 0.45), "realised_fpr": 0.1, "proven_limit": 0.5, "words": ""},
        {"fpr": 0.01, **about(None), "realised_fpr": None, "proven_limit": 0.2, "words": "not measurable"},
    ]
    primary = {"name": "membership, likelihood, lira, sum, auc", "auc": about(0.55, 0.4, 0.7), "tpr": rates}
    groups = [
        {"condition": "size", "class": c, "members": 9, "auc": about(v, 0.3, 0.9), "verdict": "as others"}
        for c, v in (("small", 0.7), ("large", 0.6), ("none", None))
    ]
    risks = [
        {"name": "pairs", "kind": "linkability", "risk": about(0.02, -0.1, 0.1), "attack": about(0.3),
         "control": about(0.29), "baseline": about(0.25), "verdict": "none found"},
    ]  # fmt: skip
    found = {
        "provenance": "private", "state": "measured", "others": 40, "membership": [primary], "subgroups": groups,
        "risks": risks,
    }  # fmt: skip
    return found | changes


def test_the_public_part_is_public_and_its_numbers_are_the_oracles(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed = Mechanism("dpsgd", 1.0, 0.2, 10)
    plant(run)  # it charges the run anew
    book = Ledger(run.parent / "cohort" / "ledger.db")
    book.reserve("a crashed run", [crashed], hand.DELTA, note=hand.PLANTED[0])
    book.set_budget(20.0, hand.DELTA)
    monkeypatch.setattr(canaries, "visible_factor", lambda *_: 0.7)  # so few steps accuse nothing else
    audit = complete(hand.audit_of(run), run)
    assert problem("audit", audit) is None
    board = audit["board"]
    rungs = {r["kind"]: r["epsilon"] for r in board["ladder"]["rows"]}
    weaker = [replace(m, noise_multiplier=m.noise_multiplier * 0.7) for m in hand.MECHANISMS]
    assert rungs["claim"] == pld_epsilon(hand.MECHANISMS, hand.DELTA) < rungs["fault"]
    assert rungs["fault"] == pld_epsilon(weaker, hand.DELTA)
    assert all(r["epsilon"] <= rungs["claim"] for r in board["ladder"]["rows"] if r["kind"] == "found")
    assert [r["label"] for r in board["ladder"]["rows"] if r["kind"] == "found"]
    own, other = board["ledger"]["rows"]
    assert (own["this"], own["ended"], other["this"], other["ended"]) == (True, True, False, False)
    assert own["cumulative"] == own["epsilon"] == rungs["claim"]
    assert other["cumulative"] == pld_epsilon([*hand.MECHANISMS, crashed], hand.DELTA)
    assert board["ledger"]["budget"]["epsilon"] == 20.0
    assert {r["kind"] for r in board["risks"]} == {"singling out", "linkability", "inference"}
    assert all(r["proven_limit"] == reid_bound(hand.MECHANISMS, r["blind_guess"]) for r in board["risks"])
    assert not any(planted in json.dumps(audit) for planted in hand.PLANTED)


def test_the_viewer_holds_the_models_own_scans_to_the_byte(run: Path) -> None:
    viewer = complete(hand.audit_of(run), run)["viewer"]
    codes = np.frombuffer(base64.b64decode(viewer["uint8_base64"]), np.uint8)
    drawn = codes.reshape(len(viewer["labels"]), *viewer["shape"])
    rows = volumes.spread_conditions(hand.SPACE, volumes.COUNT, volumes.SEED)
    model = type("Model", (), {"space": hand.SPACE})()
    images = hand.fake_generate(model, rows, volumes.SEED).images
    assert np.array_equal(drawn, np.rint(255 * images).astype(np.uint8))
    assert all("size_class" in label and "age" in label for label in viewer["labels"])


def test_large_scans_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "MAX_VOXELS", 100)
    model: Any = type("Model", (), {"space": hand.SPACE})()
    viewer = volumes.volumes(model, "dp")
    assert math.prod(viewer["shape"]) <= 100
    assert viewer["spacing_mm"][0] == 2 * hand.SPACE.spacing_mm[0]


def test_nothing_an_attack_found_reaches_the_public_part(run: Path) -> None:
    """Even where an audit was to carry its attacks into the public report by mistake, nothing is taken from them."""
    plain = hand.audit_of(run)
    mistaken = complete(plain | {"attacks": attacks()}, run)
    assert mistaken["board"] == complete(plain, run)["board"]
    assert mistaken["summary"] == complete(plain, run)["summary"]
    assert problem("audit", mistaken) is not None


def test_the_internal_part_reads_the_attacks(run: Path) -> None:
    audit = complete(hand.audit_of(run, "internal", attacks=attacks()), run)
    assert problem("audit", audit) is None
    board = audit["board"]
    assert (board["subgroup"]["name"], board["subgroup"]["value"], board["subgroup"]["tested"]) == (
        "size small",
        0.7,
        2,
    )
    assert not any(r["kind"] == "fault" for r in board["ladder"]["rows"])
    link = next(r for r in board["risks"] if r["kind"] == "linkability")
    assert (link["value"], link["low"], link["blind_guess"], link["provenance"]) == (0.02, -0.1, 0.25, "private")
    assert link["proven_limit"] == reid_bound(hand.MECHANISMS, 0.25)
    found = next(r for r in board["ladder"]["rows"] if r["provenance"] == "private")
    assert found["epsilon"] == pytest.approx(max(0, math.log((0.18 - hand.DELTA) / beta.ppf(0.975, 5, 36))))
    assert any("found 30 of 100 patients (95 % interval 18 to 45)" in line for line in audit["summary"])
    assert audit_view(audit)["internal"]


@pytest.mark.parametrize("state", ["INVALID: blind", "INCONCLUSIVE: control", "not measurable"])
def test_an_attack_without_a_result_gives_no_rung_and_no_sentence(run: Path, state: str) -> None:
    audit = complete(hand.audit_of(run, "internal", attacks=attacks(state=state)), run)
    assert not any(r["provenance"] == "private" for r in audit["board"]["ladder"]["rows"])
    assert not any("of 100 patients" in line for line in audit["summary"])


def test_the_epsilon_read_from_an_attack_is_too_large_in_at_most_1_of_20_audits() -> None:
    """The best attack on a Gaussian mechanism, 3,000 times; a bound without the interval of FPR would fail."""
    epsilon, delta, members, others, times = 1.0, 1e-5, 60, 60, 3000
    noise = 3.730631634816464  # of the Gaussian mechanism that is (1, 1e-5)-DP
    assert pld_epsilon([Mechanism("m", noise)], delta) == pytest.approx(epsilon, rel=5e-3)
    tpr = norm.sf(norm.isf(LADDER_RATE) - 1 / noise)
    rng = np.random.default_rng(0)
    right, wrong = rng.binomial(members, tpr, times), rng.binomial(others, LADDER_RATE, times)
    over = naive = 0
    for r, w in zip(right, wrong, strict=True):
        low = float(beta.ppf(0.025, r, members - r + 1)) if r else 0.0
        row = {"fpr": LADDER_RATE, "low": low, "realised_fpr": w / others}
        found = _attack_epsilon({"state": "measured", "others": others, "membership": [{"tpr": [row]}]}, delta)
        over += found is not None and found > epsilon
        naive += r > 0 and w > 0 and math.log((r / members) / (w / others)) > epsilon
    assert over <= 0.05 * times
    assert naive > 0.1 * times


def test_a_refuting_canary_turns_the_decision(run: Path) -> None:
    audit = complete(hand.audit_of(plant(run, noise=0.5)), run)
    assert audit["decision"]["verdict"] == "DO NOT RELEASE"
    assert "canary audit refutes the claim" in audit["decision"]["reasons"][0]
    assert "epsilon is a weak promise" in audit["decision"]["reasons"]


@pytest.mark.parametrize("key", ["receipt_digest", "weights_sha256"])
def test_canaries_of_another_run_say_nothing(run: Path, key: str) -> None:
    audit = complete(hand.audit_of(plant(run, **{key: "0" * 64})), run)
    assert audit["board"]["canary"]["verdict"] == "NOT_MEASURABLE"
    assert "another run or model" in audit["board"]["canary"]["words"][0]
    assert [r["kind"] for r in audit["board"]["ladder"]["rows"]] == ["claim"]
    assert "no canary audit" in audit["not_tested"][0]


def test_a_run_without_privacy_shows_its_scans_inside_only(run: Path) -> None:
    inside, outside = (hand.audit_of(run, side) for side in ("internal", "public"))
    for audit in (inside, outside):
        audit["claim"] |= {"epsilon": None, "releasable": False}
    assert complete(inside, run)["viewer"]["provenance"] == "private"
    whole = complete(outside, run)
    assert whole["viewer"] is None
    assert whole["board"]["ladder"]["rows"] == []
    assert all(r["proven_limit"] is None for r in whole["board"]["risks"])
    assert problem("audit", whole) is None


def test_a_lost_ledger_is_not_passed_over(run: Path) -> None:
    (run.parent / "cohort" / "ledger.db").unlink()
    with pytest.raises(NotReleasable, match="ledger"):
        complete(hand.audit_of(run), run)


@pytest.mark.parametrize(("day", "later"), [("2026-01-05", "2027-01-05"), ("2024-02-29", "2025-02-28"), ("", "")])
def test_review_is_due_within_a_year(day: str, later: str) -> None:
    assert _later(day) == later
