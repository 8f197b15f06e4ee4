"""Masks as DICOM Segmentation objects, made by highdicom and tied to the synthetic images by their fresh UIDs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from medvae.synth.dicom_objects import MAKER, MIDNIGHT, Origin, Subject, declare_synthetic
from medvae.synth.identifiers import fresh_uid
from medvae.version import __version__


def segmentation(
    sources: Sequence[Dataset],
    frames: npt.NDArray[np.uint8],
    labels: Sequence[int],
    subject: Subject,
    origin: Origin,
) -> Dataset:
    """Return one binary SEG over `sources`, with one segment a mask label, in the order of `labels`.

    frames: (F, rows, columns), aligned with the frames of the sources, of 0 and mask labels.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes

    algorithm = hd.AlgorithmIdentificationSequence(
        name=MAKER, version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    # The cohort names no anatomy: a segment is "tissue", told apart by its label.
    segments = [
        hd.seg.SegmentDescription(
            segment_number=i + 1,
            segment_label=f"label {label}",
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for i, label in enumerate(labels)
    ]
    numbers = np.zeros(256, dtype=np.uint8)
    numbers[list(labels)] = np.arange(1, len(labels) + 1)
    seg: Any = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=numbers[frames],
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=fresh_uid(),
        series_number=2,
        sop_instance_uid=fresh_uid(),
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name=MAKER,
        software_versions=__version__,
        device_serial_number="0",
        content_label="SYNTHETIC",
        content_description="Synthetic mask",
        # An empty mask is a fair answer of a generator, and a SEG without frames is not allowed.
        omit_empty_frames=bool(frames.any()),
    )
    declare_synthetic(seg, subject, origin)
    # highdicom writes the local clock and UIDs below its own root.
    seg.InstanceCreationDate = seg.ContentDate = origin.date
    seg.InstanceCreationTime = seg.ContentTime = MIDNIGHT
    organization = fresh_uid()
    for item in (*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization
    seg.BodyPartExamined = origin.body_part
    if "FrameOfReferenceUID" not in sources[0]:
        seg.PatientOrientation = ""
    return seg
