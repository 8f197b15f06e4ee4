"""The privacy part as a whole: a model that leaks under a small claim is refuted, and one that does not is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from audit_world import TINY, case_of, phantom_scans, privacy_json, recipe, space_of

from medvae.audit import case as case_module
from medvae.audit.case import Part
from medvae.audit.claim import internal_decision, make_claim, public_decision
from medvae.audit.control import ControlVAE, overfit
from medvae.audit.privacy import privacy_part
from medvae.nets.build import build_model, make_card, state_arrays
from medvae.types import Mechanism, ModelRelease

CLAIMED = {"epsilon": 0.45, "crosscheck": {"epsilon": 0.45}, "mechanisms": [Mechanism("means", 10.0).to_json()]}


def attacked(monkeypatch: pytest.MonkeyPatch, model: Any) -> tuple[Part, dict[str, Any]]:
    scans = phantom_scans(2, 60, 5, 16)
    train, holdout = scans.of(np.arange(30)), scans.of(np.arange(30, 60))
    monkeypatch.setattr(case_module, "EFFORTS", {"quick": TINY})
    monkeypatch.setattr("medvae.audit.deep_attack.load_release", lambda release: model(train))
    claim = make_claim(privacy_json(30, "f", **CLAIMED), {"weights_sha256": "w"})
    space = space_of((16, 16))
    release = ModelRelease(state_arrays(build_model(space, recipe())), make_card(space, recipe()))
    case = case_of(release, claim, train, holdout, phantom_scans(2, 40, 6, 16))
    return privacy_part(case), claim


def test_a_model_that_remembers_its_patients_refutes_its_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    part, claim = attacked(monkeypatch, lambda train: overfit(train, 300, 1))
    found = {f.name: f for f in part.findings}
    assert found["membership, likelihood, raw, mean, auc"].value >= 0.95
    assert found["membership, above the proven curve"].verdict == "ABOVE the proven curve: the claim is refuted"
    decision = internal_decision(public_decision(claim), part.notes)
    assert decision["verdict"] == "DO NOT RELEASE"
    assert "refuted" in decision["reasons"][0]
    assert public_decision(claim)["verdict"] != "DO NOT RELEASE"  # a private number has no say in public


def test_a_model_that_knows_nobody_stays_under_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    part, _ = attacked(monkeypatch, lambda train: ControlVAE(train.x[0].size, train.condition.shape[1]))
    found = {f.name: f for f in part.findings}
    assert found["membership, above the proven curve"].verdict == "under the proven curve"
    assert part.notes["refuted"] is False
