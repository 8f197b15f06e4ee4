"""SIGKILL at random moments, and trainers that race: the same spent epsilon, no second charge, the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from postgres_server import Server
from racers import BUDGET

HERE = Path(__file__).parent
TIMEOUT_S = 1700  # for fifty kills on a busy machine; otherwise it takes a few minutes
pytestmark = pytest.mark.timeout(TIMEOUT_S + 60)


def tell(script: str, folder: Path, count: int, ledger: str = "") -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MEDVAE_LEDGER": ledger}
    command = [sys.executable, str(HERE / script), str(folder), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


def check_killed(result: dict[str, Any], kills: int) -> None:
    assert result["killed"] == kills
    assert len(set(result["epsilons"])) == 1
    assert result["charges"] == result["runs"]
    assert sorted(result["commits"]) == sorted(result["runs"])
    assert result["spent"] == result["expected"]
    assert len(set(result["weights"])) == 1


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_end_like_undisturbed_ones(tmp_path: Path, kills: int) -> None:
    check_killed(tell("killed.py", tmp_path, kills), kills)


@pytest.mark.slow
def test_killed_runs_end_like_undisturbed_ones_with_a_shared_ledger(tmp_path: Path, postgres: Server) -> None:
    check_killed(tell("killed.py", tmp_path, 20, postgres.url(postgres.new_database())), 20)


def check_race(result: dict[str, Any]) -> None:
    assert sorted(result["codes"]) == [0, 3, 3]
    winner = result["codes"].index(0)
    assert result["finished"] == result["left"] == [i == winner for i in range(3)]
    assert sorted(result["kinds"]) == ["budget", "commit", "create", "reserve"]
    assert 7.9 < result["spent"] <= BUDGET


def test_of_trainers_racing_for_the_last_of_a_budget_one_wins(tmp_path: Path) -> None:
    check_race(tell("racers.py", tmp_path, 3))


def test_of_trainers_on_copies_of_a_cohort_one_wins_in_a_shared_ledger(tmp_path: Path, postgres: Server) -> None:
    """The copies stand for several machines: each has its own folder, and all have one ledger."""
    check_race(tell("racers.py", tmp_path, 3, postgres.url(postgres.new_database())))
