"""Walks of real scans through the vault, small enough to run each time."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from vault_sources import write_table

from medvae.vault.store import CohortStore
from medvae.vault.table import read_table

Data = Callable[[str], Path]


def test_hippocampus_by_person(tmp_path: Path, test_data: Data, run: Any) -> None:
    """A tenth of the volumes: two of one person are one patient; labels 1 and 2 keep their share of the volume."""
    source = test_data("msd_hippocampus")
    table = read_table(source / "volumes.csv")
    rows = [dict(zip(table.columns, r, strict=True)) for r in table.rows][:24]
    for sub in ("images", "labels"):
        (tmp_path / "in" / sub).mkdir(parents=True)
        for row in rows:
            name = f"{row['volume_id']}.nii.gz"
            (tmp_path / "in" / sub / name).symlink_to(source / sub / name)
    write_table(tmp_path / "in" / "volumes.csv", rows)
    store: CohortStore = run(
        tmp_path / "in", shape=(32, 48, 32), spacing_mm=(1.0, 1.0, 1.0), conditions=("size_class",), modality="MR"
    )
    assert store.info["patients"] == len({r["person_id"] for r in rows})
    assert store.info["images"] == 24
    assert store.space.mask_labels == (1, 2)
    assert store.space.spacing_mm == (1.0, 1.0, 1.0)
    x = store.load(np.arange(24)).x
    volumes = sorted(float(r["vol_total"]) for r in rows)
    kept = np.sort(x[:, 1:].sum(axis=(1, 2, 3, 4)))
    # 1 mm voxels: the mask's voxel count is the published volume but for what the crop cuts off.
    assert np.median(kept / volumes) > 0.97
    assert (kept <= np.asarray(volumes) + 1).all()


def test_ct_slices_by_patient(tmp_path: Path, test_data: Data, run: Any) -> None:
    source = test_data("ct_tcga_luad")
    with tarfile.open(source / "slices.tar.xz") as archive:
        archive.extractall(tmp_path / "in", filter="data")
    config = {"shape": (32, 32), "conditions": ("age", "contrast")}
    by_table = run(tmp_path / "in", labels=source / "labels.csv", **config)
    by_tag = run(tmp_path / "in", **config)
    for store in (by_table, by_tag):
        assert store.info["patients"] == 36
        assert store.info["images"] + sum(s["count"] for s in store.info["skipped"]) == 62
        assert store.space.modality == "CT"
        assert (store.space.intensity.low, store.space.intensity.high) == (-1000.0, 1000.0)
    np.testing.assert_allclose(by_table.condition[:, 0], by_tag.condition[:, 0])
    images = by_table.load(np.arange(len(by_table))).x[:, 0]
    # A body in air, upright and centred, whatever the way the patient lay: dark corners, a bright middle.
    assert images[:, :2, :2].mean() < 0.1
    assert images[:, 12:20, 12:20].mean() > 0.2


def test_hippocampus_crops_as_dicom(test_data: Data, run: Any) -> None:
    store = run(test_data("btp_hcrop_dicom"), shape=(20, 28, 20), spacing_mm=(2.0,))
    assert (store.info["layout"], store.info["patients"], store.space.modality) == ("dicom", 3, "MR")
    assert store.space.spacing_mm == (2.0, 2.0, 2.0)


def test_pneumonia_keeps_the_published_split(test_data: Data, run: Any) -> None:
    source = test_data("pneumoniamnist") / "pneumoniamnist_trainval.npz"
    store = run(source.parent)
    assert store.info["split"] == {"train": 4708, "holdout": 524}
    assert store.info["conditions"] == {"label": {"kind": "class", "classes": ["0", "1"]}}
    with np.load(source) as archive:
        rows = store.rows(store.patients("holdout"))
        batch = store.load(rows)
        ours = np.sort(np.rint(batch.x[:, 0] * 255).astype(np.uint8).reshape(524, -1).sum(axis=1, dtype=np.int64))
        theirs = np.sort(archive["val_images"].reshape(524, -1).sum(axis=1, dtype=np.int64))
        np.testing.assert_array_equal(ours, theirs)
        assert batch.condition.sum(axis=0).tolist() == [135, 389]


def test_adrenal_masks_as_volumes(tmp_path: Path, test_data: Data, run: Any) -> None:
    """64 cubed binary volumes, a part of them: read as a stream, and still binary at their own size."""
    path = test_data("adrenalmnist3d_64") / "adrenalmnist3d_64_trainval.npz"
    with np.load(path) as archive:
        part = {k: archive[k][:12] for k in ("val_images", "val_labels")}
    np.savez_compressed(tmp_path / "a.npz", images=part["val_images"], labels=part["val_labels"] * 0)
    own = run(tmp_path / "a.npz")
    assert own.space.spatial_shape == (64, 64, 64)
    assert set(np.unique(own.load([0]).x)) == {0.0, 1.0}
    small = run(tmp_path / "a.npz", shape=(16, 16, 16))
    x = small.load(np.arange(12)).x
    np.testing.assert_allclose(x.mean(), own.load(np.arange(12)).x.mean(), rtol=1e-3)
