"""SIGKILL at random moments: the same spent epsilon, never a second charge, the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed.py")


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_end_like_undisturbed_ones(tmp_path: Path, kills: int) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(kills)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["killed"] == kills
    assert len(set(result["epsilons"])) == 1
    assert result["charges"] == result["runs"]
    assert sorted(result["commits"]) == sorted(result["runs"])
    assert len(set(result["weights"])) == 1
