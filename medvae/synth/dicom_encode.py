"""Files of one DICOM series: what its objects share is encoded once, and not once a slice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydicom.dataset import FileDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import correct_ambiguous_vr_element, write_data_element, write_file_meta_info
from pydicom.valuerep import AMBIGUOUS_VR


def write_series(files: Mapping[Path, FileDataset]) -> None:
    """Write objects in explicit little endian, byte for byte as pydicom's `save_as(..., enforce_file_format=True)`.

    Elements that several objects hold are told by identity: `image_objects` hands the same ones to every slice.
    """
    holders = Counter(id(element) for dataset in files.values() for element in dataset.elements())
    encoded: dict[int, bytes] = {}
    for path, dataset in files.items():
        stream = _stream()
        stream.write(b"\0" * 128 + b"DICM")
        write_file_meta_info(stream, dataset.file_meta, enforce_standard=True)
        for element in sorted(dataset.elements(), key=lambda e: int(e.tag)):
            known = encoded.get(id(element)) or _encode(element, dataset)
            if holders[id(element)] > 1:
                encoded[id(element)] = known
            stream.write(known)
        path.write_bytes(stream.getvalue())


def _encode(element: Any, dataset: FileDataset) -> bytes:
    if element.VR in AMBIGUOUS_VR:
        element = correct_ambiguous_vr_element(element, dataset, True)
    stream = _stream()
    write_data_element(stream, element, dataset.get("SpecificCharacterSet"))
    return bytes(stream.getvalue())


def _stream() -> DicomBytesIO:
    stream = DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, False
    return stream
