"""From the stored values of a DICOM file to gray values in its own units, frame by frame.

The order is the standard's (PS3.3, C.7.6.3, C.11.1; PS3.4, N.2): stored value, modality LUT or rescale, and where asked
the value-of-interest LUT or window. Colour becomes luminance (ITU-R BT.601) where the config takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.types import FloatArray
from medvae.vault.decoder import ask
from medvae.vault.dicom_file import open_dataset
from medvae.vault.dicom_guard import check_pixels, is_compressed
from medvae.vault.dicom_plain import in_units, padded, padding_of, rescale, without_padding
from medvae.vault.dicom_suv import SUV_TAGS, suv_factor
from medvae.vault.scan import Rules, Unusable

PIXEL_TAGS = (
    "SOPClassUID", "Modality", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation",
    "PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter", "WindowWidth",
    "VOILUTFunction", "VOILUTSequence", "PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    "FloatPixelData", "DoubleFloatPixelData", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData", "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData", "SegmentedBluePaletteColorLookupTableData", *SUV_TAGS,
)  # fmt: skip
LUMINANCE = np.asarray([0.299, 0.587, 0.114])


def read_frames(path: Path, indices: Sequence[int] | None, rules: Rules = Rules()) -> list[FloatArray]:  # noqa: B008
    """Decode frames of one file, each (rows, columns) float32: all of them for None.

    In modality units, or in [0, 1] as the header's window shows them where `rules.display`. More is brighter:
    MONOCHROME1 is turned over. Padding is set to the least value beside it.

    Raises Unusable for what is missing, truncated, absurd, in colour where that is refused, or cannot be decoded.
    """
    if is_compressed(path):
        return ask("gray", path, indices, rules)
    return decode_gray(path, indices, rules)


def decode_gray(path: Path, indices: Sequence[int] | None, rules: Rules) -> list[FloatArray]:
    """Decode in this process; see `read_frames`."""
    ds, wanted, frames = _stored(path, indices, rules)
    try:
        factor = suv_factor(ds)
        return [_gray(ds, i, stored, factor, rules) for i, stored in zip(wanted, frames, strict=True)]
    except Unusable:
        raise
    except Exception:  # element values are parsed on access, with many kinds of error
        raise Unusable("undecodable pixel data") from None


def read_stored(path: Path, indices: Sequence[int], rules: Rules) -> list[FloatArray]:
    """Decode the stored values of frames, as segmentations need them. Raises Unusable as `read_frames` does."""
    return ask("stored", path, indices, rules) if is_compressed(path) else decode_stored(path, indices, rules)


def decode_stored(path: Path, indices: Sequence[int] | None, rules: Rules) -> list[FloatArray]:
    """Decode in this process; see `read_stored`."""
    return [frame.astype(np.float32) for frame in _stored(path, indices, rules)[2]]


def _stored(path: Path, indices: Sequence[int] | None, rules: Rules) -> tuple[Any, list[int], list[npt.NDArray[Any]]]:
    ds = open_dataset(path, PIXEL_TAGS, rules, pixels=True)
    try:
        check_pixels(ds, rules)
        count = int(ds.get("NumberOfFrames") or 1)
        wanted = list(range(count)) if indices is None else list(indices)
        return ds, wanted, _decode(ds, count, wanted)
    except Unusable:
        raise
    except EOFError:
        raise Unusable("truncated file") from None
    except Exception:  # decoders raise many kinds, all of them about this one file
        raise Unusable("undecodable pixel data") from None


def read_slice(path: Path, rules: Rules = Rules()) -> FloatArray:  # noqa: B008 - frozen
    """Decode the first frame of a file, (rows, columns); see `read_frames`."""
    return read_frames(path, [0], rules)[0]


def _decode(ds: Any, count: int, wanted: list[int]) -> list[npt.NDArray[Any]]:
    """Return stored values of the wanted frames, (rows, columns) or (rows, columns, 3) in RGB."""
    from pydicom.pixels import iter_pixels

    if "PixelData" in ds:
        ds.setdefault("PixelRepresentation", 0)
        if "BitsStored" not in ds:
            ds.BitsStored = ds.BitsAllocated
    frames = [ds.pixel_array] if count == 1 else list(iter_pixels(ds, indices=wanted))
    shape = (int(ds.Rows), int(ds.Columns))
    if any(f.shape[:2] != shape for f in frames):
        raise Unusable("undecodable pixel data")
    return frames


def _gray(ds: Any, index: int, stored: npt.NDArray[Any], factor: float | None, rules: Rules) -> FloatArray:
    if stored.ndim == 3 or ds.get("PhotometricInterpretation") == "PALETTE COLOR":
        return _luminance(ds, stored, rules)
    stored = _significant(ds, stored)
    where = padded(stored, padding_of(ds))
    inverse = ds.get("PhotometricInterpretation") == "MONOCHROME1" and stored.dtype.kind != "f" and factor is None
    if inverse and not rules.display:
        # The least stored value is shown white: turned over the range that BitsStored allows.
        top = -1 if int(ds.PixelRepresentation) else 2 ** int(ds.BitsStored) - 1
        stored = top - stored.astype(np.int64)
    groups = _groups(ds, index)
    values = _modality_units(ds, stored, groups)
    if factor is not None:
        values *= np.float32(factor)
    if rules.display:
        values = _display(ds, values, groups)
        values = 1 - values if inverse else values
    return without_padding(values, where)


def _luminance(ds: Any, stored: npt.NDArray[Any], rules: Rules) -> FloatArray:
    from pydicom.pixels import apply_color_lut

    if rules.colour == "refuse":
        raise Unusable("colour")
    if stored.ndim == 2:
        stored = apply_color_lut(stored, ds)
        top = 2.0 ** (8 * stored.dtype.itemsize) - 1
    else:
        top = 2.0 ** int(ds.BitsStored) - 1
    gray: FloatArray = (stored[..., :3] @ LUMINANCE).astype(np.float32)
    return np.clip(gray / np.float32(top), 0, 1) if rules.display else gray


def _significant(ds: Any, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Take the significant bits alone where they do not begin at the lowest (HighBit above BitsStored - 1)."""
    if stored.dtype.kind == "f" or "HighBit" not in ds:
        return stored
    shift = int(ds.HighBit) + 1 - int(ds.BitsStored)
    if shift <= 0 or ds.file_meta.TransferSyntaxUID.is_encapsulated:
        return stored
    # pydicom has shifted the wrong bits out: read the words anew.
    bits, size = int(ds.BitsStored), stored.dtype.itemsize
    order = "<" if ds.file_meta.TransferSyntaxUID.is_little_endian else ">"
    words = np.frombuffer(ds.PixelData, dtype=f"{order}u{size}", count=stored.size)
    values: npt.NDArray[Any] = (words.astype(np.int64).reshape(stored.shape) >> shift) & (2**bits - 1)
    if int(ds.PixelRepresentation):
        values = np.where(values >= 2 ** (bits - 1), values - 2**bits, values)
    return values


