"""The import rules hold, and they bite: a planted violation of each kind makes them fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "medvae", tmp_path / "medvae", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def _lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    env = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def _plant(file: Path, line: str) -> None:
    file.write_text(file.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")


def test_the_rules_hold(copy: Path) -> None:
    done = _lint(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("room", "line", "rule"),
    [
        ("gate/__init__.py", "import medvae.vault", "no way back to private data"),
        ("synth/__init__.py", "import medvae.train", "no way back to private data"),
        ("report/__init__.py", "def late() -> None:\n    import medvae.audit", "no way back to private data"),
        ("gate/__init__.py", "import medvae\n\nmedvae.train", "no way back to private data"),
        ("nets/__init__.py", "import medvae.vault", "may import vault"),
        ("vault/__init__.py", "import medvae.dp", "neither networks nor privacy arithmetic"),
        ("dp/__init__.py", "import torch", "needs no torch"),
        ("types.py", "import medvae.dp", "forward only"),
        ("train/__init__.py", "import mlflow", "one door"),
    ],
)
def test_a_planted_violation_is_caught(copy: Path, room: str, line: str, rule: str) -> None:
    _plant(copy / "medvae" / room, line)
    done = _lint(copy)
    assert done.returncode != 0
    broken = [text for text in done.stdout.splitlines() if "BROKEN" in text]
    assert any(rule in text for text in broken), done.stdout


def test_not_even_through_others(copy: Path) -> None:
    _plant(copy / "medvae" / "nets" / "__init__.py", "import medvae.vault")
    _plant(copy / "medvae" / "gate" / "__init__.py", "import medvae.nets")
    done = _lint(copy)
    assert any("no way back" in text for text in done.stdout.splitlines() if "BROKEN" in text)
