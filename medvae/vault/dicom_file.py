"""Opening a DICOM file for named tags, with or without its preamble, and with the transfer syntaxes of old archives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from medvae.vault.dicom_guard import check_dataset
from medvae.vault.scan import Rules, Unusable

BY_NAME = (".dcm", ".ima")  # taken for DICOM without the preamble that old exports lack
# Retired 12-bit JPEG processes, which a decoder of process 4 understands: pydicom knows no decoder by their names.
RETIRED = frozenset({"1.2.840.10008.1.2.4.52", "1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.54",
                     "1.2.840.10008.1.2.4.55"})  # fmt: skip
PIXELS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})  # as floats, as doubles, as integers


def open_dataset(
    path: Path, tags: Sequence[str], rules: Rules, pixels: bool = False, stream: BinaryIO | None = None
) -> Any:
    """Read the named elements of one file; all others are skipped unread. An open `stream` of it is left where it ends.

    The first pixel data end the reading: elements behind them that are named again (PS3.5 7.1 has none) cannot
    say otherwise to who reads pixels than to who reads the header alone.

    Raises Unusable for what is no DICOM file, truncated before its pixels, or would inflate without bound.
    """
    from pydicom import uid
    from pydicom.dataset import FileMetaDataset
    from pydicom.errors import InvalidDicomError
    from pydicom.filereader import read_partial

    try:
        check_dataset(path, rules)
        with nullcontext(stream) if stream is not None else path.open("rb") as opened:
            ds = read_partial(
                opened, _behind_pixels() if pixels else _at_pixels, specific_tags=list(_numbers(tuple(tags))),
                force=path.name.lower().endswith(BY_NAME),
            )  # fmt: skip
        bare = not ds.preamble
        if bare and not ds.get("SOPClassUID"):
            raise Unusable("not an image")
        if not hasattr(ds, "file_meta"):
            ds.file_meta = FileMetaDataset()
        syntax = ds.file_meta.get("TransferSyntaxUID")
        if not syntax:
            implicit, little = ds.original_encoding
            plain = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
            ds.file_meta.TransferSyntaxUID = plain if little else uid.ExplicitVRBigEndian
        elif syntax in RETIRED:
            ds.file_meta.TransferSyntaxUID = uid.JPEGExtended12Bit
    except Unusable:
        raise
    except InvalidDicomError:
        raise Unusable("not an image") from None
    except EOFError:
        raise Unusable("truncated file") from None
    except Exception:  # pydicom raises many kinds on foreign bytes, all of them about this one file
        raise Unusable("unreadable file") from None
    return ds


def _at_pixels(tag: int, vr: str | None, length: int) -> bool:
    return tag in PIXELS


def _behind_pixels() -> Callable[[int, str | None, int], bool]:
    found = False

    def stop(tag: int, vr: str | None, length: int) -> bool:
        nonlocal found
        before, found = found, found or tag in PIXELS
        return before

    return stop


@cache
def _numbers(names: tuple[str, ...]) -> list[Any]:
    """Return tags by keyword: looked up once, and not for every file."""
    from pydicom.tag import Tag

    return [Tag(name) for name in names]
