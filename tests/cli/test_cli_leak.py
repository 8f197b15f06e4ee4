"""Identifiers planted in tags, file names, folders and tables, then searched for in all that leaves or is said."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import random
import re
import sqlite3
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from medvae.cli_run import run

NAME = "ZWETSCHGE"  # in person names, folders and file names
NUMBER = "QX77310"  # in patient ids
FREE = "KLABAUTERMANN"  # in free text, table columns and private tags
UID = "1.2.826.0.1.3680043.8.498.77310"
SECRETS = (NAME, NUMBER, FREE, UID)
FILES = 44  # of the made hospital
RECIPE = "name: tiny\ndpsgd:\n  steps: 2\n  sample_rate: 0.5\n"


COUNT = 10_000
NEEDLE = re.compile(
    rb"zw[a-z]{8}|qx\d{9}|2\.25\.\d{20}|klab[0-9a-f]{8}|(?<![\d.])1[78]\d{6}(?![\d.])|(?<![\d.])1[78]\d\d-\d\d-\d\d(?!\d)"
)
"""The families of planted needles: names, numbers, UIDs, free text, and dates of centuries without tomography."""


@cache
def needles() -> tuple[str, ...]:
    """Return 10,000 identifiers that occur nowhere by chance."""
    rng = random.Random(77310)
    letters, digits, hexes = "abcdefghijklmnopqrstuvwxyz", "0123456789", "0123456789abcdef"
    families: tuple[tuple[str, str, int], ...] = (("ZW", letters, 8), ("QX", digits, 9), ("KLAB", hexes, 8))
    made: dict[str, None] = {}
    while len(made) < COUNT:
        for prefix, signs, length in families:
            made[prefix + "".join(rng.choices(signs, k=length))] = None
        made["2.25." + rng.choice(digits[1:]) + "".join(rng.choices(digits, k=19))] = None
        if len(made) % 3 == 0:
            made[f"{rng.randint(1700, 1899)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}"] = None
    return tuple(rng.sample(list(made)[:COUNT], COUNT))


def thumbnail(n: int) -> bytes:
    """Return the 64 x 64 icon that is planted into file n."""
    return random.Random(n).randbytes(4096)


def found_needles(blobs: Iterable[bytes]) -> set[str]:
    """Return which needles, and slices of which icons, stand in bytes, in 8 or 16 bit letters."""
    known = {needle.lower() for needle in needles()}
    icons = {thumbnail(n)[at : at + 24]: f"icon {n}" for n in range(FILES) for at in (0, 1000, 4000)}
    found: set[str] = set()
    for blob in blobs:
        for form in (blob.lower(), blob.lower().replace(b"\0", b"")):
            hits = {hit.decode().replace("-", "") for hit in NEEDLE.findall(form)}
            found |= hits & known
        found |= {name for piece, name in icons.items() if piece in blob}
    return found


def everything(folder: Path) -> Iterator[bytes]:
    """Yield names and bytes of all files below a folder (or of one file), with whatever is packed in them."""
    for path in [folder, *sorted(folder.rglob("*"))]:
        yield str(path.name).encode()
        if path.is_file():
            yield from texts(path.read_bytes())


@dataclass(frozen=True)
class Walk:
    """All that the commands wrote and said."""

    folder: Path
    codes: dict[str, int]
    said: str


def texts(blob: bytes, name: str = "") -> Iterator[bytes]:
    """Return the bytes of a file, and of whatever is packed in it: zip, gzip, deflated streams, base64, SQLite."""
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
    elif blob[:8] == b"\x89PNG\r\n\x1a\n":
        at = 8
        while at < len(blob):
            size, kind = int.from_bytes(blob[at : at + 4], "big"), blob[at + 4 : at + 8]
            if kind in (b"zTXt", b"iTXt", b"iCCP"):
                with suppress(zlib.error):
                    yield zlib.decompress(blob[at + 8 : at + 8 + size].split(b"\0", 1)[1].lstrip(b"\0\1"))
            at += size + 12
    elif blob[:15] == b"SQLite format 3":
        book = sqlite3.connect(":memory:")
        book.deserialize(blob)
        yield "\n".join(book.iterdump()).encode()
        book.close()
    elif b'"' in blob:  # text: JSON, HTML, SVG; a string of base64 may hold anything
        for packed in re.findall(rb"[A-Za-z0-9+/]{64,}={0,2}", blob):
            with suppress(ValueError):
                yield from texts(base64.b64decode(packed))


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
        _plant(data, block, n)
        target = scans / f"{NAME}_{n // 7}" / f"{NUMBER}_{n}.dcm"
        target.parent.mkdir(parents=True, exist_ok=True)
        data.save_as(target)
    table = folder / f"list_{NAME}.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["patient_id", "lesion", "remark", FREE.lower()])
        writer.writerows([f"{NUMBER}-{row['patient_id']}", row["lesion"], FREE, NAME] for row in rows)
    return table


def _plant(data: Any, block: Any, n: int) -> None:
    """Put this file's share of the needles into its tags, its private block and an icon."""
    from pydicom.dataset import Dataset

    mine = needles()[n::FILES]
    uids = [x for x in mine if x.startswith("2.25.")]
    dates = [x for x in mine if x.isdigit()]
    texts_ = [x for x in mine if not x[0].isdigit()]
    data.OtherPatientNames = [f"{x}^Anna" for x in texts_[0::2]]
    block.add_new(2, "LO", texts_[1::2])
    block.add_new(3, "UI", uids[1:])
    data.FrameOfReferenceUID = uids[0]
    data.StudyDate, data.PatientBirthDate, data.DateOfSecondaryCapture = dates[0], dates[1], dates[2:]
    icon = Dataset()
    icon.Rows = icon.Columns = 64
    icon.SamplesPerPixel, icon.PhotometricInterpretation = 1, "MONOCHROME2"
    icon.BitsAllocated = icon.BitsStored = 8
    icon.HighBit, icon.PixelRepresentation = 7, 0
    icon.PixelData = thumbnail(n)
    data.IconImageSequence = [icon]


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
            *(("--report", "report") if audited else ("--override", "no audit was made: a test of the shortest way")),
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


