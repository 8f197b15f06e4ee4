"""The short way to plain pixels holds to the whole way, bit by bit, and leaves to it all that is not plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vault_sources import noise, write_slice

from medvae.vault.dicom_header import Frame, read_header
from medvae.vault.dicom_pixels import read_frames
from medvae.vault.dicom_plain import read_plain
from medvae.vault.scan import Rules, Unusable, quiet

TAKE = Rules(colour="luminance", frames="all")


def short_way(path: Path) -> np.ndarray | None:
    frame = read_header(path, TAKE).frames[0]
    if frame.plain is None:
        return None
    return read_plain(frame.file, frame.offset, frame.rows, frame.columns, frame.plain)


def test_both_ways_agree_on_every_plain_file_of_the_collection(test_data: Any) -> None:
    plain = 0
    with quiet():
        for path in sorted(p for p in test_data("dicom_variety").rglob("*") if p.is_file()):
            try:
                image = short_way(path)
            except Unusable:
                continue
            if image is None:
                continue
            plain += 1
            (whole,) = read_frames(path, None, TAKE)
            assert image.dtype == whole.dtype == np.float32
            np.testing.assert_array_equal(image, whole, err_msg=path.name)
    assert plain >= 10


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_both_ways_agree_on_any_header(tmp_path: Path, data: st.DataObject) -> None:
    """Bits stored below allocated with junk or overlays above them, signed or not, padding, any rescale."""
    bits = data.draw(st.sampled_from([8, 16]), "allocated")
    stored = data.draw(st.integers(1, bits), "stored")
    signed = data.draw(st.booleans(), "signed")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    words = rng.integers(0, 2**bits, (5, 4)).astype(f"u{bits // 8}")  # all bits are set: junk above those stored
    tags: dict[str, Any] = {"BitsAllocated": bits, "BitsStored": stored, "HighBit": stored - 1}
    slope = data.draw(st.sampled_from([None, "1", "2", "0.5", "-1.25", "1e-7", "nan"]), "slope")
    intercept = data.draw(st.sampled_from([None, "0", "-1024", "0.5", "1e30", "inf"]), "intercept")
    if slope is not None:
        tags["RescaleSlope"] = slope
    if intercept is not None:
        tags["RescaleIntercept"] = intercept
    padding = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=2), "padding")
    words[0, 0] = padding[0] if padding else 0
    path = tmp_path / "a.dcm"
    with quiet(), np.errstate(all="ignore"):
        write_slice(path, words.view(f"i{bits // 8}") if signed else words, **tags)
        ds = pydicom.dcmread(path)
        for tag, value in zip((0x00280120, 0x00280121), padding, strict=False):
            ds.add_new(tag, "US", value)  # unsigned beside signed pixels, too, as some scanners do
        ds.save_as(path)
        image = short_way(path)
        usual = slope != "nan" and intercept != "inf"
        assert (image is not None) == usual
        if image is None:
            return
        (whole,) = read_frames(path, None, TAKE)
    np.testing.assert_array_equal(image, whole)


@pytest.mark.parametrize(
    "tags",
    [
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"Modality": "PT", "Units": "GML"},
        {"BitsStored": 10, "HighBit": 15},
        {"RescaleSlope": ["1", "2"]},
        {"PixelPaddingValue": [1, 2]},
    ],
)
def test_what_is_not_plain_takes_the_whole_way(tmp_path: Path, tags: dict[str, Any]) -> None:
    with quiet():
        write_slice(tmp_path / "a.dcm", noise((6, 7), 0, "u2"), **tags)
        assert read_header(tmp_path / "a.dcm").frames[0].plain is None
    write_slice(tmp_path / "b.dcm", noise((6, 7), 0, "u2"))
    assert read_header(tmp_path / "b.dcm", Rules(display=True)).frames[0].plain is None
    assert read_header(tmp_path / "b.dcm").frames[0].plain is not None


def test_a_file_that_ends_early_is_no_image_by_either_way(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    write_slice(path, noise((6, 7), 0, "u2"))
    frame: Frame = read_header(path).frames[0]
    assert frame.plain is not None
    path.write_bytes(path.read_bytes()[:-1])
    assert read_plain(frame.file, frame.offset, frame.rows, frame.columns, frame.plain) is None
    with pytest.raises(Unusable, match="truncated"):
        read_frames(path, None)


def test_an_unreadable_value_that_nobody_asks_for_costs_nothing(tmp_path: Path) -> None:
    with quiet():
        write_slice(tmp_path / "a.dcm", noise((6, 7), 0, "u2"), PatientWeight="70")
        data = (tmp_path / "a.dcm").read_bytes()
        for name, tag in (("weight", b"\x10\x00\x30\x10"), ("rows", b"\x28\x00\x10\x00")):
            at = data.index(tag)
            (tmp_path / f"{name}.dcm").write_bytes(
                data[: at + 4] + b"IS" + data[at + 6 : at + 8] + b"\xffx" + data[at + 10 :]
            )
        assert read_header(tmp_path / "weight.dcm").patient == "P1"
        with pytest.raises(Unusable, match="header cannot be read"):
            read_header(tmp_path / "rows.dcm")


def test_a_file_of_another_encoding_than_it_says_takes_the_whole_way(tmp_path: Path) -> None:
    """Explicit elements under the name of implicit ones, found by fuzzing: the short way was two pixels off."""
    path, pixels = tmp_path / "a.dcm", noise((6, 7), 0, "u2")
    write_slice(path, pixels)
    data = path.read_bytes()
    assert data.count(b"1.2.840.10008.1.2.1\0") == 1
    path.write_bytes(data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0"))
    with quiet():
        assert short_way(path) is None
        np.testing.assert_array_equal(read_frames(path, None), [pixels])


def test_what_stands_behind_the_pixels_changes_nothing(tmp_path: Path) -> None:
    """A second data set in one file, found by fuzzing: header and pixels came from different ones."""
    path, pixels = tmp_path / "a.dcm", noise((6, 7), 0, "u2")
    write_slice(path, pixels, RescaleSlope="2", WindowCenter="1")
    write_slice(tmp_path / "b.dcm", noise((6, 7), 1, "u2"), RescaleSlope="3", PatientID="P2")
    other = (tmp_path / "b.dcm").read_bytes()
    path.write_bytes(path.read_bytes() + other[other.index(b"\x08\x00\x16\x00UI") :])
    header = read_header(path, TAKE)
    assert header.patient == "P1"
    with quiet():
        np.testing.assert_array_equal(read_frames(path, None), [pixels * 2.0])
        np.testing.assert_array_equal(short_way(path), pixels * 2.0)
