"""The embedded cohort: phantoms written as a hospital's DICOM tree, for `medvae demo` and for `train` without one."""

from __future__ import annotations

from pathlib import Path

from medvae.config import AuditConfig, DpSgdConfig, IngestConfig, Recipe, ReleaseConfig, TrainConfig, build
from medvae.types import Progress

PATIENTS = 240
SIZE = 48
STEPS = 30  # few, so that two cores end within minutes; the closed form carries most of it
EPSILON = 8.0
COUNT = 200


def write_scans(folder: Path, progress: Progress | None = None) -> Path:
    """Paint the phantoms and write them as a DICOM tree with a table; return the table's path."""
    from medvae.synth.phantom import make_phantom
    from medvae.synth.phantom_write import write_phantom

    write_phantom(make_phantom(2, PATIENTS, seed=0, size=SIZE), folder, "dicom", progress)
    return folder / "table.csv"


def ingest_config(labels: Path) -> IngestConfig:
    """How the phantoms are read: with the flags that a hospital would give. The age stands in the DICOM header."""
    conditions = ("lesion=absent|present", "age=20:90")
    config: IngestConfig = build(IngestConfig, shape=(SIZE, SIZE), labels=labels, conditions=conditions)
    return config


def train_config() -> TrainConfig:
    """The demo's training: `medvae train --dp-epsilon 8`, with few steps."""
    recipe = Recipe(name="demo", dpsgd=DpSgdConfig(enabled=True, steps=STEPS))
    config: TrainConfig = build(TrainConfig, dp_epsilon=EPSILON, recipe=recipe)
    return config


def audit_config() -> AuditConfig:
    """The demo's audit: the quick tier."""
    config: AuditConfig = build(AuditConfig, tier="quick", synthetic=300)
    return config


def release_config() -> ReleaseConfig:
    """The demo's release: DICOM, PNG and npz."""
    config: ReleaseConfig = build(
        ReleaseConfig, count=COUNT, formats=("npz", "png", "dicom"), title="Synthetic phantom images (medvae demo)"
    )
    return config