def test_none_of_ten_thousand_needles_leaves(walk: Walk) -> None:
    """Names, numbers, UIDs, dates, free text and thumbnails, in every byte: archives, PDF streams, databases too."""
    places = [walk.folder / "release", walk.folder / "report", walk.folder / "run" / "model"]
    places += [walk.folder / "run" / "privacy.json", walk.folder / "run" / "canary.json"]
    places += [path for path in walk.folder.iterdir() if path.name.startswith(("mlflow", "mlartifacts", "mlruns"))]
    searched = [place for place in places if place.exists()]
    assert len(searched) >= 5 + ("audit" in walk.codes)
    for place in searched:
        assert found_needles(everything(place)) == set(), place.name
    assert found_needles([walk.said.encode()]) == set()


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

    few = needles()[:8]
    packed = base64.b64encode(b"-" * 60 + few[0].encode()).decode()
    (tmp_path / "e.json").write_text(f'{{"image": "{packed}"}}', encoding="utf-8")
    book = sqlite3.connect(tmp_path / "f.db")
    book.execute("CREATE TABLE t (a TEXT)")
    book.execute("INSERT INTO t VALUES (?)", ["x" * 5000 + few[1]])  # over the edge of a page
    book.commit()
    book.close()
    (tmp_path / "g.gz").write_bytes(gzip.compress(few[2].encode("utf-16-le")))
    chunk = b"k\0\0" + zlib.compress(few[3].encode())
    png = b"\x89PNG\r\n\x1a\n" + len(chunk).to_bytes(4, "big") + b"zTXt" + chunk + b"\0\0\0\0"
    (tmp_path / "h.png").write_bytes(png)
    (tmp_path / f"{few[4]}.txt").touch()
    date = next(x for x in needles() if x.isdigit())
    (tmp_path / "i.txt").write_text(f"born {date[:4]}-{date[4:6]}-{date[6:]}", encoding="utf-8")
    (tmp_path / "j.bin").write_bytes(b"..." + thumbnail(3)[990:1100])
    wanted = {x.lower() for x in few[:5]} | {date, "icon 3"}
    assert found_needles(everything(tmp_path)) == wanted


def test_the_hospital_does_hold_the_identifiers(tmp_path: Path) -> None:
    _hospital(tmp_path)
    found = " ".join(traces(tmp_path))
    assert all(f"{secret} in " in found for secret in SECRETS)
    assert len(list(tmp_path.rglob(f"export_{NAME}/**/*.dcm"))) == FILES
    planted = found_needles(everything(tmp_path / f"export_{NAME}"))
    assert planted == {needle.lower() for needle in needles()} | {f"icon {n}" for n in range(FILES)}
    assert len(planted) == COUNT + FILES
