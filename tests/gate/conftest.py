"""Fixtures of the gate's tests: a releasable run and a release, each once for reading and once for harming."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hand_made_run import agree_once, build_run, edit_json, fake_generate, fake_render, fake_render_audit, release

from medvae.config import ReleaseConfig
from medvae.gate import checks
from medvae.synth import sample


@pytest.fixture(autouse=True)
def _stand_ins(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDVAE_SIGNING_KEY", raising=False)
    monkeypatch.setattr(checks, "agree", agree_once)
    if "real_model" not in request.node.name:
        monkeypatch.setattr(sample, "generate", fake_generate)


@pytest.fixture(scope="session")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A releasable run that no test changes."""
    return build_run(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(base_run: Path, tmp_path: Path) -> Path:
    """A releasable run of the test's own, with a ledger of its own."""
    shutil.copytree(base_run.parent, tmp_path / "own", ignore=shutil.ignore_patterns("signing_key.pem"))
    own = tmp_path / "own" / "run"
    edit_json(own / "private" / "run.json", ledger=str(tmp_path / "own" / "cohort" / "ledger.db"))
    return own


@pytest.fixture
def edit_privacy(run: Path) -> Callable[..., None]:
    """Change keys of the run's privacy.json."""
    return lambda **changes: edit_json(run / "privacy.json", **changes)


@pytest.fixture(scope="session")
def base_release(base_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete release in all formats that no test changes."""
    out = tmp_path_factory.mktemp("released") / "release"
    config = ReleaseConfig(count=3, formats=("nifti", "dicom", "png", "npz", "huggingface", "viewer"), seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "generate", fake_generate)
        patch.setattr(checks, "agree", agree_once)
        patch.delenv("MEDVAE_SIGNING_KEY", raising=False)
        release(base_run, out, config, render=fake_render, render_audit=fake_render_audit)
    return out


@pytest.fixture
def released(base_release: Path, tmp_path: Path) -> Path:
    """A release of the test's own."""
    return Path(shutil.copytree(base_release, tmp_path / "release"))
