"""Phantoms walk the way of real scans: every layout goes through `ingest` and comes out as it was painted."""

from __future__ import annotations

import numpy as np
import pytest

from medvae.config import IngestConfig
from medvae.synth.phantom import make_phantom
from medvae.synth.phantom_write import write_phantom
from medvae.vault.ingest import ingest
from medvae.vault.store import open_cohort

LAYOUTS = [(2, "nifti"), (3, "nifti"), (2, "dicom"), (3, "dicom"), (2, "png"), (2, "npz"), (3, "npz")]


@pytest.mark.parametrize(("dims", "layout"), LAYOUTS)
def test_ingest_reads_phantoms(dims, layout, tmp_path):
    cohort = make_phantom(dims, 8, seed=0, size=32 if dims == 2 else 16)
    shape = cohort.images.shape[1:]
    write_phantom(cohort, tmp_path / "source", layout)
    config = IngestConfig(
        shape=shape,
        labels=tmp_path / "source" / "table.csv" if layout != "npz" else None,
        conditions=("lesion", "age=20:90"),
        holdout=0.25,
        intensity="window",
        intensity_low=0,
        intensity_high=255 if layout in ("png", "npz") else 4095,
    )
    info = ingest(tmp_path / "source", tmp_path / "cohort", config)
    assert (info["patients"], info["images"], info["skipped"]) == (8, len(cohort), [])
    assert info["masks"] is (layout != "dicom")
    assert info["space"]["modality"] == ("MR" if layout == "dicom" else "OT")
    store = open_cohort(tmp_path / "cohort").reveal()
    rows = np.sort(np.concatenate([store.rows(store.patients(s)) for s in ("train", "holdout")]))
    batch = store.load(rows)
    near = np.abs(batch.x[:, None, 0] - cohort.images[None]).reshape(len(rows), len(cohort), -1).max(axis=2)
    match = near.argmin(axis=1)
    assert sorted(match) == list(range(len(cohort)))
    assert near.min(axis=1).max() < 0.003
    np.testing.assert_array_equal(batch.condition[:, 1], cohort.lesion[cohort.patients[match]])
    ages = 20 + (batch.condition[:, 2] + 1) * 35
    assert np.abs(ages - cohort.age[cohort.patients[match]]).max() <= 0.51
    if layout != "dicom":
        np.testing.assert_array_equal(batch.x[:, 2], cohort.masks[match] == 2)
    assert len(np.unique(batch.patient)) == 8
