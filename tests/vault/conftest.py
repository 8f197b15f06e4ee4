"""Fixtures of the vault's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medvae.config import IngestConfig
from medvae.vault.ingest import ingest
from medvae.vault.store import CohortStore, open_cohort


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


Run = Callable[..., CohortStore]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Ingest a folder and return its store; each call writes to a new folder."""
    count = 0

    def call(source: Path, **config: Any) -> CohortStore:
        nonlocal count
        count += 1
        out = tmp_path / f"cohort-{count}"
        ingest(source, out, IngestConfig(**{"holdout": 0.0, **config}))
        return open_cohort(out).reveal()

    return call
