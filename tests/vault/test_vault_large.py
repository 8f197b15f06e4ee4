"""Many scans: several processes, interrupted runs, images that two patients share, Ray."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vault_sources import noise, write_nifti_cohort, write_series

from medvae.config import IngestConfig
from medvae.errors import CohortError
from medvae.vault import ingest as ingest_module
from medvae.vault.ingest import ingest
from medvae.vault.pool import in_chunks, parallel
from medvae.vault.store import open_cohort

SMALL = {"shape": (8, 8, 8), "holdout": 0.0}


def same_cohort(a: Path, b: Path) -> bool:
    """Whether two folders hold the same cohort, but for their keys."""
    one, two = open_cohort(a).reveal(), open_cohort(b).reveal()
    names = ("images.npy", "index.npz", "cohort.json")
    return len(one) == len(two) and all((a / n).read_bytes() == (b / n).read_bytes() for n in names)


def write_tree(folder: Path, patients: int = 6) -> None:
    for p in range(patients):
        write_series(folder / str(p), noise((4, 8, 8), p), f"p{p}")
    (folder / "torn.dcm").write_bytes((folder / "0" / "0.dcm").read_bytes()[:300])


def test_two_processes_make_the_same_cohort(tmp_path: Path) -> None:
    write_tree(tmp_path / "in")
    for workers in (1, 2):
        ingest(tmp_path / "in", tmp_path / str(workers), IngestConfig(workers=workers, **SMALL))
    assert same_cohort(tmp_path / "1", tmp_path / "2")


def pid_or_death(item: int) -> int:
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def test_a_worker_that_dies_costs_one_item() -> None:
    with parallel(2) as run:
        assert list(run(pid_or_death, range(12))) == [i * i if i != 5 else None for i in range(12)]


def test_several_that_die_cost_themselves_alone() -> None:
    """In tasks of several items, too, and however the rest was cancelled meanwhile."""
    with parallel(2) as run:
        for size in (1, 3):
            assert list(in_chunks(run, pid_or_death, [5, 1, 5, 2, 3, 5, 5, 4], size)) == [
                *(None, 1, None, 4, 9, None, None, 16),
            ]


def test_a_script_that_cannot_start_processes_is_told_so(tmp_path: Path) -> None:
    """Unguarded, every process would run the script anew; its scans are not to blame."""
    write_tree(tmp_path / "in")
    lines = [
        *("from pathlib import Path", "from medvae.config import IngestConfig"),
        *("from medvae.vault.ingest import ingest", "import sys"),
        "ingest(Path(sys.argv[1]), Path(sys.argv[2]), IngestConfig(workers=2, shape=(8, 8, 8), holdout=0.0))",
    ]
    (tmp_path / "script.py").write_text("\n".join(lines))
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "ConfigError: no further process can be started: put what a script calls under `if __name__" in done.stderr
    assert not (tmp_path / "out").exists()


def test_results_come_in_order_and_few_are_ahead() -> None:
    taken = []

    def items() -> Any:
        for i in range(100):
            taken.append(i)
            yield i

    with parallel(2) as run:
        for done, result in enumerate(run(abs, items())):
            assert result == done
            assert len(taken) <= done + 1 + 8


SCRIPT = """
import sys, time
from pathlib import Path
from medvae.config import IngestConfig
from medvae.vault.ingest import ingest
def slow(done, total):
    print(done, total, flush=True)
    time.sleep(float(sys.argv[3]))
ingest(Path(sys.argv[1]), Path(sys.argv[2]), IngestConfig(shape=(8, 8, 8), holdout=0.0), slow)
"""


def test_a_killed_run_goes_on_and_makes_the_same_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the middle; the second run decodes only what the first had not stored."""
    write_nifti_cohort(tmp_path / "in", patients=5, masks=False)
    ingest(tmp_path / "in", tmp_path / "whole", IngestConfig(**SMALL))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "in"), str(tmp_path / "out"), "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("4 "):
                child.send_signal(signal.SIGKILL)
                break
        child.wait()
    partial = tmp_path / ".out.partial"
    assert partial.is_dir()
    assert partial.stat().st_mode & 0o777 == 0o700
    decoded: list[int] = []
    monkeypatch.setattr(
        ingest_module, "_decode", lambda read, grid, inner=ingest_module._decode: decoded.append(1) or inner(read, grid)
    )
    ingest(tmp_path / "in", tmp_path / "out", IngestConfig(**SMALL))
    assert 1 <= len(decoded) <= 6
    assert same_cohort(tmp_path / "whole", tmp_path / "out")
    assert not partial.exists()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"cohort.json", "images.npy", "index.npz", "key"}


