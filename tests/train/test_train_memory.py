"""Training memory does not grow with the cohort."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "pipelines" / "benchmarks" / "step.py"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cohort(tmp_path: Path) -> None:
    """A thousand times the patients, whose scans alone would be 600 MiB in memory, at the same peak."""
    out = tmp_path / "step.json"
    subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick", "--json", str(out)],
        check=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    small, large = json.loads(out.read_text())["cohorts"]
    assert large["patients"] == 1000 * small["patients"]
    assert large["peak_mib"] < small["peak_mib"] + 64
