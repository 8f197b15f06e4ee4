"""Files made to harm: no header decides about memory, no stream ends the process, any bytes give a verdict."""

from __future__ import annotations

import resource
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vault_sources import noise, write_slice

from medvae.vault import decoder
from medvae.vault.dicom_guard import stream_size
from medvae.vault.dicom_header import HEADER_TAGS, read_header
from medvae.vault.dicom_pixels import PIXEL_TAGS, read_frames, read_slice
from medvae.vault.discover import discover
from medvae.vault.scan import Rules, Unusable, quiet

ABSURD = "absurd size"
# A JPEG of 3 by 3 pixels at which GDCM 3.2.6 ends its process by an exception that nobody catches; found by fuzzing.
ABORTS = (
    "ffd8ffe000104a46494600010100000100010000ffdb0043000302020302020303030304030304050805050404050a070706080c0a0c0c0b"
    "0a0b0b0d0e12100d0e110e0b0b1016101113141515150c0f171816141812141514ffdb00430103040405040509050509140d0b0d14141414"
    "14141414141414141414141414141414141414141414141414141414141414141414141414141414141414141414ffc00011080003000303"
    "011100021101031101ffc40014000100000000000000000000000000000006ffc4001a100001050100000000000000000000000004000516"
    "521f110000030900000000000000000000000000020304111252549293d1d2ffda000c03010002110311003f0067096aa99a04769033d3a5"
    "892e01e79cd71b63ffd900"
)


def verdict(path: Path, **rules: Any) -> str:
    """Read header and pixels as ingest would; return the reason, or "" for a scan."""
    taken = Rules(colour="luminance", frames="all", **rules)
    try:
        with quiet():
            read_header(path, taken)
            read_frames(path, None, taken)
    except Unusable as verdict:
        return verdict.reason
    return ""


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize(
    "claim",
    [
        {"Rows": 60000, "Columns": 60000, "NumberOfFrames": 14},  # 100 GB at 16 bits
        {"Rows": 512, "Columns": 512, "NumberOfFrames": 200_000},
        {"Rows": 8, "Columns": 8, "NumberOfFrames": 2_000_000_000},
        {"Rows": 8, "Columns": 8, "NumberOfFrames": -3},
    ],
)
def test_a_header_that_claims_100_gb_is_refused_before_allocation(tmp_path: Path, claim: dict[str, int]) -> None:
    write_slice(tmp_path / "a.dcm", noise((8, 8), 0), **claim)
    before, start = peak_mb(), time.perf_counter()
    assert ABSURD in verdict(tmp_path / "a.dcm")
    with pytest.raises(Unusable):
        read_slice(tmp_path / "a.dcm")
    assert peak_mb() - before < 200
    assert time.perf_counter() - start < 20


def test_a_deflated_bomb_is_refused_while_it_inflates(tmp_path: Path) -> None:
    """Half a gigabyte of zeros in half a megabyte: pydicom alone would inflate all of it."""
    write_slice(tmp_path / "a.dcm", noise((8, 8), 0))
    whole = (tmp_path / "a.dcm").read_bytes()
    at = whole.index(b"1.2.840.10008.1.2.1\0")
    from pydicom.dataset import FileMetaDataset
    from pydicom.filewriter import write_file_meta_info
    from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, "1.2"
    assert at > 0
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    with (tmp_path / "b.dcm").open("wb") as stream:
        stream.write(b"\0" * 128 + b"DICM")
        write_file_meta_info(stream, meta)
        stream.write(squeeze.compress(struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 2**29)))
        for _ in range(2**9):
            stream.write(squeeze.compress(b"\0" * 2**20))
        stream.write(squeeze.flush())
    before = peak_mb()
    assert ABSURD in verdict(tmp_path / "b.dcm", max_voxels=2**20)
    assert peak_mb() - before < 200


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b"\xff\xd8\xff\xe0\0\4ab\xff\xc0\0\x11\x08\0\x07\0\x09\x03", (7, 9, 3)),
        (b"\xff\xd8\xff\xff\xf7\0\x0b\x08\0\x07\0\x09\x01" + b"\0" * 9, (7, 9, 1)),
        (b"\xff\x4f\xff\x51\0\x29\0\0" + struct.pack(">8I", 9, 7, 0, 0, 9, 7, 0, 0) + b"\0\1\7\1\1", (7, 9, 1)),
        (b"RLE bytes", None),
    ],
)
def test_the_size_that_a_stream_claims(data: bytes, size: Any) -> None:
    assert stream_size(data) == size


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff\xe0\0\0" + b"\0" * 50,  # a segment that does not go forward
        b"\xff\xd8" + b"\xff\xe0\0\4ab" * 5,
        b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\0free" * 4,  # a box of length 0, at which pydicom turns for ever
        b"\xff\x4f\xff\x51\0\x29\0\0" + struct.pack(">8I", 9, 7, 0, 0, 0, 0, 0, 0) + b"\0\1\7\1\1",
        b"\xff\x4f\xff\x51\0\x29\0\0" + struct.pack(">8I", 9000, 7000, 0, 0, 1, 1, 0, 0) + b"\0\1\7\1\1",
    ],
)
def test_streams_that_lead_nowhere(data: bytes) -> None:
    with pytest.raises(Unusable):
        stream_size(data)


