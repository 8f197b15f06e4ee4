"""The embedded cohort: phantoms written as a hospital's DICOM tree, for `medvae demo` and for `train` without one."""

from __future__ import annotations

from pathlib import Path

from medvae.config import AuditConfig, IngestConfig, ReleaseConfig, TrainConfig, build
from medvae.types import Progress

PATIENTS = 400
SHAPE = (32, 32)
EPSILON = 8.0
COUNT = 200


def write_scans(folder: Path, progress: Progress | None = None) -> Path:
    """Write the phantom cohort as a DICOM tree with a table; return the table's path."""
    from medvae.synth.phantom import write_phantom

    write_phantom(folder, layout="dicom", spatial_dims=2, patients=PATIENTS, seed=0, progress=progress)
    return folder / "labels.csv"


def ingest_config(labels: Path) -> IngestConfig:
    """How the demo's scans are read: the same flags a hospital would give."""
    config: IngestConfig = build(IngestConfig, shape=SHAPE, labels=labels, conditions=("lesion", "age=20:90"))
    return config


def train_config() -> TrainConfig:
    """The demo's training: `medvae train --dp-epsilon 8`."""
    config: TrainConfig = build(TrainConfig, dp_epsilon=EPSILON)
    return config


def audit_config() -> AuditConfig:
    """The demo's audit: the quick tier."""
    config: AuditConfig = build(AuditConfig, tier="quick")
    return config


def release_config() -> ReleaseConfig:
    """The demo's release: DICOM, PNG and npz."""
    config: ReleaseConfig = build(
        ReleaseConfig, count=COUNT, formats=("npz", "png", "dicom"), title="Synthetic phantom images (medvae demo)"
    )
    return config
