"""The gate stays closed: every fault of a run is refused with exit code 3 (or 2 for what is no run), and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hand_made_run as hand
import numpy as np
import pytest

from medvae.config import ReleaseConfig
from medvae.dp.accounting import pld_epsilon
from medvae.dp.ledger import Ledger
from medvae.errors import MedvaeError, NotReleasable, RunError
from medvae.gate.checks import headline, recompute
from medvae.synth.store import write_release
from medvae.types import Mechanism, ModelRelease

SMALL = ReleaseConfig(count=2, formats=("npz",))
Edit = Callable[..., None]


def refuse(run: Path, match: str, error: type[MedvaeError] = NotReleasable, **given: Any) -> None:
    """Expect a refusal that names the reason in one sentence and leaves nothing behind."""
    out = run.parent / "release"
    before = sorted(run.parent.iterdir())
    with pytest.raises(error, match=match) as caught:
        hand.release(run, out, given.pop("config", SMALL), render=hand.fake_render, **given)
    assert sorted(run.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    assert not any(planted in str(caught.value) for planted in hand.PLANTED)


def test_a_good_run_passes_and_every_check_is_told(run: Path) -> None:
    summary = hand.release(run, run.parent / "release", SMALL, render=hand.fake_render)
    assert {c["name"] for c in summary["checks"]} == {
        "privacy.json", "releasable", "noise source", "unit", "delta", "headline", "epsilon", "receipt", "budget",
        "model", "audit", "canaries", "attacks", "decision",
    }  # fmt: skip
    assert all(c["ok"] for c in summary["checks"])
    assert summary["epsilon"] == pld_epsilon(hand.MECHANISMS, hand.DELTA)


def test_a_run_without_privacy_is_refused_with_its_reasons(run: Path, edit_privacy: Edit) -> None:
    edit_privacy(
        epsilon=None,
        releasable=False,
        reasons=["no noise was added: train with a finite --dp-epsilon"],
        crosscheck={"accountant": "prv", "epsilon": None},
    )
    refuse(run, "no noise was added")


def test_infinite_epsilon_is_refused_even_when_marked_releasable(run: Path, edit_privacy: Edit) -> None:
    edit_privacy(epsilon=None)
    refuse(run, "releasable")


def test_seeded_noise_is_refused_even_when_marked_releasable(run: Path, edit_privacy: Edit) -> None:
    edit_privacy(noise_source="seeded:chacha20")
    refuse(run, "noise source")


@pytest.mark.parametrize("changes", [{"unit": "scan"}, {"neighboring": "replace"}, {"accountant": "gdp"}])
def test_another_unit_relation_or_accountant_is_refused(run: Path, edit_privacy: Edit, changes: dict[str, str]) -> None:
    edit_privacy(**changes)
    refuse(run, next(iter(changes)))


def test_a_lower_epsilon_than_the_mechanisms_cost_is_refused(run: Path, edit_privacy: Edit) -> None:
    edit_privacy(epsilon=pld_epsilon(hand.MECHANISMS, hand.DELTA) * (1 - 1e-5))
    refuse(run, "epsilon: claimed")


def test_altered_mechanisms_that_justify_a_lower_epsilon_do_not_match_the_ledger(run: Path, edit_privacy: Edit) -> None:
    cheaper = (hand.MECHANISMS[0], Mechanism("dpsgd", 2.2, sample_rate=0.1, count=20))
    edit_privacy(
        mechanisms=[m.to_json() for m in cheaper],
        noise_multiplier=2.2,
        epsilon=pld_epsilon(cheaper, hand.DELTA),
        crosscheck={"accountant": "prv", "epsilon": hand.agree_once(cheaper, hand.DELTA).prv},
    )
    refuse(run, "receipt: the ledger charged other mechanisms")


def test_a_headline_that_no_mechanism_bears_out_is_refused(run: Path, edit_privacy: Edit) -> None:
    edit_privacy(noise_multiplier=9.9)
    refuse(run, "headline")


def test_the_headline_of_a_run_without_dpsgd_is_the_one_gaussian_its_releases_compose_to() -> None:
    releases = [Mechanism("means", 2.0), Mechanism("second", 2.0)]
    claim = {"noise_multiplier": 2.0**0.5, "sample_rate": 1.0, "steps": 1}
    assert headline(claim, releases).ok
    assert not headline({**claim, "noise_multiplier": 1.5}, releases).ok
    assert not headline({**claim, "steps": 0}, releases).ok


@pytest.mark.parametrize("part", ["run_id", "ledger_id", "sequence", "digest"])
def test_a_tampered_receipt_is_refused(run: Path, edit_privacy: Edit, part: str) -> None:
    receipt = json.loads((run / "privacy.json").read_text())["receipt"]
    receipt[part] = {"sequence": 7, "digest": "0" * 64}.get(part, "someone-else")
    edit_privacy(receipt=receipt)
    refuse(run, "receipt: the ledger holds no run of this receipt")


def test_a_run_that_never_ended_is_refused(tmp_path: Path) -> None:
    refuse(hand.build_run(tmp_path / "crashed", commit=False), "receipt: the ledger does not say that the run ended")


def test_a_model_that_another_run_paid_for_is_refused(run: Path) -> None:
    card = json.loads((run / "model" / "model.json").read_text())
    write_release(run / "model", ModelRelease({"w": np.ones(3, dtype=np.float32)}, card))
    refuse(run, "receipt: the run ended with other weights")


def test_a_missing_ledger_is_refused_and_not_made_anew(run: Path) -> None:
    book = run.parent / "cohort" / "ledger.db"
    book.unlink()
    refuse(run, "ledger is not where the run left it")
    assert not book.exists()


def test_an_altered_ledger_is_refused(run: Path) -> None:
    import sqlite3

    with sqlite3.connect(run.parent / "cohort" / "ledger.db") as book:
        book.execute("DROP TRIGGER medvae_ledger_no_update")
        book.execute("UPDATE medvae_ledger SET note = 'never mind' WHERE kind = 'reserve'")
    refuse(run, "receipt: row 2 of the privacy ledger was altered")


def test_a_cohort_over_its_budget_is_refused(run: Path) -> None:
    ledger = Ledger(run.parent / "cohort" / "ledger.db")
    ledger.reserve("a crashed run", [Mechanism("dpsgd", 1.0, 0.2, 10)], hand.DELTA)
    ledger.set_budget(4.0, hand.DELTA)
    refuse(run, "budget: .* of 4 spent")


def test_crashed_runs_count_in_the_cumulative_spending(run: Path) -> None:
    other = Mechanism("dpsgd", 1.0, 0.2, 10)
    Ledger(run.parent / "cohort" / "ledger.db").reserve("a crashed run", [other], hand.DELTA)
    hand.release(run, run.parent / "release", SMALL, render=hand.fake_render)
    proof = json.loads((run.parent / "release/privacy/certificate.json").read_text())
    assert proof["cumulative"]["runs"] == 2
    assert proof["cumulative"]["epsilon"] == pld_epsilon([*hand.MECHANISMS, other], hand.DELTA)


def test_delta_at_one_over_patients_is_refused(run: Path, edit_privacy: Edit) -> None:
    edit_privacy(patients=100_000)
    refuse(run, "delta .* at or above 1/patients")


def test_altered_weights_are_no_run(run: Path) -> None:
    path = run / "model" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refuse(run, "weights do not match", RunError)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    card = {"space": hand.SPACE.to_json(), "recipe": {}}
    model = ModelRelease({"w": np.asarray([1.0, np.nan], dtype=np.float32)}, card)
    refuse(hand.build_run(tmp_path / "nan", model=model), "model: some weights are not finite")


@pytest.mark.parametrize("part", ["privacy.json", "model/model.json", "model/weights.safetensors", "private/run.json"])
def test_a_run_with_a_part_missing_is_bad_input(run: Path, part: str) -> None:
    (run / part).unlink()
    refuse(run, "run|model", RunError)


@pytest.mark.parametrize("part", ["privacy.json", "model/model.json"])
def test_a_run_of_another_version_is_bad_input(run: Path, part: str) -> None:
    hand.edit_json(run / part, schema="medvae.other/9")
    refuse(run, "not of version", RunError)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_torn_claim_is_bad_input(run: Path, text: str) -> None:
    (run / "privacy.json").write_text(text)
    refuse(run, "no finished run", RunError)


@pytest.mark.parametrize("key", ["delta", "receipt", "mechanisms", "patients", "fingerprint", "crosscheck"])
def test_a_claim_that_lacks_a_part_is_refused(run: Path, key: str) -> None:
    data = json.loads((run / "privacy.json").read_text())
    del data[key]
    hand.write_json(run / "privacy.json", data)
    refuse(run, "privacy.json: ")


def test_two_accountants_agree_and_a_wrong_claim_does_not_pass() -> None:
    epsilon = pld_epsilon(hand.MECHANISMS, hand.DELTA)
    claim = {"epsilon": epsilon, "delta": hand.DELTA, "crosscheck": {"epsilon": epsilon}}
    assert recompute(hand.MECHANISMS, claim).ok
    assert not recompute(hand.MECHANISMS, {**claim, "epsilon": epsilon - 0.01}).ok
    assert not recompute(hand.MECHANISMS, {**claim, "crosscheck": {"epsilon": 0.9 * epsilon}}).ok
