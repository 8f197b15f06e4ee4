"""A disk that fills up in the middle of a run: one clear error, and a state that resumes to the same weights."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_cohort import small_config, write_cohort

from medvae.dp.ledger_place import open_ledger
from medvae.errors import InputError
from medvae.synth.store import read_release
from medvae.train import checkpoint
from medvae.train.run import train

PAGE = 4096


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, or a skip where this user may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here: run as root to test with a full disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, leave_pages: int) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE))
        except OSError as error:
            full = error.errno
        file.truncate(max(0, file.tell() // PAGE - leave_pages) * PAGE)
    assert full == errno.ENOSPC
    return ballast


def same_weights(a: Path, b: Path) -> bool:
    left, right = (read_release(run / "model").weights for run in (a, b))
    return all(np.array_equal(left[k], right[k]) for k in left)


def test_a_full_disk_leaves_a_state_to_resume(small_disk: Path, tmp_path: Path) -> None:
    whole = write_cohort(tmp_path / "cohort")
    train(whole, tmp_path / "whole", small_config())
    failed = []
    for pages in (0, 4, 8, 12, 16, 24, 32, 48):
        cohort, run = write_cohort(small_disk / "cohort"), small_disk / "run"
        ballast = fill(small_disk, pages)
        try:
            train(cohort, run, small_config())
            failed.append(False)
        except InputError as error:  # of the ledger's database
            assert "the disk is full" in str(error)  # noqa: PT017
            failed.append(True)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
            failed.append(True)
        ballast.unlink()
        assert failed[-1] is not (run / "privacy.json").exists()
        train(cohort, run, small_config(), resume=run.is_dir())
        assert same_weights(run, tmp_path / "whole")
        assert [e.kind for e in open_ledger(cohort).events()] == ["create", "reserve", "commit"]
        assert not list(run.rglob("*.part"))
        for folder in (run, cohort):
            subprocess.run(["rm", "-rf", str(folder)], check=True)
    assert failed[:3] == [True, True, True]
    assert sum(failed) >= 5


@pytest.mark.parametrize("write", [1, 5, 9, 13])
def test_an_error_of_the_disk_at_any_write_leaves_a_state_to_resume(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    train(cohort, tmp_path / "whole", small_config())
    plain, calls = checkpoint.os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > write:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("medvae.train.checkpoint.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            train(cohort, tmp_path / "run", small_config())
    train(cohort, tmp_path / "run", small_config(), resume=True)
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    kinds = [e.kind for e in open_ledger(cohort).events()]
    assert (kinds.count("reserve"), kinds.count("commit")) == (2, 2)
