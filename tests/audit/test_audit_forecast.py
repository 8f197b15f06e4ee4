"""What a tier without a bound will cost is foretold from first pieces of the work that is still to be done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from audit_world import TINY, case_of, make_cohort, make_run, phantom_scans, privacy_json, recipe

from medvae.audit import case as case_module
from medvae.audit.case import Case
from medvae.audit.claim import make_claim
from medvae.audit.forecast import Work, duration, forecast, in_words
from medvae.audit.privacy import privacy_part
from medvae.audit.run import audit
from medvae.config import AuditConfig, DpSgdConfig, MomentsConfig
from medvae.nets.build import build_model, make_card, state_arrays
from medvae.train.rule import resolve
from medvae.types import Mechanism, ModelRelease

EFFORT = replace(TINY, closed_shadows=8, deep_shadows=8, generators=2, made=40, deep_minutes=None)


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A run of closed form and DP-SGD on 12 patients, with 12 others."""
    monkeypatch.setattr(case_module, "EFFORTS", {"quick": EFFORT})
    scans = phantom_scans(2, 24, 1, 16)
    train, holdout = scans.of(np.arange(12)), scans.of(np.arange(12, 24))
    asked = recipe().model_copy(
        update={"moments": MomentsConfig(enabled=True), "dpsgd": DpSgdConfig(enabled=True, steps=2, sample_rate=0.5)}
    )
    whole = resolve(asked, 12, scans.space)
    release = ModelRelease(state_arrays(build_model(scans.space, whole)), make_card(scans.space, whole))
    mechanisms = [Mechanism("means", 10.0).to_json(), Mechanism("dpsgd", 2.0, 0.5, 2).to_json()]
    claim = make_claim(privacy_json(12, "f", mechanisms=mechanisms), {"weights_sha256": "w"})
    return replace(case_of(release, claim, train, holdout, phantom_scans(2, 40, 6, 16)), folder=tmp_path)


def by_name(works: list[Work]) -> dict[str, Work]:
    return {w.name: w for w in works}


def test_a_forecast_counts_what_is_still_to_be_done(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_seconds(work: object) -> float:
        work()  # type: ignore[operator]
        return 2.0

    monkeypatch.setattr("medvae.audit.forecast.seconds_of", two_seconds)
    before = by_name(forecast(case))
    assert (before["closed-form shadow models"].count, before["closed-form shadow models"].seconds) == (8, 16.0)
    assert before["shadow models by DP-SGD"].done == 0
    assert before["shadow models by DP-SGD"].seconds > 0
    # 40 volumes are 200 images: some more of the audited model, 200 of each of two shadows; a look takes 32.
    made, more = before["synthetic scans for attacks"], 200 - len(case.made) + 2 * 200
    assert (made.count, made.seconds) == (more, 2.0 / 32 * more)
    assert not list(case.folder.rglob("shadow-*"))  # type: ignore[union-attr]

    privacy_part(case)
    stored = sorted(case.folder.rglob("shadow-*"))  # type: ignore[union-attr]
    assert len(stored) == 16
    after = by_name(forecast(case))
    assert all(after[n].done == 8 and after[n].seconds == 0 for n in before if "shadow" in n)
    torn = next(p for p in stored if p.name == "shadow-0005.npz")
    torn.write_bytes(b"torn")
    assert sorted(w.done for w in forecast(case) if "shadow" in w.name) == [7, 8]


def test_a_forecast_is_of_the_size_of_what_it_foretells(case: Case) -> None:
    foretold = by_name(forecast(case))["closed-form shadow models"].seconds
    took = privacy_part(case).attacks["seconds"]["shadows"]
    assert 0 < foretold < 20 * took


def test_it_is_told_before_the_attacks_of_a_tier_without_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", make_cohort(tmp_path / "cohort", 2, 48, size=16))
    for minutes, told in ((None, 1), (5.0, 0)):
        monkeypatch.setattr(case_module, "EFFORTS", {"quick": replace(TINY, deep_minutes=minutes)})
        monkeypatch.setattr("medvae.audit.run.EFFORTS", {"quick": replace(TINY, deep_minutes=minutes)})
        said: list[str] = []
        done: list[int] = []

        def note(line: str, said: list[str] = said, done: list[int] = done) -> None:
            said.append(line)
            assert max(done) < 16  # before the first of the parts is over

        audit(run, tmp_path / f"report{told}", AuditConfig(synthetic=32), lambda at, _, d=done: d.append(at), note)
        assert len(said) == told
        assert all("tier quick: about" in line and "goes on after the last" in line for line in said)


def test_durations_are_words_a_person_uses() -> None:
    assert [duration(s) for s in (0.2, 40, 100, 3000, 7200)] == ["1 s", "40 s", "2 min", "50 min", "2.0 hours"]
    line = in_words("full", [Work("shadow models by DP-SGD", 64, 20, 3600.0), Work("learners for utility", 0, 0, 60.0)])
    assert "about 61 min on this machine" in line
    assert "64 shadow models by DP-SGD (20 are there) 60 min; learners for utility 60 s" in line
