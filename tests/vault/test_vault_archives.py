"""Archives and DICOMDIR: the same cohort as from a folder, and nothing outside it, nothing beyond the bound."""

from __future__ import annotations

import gzip
import io
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.fileset import FileSet
from vault_sources import noise, write_nifti_cohort, write_slice

from medvae.config import IngestConfig
from medvae.errors import CohortError
from medvae.vault import archives
from medvae.vault.archives import unpack
from medvae.vault.discover import discover
from medvae.vault.ingest import ingest
from medvae.vault.scan import Skipped

UNSAFE = "unsafe name or link in an archive"


def take(archive: Path, into: Path, most: int = 2**24) -> Skipped:
    skipped = Skipped()
    unpack(archive, into, most, skipped, archive.name)
    return skipped


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "bztar", "xztar"])
def test_an_archive_is_the_cohort_of_its_folder(tmp_path: Path, run: Any, kind: str) -> None:
    write_nifti_cohort(tmp_path / "in" / "study")
    plain = run(tmp_path / "in" / "study", shape=(8, 9, 7), conditions=("group",))
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), kind, tmp_path / "in", "study"))
    for source in (packed, tmp_path / "around"):
        if source.name == "around":
            source.mkdir()
            shutil.move(packed, source)
        store = run(source, shape=(8, 9, 7), conditions=("group",))
        np.testing.assert_array_equal(store.load(np.arange(8)).x, plain.load(np.arange(8)).x)
        np.testing.assert_array_equal(store.condition, plain.condition)
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name or "unpacked" in p.name]