def _groups(ds: Any, index: int) -> tuple[Any, ...]:
    """Return the functional groups of a frame, its own before the shared; none for classic objects."""
    own, shared = ds.get("PerFrameFunctionalGroupsSequence"), ds.get("SharedFunctionalGroupsSequence")
    return (*([own[index]] if own else []), *([shared[0]] if shared else []))


def _macro(groups: tuple[Any, ...], name: str) -> Any:
    return next((g[name][0] for g in groups if g.get(name)), None)


def _modality_units(ds: Any, stored: npt.NDArray[Any], groups: tuple[Any, ...]) -> FloatArray:
    """Apply the modality LUT, or the frame's or the file's rescale slope and intercept."""
    table = ds.get("ModalityLUTSequence")
    if table:
        return _looked_up(table[0], stored, unit=False)
    group = _macro(groups, "PixelValueTransformationSequence") or ds
    return in_units(stored, *rescale(group))


def _looked_up(table: Any, values: npt.NDArray[Any], unit: bool) -> FloatArray:
    """Map through a lookup table (PS3.3, C.11.1.1); `unit` scales its output bits to [0, 1]."""
    entries, first, bits = (int(v) for v in table.LUTDescriptor)
    entries = entries or 2**16
    data = table.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, dtype="<u2" if len(data) >= 2 * entries else "u1")
    lut = np.atleast_1d(np.asarray(data, dtype=np.float32))[:entries]
    found: FloatArray = lut[np.clip(np.rint(values).astype(np.int64) - first, 0, len(lut) - 1)]
    return found / np.float32(2**bits - 1) if unit else found


def _display(ds: Any, values: FloatArray, groups: tuple[Any, ...]) -> FloatArray:
    """Return the values as the header's VOI LUT or first window shows them, in [0, 1] (PS3.3, C.11.2)."""
    table = ds.get("VOILUTSequence")
    if table:
        return np.clip(_looked_up(table[0], values, unit=True), 0, 1)
    voi = _macro(groups, "FrameVOILUTSequence") or ds
    centre, width = _first(voi.get("WindowCenter")), _first(voi.get("WindowWidth"))
    if centre is None or width is None or width <= 0:
        raise Unusable("no window in the header")
    function = str(voi.get("VOILUTFunction") or "LINEAR").strip().upper()
    if function == "SIGMOID":
        shown: FloatArray = (1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -80, 80)))).astype(np.float32)
        return shown
    if function == "LINEAR":  # LINEAR_EXACT has no half steps
        centre, width = centre - 0.5, max(width - 1, 1e-6)
    linear: FloatArray = np.clip((values - np.float32(centre)) / np.float32(width) + np.float32(0.5), 0, 1)
    return linear


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value)
