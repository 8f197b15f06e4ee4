"""What the audits say opens or closes the gate; judgements may be overridden with a reason, facts never."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hand_made_run as hand
import numpy as np
import pytest
from test_gate_checks import SMALL, refuse

from medvae.config import ReleaseConfig, build
from medvae.dp import canaries
from medvae.dp.conformance import Watch
from medvae.dp.ledger import Ledger
from medvae.dp.noise import seeded_noise
from medvae.errors import ConfigError, RunError
from medvae.gate import findings
from medvae.gate.evidence import read_evidence, read_privacy
from medvae.gate.reports import edited, latest, remember
from medvae.gate.verify import verify
from medvae.schemas import problem
from medvae.types import Mechanism

REASON = "The board judged the accusation a false alarm on 5 January."
OVERRIDE = SMALL.model_copy(update={"override": REASON})
AGAINST = {"verdict": "DO NOT RELEASE", "reasons": ["an attack went too far"], "provenance": "private"}
Edit = Callable[..., None]


def proof_of(out: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((out / "privacy" / "certificate.json").read_text())
    return data


def test_the_public_report_goes_along_by_name(run: Path) -> None:
    out = run.parent / "release"
    (run.parent / "report" / "public" / "audit.html").write_text(hand.PLANTED[0])  # an edited page stays behind
    summary = hand.release(
        run,
        out,
        SMALL,
        render=hand.fake_render,
        render_audit=lambda audit, folder: (folder / "audit.html").write_text(audit["decision"]["verdict"]),
    )
    assert sorted(p.name for p in (out / "audit").iterdir()) == ["audit.html", "audit.json"]
    assert (out / "audit" / "audit.html").read_text() == "CONDITIONAL"
    assert proof_of(out)["audit"]["decision"] == "CONDITIONAL"
    assert proof_of(out)["override"] is summary["override"] is None


def test_a_folder_that_is_no_report_is_bad_input(run: Path) -> None:
    refuse(run, "no report", RunError, report=run.parent / "cohort")


# facts: refused, with and without a reason


@pytest.mark.parametrize("config", [SMALL, OVERRIDE], ids=["plain", "override"])
@pytest.mark.parametrize("side", ["public", "internal"])
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("receipt_digest", "0" * 64, "of another run"), ("weights_sha256", "1" * 64, "of another model, or older")],
)
def test_a_report_of_another_run_or_model_is_never_accepted(
    run: Path, config: ReleaseConfig, side: str, key: str, value: str, words: str
) -> None:
    audit = hand.audit_of(run, side)
    audit["claim"][key] = value
    refuse(run, words, report=hand.write_report(run, **{side: audit}), config=config)


@pytest.mark.parametrize("created", ["2001-01-01T00:00:00+00:00", "", "yesterday", "2099-01-01"])
def test_a_report_older_than_the_end_of_the_run_is_never_accepted(run: Path, created: str) -> None:
    report = hand.write_report(run, hand.audit_of(run, created=created))
    refuse(run, "before the run ended", report=report, config=OVERRIDE)


@pytest.mark.parametrize(
    "changes",
    [
        {"findings": "private"},
        {"audience": "internal"},
        {"attacks": {"provenance": "private"}},
        {"viewer": {"provenance": "private", "shape": [2, 2], "spacing_mm": [1], "labels": [], "uint8_base64": ""}},
        {"loss": 0.25},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_public_report_that_names_something_private_is_never_accepted(run: Path, changes: dict[str, Any]) -> None:
    if changes.get("findings") == "private":
        changes = {"findings": hand.audit_of(run, "internal")["findings"]}
    report = hand.write_report(run, hand.audit_of(run, **changes))
    refuse(run, "names something private", report=report, config=OVERRIDE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": None, "releasable": False, "reasons": ["no noise was added"]}, "no noise was added"),
        ({"noise_source": "seeded:chacha20"}, "noise source"),
        ({"noise_multiplier": 9.9}, "headline"),
        ({"epsilon": 0.5}, "epsilon: claimed"),
        ({"unit": "scan"}, "unit"),
    ],
)
def test_no_reason_opens_the_gate_to_a_claim_that_does_not_hold(
    run: Path, edit_privacy: Edit, changes: dict[str, Any], words: str
) -> None:
    edit_privacy(**changes)
    refuse(run, words, config=OVERRIDE)


def test_no_reason_opens_the_gate_over_the_budget(run: Path) -> None:
    ledger = Ledger(run.parent / "cohort" / "ledger.db")
    ledger.reserve("a crashed run", [Mechanism("dpsgd", 1.0, 0.2, 10)], hand.DELTA)
    ledger.set_budget(4.0, hand.DELTA)
    refuse(run, "budget: .* of 4 spent", config=OVERRIDE)


# judgements: refused, and released with a reason that is printed


def no_audit(run: Path) -> Path | None:
    return None


def no_attack(run: Path) -> Path:
    thin = hand.audit_of(run, "internal")
    thin["findings"] = [f for f in thin["findings"] if not f["name"].startswith("membership")]
    return hand.write_report(run, internal=thin)


def decided_inside(run: Path) -> Path:
    return hand.write_report(run, internal=hand.audit_of(run, "internal", decision=AGAINST))


def decided_outside(run: Path) -> Path:
    return hand.write_report(run, hand.audit_of(run, decision=AGAINST | {"provenance": "public"}))


JUDGEMENTS = [
    (no_audit, "attacks: no audit of this run"),
    (no_attack, "attacks: the audit ran no attack on membership"),
    (decided_inside, "decision: the audit decided DO NOT RELEASE"),
    (decided_outside, "decision: the audit decided DO NOT RELEASE"),
]


@pytest.mark.parametrize(("make", "words"), JUDGEMENTS)
def test_a_judgement_closes_the_gate(run: Path, make: Callable[[Path], Path | None], words: str) -> None:
    refuse(run, rf"{words}.*--override REASON", report=make(run))


@pytest.mark.parametrize(("make", "words"), JUDGEMENTS)
def test_an_override_is_printed_in_certificate_readme_report_and_verification(
    run: Path, tmp_path: Path, make: Callable[[Path], Path | None], words: str
) -> None:
    out, seen = tmp_path / "release", []

    def render_audit(audit: Any, folder: Path) -> None:
        seen.append(audit)
        (folder / "audit.html").write_text(audit["decision"]["override"]["reason"])

    report = make(run)
    summary = hand.release(run, out, OVERRIDE, report=report, render=hand.fake_render, render_audit=render_audit)
    proof = proof_of(out)
    assert proof["override"] == summary["override"]
    assert proof["override"]["reason"] == REASON
    assert words in proof["override"]["overridden"][0]
    assert [c["ok"] for c in proof["checks"]].count(False) == len(proof["override"]["overridden"])
    assert REASON in (out / "README.md").read_text()
    assert problem("certificate", {**proof, "override": None}) is not None  # a failed check cannot go unexplained
    if report is not None:
        assert seen == [json.loads((out / "audit" / "audit.json").read_text())]
        assert seen[0]["decision"]["override"] == proof["override"]
        assert problem("audit", seen[0]) is None
        assert (out / "audit" / "audit.html").read_text() == REASON
    said = {c["name"]: c["detail"] for c in verify(out)["checks"]}
    assert "OVERRIDDEN" in said["certificate"]


def test_a_report_that_cannot_be_printed_anew_goes_without_its_old_pages(run: Path, tmp_path: Path) -> None:
    hand.release(run, tmp_path / "out", OVERRIDE, report=decided_inside(run), render=hand.fake_render)
    assert [p.name for p in (tmp_path / "out" / "audit").iterdir()] == ["audit.json"]


def test_a_reason_that_is_not_needed_is_not_printed(run: Path, tmp_path: Path) -> None:
    hand.release(run, tmp_path / "out", OVERRIDE, render=hand.fake_render)
    assert proof_of(tmp_path / "out")["override"] is None
    assert REASON not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("reason", ["", "   ", "because", "x" * 501])
def test_a_reason_says_why(reason: str) -> None:
    with pytest.raises(ConfigError, match="10 to 500 characters"):
        build(ReleaseConfig, override=reason)


# canaries: simulated trainings, judged by the real judge


def plant(run: Path, noise: float = 1.0, leak: float = 0.0, **changes: Any) -> Path:
    """Write canary.json of a training with `noise` times the claimed noise; leak: added to the scores of members."""
    commitment = canaries.commit(canaries.register(400, hand.MECHANISMS, 4), seeded_noise(1))
    hand.charge_anew(run, commitment.digest)
    privacy = json.loads((run / "privacy.json").read_text())
    card = json.loads((run / "model" / "model.json").read_text())
    binding = {"receipt_digest": privacy["receipt"]["digest"], "weights_sha256": card["weights_sha256"]}
    rng = np.random.default_rng(0)
    coins = np.asarray(commitment.coins)
    watches = [Watch(coins, mechanism) for mechanism in hand.MECHANISMS]
    for watch in watches:
        for _ in range(watch.mechanism.count):
            drawn = coins & (rng.random(len(coins)) < watch.mechanism.sample_rate)
            sigma = noise * watch.mechanism.noise_multiplier
            watch.see((drawn + sigma * rng.standard_normal(len(coins)))[None], drawn)
    scores = {watch.mechanism.name: watch.scores + leak * coins for watch in watches}
    records = [watch.record() for watch in watches]
    document = canaries.document(commitment, scores, records, hand.MECHANISMS, hand.DELTA, binding)
    hand.end_anew(run, canaries.unjudged_digest(document))
    hand.write_json(run / "canary.json", {**document, **changes})
    return run


def test_canaries_that_find_nothing_are_told_and_travel_along(run: Path, tmp_path: Path) -> None:
    summary = hand.release(plant(run), tmp_path / "out", SMALL, render=hand.fake_render)
    assert (
        "400 planted: nothing they show speaks against the claim"
        in {c["name"]: c["detail"] for c in summary["checks"]}["canaries"]
    )
    assert (tmp_path / "out" / "privacy" / "canary.json").is_file()
    assert "canaries" in {c["name"] for c in verify(tmp_path / "out")["checks"]}


def test_canaries_that_show_too_little_noise_close_the_gate_for_good(run: Path) -> None:
    for config in (SMALL, OVERRIDE):
        refuse(plant(run, noise=0.5), "canaries: they refute the claim: noise", config=config)


def test_an_accusation_by_scores_alone_is_a_judgement(run: Path, tmp_path: Path) -> None:
    """It befalls correct builds too, at the stated level, so a board may take it upon itself, in public."""
    plant(run, leak=50.0)
    refuse(run, "canaries: they refute the claim: accusation .*--override REASON")
    hand.release(run, tmp_path / "out", OVERRIDE, render=hand.fake_render)
    assert proof_of(tmp_path / "out")["override"]["overridden"][0].startswith("canaries: they refute the claim")


@pytest.mark.parametrize("key", ["receipt_digest", "weights_sha256"])
def test_canaries_of_another_run_or_model_close_the_gate(run: Path, key: str) -> None:
    refuse(plant(run, **{key: "0" * 64}), "canary.json is of another", config=OVERRIDE)


@pytest.mark.parametrize("changes", [{"flips": "01" * 200}, {"parts": []}, {"mechanisms": []}, {"count": 399}])
def test_altered_canaries_close_the_gate(run: Path, changes: dict[str, Any]) -> None:
    refuse(plant(run, **changes), "canar", config=OVERRIDE)


def test_torn_canaries_are_bad_input(run: Path) -> None:
    (run / "canary.json").write_text("{")
    refuse(run, "torn", RunError)


def test_canaries_that_were_planted_must_be_shown(run: Path) -> None:
    evidence = read_evidence(run, read_privacy(run), None)
    assert findings.canary(evidence).ok
    planted = {**evidence.model.card, "recipe": {"canaries": {"enabled": True}}}
    missing = replace(evidence, model=replace(evidence.model, card=planted))
    answer = findings.canary(missing)
    assert (answer.ok, answer.overridable) == (False, False)
    assert "canary.json is missing" in answer.detail


# false stories: each of them passed once


def canary_file(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "canary.json").read_text())
    return found


def test_coins_tossed_after_the_run_close_the_gate(run: Path) -> None:
    """Scores of a broken training, with coins and commitment made anew so that they agree with each other."""
    plant(run, noise=0.5)
    refuse(run, "they refute the claim")
    ledger_of_the_run = (run.parent / "cohort" / "ledger.db").read_bytes()
    receipt = json.loads((run / "privacy.json").read_text())["receipt"]
    other = canaries.commit(canaries.register(400, hand.MECHANISMS, 4), seeded_noise(2))
    plant(run)
    forged = canary_file(run) | {"receipt_digest": receipt["digest"], "flips": canaries.flips(other.coins)}
    forged |= {"included": int(other.coins.sum())}
    forged |= {"commitment": {"algorithm": "sha256", "digest": other.digest, "salt": other.salt}}
    (run.parent / "cohort" / "ledger.db").write_bytes(ledger_of_the_run)
    hand.edit_json(run / "privacy.json", receipt=receipt)
    hand.write_report(run)
    hand.write_json(run / "canary.json", forged)
    refuse(run, "coins of canary.json are not those recorded before the first step", config=OVERRIDE)


def test_scores_altered_after_the_run_close_the_gate(run: Path) -> None:
    plant(run)
    found = canary_file(run)
    hand.write_json(run / "canary.json", found | {"included": found["included"] + 1})
    refuse(run, "canary.json was altered since the run ended", config=OVERRIDE)


def test_a_run_whose_ledger_is_silent_about_it_is_refused(run: Path) -> None:
    """Noise source and number of patients are noted by every run; a ledger without them was not written by one."""
    hand.ledger_of(run).unlink()
    receipt = Ledger(hand.ledger_of(run)).reserve("run-7f3a", hand.MECHANISMS, hand.DELTA, note="train")
    hand.edit_json(run / "privacy.json", receipt=receipt.to_json())
    hand.end_anew(run)
    refuse(run, "receipt: the ledger noted another noise source", config=OVERRIDE)


def test_canaries_that_the_ledger_knows_cannot_be_hidden(run: Path) -> None:
    """Neither by deleting what they showed, nor by a model card that says there were none."""
    plant(run)
    (run / "canary.json").unlink()
    refuse(run, "planted canaries and canary.json is missing", config=OVERRIDE)


def test_canaries_that_the_ledger_does_not_know_are_not_shown(run: Path) -> None:
    plant(run)
    shown = canary_file(run)
    hand.charge_anew(run)
    hand.end_anew(run)
    receipt = json.loads((run / "privacy.json").read_text())["receipt"]
    hand.write_json(run / "canary.json", shown | {"receipt_digest": receipt["digest"]})
    refuse(run, "not those recorded before the first step", config=OVERRIDE)


@pytest.mark.parametrize("side", ["public", "internal"])
@pytest.mark.parametrize(("key", "value"), [("epsilon", 0.1), ("delta", 1e-9), ("patients", 10**6), ("epsilon", None)])
def test_a_report_that_states_another_claim_is_never_accepted(run: Path, side: str, key: str, value: Any) -> None:
    audit = hand.audit_of(run, side)
    audit["claim"][key] = value
    refuse(run, "states another claim than the run", report=hand.write_report(run, **{side: audit}), config=OVERRIDE)


@pytest.mark.parametrize("side", ["public", "internal"])
def test_a_report_edited_since_the_audit_wrote_it_is_never_accepted(run: Path, side: str) -> None:
    """A decision, say, in an otherwise well-formed report; the same report elsewhere has nothing to compare with."""
    report = hand.write_report(run, internal=hand.audit_of(run, "internal", decision=AGAINST))
    remember(run, report)
    refuse(run, "decided DO NOT RELEASE", report=report)
    path = report / side / "audit.json"
    before = path.read_bytes()
    hand.edit_json(path, decision={"verdict": "RELEASE", "reasons": [], "provenance": "public"})
    refuse(run, "edited since the audit wrote it", report=report, config=OVERRIDE)
    path.write_bytes(before)
    refuse(run, "decided DO NOT RELEASE", report=report)
    (report / "internal" / "audit.json").unlink()
    refuse(run, "edited since the audit wrote it", report=report, config=OVERRIDE)


def test_the_latest_report_is_found_and_an_earlier_one_is_still_known(run: Path, tmp_path: Path) -> None:
    first = hand.write_report(run)
    remember(run, first)
    second = tmp_path / "second"
    shutil.copytree(first, second)
    remember(run, second)
    assert latest(run) == second
    hand.edit_json(first / "public" / "audit.json", tier="full")
    assert edited(run, first)
    assert not edited(run, second)
    shutil.rmtree(second)
    assert latest(run) is None
    (run / "private" / "audits.json").write_text("[")
    assert latest(run) is None
    assert not edited(run, first)


def test_a_seeded_run_that_says_otherwise_is_refused(run: Path) -> None:
    """Everything in the run's own folder may be edited; what the ledger noted as the run began may not."""
    hand.charge_anew(run, noise="seeded:chacha20")
    hand.end_anew(run)
    refuse(run, "receipt: the ledger noted another noise source", config=OVERRIDE)


def test_a_run_that_changes_its_number_of_patients_is_refused(run: Path) -> None:
    """Delta is judged by it."""
    hand.edit_json(run / "privacy.json", patients=hand.PATIENTS // 10)
    hand.write_report(run)
    refuse(run, "receipt: the ledger noted another number of patients", config=OVERRIDE)
