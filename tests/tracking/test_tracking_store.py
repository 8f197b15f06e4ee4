"""What reaches the store, what never does, and that a broken store never stops the work."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvae import tracking
from medvae.errors import PrivacyError

Rows = Callable[[str], list[tuple[Any, ...]]]

METRICS = (
    "select e.name, m.key, m.value, m.step from metrics m join runs r using (run_uuid) join experiments e using "
    "(experiment_id) order by m.key, m.step"
)
TAGS = "select e.name, t.key, t.value from tags t join runs r using (run_uuid) join experiments e using (experiment_id)"
PARAMS = "select key, value from params"
STATUS = "select name, status from runs"


def finding(name: str, provenance: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "group": "privacy", "value": 0.5, "provenance": provenance, **more}


def test_metrics_and_parameters_are_stored(store: Path, rows: Rows) -> None:
    with tracking.run("train", {"dp_epsilon": 8.0, "recipe": {"dpsgd": {"steps": 300}}}, private=True) as t:
        for step in range(3):
            t.metric("loss", 1.0 / (step + 1), step=step)
        t.metric("nothing", None)
    assert rows(METRICS) == [("medvae-private", "loss", 1.0 / (s + 1), s) for s in range(3)]
    assert sorted(rows(PARAMS)) == [("dp_epsilon", "8.0"), ("recipe.dpsgd.steps", "300")]
    assert rows(STATUS) == [("train", "FINISHED")]


def test_findings_go_where_their_provenance_allows(store: Path, rows: Rows) -> None:
    with tracking.run("audit", {}, private=True) as t:
        t.findings(
            [
                finding("auc", "private", low=0.4, high=0.6, n=131, baseline=0.5, control=None, verdict="valid"),
                finding("bound", "public"),
                finding("ms-ssim, diversity", "dp"),
            ]
        )
    found = rows(METRICS)
    assert {key for experiment, key, *_ in found if experiment == "medvae"} == {
        "privacy/bound",
        "privacy/ms-ssim_ diversity",
    }
    private = {key: value for experiment, key, value, _ in found if experiment == "medvae-private"}
    assert private["privacy/auc"] == 0.5
    assert private["privacy/auc.n"] == 131
    assert "privacy/auc.control" not in private
    tags = rows(TAGS)
    assert ("medvae-private", "provenance.privacy/auc", "private") in tags
    assert ("medvae", "provenance.privacy/bound", "public") in tags
    assert not [tag for tag in tags if tag[0] == "medvae" and tag[2] == "private"]


def test_a_private_finding_is_refused_in_a_shared_run(store: Path, rows: Rows) -> None:
    with pytest.raises(PrivacyError, match="private"), tracking.run("release", {}, private=False) as t:
        t.findings([finding("auc", "private")])
    assert rows(METRICS) == []
    assert rows(STATUS) == [("release", "FAILED")]


@pytest.mark.parametrize("provenance", ["unheard-of", None])
def test_an_unknown_provenance_counts_as_private(store: Path, provenance: Any) -> None:
    with pytest.raises(PrivacyError), tracking.run("release", {}, private=False) as t:
        t.findings([finding("auc", provenance)])


def test_internal_files_are_refused_in_a_shared_run(store: Path, tmp_path: Path) -> None:
    inner = tmp_path / "internal" / "audit.json"
    inner.parent.mkdir()
    inner.write_text("{}")
    for path in (inner, inner.parent):
        with pytest.raises(PrivacyError, match="internal"), tracking.run("audit", {}, private=False) as t:
            t.artifact(path)


def test_planted_identifiers_never_reach_the_store(
    store: Path, tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = ["DOE^JOHN", "PAT-4711-SECRET", "/data/ward7/doe.csv", "1.2.840.99999.4711", "tok-4711", "pacs.ward7"]
    monkeypatch.setenv("MEDVAE_DICOMWEB_TOKEN", planted[4])
    monkeypatch.setenv("MEDVAE_DICOMWEB_PASSWORD", planted[4])
    params = {
        "source": f"dicomweb://{planted[5]}/dicom-web",
        "to": f"dicomweb://{planted[5]}/dicom-web",
        "labels": Path(planted[2]),
        "title": planted[0],
        "shape": [planted[1]],
        "device": planted[3],
        "dp_epsilon": planted[0],
        planted[1]: 3,
        "recipe": {"name": planted[0], planted[3]: {"steps": 1}},
        "conditions": (planted[1],),
        "tier": "quick",
    }

    def work() -> None:
        with tracking.run("audit", params, private=True) as t:
            t.metric("loss", 1.0)
            raise RuntimeError(f"{planted[0]} in {planted[2]}")

    with pytest.raises(RuntimeError, match="DOE"):
        work()
    assert rows(PARAMS) == [("tier", "quick")]
    assert rows(STATUS) == [("audit", "FAILED")]
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"medvae-private" in written
    assert [word for word in planted if word.encode() in written] == []


def test_no_user_host_command_line_or_git_state_is_a_tag(store: Path, rows: Rows) -> None:
    with tracking.run("audit", {}, private=True) as t:
        t.metric("loss", 1.0)
    tags = {key: value for _, key, value in rows(TAGS)}
    assert tags["mlflow.user"] == "medvae"
    assert tags["mlflow.source.name"] == "medvae"
    assert not [key for key in tags if "git" in key]
    # where the words of this machine are too common to search for, the check above is all there is
    for word in (getpass.getuser(), socket.gethostname(), sys.argv[0]):
        assert len(word) < 6 or word not in " ".join(tags.values())
    assert [user for (user,) in rows("select user_id from runs")] == ["medvae"]


def test_the_off_switch(store: Path, tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVAE_TRACKING", "off")
    with tracking.run("train", {}, private=True) as t:
        t.metric("loss", 1.0)
        t.findings([finding("auc", "private")])
        t.figure("roc", b"<svg/>")
        t.artifact(tmp_path)
    assert rows(STATUS) == []


def test_the_off_switch_imports_no_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys; from medvae import tracking\n"
        "with tracking.run('train', {}, private=True) as t: t.metric('loss', 1.0)\n"
        "assert 'mlflow' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "MEDVAE_TRACKING": "off"}, check=True, timeout=60
    )
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_server_is_said_once_and_soon(
    migrated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:pass-word@127.0.0.1:{port}")
    begun = time.monotonic()
    with tracking.run("train", {"dp_epsilon": 8}, private=True) as t:
        t.metric("loss", 1.0)
        done = "the work goes on"
    assert done
    assert time.monotonic() - begun < 30
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("MLflow could not be written") == 1
    assert len(err.splitlines()) == 1
    assert "pass-word" not in err


def test_a_store_that_breaks_midway_does_not_stop_the_work(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no space left: /data/ward7")

    with tracking.run("train", {}, private=True) as t:
        monkeypatch.setattr(MlflowClient, "log_batch", broken)
        for step in range(3 * tracking.FLUSH_AT):
            t.metric("loss", 1.0, step=step)
    err = capsys.readouterr().err
    assert err.count("MLflow could not be written") == 1
    assert "ward7" not in err


def test_ctrl_c_is_recorded_as_killed(store: Path, rows: Rows) -> None:
    with pytest.raises(KeyboardInterrupt), tracking.run("train", {}, private=True):
        raise KeyboardInterrupt
    assert rows(STATUS) == [("train", "KILLED")]


def test_the_default_store_is_quiet_and_local(migrated: Path, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(migrated.read_bytes())
    code = (
        "import socket, pathlib\n"
        "def refuse(*a, **k): raise AssertionError('a network call')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "from medvae import tracking\n"
        "with tracking.run('train', {}, private=True) as t:\n"
        "    t.metric('loss', 1.0); t.figure('loss curve', b'<svg/>')\n"
    )
    hidden = ("MLFLOW", "MEDVAE_TRACKING", "DO_NOT_TRACK")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [p.name for p in tmp_path.rglob("*.svg")] == ["loss curve.svg"]
    assert {p.name for p in tmp_path.iterdir()} == {"mlflow.db", "mlartifacts"}


def test_the_first_run_migrates_in_silence(first_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    path, done = first_run
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert path.is_file()


def test_parameters_pass_by_name_and_by_kind() -> None:
    assert tracking.allowed_params({"formats": ("npz", "dicom"), "seed": 3, "resume": True}) == {
        "formats": "npz dicom",
        "seed": "3",
        "resume": "True",
    }
    assert tracking.allowed_params({"formats": ["npz", "doe"], "seed": "doe", "name": "x", "shape": [1] * 9}) == {}
    assert tracking.allowed_params({"seed": None}) == {}
