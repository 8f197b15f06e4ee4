"""What is checked of a DICOM file before anything is decoded: no header decides how much memory is taken.

A file may be made to harm. Every size that a decoder would trust is compared with the config's bound first: what a
deflated data set inflates to, what the header claims, and what the compressed streams themselves claim.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medvae.vault.scan import Rules, Unusable

DEFLATED = b"1.2.840.10008.1.2.1.99"
META_AT_MOST = 2**16
META = 132  # bytes before the file meta information (PS3.10, 7.1)
PLAIN = (b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1", b"1.2.840.10008.1.2.2", DEFLATED)
CHUNK = 2**20
OTHER_BYTES = 2**26  # what a data set may hold beside its pixels
TILES_AT_MOST = 65535  # T.800, A.4.2
STANDALONE = {0x01, *range(0xD0, 0xD9)}  # JPEG markers without a length
FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15, and JPEG-LS's SOF55
WRONG_SIZE = "compressed image of another size than its header"


def check_dataset(path: Path, rules: Rules) -> None:
    """Raise Unusable for a deflated data set that would inflate beyond the largest scan."""
    with path.open("rb") as stream:
        start = stream.read(META_AT_MOST)
        syntax, at = _transfer_syntax(start)
        if syntax != DEFLATED:
            return
        stream.seek(at)
        inflate, left = zlib.decompressobj(-zlib.MAX_WBITS), 8 * rules.max_voxels + OTHER_BYTES
        while data := inflate.unconsumed_tail or stream.read(CHUNK):
            left -= len(inflate.decompress(data, CHUNK))
            if left < 0:
                raise Unusable("header claims an absurd size")
            if inflate.eof:
                return


def is_compressed(path: Path) -> bool:
    """Whether the pixels need a decoder library: any transfer syntax but the plain and the deflated ones (PS3.5, A)."""
    with path.open("rb") as stream:
        syntax, _ = _transfer_syntax(stream.read(META_AT_MOST))
    return bool(syntax) and syntax not in PLAIN


def _transfer_syntax(data: bytes) -> tuple[bytes, int]:
    """Return the transfer syntax and where the data set begins, by the explicit elements of group 2 (PS3.10, 7.1)."""
    syntax, at = b"", META
    while data[at : at + 2] == b"\x02\x00":
        long = data[at + 4 : at + 6] in (b"OB", b"UN", b"OW", b"SQ", b"UT")
        size = data[at + 8 : at + 12] if long else data[at + 6 : at + 8]
        value = at + (12 if long else 8)
        end = value + int.from_bytes(size, "little")
        if end > len(data):
            raise Unusable("truncated file" if len(data) < META_AT_MOST else "header cannot be read")
        if data[at + 2 : at + 4] == b"\x10\x00":
            syntax = data[value:end].rstrip(b"\0 ")
        at = end
    return syntax, at


def check_pixels(ds: Any, rules: Rules) -> None:
    """Compare the bytes that are there with what header and streams claim, before any allocation.

    Raises Unusable for missing or truncated pixels, absurd sizes, and compressed images of another size.
    """
    rows, columns, samples = int(ds.Rows), int(ds.Columns), int(ds.get("SamplesPerPixel") or 1)
    frames = int(ds.get("NumberOfFrames") or 1)
    if min(rows, columns, frames, samples) < 1 or rows * columns > rules.max_pixels or samples > 4:
        raise Unusable("header claims an absurd size")
    if rows * columns * frames > rules.max_voxels:
        raise Unusable("header claims an absurd size")
    if "PixelData" not in ds:
        name = "FloatPixelData" if "FloatPixelData" in ds else "DoubleFloatPixelData"
        if name not in ds:
            raise Unusable("no pixel data")
        if len(ds[name].value or b"") < rows * columns * frames * (4 if name[0] == "F" else 8):
            raise Unusable("truncated file")
        return
    if not ds.PixelData:
        raise Unusable("no pixel data")
    if not ds.file_meta.TransferSyntaxUID.is_encapsulated:
        bits = rows * columns * frames * samples * int(ds.BitsAllocated)
        if ds.get("PhotometricInterpretation") == "YBR_FULL_422":
            bits = bits * 2 // 3
        if len(ds.PixelData) < (bits + 7) // 8:
            raise Unusable("truncated file")
        return
    for stream in _streams(ds, frames):
        size = stream_size(stream)
        if size is not None and size != (rows, columns, samples):
            raise Unusable(WRONG_SIZE)


def _streams(ds: Any, frames: int) -> Iterator[bytes]:
    from pydicom.encaps import generate_frames

    offsets = None
    if "ExtendedOffsetTable" in ds and "ExtendedOffsetTableLengths" in ds:
        offsets = (ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths)
    yield from generate_frames(ds.PixelData, number_of_frames=frames, extended_offsets=offsets)


def stream_size(data: bytes) -> tuple[int, int, int] | None:
    """Return (rows, columns, samples) that a JPEG, JPEG-LS or JPEG 2000 stream claims; None for other bytes (RLE).

    ITU-T T.81 annex B, T.87 annex C, T.800 annex A. Raises Unusable for a stream that begins as one and claims nothing.
    """
    if data[:2] == b"\xff\xd8":
        return _jpeg_size(data)
    if data[4:8] == b"jP  ":
        data = _codestream(data)
    if data[:4] == b"\xff\x4f\xff\x51":
        return _jpeg2000_size(data)
    return None


def _jpeg_size(data: bytes) -> tuple[int, int, int]:
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF or marker in STANDALONE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in FRAME_HEADERS and at + 10 <= len(data):
            return (
                int.from_bytes(data[at + 5 : at + 7], "big"),
                int.from_bytes(data[at + 7 : at + 9], "big"),
                data[at + 9],
            )
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if length < 2:
            break
        at += 2 + length
    raise Unusable("undecodable pixel data")


def _codestream(data: bytes) -> bytes:
    """Return the contiguous codestream of a JP2 file; a box that does not go forward ends the search."""
    at = 0
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"jp2c":
            return data[at + 8 :]
        if length < 8:
            break
        at += length
    raise Unusable("undecodable pixel data")


def _jpeg2000_size(data: bytes) -> tuple[int, int, int]:
    if len(data) < 42:
        raise Unusable("undecodable pixel data")
    right, bottom, left, top = (int.from_bytes(data[at : at + 4], "big") for at in (8, 12, 16, 20))
    tile_right, tile_bottom = (int.from_bytes(data[at : at + 4], "big") for at in (24, 28))
    rows, columns = bottom - top, right - left
    if not tile_right or not tile_bottom or -(-rows // tile_bottom) * -(-columns // tile_right) > TILES_AT_MOST:
        raise Unusable("undecodable pixel data")
    return rows, columns, int.from_bytes(data[40:42], "big")
