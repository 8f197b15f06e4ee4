"""Identifiers planted in tags, file names, folders and tables, then searched for in all that leaves or is said."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from medvae.cli import run

NAME = "ZWETSCHGE"  # in person names, folders and file names
NUMBER = "QX77310"  # in patient ids
FREE = "KLABAUTERMANN"  # in free text, table columns and private tags
UID = "1.2.826.0.1.3680043.8.498.77310"
SECRETS = (NAME, NUMBER, FREE, UID)
RECIPE = "name: tiny\ndpsgd:\n  steps: 2\n  sample_rate: 0.5\n"


@dataclass(frozen=True)
class Walk:
    """All that the commands wrote and said."""

    folder: Path
    codes: dict[str, int]
    said: str


def texts(blob: bytes, name: str = "") -> Iterator[bytes]:
    """Return the bytes of a file, and of whatever is packed in it: zip, gzip, and deflated streams of PDF and PNG."""
    yield blob
    if blob[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            for part in archive.namelist():
                yield part.encode()
                yield from texts(archive.read(part))
    elif blob[:2] == b"\x1f\x8b":
        yield from texts(gzip.decompress(blob))
    elif blob[:5] == b"%PDF-":
        for stream in re.findall(rb"stream\r?\n(.*?)endstream", blob, flags=re.S):
            try:
                yield zlib.decompress(stream)
            except zlib.error:
                continue
    elif b"base64," in blob:
        import base64

        for packed in re.findall(rb"base64,([A-Za-z0-9+/=]+)", blob):
            yield base64.b64decode(packed)


def traces(folder: Path, secrets: tuple[str, ...] = SECRETS) -> list[str]:
    """Return where a secret stands, in 8 or 16 bit letters, in names or in bytes."""
    found = []
    for path in sorted(folder.rglob("*")):
        blobs = [str(path.relative_to(folder)).encode()]
        if path.is_file():
            blobs += list(texts(path.read_bytes()))
        for secret in secrets:
            forms = (secret.lower().encode(), secret.lower().encode("utf-16-le"))
            if any(form in blob.lower() for blob in blobs for form in forms):
                found.append(f"{secret} in {path.relative_to(folder)}")
    return found


def _hospital(folder: Path) -> Path:
    """Write phantoms as DICOM and plant identifiers wherever a hospital has them; return the table."""
    import pydicom
    from pydicom.dataset import Dataset

    from medvae.synth.phantom import make_phantom
    from medvae.synth.phantom_write import write_phantom

    plain = folder / "plain"
    write_phantom(make_phantom(2, 30, seed=3, size=32, scans=(1, 2)), plain, "dicom")
    rows = list(csv.DictReader((plain / "table.csv").open(encoding="utf-8")))
    scans = folder / f"export_{NAME}"
    for n, path in enumerate(sorted(plain.rglob("*.dcm"))):
        data = pydicom.dcmread(path)
        data.PatientName = f"{NAME}^Anna"
        data.PatientID = f"{NUMBER}-{data.PatientID}"
        data.OtherPatientIDs = NUMBER
        data.InstitutionName = data.ReferringPhysicianName = data.StudyDescription = FREE
        data.ImageComments = data.PatientComments = f"{FREE} {NAME}"
        data.StudyInstanceUID = f"{UID}.{n}"
        step = Dataset()
        step.ScheduledProcedureStepDescription = FREE
        data.RequestAttributesSequence = [step]
        block = data.private_block(0x0009, FREE, create=True)
        block.add_new(1, "LO", NUMBER)
        target = scans / f"{NAME}_{n // 7}" / f"{NUMBER}_{n}.dcm"
        target.parent.mkdir(parents=True, exist_ok=True)
        data.save_as(target)
    table = folder / f"list_{NAME}.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient_id", "lesion", "remark", FREE.lower()])
        writer.writerows([f"{NUMBER}-{row['patient_id']}", row["lesion"], FREE, NAME] for row in rows)
    return table


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["short", "audited"])
def walk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    audited: bool = request.param
    private, folder = tmp_path_factory.mktemp(f"private_{NAME}"), tmp_path_factory.mktemp("walk")
    table = _hospital(private)
    (folder / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    cohort, said, codes = private / "cohort", io.StringIO(), {}
    commands = {
        "doctor": ["doctor"],
        "ingest": [
            *("ingest", str(private / f"export_{NAME}"), "-o", str(cohort), "--labels", str(table)),
            *("--condition", "lesion=absent|present", "--condition", "age=20:90", "--shape", "32", "32"),
        ],
        "plan": ["plan", str(cohort), "--dp-epsilon", "8"],
        "train": ["train", str(cohort), "--dp-epsilon", "8", "-o", "run", "--pipeline", "tiny.yaml", "--json"],
        **({"audit": ["audit", "run", "-o", "report"]} if audited else {}),
        "release": [
            *("release", "run", "-o", "release", "--count", "6"),
            *(("--report", "report") if audited else ()),
            *("--format", "npz", "--format", "png", "--format", "dicom", "--format", "nifti"),
        ],
        "verify": ["verify", "release"],
        "ledger": ["ledger", str(cohort), "--json"],
        "no cohort": ["train", str(private / f"export_{NAME}"), "--dp-epsilon", "8", "-o", "other"],
        "no table": ["ingest", str(private / f"export_{NAME}"), "-o", "other", "--labels", str(private / NAME)],
        "no column": ["ingest", str(private / f"export_{NAME}"), "-o", "other", "--condition", "weight"],
        "used": ["ingest", str(private / f"export_{NAME}"), "-o", str(cohort)],
        "no run": ["release", str(cohort), "-o", "other"],
    }
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.chdir(folder)
        patch.delenv("MEDVAE_DEBUG", raising=False)
        patch.delenv("MEDVAE_TRACKING", raising=False)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name, argv in commands.items():
            codes[name] = run(argv)
    return Walk(folder, codes, said.getvalue())


def test_the_walk_ends_as_it_should(walk: Walk) -> None:
    bad = {"no cohort", "no table", "no column", "used", "no run"}
    assert walk.codes == {name: 2 if name in bad else 0 for name in walk.codes}, walk.said


def test_planted_identifiers_reach_nothing_that_leaves(walk: Walk) -> None:
    parts = ("release", "report/public") if "audit" in walk.codes else ("release",)
    for part in parts:
        assert (walk.folder / part).is_dir()
        assert traces(walk.folder / part) == []


def test_planted_identifiers_reach_no_model_and_no_internal_report(walk: Walk) -> None:
    assert traces(walk.folder / "run" / "model") == []
    assert ("audit" in walk.codes) == (walk.folder / "report" / "internal" / "audit.pdf").is_file()
    assert traces(walk.folder / "report") == []
    assert not any(secret in (walk.folder / "run" / "privacy.json").read_text(encoding="utf-8") for secret in SECRETS)


def test_planted_identifiers_are_never_said(walk: Walk) -> None:
    # The plan and the ledger were given a path that holds one; a command may repeat what was typed only where it says
    # where its own output is.
    said = [line for line in walk.said.splitlines() if not line.startswith(("cohort: ", "next: "))]
    assert [line for line in said if any(secret.lower() in line.lower() for secret in SECRETS)] == []


def test_planted_identifiers_reach_no_tracking_store(walk: Walk) -> None:
    assert (walk.folder / "mlflow.db").is_file()
    store = [path for path in walk.folder.iterdir() if path.name.startswith(("mlflow", "mlartifacts", "mlruns"))]
    for path in store:
        if path.is_dir():
            assert traces(path) == []
        else:
            blob = path.read_bytes().lower()
            assert [secret for secret in SECRETS if secret.lower().encode() in blob] == []


def test_nothing_else_was_written(walk: Walk) -> None:
    assert {p.name for p in walk.folder.iterdir()} <= {
        "tiny.yaml", "run", "report", "release", "mlflow.db", "mlartifacts",
    }  # fmt: skip


def test_the_search_can_find(tmp_path: Path) -> None:
    import numpy as np

    (tmp_path / "a.txt").write_text(NAME.lower(), encoding="utf-16-le")
    (tmp_path / "b.gz").write_bytes(gzip.compress(NUMBER.encode()))
    np.savez_compressed(tmp_path / "c.npz", remark=np.array([FREE.encode()]))
    (tmp_path / "d.pdf").write_bytes(b"%PDF-1.7\nstream\n" + zlib.compress(UID.encode()) + b"\nendstream")
    (tmp_path / f"{NAME}.png").touch()
    assert len(traces(tmp_path)) == 5


def test_the_hospital_does_hold_the_identifiers(tmp_path: Path) -> None:
    _hospital(tmp_path)
    found = " ".join(traces(tmp_path))
    assert all(f"{secret} in " in found for secret in SECRETS)
