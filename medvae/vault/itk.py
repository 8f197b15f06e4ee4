"""NRRD and MetaImage volumes through SimpleITK, an optional part (extra `itk`)."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.errors import MissingPart
from medvae.vault.nifti import LUMINANCE
from medvae.vault.scan import Rules, Unusable, Volume

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
HEADER = 2**16  # bytes within which a text header ends
DATA_FILE = re.compile(rb"^\s*(?:data file|datafile|ElementDataFile)\s*[:=]+\s*(.*?)\s*$", re.MULTILINE | re.IGNORECASE)


def simple_itk() -> Any:
    """Return the library. Raises MissingPart where it is not installed."""
    try:
        import SimpleITK
    except ImportError:
        raise MissingPart("NRRD and MetaImage need SimpleITK: pip install 'medvae-dp[itk]'") from None
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # type: ignore[no-untyped-call]
    return SimpleITK


def read_itk(path: Path, mask: Path | None, frame: int | None = None, rules: Rules = Rules()) -> Volume:  # noqa: B008
    """Read one image, (X, Y, Z) with its RAS affine, and its mask; arguments and verdicts as `read_nifti`'s."""
    array, affine = _load(path, frame, rules)
    if mask is None:
        return Volume(array, affine)
    labels, mask_affine = _load(mask, None, Rules(max_voxels=rules.max_voxels))
    return Volume(array, affine, labels, mask_affine)


def count_frames(path: Path) -> int:
    """Return how many volumes a file holds by its header; 1 where it cannot be read."""
    try:
        return math.prod(_reader(path).GetSize()[3:])
    except Unusable:
        return 1


def _reader(path: Path) -> Any:
    sitk = simple_itk()
    _check_inside(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        raise Unusable("unreadable file") from None
    return reader


def _check_inside(path: Path) -> None:
    """Refuse a header that names pixels in another folder, or several files by a pattern."""
    with path.open("rb") as stream:
        text = stream.read(HEADER).split(b"\n\n")[0]
    for named in DATA_FILE.findall(text):
        name = named.decode("latin-1").strip()
        if name.upper() == "LOCAL":
            continue
        target = path.parent / name
        plain = name and not any(c in name for c in "/\\%") and name.upper().split()[0] not in ("LIST", "SKIPLIST")
        if not plain or target.is_symlink() or not target.is_file():
            raise Unusable("data outside its own folder")


def _load(path: Path, frame: int | None, rules: Rules) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    from medvae.vault.nifti import frame_by_rule

    sitk = simple_itk()
    reader = _reader(path)
    size, channels = tuple(reader.GetSize()), reader.GetNumberOfComponents()
    if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()):
        raise Unusable("complex numbers")
    if channels > 1 and (rules.colour == "refuse" or channels not in (3, 4)):
        raise Unusable("colour")
    if min(size) < 1 or math.prod(size[:3]) * max(channels, 1) > 4 * rules.max_voxels or len(size) > 4:
        raise Unusable("header claims an absurd size")
    if math.prod(size[:3]) > rules.max_voxels:
        raise Unusable("header claims an absurd size")
    wanted = frame_by_rule(size, frame, rules)
    try:
        if len(size) < 4:
            image = reader.Execute()
            array = sitk.GetArrayFromImage(image)
        else:
            volumes = [_volume(sitk, reader, size, i) for i in (range(size[3]) if wanted < 0 else [wanted])]
            array = np.mean(volumes, axis=0) if wanted < 0 else volumes[0]
    except RuntimeError:
        raise Unusable("truncated file") from None
    if channels > 1:
        array = array[..., :3] @ LUMINANCE
    axes = tuple(reversed(range(array.ndim)))
    values = np.ascontiguousarray(array.transpose(axes), dtype=np.float32)
    return values if values.ndim == 3 else values[..., None], _affine(reader, len(size))


def _volume(sitk: Any, reader: Any, size: tuple[int, ...], index: int) -> npt.NDArray[Any]:
    reader.SetExtractIndex([0, 0, 0, index])
    reader.SetExtractSize([*size[:3], 0])
    return np.asarray(sitk.GetArrayFromImage(reader.Execute()))


def _affine(reader: Any, dims: int) -> npt.NDArray[np.float64]:
    """Return the affine from (X, Y, Z) to RAS mm; a 2D image lies in the plane z = 0."""
    direction = np.eye(3)
    whole = np.asarray(reader.GetDirection(), dtype=np.float64).reshape(dims, dims)
    n = min(dims, 3)
    direction[:n, :n] = whole[:n, :n]
    spacing, origin = np.ones(3), np.zeros(3)
    spacing[:n], origin[:n] = reader.GetSpacing()[:n], reader.GetOrigin()[:n]
    affine = np.eye(4)
    affine[:3, :3] = direction * spacing
    affine[:3, 3] = origin
    return LPS_TO_RAS @ affine