@pytest.mark.parametrize("change", ["config", "file", "journal", "images"])
def test_an_interrupted_run_is_only_gone_on_with_if_all_is_as_it_was(tmp_path: Path, change: str) -> None:
    write_nifti_cohort(tmp_path / "in", masks=False)
    config = IngestConfig(**SMALL)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(tmp_path / "in", tmp_path / "out", config, stop)
    partial = tmp_path / ".out.partial"
    assert partial.is_dir()
    if change == "config":
        config = IngestConfig(**{**SMALL, "intensity": "window", "intensity_low": 5.0, "intensity_high": 500.0})
    elif change == "file":
        path = sorted((tmp_path / "in" / "images").iterdir())[0]
        other = sorted((tmp_path / "in" / "images").iterdir())[-1]
        time.sleep(0.01)
        path.write_bytes(other.read_bytes())
    elif change == "journal":
        (partial / "journal").write_bytes((partial / "journal").read_bytes()[:-7])
    else:
        (partial / "images.npy").write_bytes((partial / "images.npy").read_bytes()[:200])
    if change == "images":
        with pytest.raises(CohortError, match="torn"):
            ingest(tmp_path / "in", tmp_path / "out", config)
    ingest(tmp_path / "in", tmp_path / "out", config)
    ingest(tmp_path / "in", tmp_path / "fresh", config)
    assert same_cohort(tmp_path / "out", tmp_path / "fresh")


def test_two_runs_at_once_do_not_mix(tmp_path: Path) -> None:
    write_nifti_cohort(tmp_path / "in", masks=False)

    def again(done: int, total: int) -> None:
        with pytest.raises(CohortError, match="another ingest"):
            ingest(tmp_path / "in", tmp_path / "out", IngestConfig(**SMALL))

    ingest(tmp_path / "in", tmp_path / "out", IngestConfig(**SMALL), again)
    assert open_cohort(tmp_path / "out").reveal().info["images"] == 8


def test_patients_who_share_an_image(tmp_path: Path, run: Any) -> None:
    """Noted, refused, or counted as one person, who then holds all scans of both but for the copy."""
    write_nifti_cohort(tmp_path / "in", patients=5, masks=False)
    images = tmp_path / "in" / "images"
    shutil.copy(images / "vol_0_0.nii.gz", images / "vol_1_0.nii.gz")
    shutil.copy(images / "vol_1_1.nii.gz", images / "vol_2_0.nii.gz")
    config = {"shape": (8, 8, 8)}
    noted = run(tmp_path / "in", **config).info
    assert (noted["patients"], noted["images"]) == (5, 10)
    assert any(n.startswith("2 images are identical") for n in noted["notes"])
    with pytest.raises(CohortError, match="2 images are identical"):
        run(tmp_path / "in", identical="refuse", **config)
    store = run(tmp_path / "in", identical="merge", **config)
    assert (store.info["patients"], store.info["images"]) == (3, 8)
    assert sorted(np.bincount(store.patient)) == [2, 2, 4]
    assert store.info["skipped"] == [{"reason": "same pixels as a scan of another patient", "count": 2}]


def test_a_merged_patient_cannot_be_on_both_sides(tmp_path: Path, run: Any) -> None:
    from vault_sources import write_table

    rows = write_nifti_cohort(tmp_path / "in", patients=5, scans=1, masks=False)
    write_table(tmp_path / "in" / "table.csv", [{**r, "split": ["train", "test"][i == 1]} for i, r in enumerate(rows)])
    images = tmp_path / "in" / "images"
    shutil.copy(images / "vol_0_0.nii.gz", images / "vol_1_0.nii.gz")
    assert run(tmp_path / "in", shape=(8, 8, 8)).info["split"] == {"train": 4, "holdout": 1}
    merged = run(tmp_path / "in", shape=(8, 8, 8), identical="merge").info
    assert merged["patients"] == 4


@pytest.mark.slow
def test_ray_makes_the_same_cohort(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not here: pip install 'medvae-dp[cluster]'")
    write_tree(tmp_path / "in")
    ingest(tmp_path / "in", tmp_path / "1", IngestConfig(**SMALL))
    ingest(tmp_path / "in", tmp_path / "2", IngestConfig(workers=2, cluster="local", **SMALL))
    assert same_cohort(tmp_path / "1", tmp_path / "2")
