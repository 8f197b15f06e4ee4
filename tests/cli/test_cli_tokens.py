"""The secrets of a PACS, planted in the environment and searched for in all that the commands write, log and say."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pydicom
import pytest
from test_cli_leak import RECIPE, everything

from medvae import pacs
from medvae.cli_run import run
from medvae.vault import dicomweb

pytest.importorskip("dicomweb_client", reason="the PACS client is not here: pip install 'medvae-dp[pacs]'")

TOKEN, USER, PASSWORD = "tok-Zwetschge+4711/planted", "ward-seven", "pass:Klabauter~0815"
LOGIN = f"{USER}:{PASSWORD}"
ELSEWHERE = "127.0.0.2"


def forms(secret: str) -> set[bytes]:
    """Return how a secret may look: as it is, in base64 at any offset, quoted, in hexadecimal, in 16 bit letters."""
    found = {
        secret.encode(),
        secret.encode("utf-16-le"),
        quote(secret, safe="").encode(),
        secret.encode().hex().encode(),
    }
    for shift in range(3):
        padded = b"\0" * shift + secret.encode()
        whole = padded[: len(padded) // 3 * 3]
        found |= {code(whole)[5 * bool(shift) :] for code in (b64encode, urlsafe_b64encode)}
    return found


NEEDLES = forms(TOKEN) | forms(PASSWORD) | forms(LOGIN)


@dataclass
class Archive:
    """A small DICOMweb server; `mode` is what it does wrong, `seen` the headers and paths that reached it."""

    host: str = "127.0.0.1"
    mode: str = "fine"
    files: list[Path] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)
    stored: int = 0
    away: str = ""

    def __post_init__(self) -> None:
        archive = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                archive.answer(self, b"")

            def do_POST(self) -> None:
                archive.answer(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *_: Any) -> None:
                pass

        self.web = ThreadingHTTPServer((self.host, 0), Handler)
        threading.Thread(target=self.web.serve_forever, daemon=True).start()
        self.address = f"dicomweb+http://{self.host}:{self.web.server_port}/dicom-web"

    def answer(self, call: BaseHTTPRequestHandler, body: bytes) -> None:
        self.seen.append((call.path, call.headers["Authorization"] or ""))
        wrong = {"401": 401, "500": 500, "elsewhere": 302 if call.command == "GET" else 307}
        if self.mode in wrong:
            echo = f"you sent {call.headers['Authorization']}".encode()  # as debugging servers do
            self.say(call, wrong[self.mode], "text/plain", echo, Location=f"{self.away}{call.path}")
        elif self.mode == "babble":
            self.say(call, 200, "application/dicom+json", b'[{"0020000D": 7}, [1], "x"]')
        elif call.command == "POST":
            self.stored += body.count(b"DICM")
            self.say(call, 200, "application/dicom+json", b'{"00081199": {"vr": "SQ", "Value": []}}')
        else:
            self.find(call)

    def find(self, call: BaseHTTPRequestHandler) -> None:
        at = urlsplit(call.path)
        _, _, *asked = at.path.strip("/").split("/")
        if at.query and "offset=0" not in at.query:
            return self.say(call, 204, "application/dicom+json", b"")
        heads = [(p, pydicom.dcmread(p, stop_before_pixels=True)) for p in self.files]
        if len(asked) == 3:  # a series
            bodies = [p.read_bytes() for p, h in heads if h.SeriesInstanceUID == asked[2]]
            parts = b"".join(b"--edge\r\nContent-Type: application/dicom\r\n\r\n" + b + b"\r\n" for b in bodies)
            return self.say(
                call, 200, 'multipart/related; type="application/dicom"; boundary=edge', parts + b"--edge--"
            )
        tag, name = {0: ("0020000D", "StudyInstanceUID"), 2: ("0020000E", "SeriesInstanceUID")}[len(asked)]
        found = {getattr(h, name): None for _, h in heads if not asked or h.StudyInstanceUID == asked[0]}
        rows = [{tag: {"vr": "UI", "Value": [uid]}} for uid in found]
        return self.say(call, 200, "application/dicom+json", json.dumps(rows).encode())

    def say(self, call: BaseHTTPRequestHandler, status: int, kind: str, body: bytes, **headers: str) -> None:
        call.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            call.send_header(key, value)
        call.end_headers()
        call.wfile.write(body)


@contextmanager
def loud(said: io.StringIO) -> Iterator[None]:
    """Write every record of every logger to `said`, whatever its level, its handlers, and whom it passes records to.

    Only what is switched off for the whole process stays silent, as libraries are while a PACS is spoken to.
    """
    ours, handle = logging.StreamHandler(said), logging.Logger.handle
    ours.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))

    def also(logger: logging.Logger, record: logging.LogRecord) -> None:
        ours.handle(record)
        handle(logger, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.Logger, "isEnabledFor", lambda logger, level: level > logger.manager.disable)
        patch.setattr(logging.Logger, "handle", also)
        yield


@dataclass
class World:
    """What the commands wrote (below `folder`), said and logged."""

    folder: Path
    archive: Archive
    elsewhere: Archive
    codes: dict[str, int] = field(default_factory=dict)
    said: io.StringIO = field(default_factory=io.StringIO)

    def command(self, name: str, *argv: str) -> int:
        """Run a command; see `loud`."""
        with loud(self.said), redirect_stdout(self.said), redirect_stderr(self.said):
            self.codes[name] = run(argv)
        return self.codes[name]

    def leaks(self) -> list[str]:
        """Return where a secret stands."""
        blobs = [("what was said and logged", self.said.getvalue().encode())]
        for path in sorted(self.folder.rglob("*")):
            blobs += (
                [(path.name, blob) for blob in everything(path)]
                if path.is_file()
                else [(path.name, path.name.encode())]
            )
        return [where for where, blob in blobs if any(needle in blob for needle in NEEDLES)]


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["short", "audited"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Ingest from an archive by a token, train, (audit,) and release into it by a login, all with secrets around."""
    from medvae.synth.phantom import make_phantom
    from medvae.synth.phantom_write import write_phantom

    plain, folder = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("world")
    write_phantom(make_phantom(2, 30, seed=3, size=32), plain, "dicom")
    made = World(folder, Archive(files=sorted(plain.rglob("*.dcm"))), Archive(ELSEWHERE))
    made.archive.away = f"http://{ELSEWHERE}:{made.elsewhere.web.server_port}"
    (folder / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MEDVAE_DEBUG", "1")
        patch.setenv(pacs.TOKEN, TOKEN)
        for name in ("MEDVAE_TRACKING", pacs.USER, pacs.PASSWORD):
            patch.delenv(name, raising=False)
        # By its whole path: MLflow keeps the store of a relative one, wherever the process has gone since.
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        made.command("ingest", "ingest", made.archive.address, "-o", "cohort", "--shape", "32", "32")
        patch.setenv(pacs.USER, USER)
        patch.setenv(pacs.PASSWORD, PASSWORD)
        made.command("train", "train", "cohort", "--dp-epsilon", "8", "-o", "run", "--pipeline", "tiny.yaml")
        if request.param:
            made.command("audit", "audit", "run", "-o", "report", "--tier", "quick")
        patch.delenv(pacs.TOKEN)
        made.command(
            "release",
            *("release", "run", "-o", "release", "--count", "6", "--format", "dicom", "--to", made.archive.address),
            *(
                ("--report", "report")
                if request.param
                else ("--override", "no audit was made: a test of the short way")
            ),
        )
        yield made
    for server in (made.archive, made.elsewhere):
        server.web.shutdown()


def test_secrets_are_in_nothing_that_is_written_said_or_logged(world: World) -> None:
    assert set(world.codes.values()) == {0}, world.said.getvalue()
    assert world.archive.stored == len(list((world.folder / "release" / "dicom").rglob("*.dcm")))
    sent = {header for _, header in world.archive.seen}
    assert sent == {f"Bearer {TOKEN}", f"Basic {b64encode(LOGIN.encode()).decode()}"}  # so there was something to leak
    assert (world.folder / "mlflow.db").is_file()
    assert "\nDEBUG " in world.said.getvalue()  # so the loudest records did come here
    assert world.leaks() == []


@pytest.mark.parametrize("secret", ["token", "login"])
@pytest.mark.parametrize("mode", ["401", "500", "elsewhere", "babble"])
def test_a_failing_archive_gets_no_secret_out(
    world: World, mode: str, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, exit code 2, nothing half-written, and no other host hears of it, whatever the archive answers."""
    if secret == "token":
        monkeypatch.setenv(pacs.TOKEN, TOKEN)
    world.archive.mode = mode
    before = len(world.said.getvalue())
    try:
        assert (
            world.command(
                f"ingest {mode}", "ingest", world.archive.address, "-o", f"cohort-{mode}", "--shape", "32", "32"
            )
            == 2
        )
        if mode != "babble":  # an archive that cannot be searched is sent to all the same
            assert world.command(f"send {mode}", "send", "release", world.archive.address) == 2
    finally:
        world.archive.mode = "fine"
    said = world.said.getvalue()[before:]
    assert "the PACS" in said
    assert "Traceback" not in said
    assert world.elsewhere.seen == []
    assert not [p for p in world.folder.iterdir() if f"cohort-{mode}" in p.name]
    assert world.leaks() == []


def test_a_proxy_of_the_environment_does_not_read_along(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, world.archive.away)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert world.command("proxy", "send", "release", world.archive.address) == 0
    assert world.elsewhere.seen == []


def test_a_token_of_several_lines_is_refused_and_not_shown(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pacs.TOKEN, f"{TOKEN}\nX-Other: 1")
    reached = len(world.archive.seen)
    assert world.command("lines", "send", "release", world.archive.address) == 2
    assert len(world.archive.seen) == reached
    assert world.leaks() == []


@pytest.mark.parametrize("logger", ["as it comes", "not passed on", "of a high level", "disabled"])
def test_a_secret_in_a_log_for_debugging_would_be_found(
    logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted where the client is made, in each of the ways in which a logger can hide from the root's handlers."""
    planted = logging.getLogger(f"medvae.planted.{logger}")
    planted.propagate = logger != "not passed on"
    planted.disabled = logger == "disabled"
    planted.setLevel(logging.ERROR if logger == "of a high level" else logging.NOTSET)
    session = dicomweb.web_session

    def leaky(place: pacs.DicomWeb) -> Any:
        planted.debug("a session with %s", os.environ[pacs.TOKEN])
        return session(place)

    monkeypatch.setattr(dicomweb, "web_session", leaky)
    monkeypatch.setenv(pacs.TOKEN, TOKEN)
    monkeypatch.setenv("MEDVAE_TRACKING", "off")
    monkeypatch.chdir(tmp_path)
    world = World(tmp_path, Archive(mode="500"), Archive())
    assert world.command("ingest", "ingest", world.archive.address, "-o", "cohort", "--shape", "32", "32") == 2
    assert world.leaks() == ["what was said and logged"]


@pytest.mark.parametrize("secret", [TOKEN, PASSWORD, LOGIN])
def test_the_search_can_find(tmp_path: Path, secret: str) -> None:
    """In plain text, in base64 by itself and inside a longer text, and packed."""
    import gzip

    (tmp_path / "a.log").write_text(f"Authorization: {secret}")
    (tmp_path / "b.log").write_bytes(b64encode(secret.encode()))
    for n in range(3):
        (tmp_path / f"c{n}.log").write_bytes(b64encode(b"x" * n + secret.encode() + b"tail"))
    (tmp_path / "d.gz").write_bytes(gzip.compress(secret.encode()))
    world = World(tmp_path, Archive(), Archive())
    assert set(world.leaks()) == {p.name for p in tmp_path.iterdir()}
