"""Releases into a real Orthanc, over TLS and over C-STORE, in a network of their own; and what is refused before."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from orthanc_server import PASSWORD, USER, Missing, Orthanc

from medvae import pacs
from medvae.errors import ConfigError, InputError, RunError, VerificationFailed
from medvae.gate import send as sending
from medvae.gate.send import send

pytest.importorskip("dicomweb_client", reason="the PACS client is not here: pip install 'medvae-dp[pacs]'")
pytest.importorskip("pynetdicom", reason="the PACS client is not here: pip install 'medvae-dp[pacs]'")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    try:
        running = Orthanc(tmp_path_factory.mktemp("orthanc"))
    except Missing as why:
        pytest.skip(str(why))
    yield running
    running.stop()


@pytest.fixture
def orthanc(server: Orthanc, monkeypatch: pytest.MonkeyPatch) -> Iterator[Orthanc]:
    """An empty Orthanc, from inside its network, with the login and the certificate authority that it needs."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(server.certificate))
    monkeypatch.setenv(pacs.USER, USER)
    monkeypatch.setenv(pacs.PASSWORD, PASSWORD)
    monkeypatch.delenv(pacs.TOKEN, raising=False)
    with server.entered():
        server.clear()
        yield server


@pytest.fixture
def objects(base_release: Path) -> list[Path]:
    return sorted((base_release / "dicom").rglob("*.dcm"))


@pytest.mark.parametrize("way", ["web_address", "plain_address", "dicom_address"])
def test_every_object_arrives_as_it_is(way: str, orthanc: Orthanc, base_release: Path, objects: list[Path]) -> None:
    seen: list[tuple[int, int]] = []
    result = send(base_release, getattr(orthanc, way), progress=lambda done, total: seen.append((done, total)))
    assert result == {"objects": len(objects), "sent": len(objects), "already_there": 0}
    assert seen[-1] == (len(objects), len(objects))
    assert orthanc.instances() == len(objects)
    ours = {pydicom.dcmread(p).SOPInstanceUID: pydicom.dcmread(p) for p in objects}
    for name in orthanc.ask("instances"):
        tags = orthanc.ask(f"instances/{name}/tags?short")
        mine = ours[tags["0008,0018"]]
        assert tags["0008,001c"] == "YES"
        assert tags["0010,0020"] == mine.PatientID
        assert tags["0020,000d"] == mine.StudyInstanceUID


def test_pixels_come_back_unchanged(orthanc: Orthanc, base_release: Path, objects: list[Path]) -> None:
    send(base_release, orthanc.web_address)
    place = pacs.parse(orthanc.web_address)
    assert isinstance(place, pacs.DicomWeb)
    client = pacs.web_client(place)
    for path in objects[:3]:
        mine = pydicom.dcmread(path)
        theirs = client.retrieve_instance(mine.StudyInstanceUID, mine.SeriesInstanceUID, mine.SOPInstanceUID)
        np.testing.assert_array_equal(theirs.pixel_array, mine.pixel_array)


def test_what_is_there_is_not_sent_again(orthanc: Orthanc, base_release: Path, objects: list[Path]) -> None:
    send(base_release, orthanc.web_address)
    assert send(base_release, orthanc.web_address)["sent"] == 0
    orthanc.ask(f"instances/{orthanc.ask('instances')[0]}", "DELETE")
    assert send(base_release, orthanc.web_address) == {
        "objects": len(objects),
        "sent": 1,
        "already_there": len(objects) - 1,
    }
    assert send(base_release, orthanc.dicom_address)["sent"] == len(objects)  # C-STORE again, which is harmless
    assert orthanc.instances() == len(objects)