def test_names_and_links_that_lead_elsewhere(tmp_path: Path) -> None:
    names = ("../out.dcm", "/abs.dcm", "a/../../b.dcm", "..\\win.dcm", "C:\\x.dcm", "a\0b/../../c", "good/x.dcm")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        for name in names:
            z.writestr(zipfile.ZipInfo(name), b"x")
        link = zipfile.ZipInfo("link.dcm")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        z.writestr(link, "/etc/passwd")
    skipped = take(tmp_path / "a.zip", tmp_path / "z" / "in")
    assert {p.name for p in (tmp_path / "z").iterdir()} == {"in"}
    assert "good/x.dcm" in files(tmp_path / "z" / "in")
    assert skipped[UNSAFE] >= 6
    with tarfile.open(tmp_path / "a.tar", "w") as t:
        for name in ("../out.dcm", "/abs.dcm", "good/x.dcm"):
            info = tarfile.TarInfo(name)
            info.size = 1
            t.addfile(info, io.BytesIO(b"x"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"odd{int(kind)}")
            info.type, info.linkname = kind, "/etc/passwd"
            t.addfile(info)
        folder = tarfile.TarInfo("sly")  # a link to a folder, and then a file through it
        folder.type, folder.linkname = tarfile.SYMTYPE, str(tmp_path)
        t.addfile(folder)
        info = tarfile.TarInfo("sly/through.dcm")
        info.size = 1
        t.addfile(info, io.BytesIO(b"x"))
    skipped = take(tmp_path / "a.tar", tmp_path / "t" / "in")
    assert {p.name for p in (tmp_path / "t").iterdir()} == {"in"}
    assert files(tmp_path / "t" / "in") == {"good/x.dcm", "sly/through.dcm"}
    assert skipped[UNSAFE] == 7
    assert not (tmp_path / "through.dcm").exists()
    assert not [p for p in (tmp_path / "t").rglob("*") if p.is_symlink()]


def test_bombs_are_refused_while_they_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("zeros.dcm", b"\0" * 2**24)
    with pytest.raises(CohortError, match="max_unpacked_gib"):
        take(tmp_path / "a.zip", tmp_path / "z", 2**20)
    assert sum(p.stat().st_size for p in (tmp_path / "z").rglob("*") if p.is_file()) <= 2**20 + archives.CHUNK
    monkeypatch.setattr(archives, "RATIO_FROM", 2**20)
    with pytest.raises(CohortError, match="times its size"):
        take(tmp_path / "a.zip", tmp_path / "y")
    monkeypatch.setattr(archives, "MAX_MEMBERS", 5)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as z:
        for i in range(9):
            z.writestr(f"{i}", b"")
    with pytest.raises(CohortError, match="more than 5 files"):
        take(tmp_path / "b.zip", tmp_path / "x")


def test_a_tar_header_that_claims_gigabytes(tmp_path: Path) -> None:
    """A compressed extended header of 4 GB costs no memory: tarfile alone would read all of it."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 2**32
    with gzip.open(tmp_path / "a.tar.gz", "wb") as stream:
        stream.write(info.tobuf())
        stream.write(b"\0" * 2**16)
    assert take(tmp_path / "a.tar.gz", tmp_path / "t") == {"unreadable archive": 1}


def test_archives_that_are_none(tmp_path: Path) -> None:
    for name, data in (("a.zip", b"PK\3\4rubbish"), ("b.tar.gz", b"\x1f\x8brubbish"), ("c.tar", b"x" * 2000)):
        (tmp_path / name).write_bytes(data)
        assert take(tmp_path / name, tmp_path / "t") == {"unreadable archive": 1}
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as z:
        z.writestr("inner.zip", b"PK")
    assert take(tmp_path / "d.zip", tmp_path / "u") == {"archive within an archive": 1}
    assert not files(tmp_path / "u")
    (tmp_path / "in").mkdir()
    shutil.move(tmp_path / "d.zip", tmp_path / "in" / "d.zip")
    with pytest.raises(CohortError, match="by hand"):
        ingest(tmp_path / "in", tmp_path / "out", IngestConfig())
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]


@pytest.mark.parametrize("kind", ["zip", "gztar", "xztar"])
def test_a_torn_archive_gives_what_was_whole(tmp_path: Path, kind: str) -> None:
    for i in range(5):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}.bin").write_bytes(np.random.default_rng(i).bytes(5000))
    packed = Path(shutil.make_archive(str(tmp_path / "p"), kind, tmp_path / "in"))
    whole = packed.read_bytes()
    for i, cut in enumerate(range(1, len(whole), 997)):
        packed.write_bytes(whole[:cut])
        skipped = take(packed, tmp_path / f"o{i}")
        assert sum(skipped.values()) == 1
        assert files(tmp_path / f"o{i}") <= files(tmp_path / "in")


def test_a_dicomdir_stays_in_its_folder(tmp_path: Path, run: Any) -> None:
    """The directory's own files are read, and what it names elsewhere, by dots or by links, is not."""
    fs = FileSet()
    for i in range(3):
        write_slice(
            tmp_path / "raw" / f"{i}.dcm", noise((8, 8), i), PatientID=str(i), PatientName="x",
            StudyInstanceUID=f"1.{i}", StudyDate="20200101", StudyTime="1", StudyID="1",
            SeriesNumber=1, InstanceNumber=1,
            AccessionNumber="",
        )  # fmt: skip
        fs.add(tmp_path / "raw" / f"{i}.dcm")
    fs.write(tmp_path / "disc")
    directory = tmp_path / "disc" / "DICOMDIR"
    info = run(directory, shape=(8, 8)).info
    assert (info["layout"], info["patients"]) == ("dicom", 3)
    import pydicom

    ds = pydicom.dcmread(directory)
    named = [r for r in ds.DirectoryRecordSequence if "ReferencedFileID" in r]
    named[0].ReferencedFileID = ["..", "raw", "0.dcm"]
    link = tmp_path / "disc" / "LINK"
    link.symlink_to(tmp_path / "raw" / "1.dcm")
    named[1].ReferencedFileID = ["LINK"]
    ds.save_as(directory)
    found = discover(directory)
    assert len(found.files) == 1
    assert found.skipped == {"data outside its own folder": 2}
    ds.file_meta = FileMetaDataset(ds.file_meta)
    directory.write_bytes(directory.read_bytes()[:400])
    with pytest.raises(CohortError, match="DICOMDIR cannot be read"):
        discover(directory)
