"""Progress on stderr: a bar on a terminal, a line every ten seconds elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from medvae import console, words
from medvae.console import Console


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(console.time, "monotonic", clock)
    return clock


def test_off_a_terminal_a_line_comes_every_ten_seconds(clock: _Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Console(json=False, quiet=False) as out:
        step = out.stage("train")
        for done in range(1, 101):
            clock.now = float(done)
            step(done, 100)
    printed, said = capsys.readouterr()
    lines = said.splitlines()
    assert printed == ""
    assert lines[0] == "train ..."
    assert lines[1] == "train: 10 of 100, about 90 s left"
    assert lines[-1] == "train: 100 done in 100 s"
    assert len(lines) == 11


def test_preparation_does_not_spoil_the_estimate(clock: _Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Console(json=False, quiet=False) as out:
        step = out.stage("train")
        clock.now = 500.0
        step(1, 50)
        clock.now = 511.0
        step(12, 50)
    assert capsys.readouterr().err.splitlines()[-1] == "train: 12 of 50, about 38 s left"


def test_quiet_says_nothing_but_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(json=False, quiet=True) as out:
        out.stage("train")(1, 2)
        out.note("by the way")
        out.result({"a": 1}, ["done"])
    assert capsys.readouterr() == ("done\n", "")


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Console(json=True, quiet=False) as out:
        first, second = out.stage("ingest"), out.stage("train")
        first(3, 3)
        second(1, 2)
        out.result({"a": 1}, [])
    printed, said = capsys.readouterr()
    assert printed == '{\n  "a": 1\n}\n'
    assert "ingest" in said
    assert "train" in said


def test_a_number_that_json_lacks_is_refused() -> None:
    with Console(json=True, quiet=True) as out, pytest.raises(ValueError, match="JSON"):
        out.result({"epsilon": float("inf")}, [])


CLAIM = {"epsilon": 8.0, "delta": 1e-5, "unit": "patient", "neighboring": "add-remove", "accountant": "pld"}


def test_epsilon_is_never_said_alone() -> None:
    said = words.claim(CLAIM)
    for part in ("epsilon 8", "delta 1e-05", "patient", "add-remove", "PLD"):
        assert part in said


def test_without_noise_no_epsilon_is_said() -> None:
    assert words.claim({**CLAIM, "epsilon": None}).startswith("no differential privacy")


def test_a_run_that_may_not_leave_says_why() -> None:
    result = {**CLAIM, "plain_words": [], "releasable": False, "reasons": ["no noise was added"], "run": "run"}
    assert "not releasable: no noise was added" in words.train(result)


def test_an_ingest_says_what_was_skipped() -> None:
    result = {
        "patients": 3,
        "images": 5,
        "spatial_shape": [8, 8],
        "masks": False,
        "conditions": {"age": {"kind": "continuous", "range": [20, 90]}},
        "skipped": [{"reason": "not an image", "count": 2}],
        "split": {"train": 2, "holdout": 1},
        "notes": ["no shape was given"],
    }
    lines = words.ingest(result, Path("cohort"))
    assert "skipped 2: not an image" in lines
    assert "note: no shape was given" in lines
