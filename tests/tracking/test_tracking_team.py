"""A team's server as compose.yaml starts it, here with a PostgreSQL of the tests' own: rights, files, aliases."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from postgres_server import PASSWORD, Server

from medvae import tracking
from medvae.synth.store import write_release
from medvae.types import ImageSpace, Intensity, ModelRelease

pytestmark = pytest.mark.slow  # two databases migrate, and a server starts

FOLDER = Path(__file__).resolve().parents[2] / "mlflow"
ADMIN = "admin of the tests"
SPACE = ImageSpace((4, 6), (1.0, 1.0), "MR", Intensity("window", 0.0, 1.0), ())


class Team:
    """The server of compose.yaml by its own script, without a container; `databases` are PostgreSQL's."""

    def __init__(self, postgres: Server, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.database, self.artifacts = postgres.new_database(), folder / "artifacts"
        script = self._script(postgres, folder)
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "MEDVAE"))},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "POSTGRES_PASSWORD": PASSWORD,
            "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(24),
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
            "MLFLOW_ALLOWED_HOSTS": "localhost:*,127.0.0.1:*",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_WORKERS": "1",
        }
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                ["bash", "-ec", script], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self._wait(folder / "log")

    def _script(self, postgres: Server, folder: Path) -> str:
        """Return compose's script with the names of a container replaced by this machine's."""
        compose = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
        script = str(compose["services"]["server"]["command"][-1]).replace("$$", "$")
        here = {
            "postgresql://mlflow:": "postgresql+psycopg://team:",
            "@database:5432/mlflow": f"@127.0.0.1:{postgres.port}/{self.database}",
            "/tmp/auth.ini": str(folder / "auth.ini"),
            "--host 0.0.0.0 --port 5000": f"--host 127.0.0.1 --port {self.port}",
            "--artifacts-destination /artifacts": f"--artifacts-destination {self.artifacts}",
        }
        for there, mine in here.items():
            assert there in script, there
            script = script.replace(there, mine)
        script, installs = re.subn(r"^pip install .*\n", "", script, flags=re.MULTILINE)
        assert installs == 1
        return script

    def _wait(self, log: Path) -> None:
        until = time.monotonic() + 240
        while time.monotonic() < until and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.3)
        self.stop()
        raise RuntimeError(log.read_text()[-2000:])

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture(scope="module")
def team(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    pytest.importorskip("flask_wtf", reason="MLflow's logins are not here: pip install 'mlflow[auth]'")
    server = Team(postgres, tmp_path_factory.mktemp("team"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            patch.setenv(name, "")  # put back at the end
        _grant(server)
    yield server
    server.stop()


def _grant(team: Team) -> None:
    """Run the README's own words to make experiments, people and rights."""
    blocks = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (words,) = [b for b in blocks if "grant_user_permission" in b]
    words = words.replace("http://localhost:5000", team.url).replace('"…"', f'"{ADMIN}"')
    exec(compile(words, "README.md", "exec"), {})


def log_in(monkeypatch: pytest.MonkeyPatch, team: Team, user: str, password: str) -> Any:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.url)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    monkeypatch.setenv("MEDVAE_TRACKING", "on")
    return MlflowClient(tracking_uri=team.url, registry_uri=team.url)


@pytest.fixture(scope="module")
def written(team: Team, tmp_path_factory: pytest.TempPathFactory) -> Team:
    """What a scientist's commands write: private numbers, public findings, and a released model, twice."""
    model = tmp_path_factory.mktemp("released") / "run" / "model"
    write_release(model, ModelRelease({"w": np.ones(3, np.float32)}, {"space": SPACE.to_json(), "recipe": {}}))
    (model.parent / "privacy.json").write_text(json.dumps({"releasable": True}))
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        log_in(patch, team, "scientist", "a long password")
        with tracking.run("train", {"dp_epsilon": 8.0}, private=True) as run:
            run.metric("loss", 0.75, step=1)
            run.findings([{"name": "epsilon", "group": "privacy", "provenance": "public", "value": 8.0}])
            run.figure("curve", b"<svg/>")
        for _ in range(2):
            with tracking.run("release", {}, private=False) as run:
                run.register(model)
    assert said.getvalue() == ""
    return team


def test_who_may_read_what_is_shared_cannot_read_what_is_private(
    written: Team, postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    scientist = log_in(monkeypatch, written, "scientist", "a long password")
    shared, private = (scientist.get_experiment_by_name(n) for n in (tracking.SHARED, tracking.PRIVATE))
    (secret,) = scientist.search_runs([private.experiment_id])
    assert secret.data.metrics == {"loss": 0.75}
    assert [f.path for f in scientist.list_artifacts(secret.info.run_id, "figures")] == ["figures/curve.svg"]

    partner = log_in(monkeypatch, written, "partner", "another long password")
    public = partner.search_runs([shared.experiment_id])
    assert {"privacy/epsilon": 8.0} in [r.data.metrics for r in public]
    assert [e.name for e in partner.search_experiments()] == [tracking.SHARED]
    assert partner.search_runs([private.experiment_id]) == []
    refused = {
        "the experiment": lambda: partner.get_experiment(private.experiment_id),
        "its run": lambda: partner.get_run(secret.info.run_id),
        "its numbers": lambda: partner.get_metric_history(secret.info.run_id, "loss"),
        "its list of files": lambda: partner.list_artifacts(secret.info.run_id),
        "its files": lambda: partner.download_artifacts(secret.info.run_id, "figures/curve.svg", str(tmp_path)),
        "writing what is shared": lambda: partner.create_run(shared.experiment_id),
        "a new version": lambda: partner.create_model_version("medvae", public[0].info.artifact_uri),
    }
    for what, ask in refused.items():
        with pytest.raises(MlflowException, match=r"403|[Pp]ermission denied"):
            pytest.fail(f"{what}: {ask()!r}")
    stranger = log_in(monkeypatch, written, "partner", "a wrong password")
    with pytest.raises(MlflowException, match=r"401|not authenticated"):
        stranger.get_run(public[0].info.run_id)
    # The numbers are in PostgreSQL, and what is private is nowhere in what is shared.
    rows = postgres.execute(
        "SELECT r.experiment_id, m.key FROM metrics m JOIN runs r USING (run_uuid)", written.database
    )
    assert set(rows) == {(int(private.experiment_id), "loss"), (int(shared.experiment_id), "privacy/epsilon")}


def test_files_go_through_the_server_and_the_model_by_its_aliases(
    written: Team, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import mlflow

    partner = log_in(monkeypatch, written, "partner", "another long password")
    released = partner.get_model_version_by_alias("medvae", "released")
    champion = partner.get_model_version_by_alias("medvae", "champion")
    assert (int(champion.version), int(released.version)) == (1, 2)
    run = partner.get_run(released.run_id)
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert list(written.artifacts.rglob("*.safetensors"))
    folder = mlflow.artifacts.download_artifacts("models:/medvae@released", dst_path=str(tmp_path / "model"))
    assert sorted(p.suffix for p in Path(folder).rglob("*.safetensors")) == [".safetensors"]
    assert not [p for p in Path(folder).rglob("*") if p.suffix in (".pkl", ".pt", ".pth")]