def test_a_stream_larger_than_its_header_is_refused(tmp_path: Path, test_data: Any) -> None:
    """JPEG and JPEG 2000 whose own size is another than Rows and Columns: decoders would believe the stream."""
    folder = test_data("dicom_variety") / "pydicom"
    for name in ("JPEG2000.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_small_odd_jpeg.dcm"):
        data = bytearray((folder / name).read_bytes())
        at = data.index(b"\x28\0\x10\0US\2\0")  # Rows
        data[at + 8 : at + 10] = (int.from_bytes(data[at + 8 : at + 10], "little") // 2 or 1).to_bytes(2, "little")
        (tmp_path / name).write_bytes(data)
        assert verdict(tmp_path / name) == "compressed image of another size than its header"


def test_a_crash_of_a_decoder_costs_one_file(tmp_path: Path, test_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream at which a decoder library aborts its process (found by fuzzing); the next file is read as before."""
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit

    good = test_data("dicom_variety") / "pydicom" / "SC_rgb_small_odd_jpeg.dcm"
    ds = pydicom.dcmread(good)
    ds.PixelData = encapsulate([bytes.fromhex(ABORTS)])
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    ds.save_as(tmp_path / "bad.dcm")
    before = read_slice(good, Rules(colour="luminance"))
    assert verdict(tmp_path / "bad.dcm") in ("decoder crashed", "undecodable pixel data")
    np.testing.assert_array_equal(read_slice(good, Rules(colour="luminance")), before)
    decoder._DECODER._child.kill()  # as a crash would
    decoder._DECODER._child.wait()
    assert verdict(good) == "decoder crashed"
    np.testing.assert_array_equal(read_slice(good, Rules(colour="luminance")), before)
    monkeypatch.setattr(decoder, "SECONDS", 0.0)
    assert verdict(good) == "decoder crashed"  # too slow
    monkeypatch.undo()
    np.testing.assert_array_equal(read_slice(good, Rules(colour="luminance")), before)


def test_private_tags_are_never_asked_for(tmp_path: Path) -> None:
    """Neither list names a private tag, and what a file holds of them changes nothing that is read."""
    from pydicom.datadict import tag_for_keyword

    assert all((tag_for_keyword(name) >> 16) % 2 == 0 for name in (*HEADER_TAGS, *PIXEL_TAGS))
    write_slice(tmp_path / "a.dcm", noise((8, 8), 0), SOPInstanceUID="1.2", SeriesInstanceUID="1.3")
    plain = read_header(tmp_path / "a.dcm")
    ds = pydicom.dcmread(tmp_path / "a.dcm")
    ds.private_block(0x0011, "maker", create=True).add_new(1, "LO", "Xylophonius")
    ds.save_as(tmp_path / "a.dcm")
    assert read_header(tmp_path / "a.dcm") == plain


def test_truncation_of_real_files_at_many_lengths(tmp_path: Path, test_data: Any) -> None:
    folder = test_data("dicom_variety") / "pydicom"
    count = 0
    for name in ("MR_small_RLE.dcm", "image_dfl.dcm", "SC_rgb_rle_2frame.dcm", "CT_small.dcm", "MR_small.dcm"):
        data = (folder / name).read_bytes()
        for length in range(0, len(data), max(1, len(data) // 60)):
            (tmp_path / "a.dcm").write_bytes(data[:length])
            count += bool(verdict(tmp_path / "a.dcm"))
    assert count > 250


VALUES = st.one_of(
    st.integers(-(2**31), 2**31 - 1), st.text(max_size=12), st.floats(width=32), st.binary(max_size=16).map(list),
    st.none(), st.lists(st.floats(-1e9, 1e9), max_size=7),
)  # fmt: skip
TAGS = sorted({*HEADER_TAGS, *PIXEL_TAGS} - {"PixelData"})


@given(
    changes=st.dictionaries(st.sampled_from(TAGS), VALUES, max_size=5), gone=st.sets(st.sampled_from(TAGS), max_size=3)
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_values_in_any_tags_give_a_verdict(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], gone: set[str]
) -> None:
    """Data sets whose elements hold what they should not: whatever pydicom can write, we must be able to judge."""
    path = tmp_path_factory.getbasetemp() / "hypothesis.dcm"
    write_slice(path, noise((8, 8), 0))
    with quiet():
        ds = pydicom.dcmread(path)
        for name in gone & set(ds.dir()):
            delattr(ds, name)
        for name, value in changes.items():
            try:
                setattr(ds, name, value)
                ds.save_as(path)
            except Exception:
                if name in ds:
                    delattr(ds, name)
        try:
            ds.save_as(path)
        except Exception:
            return
    verdict(path, max_voxels=2**20)


def test_linked_folders_are_not_followed(tmp_path: Path) -> None:
    """Linked files are how versioned archives lie on disk, and count; a linked folder may lead anywhere, or around."""
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    write_slice(source / "a.dcm", noise((8, 8), 0))
    write_slice(elsewhere / "secret.dcm", noise((8, 8), 1))
    (source / "out").symlink_to(elsewhere)
    (source / "loop").symlink_to(source)
    (source / "linked.dcm").symlink_to(elsewhere / "secret.dcm")
    (source / "gone.dcm").symlink_to(elsewhere / "nothing.dcm")
    assert sorted(p.name for p in discover(source).files) == ["a.dcm", "linked.dcm"]
