"""Fixtures every room's tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from postgres_server import Server, programs

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores, and small models gain nothing
os.environ.pop("MEDVAE_LEDGER", None)  # no test charges a team's own ledger


@pytest.fixture(scope="session")
def test_data() -> Callable[[str], Path]:
    """Return the path of a real data set by name, or skip with a word where it is missing."""
    base = Path(os.environ.get("MEDVAE_TEST_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        path = base / name
        if not path.exists():
            pytest.skip(f"real test data {name!r} is not here: set MEDVAE_TEST_DATA")
        return path

    return find


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """Start a PostgreSQL server on loopback, or skip with a word where there is none."""
    pytest.importorskip("psycopg", reason="the PostgreSQL driver is not here: pip install 'medvae-dp[postgres]'")
    found = programs()
    if found is None:
        pytest.skip("PostgreSQL is not here: apt-get install postgresql")
    server = Server(found)
    yield server
    server.remove()
