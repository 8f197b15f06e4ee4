"""Whole audits of tiny cohorts in the real store: two reports, kept apart by provenance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from audit_world import TINY, by_name, make_cohort, make_run, privacy_json
from hypothesis import given, settings
from hypothesis import strategies as st

import medvae
from medvae.audit import case as case_module
from medvae.audit.case import Figure, Part, plain
from medvae.audit.claim import internal_decision, make_claim, public_decision
from medvae.audit.run import audit, reports
from medvae.audit.untested import ALWAYS, CODE_PRIOR, LABELS, PRETRAINING, ROBUST, TEACHER, untested
from medvae.config import AuditConfig, Recipe, build
from medvae.errors import RunError
from medvae.types import PROVENANCES, SHAREABLE, Finding

CONFIG = AuditConfig(synthetic=32)
SCHEMA = json.loads((Path(medvae.__file__).parent / "schemas" / "audit.schema.json").read_text())


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import torch

    monkeypatch.setattr(case_module, "EFFORTS", {"quick": TINY})
    monkeypatch.setattr("medvae.audit.run.EFFORTS", {"quick": TINY})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read(folder: Path, audience: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / audience / "audit.json").read_text())
    jsonschema.validate(report, SCHEMA)
    return report


@pytest.mark.parametrize("dims", [2, 3])
def test_whole_audit_of_a_tiny_cohort(tmp_path: Path, dims: int) -> None:
    run = make_run(tmp_path / "run", make_cohort(tmp_path / "cohort", dims, 48, size=16))
    steps: list[int] = []
    result = audit(run, tmp_path / "report", CONFIG, lambda done, total: steps.append(done))
    internal, public = read(tmp_path / "report", "internal"), read(tmp_path / "report", "public")
    assert result == internal
    assert steps == sorted(steps)
    assert steps[-1] == 100
    assert all(f["provenance"] in SHAREABLE for f in public["findings"])
    assert all(f["provenance"] in SHAREABLE for f in public["figures"].values())
    assert {"proven curve", "synthetic scans"} == set(public["figures"])
    assert {"empirical roc", "feature distributions", "attack scores"} <= set(internal["figures"])
    found = by_name(internal)
    assert found["membership, positive control, auc"]["value"] >= 0.9
    assert found["membership, likelihood, raw, mean, auc"]["low"] <= 0.5
    assert found["membership, likelihood, raw, mean, tpr at 1% fpr"]["value"] is None
    assert "needs 100" in found["membership, likelihood, raw, mean, tpr at 1% fpr"]["verdict"]
    assert "under the proven curve" in found["membership, above the proven curve"]["verdict"]
    for name in ("frechet distance", "kernel distance", "recall", "radiomics distance, median feature"):
        assert found[name]["baseline"] is not None
    assert found["classification of lesion, auc"]["control"] is not None
    assert found["segmentation of label 1, dice"]["baseline"] is not None
    assert internal["decision"]["verdict"] == "CONDITIONAL"  # epsilon 7.9 is a weak promise


def test_public_report_does_not_depend_on_any_real_scan(tmp_path: Path) -> None:
    """Noninterference: two cohorts of other patients, one model and claim, one public report to the byte."""
    texts = []
    for name, seed, shift in (("one", 0, 0.0), ("two", 7, 0.3)):
        cohort = make_cohort(tmp_path / f"cohort-{name}", 2, 40, seed, size=16, shift=shift)
        run = make_run(tmp_path / f"run-{name}", cohort)
        audit(run, tmp_path / name, CONFIG)
        public = read(tmp_path / name, "public")
        public["created"] = ""
        texts.append(json.dumps(public))
        assert str(tmp_path) not in texts[-1]
        assert json.loads((run / "privacy.json").read_text())["fingerprint"] not in texts[-1]
    assert texts[0] == texts[1]
    one, two = read(tmp_path / "one", "internal"), read(tmp_path / "two", "internal")
    assert by_name(one)["frechet distance"] != by_name(two)["frechet distance"]


def test_a_planted_shift_of_the_holdout_makes_membership_invalid(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_cohort(tmp_path / "cohort", 2, 60, size=16, shift=0.3))
    report = audit(run, tmp_path / "report", CONFIG)
    assert by_name(report)["membership, blind baseline, auc"]["verdict"].startswith("INVALID")
    assert "INVALID" in by_name(report)["membership, likelihood, raw, mean, auc"]["verdict"]
    assert any("INVALID" in reason for reason in report["decision"]["reasons"])


def test_too_few_held_out_patients_give_no_number(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_cohort(tmp_path / "cohort", 2, 20, size=16, holdout=0.1))
    report = audit(run, tmp_path / "report", CONFIG)
    found = by_name(report)
    assert found["membership, primary attack, auc"]["value"] is None
    assert "needs at least 8" in found["membership, primary attack, auc"]["verdict"]
    assert found["frechet distance"]["value"] is None
    assert any("not measured" in reason for reason in report["decision"]["reasons"])
    read(tmp_path / "report", "internal")


def test_a_run_without_noise_is_audited_and_its_samples_count_as_private(tmp_path: Path) -> None:
    cohort = make_cohort(tmp_path / "cohort", 2, 40, size=16)
    run = make_run(
        tmp_path / "run", cohort, epsilon=None, mechanisms=[], releasable=False, receipt=None, reasons=["no noise"]
    )
    report = audit(run, tmp_path / "report", CONFIG)
    public = read(tmp_path / "report", "public")
    assert report["claim"]["epsilon"] is None
    assert report["decision"]["verdict"] == public["decision"]["verdict"] == "DO NOT RELEASE"
    assert public["findings"] == []
    assert public["figures"] == {}


def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    cohort = make_cohort(tmp_path / "cohort", 2, 20, size=16)
    run = make_run(tmp_path / "run", cohort)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(RunError, match="not empty"):
        audit(run, tmp_path / "full", CONFIG)
    with pytest.raises(RunError, match="no finished run"):
        audit(tmp_path / "nothing", tmp_path / "report", CONFIG)
    with (cohort / "images.npy").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x77")
    with pytest.raises(RunError, match="edited since"):
        audit(run, tmp_path / "report", CONFIG)
    (run / "private" / "run.json").write_text(json.dumps({"cohort": str(tmp_path / "gone")}))
    with pytest.raises(RunError, match="cannot be opened") as error:
        audit(run, tmp_path / "report", CONFIG)
    assert str(tmp_path) not in str(error.value)
    (run / "privacy.json").write_text(json.dumps({"schema": "medvae.privacy/0"}))
    with pytest.raises(RunError, match=r"medvae\.privacy/1"):
        audit(run, tmp_path / "report", CONFIG)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cohort", "full", "run"]


SECRET = "only-in-private"
finding_of = st.builds(
    lambda provenance, value: Finding(
        "secret" if provenance == "private" else "open",
        "privacy",
        value,
        provenance,
        verdict=SECRET if provenance == "private" else "",
    ),
    st.sampled_from(PROVENANCES),
    st.floats(-10, 10),
)
figure_of = st.builds(
    lambda provenance: Figure("t", provenance, {"d": SECRET if provenance == "private" else "open"}),
    st.sampled_from(PROVENANCES),
)


@settings(deadline=None)
@given(st.lists(finding_of), st.dictionaries(st.text(max_size=3), figure_of), st.booleans())
def test_no_private_number_reaches_the_public_report(findings: list[Finding], figures: Any, refuted: bool) -> None:
    notes = {"membership": "not measurable", "reason": SECRET, "refuted": refuted}
    internal, public = reports(claim(), [Part(tuple(findings), figures, notes)], CONFIG)
    assert SECRET not in json.dumps(public)
    assert len(public["findings"]) == sum(f.provenance in SHAREABLE for f in findings)
    assert public["decision"] == reports(claim(), [Part(notes={"membership": "measured"})], CONFIG)[1]["decision"]
    assert len(internal["findings"]) == len(findings)


def claim(**change: Any) -> dict[str, Any]:
    return make_claim(privacy_json(100, "f", **change), {"weights_sha256": "w"})


@pytest.mark.parametrize(
    ("change", "verdict", "word"),
    [
        ({"epsilon": 0.9, "crosscheck": {"epsilon": 0.9}}, "RELEASE", "strong"),
        ({"epsilon": 3.0, "crosscheck": {"epsilon": 3.0}}, "RELEASE", "moderate"),
        ({}, "CONDITIONAL", "weak"),
        ({"epsilon": 3.0, "crosscheck": {"epsilon": 3.0}, "delta": 0.005}, "CONDITIONAL", "delta"),
        ({"crosscheck": {"epsilon": 9.0}}, "DO NOT RELEASE", "accountants"),
        ({"receipt": None}, "DO NOT RELEASE", "receipt"),
        ({"releasable": False, "reasons": ["seeded noise"]}, "DO NOT RELEASE", "seeded noise"),
        ({"epsilon": None}, "DO NOT RELEASE", "without noise"),
    ],
)
def test_public_decision_follows_from_the_claim(change: dict[str, Any], verdict: str, word: str) -> None:
    decision = public_decision(claim(**change))
    assert decision["verdict"] == verdict
    assert word in " ".join(decision["reasons"])


def test_internal_decision_only_gets_stricter() -> None:
    fine = public_decision(claim(epsilon=0.9, crosscheck={"epsilon": 0.9}))
    assert internal_decision(fine, {"membership": "measured", "refuted": False})["verdict"] == "RELEASE"
    assert internal_decision(fine, {"membership": "INVALID: x"})["verdict"] == "CONDITIONAL"
    assert internal_decision(fine, {"membership": "INCONCLUSIVE: x"})["verdict"] == "CONDITIONAL"
    assert internal_decision(fine, {"membership": "measured", "refuted": True})["verdict"] == "DO NOT RELEASE"
    assert (
        internal_decision(fine, {"membership": "measured", "copied": False, "exposed": (0, 5)})["verdict"] == "RELEASE"
    )
    for notes, word in (({"copied": True}, "copies"), ({"exposed": (2, 5)}, "2 of 5 tests")):
        found = internal_decision(fine, {"membership": "measured", **notes})
        assert found["verdict"] == "CONDITIONAL"
        assert word in found["reasons"][0]
    refused = public_decision(claim(epsilon=None))
    assert internal_decision(refused, {"membership": "measured"})["verdict"] == "DO NOT RELEASE"


def test_plain_json_has_no_numpy_and_no_infinity() -> None:
    found = plain({"a": np.float64(np.inf), "b": np.arange(2), "c": (np.bool_(True), float("nan")), 1: np.int64(3)})
    assert found == {"a": None, "b": [0, 1], "c": [True, None], "1": 3}
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"teacher": {"enabled": True}}, TEACHER),
        ({"prior": {"kind": "gaussian"}}, CODE_PRIOR),
        ({"pretraining": {"source": "procedural"}}, PRETRAINING),
        ({"robust": {"enabled": True}}, ROBUST),
        ({"model": {"semi_supervised": True}, "moments": {"enabled": False}}, LABELS),
    ],
)
def test_parts_of_a_recipe_that_no_attack_knows_are_named(part: dict[str, Any], words: str) -> None:
    plain_recipe = build(Recipe, dpsgd={"enabled": True})
    assert untested(plain_recipe) == list(ALWAYS)
    recipe = build(Recipe, dpsgd={"enabled": True}, **part)
    assert untested(recipe) == [words, *ALWAYS]
    internal, public = reports(claim(), [Part(notes={"membership": "measured"})], CONFIG, untested(recipe))
    assert internal["not_tested"][0] == public["not_tested"][0] == words
