"""Whatever an audit measures on patients, no number of it reaches a public file or a release by any command."""

from __future__ import annotations

import io
import json
import re
import sqlite3
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli_leak import everything

from medvae.audit import run as audit_room
from medvae.audit.case import Figure, Part
from medvae.audit.claim import claim_part
from medvae.cli_run import run
from medvae.report import render
from medvae.synth.phantom import make_phantom
from medvae.synth.phantom_write import write_phantom
from medvae.types import PROVENANCES, SHAREABLE, Finding

RECIPE = """name: tiny
model: {latent_dim: 2, channels: [4], norm_groups: 2}
moments: {basis_shape: [4, 4], coarse_shape: [2, 2]}
dpsgd: {enabled: false}
canaries: {enabled: false}
"""
NUMBERS = re.compile(rb"(?<![\d.])\d{6}(?=\.0\b|(?![\d.]))")
GROUPS = st.sampled_from(["fidelity", "utility", "privacy"])
# Whole numbers of six digits: no rounding hides them, and they stand nowhere by chance between other signs.
VALUES = st.lists(st.integers(700_001, 999_999).filter(lambda n: n % 100), min_size=60, max_size=60, unique=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, trained by the command."""
    folder = tmp_path_factory.mktemp("provenance")
    write_phantom(make_phantom(2, 40, 0, size=16, scans=(1, 1)), folder / "scans", "png")
    (folder / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MEDVAE_TRACKING", "off")
        ingest = ["ingest", "scans", "-o", "cohort", "--labels", "scans/table.csv", "--shape", "16", "16", "-q"]
        assert run([*ingest, "--condition", "lesion=absent|present"]) == 0
        assert run(["train", "cohort", "--dp-epsilon", "8", "-o", "run", "--pipeline", "tiny.yaml", "-q"]) == 0
    return folder


@st.composite
def measured(draw: st.DrawFn) -> tuple[Part, set[int], set[int]]:
    """Draw what an audit might find; return it with its private and its shareable numbers."""
    values = iter(draw(VALUES))
    private: set[int] = set()
    shared: set[int] = set()

    def fresh(provenance: str) -> float:
        value = next(values)
        (shared if provenance in SHAREABLE else private).add(value)
        return float(value)

    findings = []
    for i in range(draw(st.integers(1, 4))):
        origin = draw(st.sampled_from(PROVENANCES))
        numbers = {key: fresh(origin) for key in ("value", "low", "high", "baseline", "control")}
        verdict = f"a verdict that tells {fresh(origin):.0f}"
        findings.append(
            Finding(name=f"membership, score {i}", group=draw(GROUPS), provenance=origin, verdict=verdict, **numbers)
        )
    figures = {}
    for i in range(draw(st.integers(0, 3))):
        origin = draw(st.sampled_from(PROVENANCES))
        rows = [{"a": fresh(origin), "b": fresh(origin)}]
        figures[f"table {i}"] = Figure(f"A table of {fresh(origin):.0f}", origin, {"rows": rows})
    rate = {"fpr": 0.1, "value": 0.3, "low": 0.2, "high": 0.4, "realised_fpr": 0.1, "proven_limit": 0.5, "words": ""}
    state = draw(st.sampled_from(["measured", "not measurable", "INVALID: blind"]))
    attacks = {
        "state": state,
        "reason": f"there are {fresh('private'):.0f}",
        "others": int(fresh("private")),
        "membership": [{"name": "membership, a", "auc": {"value": fresh("private")}, "tpr": [rate], "verdict": ""}],
        "subgroups": [{"condition": "size", "class": "a", "auc": {"value": fresh("private")}, "verdict": ""}],
        "risks": [{"name": "a", "kind": "inference", "risk": {"value": fresh("private")}, "verdict": "seen"}],
    }
    notes = {
        "membership": state,
        "reason": f"only {fresh('private'):.0f} patients",
        "refuted": draw(st.booleans()),
    }
    return Part(tuple(findings), figures, notes, attacks), private, shared


def numbers(folder: Path) -> set[int]:
    return {int(n) for blob in everything(folder) for n in NUMBERS.findall(blob)}


@given(found=measured())
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_private_number_reaches_a_public_file_by_any_command(
    trained: Path, tmp_path_factory: pytest.TempPathFactory, found: tuple[Part, set[int], set[int]]
) -> None:
    part, private, shared = found
    # Numbers come again from one example to the next, and the store of runs keeps them all.
    before = _public_metrics(trained / "mlflow.db")
    out = tmp_path_factory.mktemp("out")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.chdir(out)
        patch.setenv("MEDVAE_TRACKING", "on")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{trained / 'mlflow.db'}")
        patch.setattr(audit_room, "_measure", lambda case, tell: [claim_part(case.claim), part])
        patch.setattr(render, "_pdf", lambda html: b"%PDF-" + html.encode())  # the print of the same page
        assert run(["audit", str(trained / "run"), "-o", "report", "--json"]) == 0
        inside = said.getvalue()
        said.seek(0)
        said.truncate()
        reason = ["--override", "a test of what leaves, whatever the audit decided"]
        codes = {
            "release": run(["release", str(trained / "run"), "-o", "release", "--count", "2", *reason]),
            "verify": run(["verify", "release", "--json"]),
            "ledger": run(["ledger", str(trained / "cohort")]),
        }
    assert codes == dict.fromkeys(codes, 0), said.getvalue()
    assert private <= {int(n) for n in NUMBERS.findall(inside.encode())} | numbers(out / "report" / "internal")
    assert shared <= numbers(out / "report" / "public")
    assert numbers(out / "report" / "public") & private == set()
    assert numbers(out / "release") & private == set()
    assert {int(n) for n in NUMBERS.findall(said.getvalue().encode())} & private == set()
    tracked = {value for _, value in _public_metrics(trained / "mlflow.db") - before}
    assert tracked & private == set()


def _public_metrics(store: Path) -> set[tuple[str, float]]:
    """Return all numbers of runs outside the team's private experiment, each with its run."""
    if not store.exists():
        return set()
    query = """SELECT m.run_uuid, m.value FROM metrics m JOIN runs r ON m.run_uuid = r.run_uuid
               JOIN experiments e ON e.experiment_id = r.experiment_id WHERE e.name NOT LIKE '%private%'"""
    with closing(sqlite3.connect(store)) as book:
        return set(book.execute(query))


def test_a_public_file_that_names_a_private_number_is_not_written(trained: Path, tmp_path: Path) -> None:
    """The last door: were the audit to hand a private number to the public side, the page is refused."""
    original = audit_room.reports

    def careless(*args: Any) -> Any:
        internal, public = original(*args)
        return internal, public | {"findings": internal["findings"]}

    secret = Finding("membership, auc", "privacy", 731_935.0, "private", None, None, 3, None, None, "")
    part = Part((secret,), {}, {"membership": "measured", "auc": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("MEDVAE_TRACKING", "off")
        patch.setattr(audit_room, "_measure", lambda case, tell: [claim_part(case.claim), part])
        patch.setattr(audit_room, "reports", careless)
        patch.setattr(render, "_pdf", lambda html: b"")
        assert run(["audit", str(trained / "run"), "-o", "report", "-q"]) in (2, 3)
    assert not (tmp_path / "report").exists()
    assert json.loads((trained / "run" / "privacy.json").read_text())["releasable"]
