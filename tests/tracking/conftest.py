"""One migrated store a session, copied for each test: MLflow's first run migrates for seconds."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A store that was made and migrated as a first command does it, and what was printed meanwhile."""
    folder = tmp_path_factory.mktemp("store")
    code = "from medvae import tracking\nwith tracking._quiet(): tracking._connect().search_experiments()"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "MEDVAE_TRACKING"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return folder / "mlflow.db", done


@pytest.fixture(scope="session")
def migrated(first_run: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return first_run[0]


@pytest.fixture
def store(migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A migrated store; the working directory is its folder. The URI is absolute, for MLflow caches stores by URI."""
    path = tmp_path / "mlflow.db"
    shutil.copy(migrated, path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    monkeypatch.setenv("MEDVAE_TRACKING", "on")
    return path


@pytest.fixture
def rows(store: Path) -> Callable[[str], list[tuple[Any, ...]]]:
    def query(sql: str) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(store)
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()

    return query
