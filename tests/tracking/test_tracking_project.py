"""The folder mlflow/: no Python file that would shadow the package, files that parse, and entry points that run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from medvae import cli

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "mlflow"


def read(name: str) -> dict[str, Any]:
    content = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def test_the_folder_holds_no_python() -> None:
    assert FOLDER.is_dir()
    assert [p for p in FOLDER.rglob("*") if p.suffix in (".py", ".pyi", ".pyc")] == []


def test_the_package_is_found_from_the_root() -> None:
    code = "import importlib.util as u; print(u.find_spec('mlflow').origin)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "site-packages" in done.stdout


def test_the_server_has_logins_a_database_and_no_secret() -> None:
    compose = read("compose.yaml")
    server, database = compose["services"]["server"], compose["services"]["database"]
    script = server["command"][-1]
    assert "--app-name basic-auth" in script
    assert "default_permission = NO_PERMISSIONS" in script
    assert "--artifacts-destination /artifacts" in script
    assert database["image"].startswith("postgres:")
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])
    assert "ports" not in database
    for key, value in {**server["environment"], **database["environment"]}.items():
        if "PASSWORD" in key or "SECRET" in key:
            assert value.startswith("${"), key
    example = (FOLDER / ".env.example").read_text(encoding="utf-8")
    assert [line for line in example.splitlines() if line and not line.startswith("#") and not line.endswith("=")] == []


def _run(migrated: Path, tmp_path: Path, *args: str) -> list[str]:
    """Run the project with a `medvae` that notes how it was called."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    stub = tmp_path / "bin" / "medvae"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nprintf "%s|" "$@" >> "$CALLS"\necho >> "$CALLS"\n')
    stub.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{stub.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
    }
    environment.pop("MEDVAE_COHORT", None)
    command = [sys.executable, "-m", "mlflow", "run", str(FOLDER), "--env-manager", "local", *args]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return (tmp_path / "calls").read_text().splitlines()


def test_main_walks_from_training_to_verification(migrated: Path, tmp_path: Path) -> None:
    calls = _run(migrated, tmp_path, "-P", "dp_epsilon=8")
    assert [call.split("|")[0] for call in calls] == ["train", "audit", "release", "verify"]
    assert calls[0] == "train|--dp-epsilon|8|-o|medvae-out/run|"
    assert "--count|100|" in calls[2]


def test_main_ingests_a_folder_of_scans(migrated: Path, tmp_path: Path) -> None:
    scans = tmp_path / "my scans; $(touch broken)"
    scans.mkdir()
    calls = _run(
        migrated, tmp_path, "-P", f"cohort={scans}", "-P", "options=--condition size_class", "-P", f"out={tmp_path}/o u"
    )
    assert calls[0] == f"ingest|{scans}|-o|{tmp_path}/o u/cohort|--condition|size_class|"
    assert calls[1].startswith(f"train|{tmp_path}/o u/cohort|--dp-epsilon|8")
    assert not (ROOT / "broken").exists()


@pytest.mark.parametrize("option", ["--dp-epsilon", "--tier", "--count", "--format", "--report", "--output"])
def test_the_project_uses_options_that_exist(option: str) -> None:
    from typer.main import get_command

    commands = get_command(cli.app).commands.values()  # type: ignore[attr-defined]
    assert any(option in parameter.opts for command in commands for parameter in command.params)
