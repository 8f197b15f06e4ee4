"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from small_cohort import write_cohort

from medvae.crosscheck import prv_epsilon
from medvae.train import claim


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _remembered_crosscheck() -> Callable[..., float]:
    return cache(prv_epsilon)


@pytest.fixture(autouse=True)
def _quick_crosscheck(_remembered_crosscheck: Callable[..., float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do the second accountant's slow arithmetic once a plan, and not once a run."""
    monkeypatch.setattr(claim, "prv_epsilon", _remembered_crosscheck)


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    return write_cohort(tmp_path / "cohort")