def test_an_interrupted_transfer_goes_on(
    orthanc: Orthanc, base_release: Path, objects: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dicomweb_client.api import DICOMwebClient

    whole, calls = DICOMwebClient.store_instances, []

    def breaks(self: Any, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise ConnectionResetError("/secret/path")
        return whole(self, *given)

    monkeypatch.setattr(sending, "BATCH_BYTES", 1)
    monkeypatch.setattr(DICOMwebClient, "store_instances", breaks)
    with pytest.raises(InputError, match="breaks off") as error:
        send(base_release, orthanc.web_address)
    assert "secret" not in str(error.value)
    assert orthanc.instances() == 3
    assert send(base_release, orthanc.web_address) == {
        "objects": len(objects),
        "sent": len(objects) - 3,
        "already_there": 3,
    }
    assert orthanc.instances() == len(objects)


def test_an_altered_release_is_not_sent(orthanc: Orthanc, released: Path) -> None:
    victim = next((released / "dicom").rglob("*.dcm"))
    victim.write_bytes(victim.read_bytes() + b"\0")
    with pytest.raises(VerificationFailed):
        send(released, orthanc.web_address)
    assert orthanc.instances() == 0


def test_a_wrong_login_is_one_sentence(
    orthanc: Orthanc, base_release: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(pacs.PASSWORD, "also-secret")
    caplog.set_level(logging.DEBUG)
    with pytest.raises(InputError, match="refuses the login") as error:
        send(base_release, orthanc.web_address)
    assert "also-secret" not in str(error.value) + caplog.text
    assert orthanc.instances() == 0


def test_a_certificate_of_an_unknown_authority_is_refused(
    orthanc: Orthanc, base_release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    with pytest.raises(InputError, match="REQUESTS_CA_BUNDLE"):
        send(base_release, orthanc.web_address)
    assert orthanc.instances() == 0


def test_secrets_are_in_no_log(orthanc: Orthanc, base_release: Path, caplog: pytest.LogCaptureFixture, capfd) -> None:
    caplog.set_level(logging.DEBUG)
    send(base_release, orthanc.web_address)
    out, err = capfd.readouterr()
    assert PASSWORD not in caplog.text + out + err
    assert "2.25." not in caplog.text


@pytest.mark.parametrize("title", ["WRONG", "ORTHANC"])
def test_a_node_that_refuses_or_is_not_there(title: str, orthanc: Orthanc, base_release: Path) -> None:
    port = orthanc.dicom_port if title == "WRONG" else 4243
    with pytest.raises(InputError, match=r"does not answer or refuses|cannot be reached"):
        send(base_release, f"dicom://{title}@127.0.0.1:{port}")


def test_a_pacs_is_ingested_like_the_folder(
    orthanc: Orthanc, base_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images and their modality pass; the segmentations of the same studies stay in the archive."""
    from medvae import api
    from medvae.config import IngestConfig
    from medvae.vault.store import open_cohort

    monkeypatch.setenv("MEDVAE_TRACKING", "off")
    send(base_release, orthanc.web_address)
    config = IngestConfig(shape=(8, 10, 6), holdout=0.1)
    address = f"{orthanc.web_address}?ModalitiesInStudy=MR"
    info = api.ingest(address, tmp_path / "cohort", config)
    assert (info["patients"], info["images"], info["spatial_shape"]) == (3, 3, [8, 10, 6])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cohort"]
    images = tmp_path / "images"
    for path in (base_release / "dicom").rglob("IM*.dcm"):
        target = images / path.relative_to(base_release)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    api.ingest(images, tmp_path / "same", config)
    mine, theirs = (open_cohort(tmp_path / n).reveal() for n in ("cohort", "same"))
    assert mine.space == theirs.space
    scans = [np.sort(store.load(range(3)).x.reshape(3, -1), axis=0) for store in (mine, theirs)]
    np.testing.assert_allclose(*scans, atol=1e-6)


def test_an_interrupted_fetch_goes_on_and_is_private(
    orthanc: Orthanc, base_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medvae.vault import dicomweb
    from medvae.vault.dicomweb import local_source

    send(base_release, orthanc.web_address)
    whole, calls = dicomweb.save_objects, []

    def torn(pieces: Iterator[bytes]) -> Iterator[bytes]:
        piece = next(pieces)
        yield piece[: len(piece) // 2]
        raise ConnectionResetError

    def breaks(kind: str, pieces: Iterator[bytes], folder: Path) -> int:
        calls.append(1)
        return whole(kind, torn(pieces) if len(calls) == 2 else pieces, folder)

    monkeypatch.setattr(dicomweb, "save_objects", breaks)
    with pytest.raises(InputError), local_source(orthanc.web_address, tmp_path / "cohort"):
        pass
    kept = tmp_path / ".cohort.fetched"
    assert kept.stat().st_mode & 0o077 == 0
    with local_source(orthanc.web_address, tmp_path / "cohort") as folder:
        files = list(folder.rglob("*.dcm"))
        assert len(files) == orthanc.instances()
        assert not [p for p in files if "2.25" in p.name or "SYN" in str(p.relative_to(folder))]
    assert len(calls) == 2 + 6 - 1  # three images series and three masks; the first was whole
    assert not kept.exists()


def test_a_token_goes_to_the_named_host_and_follows_no_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(302 if "studies" in self.path and "away" not in self.path else 200)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/away/studies")
            self.send_header("Content-Type", "application/dicom+json")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_: Any) -> None:
            pass

    web = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    monkeypatch.setenv(pacs.TOKEN, "tok-secret")
    place = pacs.parse(f"dicomweb+http://127.0.0.1:{web.server_port}/dicom-web")
    assert isinstance(place, pacs.DicomWeb)
    client = pacs.web_client(place)
    with pytest.raises(InputError) as error, pacs.talking():
        client.search_for_studies()
    web.shutdown()
    assert {path.split("?")[0] for path, _ in seen} == {"/dicom-web/studies"}
    assert {token for _, token in seen} == {"Bearer tok-secret"}
    assert "tok-secret" not in str(error.value) + repr(place)


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("dicomweb://user:tok-secret@pacs.example/dicom-web", "login"),
        ("dicomweb+http://pacs.example/dicom-web", "in clear"),
        ("dicomweb+http://10.0.0.3/dicom-web", "in clear"),
        ("dicomweb://", "cannot be read"),
        ("dicomweb://host:99999/x", "cannot be read"),
        ("ftp://host/x", "cannot be read"),
        ("dicom://host:104", "AETITLE"),
        ("dicom://NODE@host", "AETITLE"),
        ("dicom://A_TITLE_OF_17_CHARS@host:104", "AETITLE"),
        ("dicom://NODE:tok-secret@host:104", "AETITLE"),
    ],
)
def test_addresses_that_are_refused(address: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as error:
        pacs.parse(address)
    assert "tok-secret" not in str(error.value)


def test_addresses_that_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pacs.parse("dicomweb://pacs.example/dicom-web/?Modality=MR") == pacs.DicomWeb(
        "https://pacs.example/dicom-web", (("Modality", "MR"),)
    )
    assert pacs.parse("dicomweb+http://[::1]:8042/x") == pacs.DicomWeb("http://[::1]:8042/x")
    assert pacs.parse("dicom://NODE@10.0.0.3:104") == pacs.Dimse("NODE", "10.0.0.3", 104)
    monkeypatch.setenv(pacs.PLAIN_HTTP, "allow")
    assert pacs.parse("dicomweb+http://pacs.example/x") == pacs.DicomWeb("http://pacs.example/x")


def test_a_release_without_dicom_is_refused(run: Path, tmp_path: Path) -> None:
    from hand_made_run import release

    from medvae.config import ReleaseConfig

    release(run, tmp_path / "plain", ReleaseConfig(count=2, formats=("npz",)))
    with pytest.raises(RunError, match="holds no DICOM"):
        send(tmp_path / "plain", "dicom://NODE@127.0.0.1:4242")


def test_the_result_is_plain_json(orthanc: Orthanc, base_release: Path) -> None:
    assert json.loads(json.dumps(send(base_release, orthanc.dicom_address)))["sent"] > 0
