"""Exit codes, one sentence on stderr, and one JSON object on stdout whatever happens."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvae import api
from medvae.cli_numbers import join_numbers
from medvae.cli_run import run
from medvae.errors import BudgetExceeded, CohortError, NotReleasable, VerificationFailed
from medvae.synth.phantom import make_phantom
from medvae.synth.phantom_write import write_phantom

SECRET = "DOE-JANE-19700101"


@pytest.fixture(autouse=True)
def _no_tracking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDVAE_TRACKING", "off")
    monkeypatch.delenv("MEDVAE_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


def _name(value: object) -> str:
    return " ".join(value)[:60] if isinstance(value, list) else ""


def _raiser(error: BaseException) -> Callable[..., Any]:
    def command(*args: Any, **kwargs: Any) -> Any:
        raise error

    return command


BAD_USAGE = [
    ([], "Usage"),
    (["nothing"], "No such command"),
    (["train"], "no privacy goal is given"),
    (["train", "--dp-epsilon", "abc"], "--dp-epsilon"),
    (["train", "--dp-epsilon", "nan"], "above zero"),
    (["train", "--dp-epsilon", "0"], "above zero"),
    (["train", "--dp-epsilon", "-1"], "above zero"),
    (["train", "--dp-epsilon", "8", "--dp-delta", "0"], "dp_delta"),
    (["train", "--dp-epsilon", "8", "--dp-delta", "1"], "dp_delta"),
    (["train", "--dp-epsilon", "8", "--device", "tpu"], "device"),
    (["train", "--dp-epsilon", "8", "--threads", "0"], "threads"),
    (["train", "--dp-epsilon", "8", "--pipeline", "missing.yaml"], "pipeline"),
    (["train", "cohort", "--dp-epsilon", "8"], "cohort"),
    (["plan", "--dp-epsilon", "8"], "--patients"),
    (["plan", "cohort", "--patients", "5", "--dp-epsilon", "8"], "not both"),
    (["plan", "--patients", "1", "--dp-epsilon", "8"], "patient"),
    (["plan", "--patients", "100", "--dp-epsilon", "8", "--dp-delta", "0.01"], "1/patients"),
    (["ingest", "missing", "-o", "cohort"], ""),
    (["ingest", ".", "-o", "cohort", "--shape", "32"], "shape"),
    (["ingest", ".", "-o", "cohort", "--shape", "axb"], "32 48 32"),
    (["ingest", ".", "-o", "cohort", "--shape", "0", "0"], "shape"),
    (["ingest", ".", "-o", "cohort", "--spacing-mm", "-1", "-1"], "spacing_mm"),
    (["ingest", ".", "-o", "cohort", "--intensity", "loud"], "intensity"),
    (["ingest", ".", "-o", "cohort", "--holdout", "1.5"], "holdout"),
    (["train", "cohort", "-o", "run"], "exactly one of --dp-epsilon"),
    (["plan", "--patients", "500"], "exactly one of --dp-epsilon"),
    (["plan", "--patients", "500", "--dp-epsilon", "8", "--max-advantage", "0.2"], "2 privacy goals are given"),
    (["plan", "--patients", "500", "--dp-epsilon", "8", "--baseline", "0.1"], "go together"),
    (["plan", "--patients", "500", "--max-reid-risk", "0.09"], "go together"),
    (["plan", "--patients", "500", "--max-reid-risk", "0.09", "--baseline", "0.1"], "not above the baseline"),
    (["plan", "--patients", "500", "--max-advantage", "1"], "max_advantage"),
    (["plan", "--patients", "500", "--max-advantage", "nan"], "max_advantage"),
    (["train", "--max-reid-risk", "1.5", "--baseline", "0.1"], "max_reid_risk"),
    (["audit", "missing", "-o", "report"], "run"),
    (["audit", "missing", "-o", "report", "--tier", "huge"], "tier"),
    (["release", "missing", "-o", "release"], "run"),
    (["release", "missing", "-o", "release", "--format", "jpeg"], "formats"),
    (["release", "missing", "-o", "release", "--count", "0"], "count"),
    (["ledger", "missing"], "cohort"),
]


@pytest.mark.parametrize(("argv", "words"), BAD_USAGE, ids=_name)
def test_bad_usage_is_one_sentence_and_exit_code_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(argv) == 2
    out, err = capsys.readouterr()
    assert words in (out + err)
    assert "Traceback" not in err
    if argv:
        said = [line for line in err.splitlines() if line.startswith("medvae: ") and "phantom" not in line]
        assert len(said) == 1
        assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argv", [case[0] for case in BAD_USAGE if case[0]], ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else ""
)
def test_with_json_an_error_is_one_object(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = run([*argv, "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["exit_code"] == code == 2
    assert error["message"]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans") / "source"
    write_phantom(make_phantom(2, 12, 0, size=16, scans=(1, 1)), folder, "png")
    return folder


def test_an_output_inside_the_source_is_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(source.rglob("*"))
    assert run(["ingest", str(source), "-o", str(source / "cohort"), "--shape", "16", "16", "-q"]) == 2
    assert "inside the source" in capsys.readouterr().err
    assert sorted(source.rglob("*")) == before


def test_a_shape_beyond_memory_is_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ingest", str(source), "-o", "cohort", "--shape", "100000", "100000", "-q"]) == 2
    assert "too many voxels" in capsys.readouterr().err
    assert not Path("cohort").exists()


@pytest.mark.parametrize("command", [["ledger"], ["train", "--dp-epsilon", "8", "-o", "run"]], ids=lambda c: c[0])
def test_a_budget_at_a_delta_of_no_worth_is_refused_and_not_written(
    command: list[str], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ingest", str(source), "-o", "cohort", "--shape", "16", "16", "-q"]) == 0
    assert run([*command, "cohort", "--budget", "10", "--dp-delta", "0.5", "-q"]) == 2
    assert "1/patients" in capsys.readouterr().err
    assert run(["ledger", "cohort", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["budget"] is None
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CohortError("the folder is empty"), 2, "the folder is empty"),
        (BudgetExceeded("over the budget"), 3, "over the budget"),
        (NotReleasable("the gate is closed"), 3, "the gate is closed"),
        (VerificationFailed("a file was changed"), 3, "a file was changed"),
        (OSError(errno.ENOSPC, "No space left on device", SECRET), 2, "the disk is full"),
        (OSError(errno.EDQUOT, "Quota exceeded", SECRET), 2, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", SECRET), 2, "Permission denied"),
        (OSError(errno.EIO, "I/O error", SECRET), 1, "a defect of ours (OSError)"),
        (KeyError(SECRET), 1, "a defect of ours (KeyError)"),
        (AssertionError(SECRET), 1, "a defect of ours (AssertionError)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_went_wrong_decides_the_code(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "verify", _raiser(error))
    assert run(["verify", "release", "--json"]) == code
    out, err = capsys.readouterr()
    assert words in err
    assert json.loads(out)["error"]["exit_code"] == code
    assert SECRET not in out + err
    assert "Traceback" not in err


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MEDVAE_DEBUG", "1")
    monkeypatch.setattr(api, "verify", _raiser(KeyError("why")))
    assert run(["verify", "release"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupted_training_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "train", _raiser(KeyboardInterrupt()))
    assert run(["train", "cohort", "--dp-epsilon", "8"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_a_library_that_prints_and_warns_does_not_spoil_the_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import logging
    import warnings

    def noisy(*args: Any, **kwargs: Any) -> dict[str, Any]:
        print("chatter")
        warnings.warn(f"bad value {SECRET}", UserWarning, stacklevel=1)
        logging.getLogger("pydicom").warning("bad value %s", SECRET)
        return {"ok": True, "checks": []}

    monkeypatch.setattr(api, "verify", noisy)
    assert run(["verify", "release", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"ok": True, "checks": []}
    assert "chatter" in err
    assert SECRET not in err
    logging.getLogger("medvae.test").warning("logs are back")
    assert logging.root.manager.disable == 0


def test_doctor_as_json_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "medvae", "doctor", "--json"], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["telemetry"] == "off"
    assert result["versions"]["medvae-dp"]
    assert "cpu" in result["devices"]


def test_a_co_installed_medvae_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from importlib import metadata

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.3" if name == "medvae" else real(name))
    assert run(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "Stanford" in err
    assert "Stanford" in json.loads(out)["name_clash"]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["--shape", "32", "48", "32", "-o", "c"], ["--shape", "32,48,32", "-o", "c"]),
        (["--shape", "32,48,32"], ["--shape", "32,48,32"]),
        (["--shape", "32x48x32", "src"], ["--shape", "32x48x32", "src"]),
        (["--spacing-mm", "1.0", "1.5", "--shape", "4", "4"], ["--spacing-mm", "1.0,1.5", "--shape", "4,4"]),
        (["--shape", "32", "48", "scans"], ["--shape", "32,48", "scans"]),
        (["--holdout", "0.2", "5"], ["--holdout", "0.2", "5"]),
    ],
)
def test_lists_of_numbers_may_be_written_apart(given: list[str], read: list[str]) -> None:
    assert join_numbers(given) == read


@pytest.mark.parametrize("shape", [["32", "48", "16"], ["32,48,16"], ["32x48x16"]])
def test_every_way_to_write_a_shape_reaches_the_config(shape: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def ingest(source: Path, out: Path, config: Any, **kwargs: Any) -> Any:
        seen.append(config)
        raise CohortError("enough")

    monkeypatch.setattr(api, "ingest", ingest)
    run(["ingest", "--shape", *shape, "scans", "-o", "cohort"])
    assert seen[0].shape == (32, 48, 16)
    assert seen[0].holdout == type(seen[0])().holdout  # untouched flags leave the defaults of the config


def test_inf_is_a_number_here(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def train(cohort: Path, out: Path, config: Any, **kwargs: Any) -> Any:
        seen.append(config)
        raise CohortError("enough")

    monkeypatch.setattr(api, "train", train)
    run(["train", "cohort", "--dp-epsilon", "inf"])
    assert seen[0].dp_epsilon == float("inf")
