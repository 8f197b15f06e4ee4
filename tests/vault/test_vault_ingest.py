"""Ingest as a whole: layouts, refusals in one sentence, nothing half-written, splits, leaks."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from vault_sources import noise, write_nifti_cohort, write_series, write_slice, write_table

from medvae.config import IngestConfig
from medvae.errors import CohortError, ConfigError, InputError
from medvae.vault import store as store_module
from medvae.vault.ingest import ingest
from medvae.vault.store import open_cohort

SMALL = {"shape": (8, 8, 8)}


def refused(source: Path, out: Path, **config: Any) -> str:
    """Ingest, expect one sentence and nothing left behind, and return the sentence."""
    with pytest.raises(InputError) as caught:
        ingest(source, out, IngestConfig(**{"holdout": 0.0, **config}))
    assert not out.exists()
    assert not list(out.parent.glob(".*partial*"))
    return str(caught.value)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


# Layouts


def test_nifti_cohort_with_masks(tmp_path: Path, run: Any) -> None:
    import jsonschema

    write_nifti_cohort(tmp_path / "in")
    steps: list[tuple[int, int]] = []
    config = IngestConfig(conditions=("group", "age"), shape=(8, 9, 7), holdout=0.0)
    info = ingest(tmp_path / "in", tmp_path / "out", config, lambda *s: steps.append(s))
    schema = Path(store_module.__file__).parents[1] / "schemas" / "cohort.schema.json"
    jsonschema.validate(info, json.loads(schema.read_text()))
    assert json.loads((tmp_path / "out" / "cohort.json").read_text()) == info
    assert (info["layout"], info["patients"], info["images"], info["masks"]) == ("nifti", 4, 8, True)
    assert info["space"]["mask_labels"] == [1, 2]
    assert steps[-1] == (8, 8)
    store = open_cohort(tmp_path / "out").reveal()
    batch = store.load(np.arange(8))
    assert batch.x.shape == (8, 3, 8, 9, 7)
    assert batch.condition.shape == (8, 3)
    assert batch.x[:, 1].sum() == 8 * 27
    assert batch.x[:, 2].sum() == 8 * 8
    assert (np.diff(batch.patient) >= 0).all()


def test_masks_walk_with_their_images(tmp_path: Path, run: Any) -> None:
    """Turned and resampled, the bright block of an image stays under its mask."""
    from scipy import ndimage

    rows = []
    for p, affine in enumerate(
        (np.diag([1.0, 1, 1, 1]), np.diag([-1.0, -1, 2, 1]), np.diag([1.0, -1, 1, 1])[[2, 0, 1, 3]])
    ):
        image = np.zeros((16, 14, 12), np.float32)
        image[3:9, 2:6, 4:10] = 100
        image[0, 0, 0] = 1
        save(tmp_path / "in" / "images" / f"v{p}.nii.gz", image, affine)
        save(tmp_path / "in" / "labels" / f"v{p}.nii.gz", (image > 50).astype(np.uint8), affine)
        rows.append({"file": f"v{p}", "patient_id": p})
    write_table(tmp_path / "in" / "t.csv", rows)
    for config in ({"shape": (8, 8, 8)}, {"shape": (16, 16, 16), "spacing_mm": (1.0,)}):
        x = run(tmp_path / "in", **config).load([0, 1, 2]).x
        for image, mask in x:
            # Nearest neighbour moves an edge by half a voxel at most, and with it the centre.
            centres = [np.array(ndimage.center_of_mass(c)) for c in (image, mask)]
            np.testing.assert_allclose(centres[0], centres[1], atol=0.51)
            assert image[mask > 0].mean() > 0.6
            assert image[mask == 0].mean() < 0.1


def test_bids(tmp_path: Path, run: Any) -> None:
    for p in ("01", "02"):
        for s in ("a", "b"):
            name = f"sub-{p}_ses-{s}"
            save(
                tmp_path / "in" / f"sub-{p}" / f"ses-{s}" / "anat" / f"{name}_T1w.nii.gz",
                noise((8, 8, 8), int(p), "f4"),
            )
            mask = np.zeros((8, 8, 8), np.uint8)
            mask[2:4] = 1
            save(tmp_path / "in" / "derivatives" / "m" / f"sub-{p}" / f"{name}_desc-x_dseg.nii.gz", mask)
    store = run(tmp_path / "in", **SMALL)  # patients are the sub- folders
    assert (store.info["layout"], store.info["patients"], store.info["images"]) == ("bids", 2, 4)
    assert store.space.modality == "MR"
    assert store.space.mask_labels == (1,)
    lines = ["participant_id\tsex", "sub-01\tF", "sub-02\tF", ""]
    (tmp_path / "in" / "participants.tsv").write_text("\n".join(lines))
    assert run(tmp_path / "in", conditions=("sex",), **SMALL).info["conditions"]["sex"]["classes"] == ["F"]


def test_nnunet(tmp_path: Path, run: Any) -> None:
    rows = []
    for p in range(3):
        for channel in (0, 1):
            save(tmp_path / "in" / "imagesTr" / f"case_{p:03d}_000{channel}.nii.gz", noise((8, 8, 8), p, "f4"))
        mask = np.zeros((8, 8, 8), np.uint8)
        mask[p : p + 2] = 1
        save(tmp_path / "in" / "labelsTr" / f"case_{p:03d}.nii.gz", mask)
        save(tmp_path / "in" / "imagesTs" / f"case_{p + 9:03d}_0000.nii.gz", noise((8, 8, 8), p, "f4"))
        rows.append({"case": f"case_{p:03d}", "patient": p})
    (tmp_path / "in" / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT", "1": "PET"}}))
    write_table(tmp_path / "t.csv", rows)
    store = run(tmp_path / "in", labels=tmp_path / "t.csv", **SMALL)
    assert (store.info["layout"], store.info["images"], store.space.modality) == ("nnunet", 3, "CT")
    assert store.space.intensity.mode == "window"
    assert {s["reason"]: s["count"] for s in store.info["skipped"]} == {
        "further channel": 3,
        "test image of the layout": 3,
    }


def test_npz_with_patients_masks_and_a_covariate(tmp_path: Path, run: Any) -> None:
    images = noise((12, 6, 5), 0, "u1")
    arrays = {
        "train_images": images[:8], "train_labels": np.arange(8)[:, None] % 2, "train_patients": np.arange(8) // 2,
        "train_masks": (images[:8] > 99).astype("u1"), "train_age": np.linspace(20, 90, 8),
        "val_images": images[8:], "val_labels": np.arange(4) % 2, "val_patients": 100 + np.arange(4),
        "val_masks": (images[8:] > 99).astype("u1"), "val_age": np.linspace(20, 90, 4),
    }  # fmt: skip
    np.savez_compressed(tmp_path / "c.npz", **arrays)
    store = run(tmp_path / "c.npz", conditions=("label", "age"))
    assert store.info["split"] == {"train": 4, "holdout": 4}
    assert "unit_note" not in store.info
    train = store.rows(store.patients("train"))
    x = store.load(train).x
    got = {
        (a.tobytes(), b.tobytes())
        for a, b in zip(np.rint(x[:, 0] * 255).astype("u1"), x[:, 1].astype("u1"), strict=True)
    }
    want = {(a.tobytes(), b.tobytes()) for a, b in zip(images[:8], (images[:8] > 99).astype("u1"), strict=True)}
    assert got == want


def test_npz_rows_are_patients_when_none_are_named(tmp_path: Path, run: Any) -> None:
    np.savez(tmp_path / "c.npz", images=noise((9, 6, 6), 0, "u1"), labels=np.arange(9) % 3)
    info = run(tmp_path / "c.npz").info
    assert info["patients"] == 9
    assert "row" in info["unit_note"]
    assert info["conditions"]["label"]["classes"] == ["0", "1", "2"]


@pytest.mark.parametrize("bits", [8, 16])
def test_pictures_with_masks(tmp_path: Path, run: Any, bits: int) -> None:
    from PIL import Image

    rows = []
    for p in range(3):
        picture = noise((10, 12), p, "u1" if bits == 8 else "u2")
        (tmp_path / "in" / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "masks").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "in" / "images" / f"{p}.png")
        Image.fromarray(((picture > 99) * 255).astype("u1")).save(tmp_path / "in" / "masks" / f"{p}.png")
        rows.append({"filename": f"images/{p}.png", "Patient ID": f"x{p}"})
    write_table(tmp_path / "in" / "t.csv", rows)
    store = run(tmp_path / "in", shape=(10, 12))
    assert store.space.mask_labels == (255,)
    assert store.space.intensity.mode == ("window" if bits == 8 else "percentile")
    if bits == 8:
        pictures = {noise((10, 12), p, "u1").tobytes() for p in range(3)}
        assert {np.rint(i * 255).astype("u1").tobytes() for i in store.load([0, 1, 2]).x[:, 0]} == pictures


# Refusals


def test_sources_that_are_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "does not exist" in refused(tmp_path / "nowhere", out)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty" in refused(empty, out)
    (empty / "notes.txt").write_text("x")
    (empty / "scan.xyz").write_text("x")
    assert "none of the 2 files" in refused(empty, out)
    (empty / "all.zip").write_bytes(b"PK")
    assert "unpack" in refused(empty, out)
    assert "unpack" in refused(empty / "all.zip", out)
    assert "not an image" in refused(empty / "notes.txt", out)
    for name in ("a.nii.gz", "b.dcm"):
        (empty / name).write_text("no image")
    assert "one kind of image" in refused(empty, out)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.dcm", "a.png", "a.npz"])
def test_a_text_named_like_an_image(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text("this is no image " * 50)
    write_table(tmp_path / "t.csv", [{"file": name, "patient_id": 1}])
    config = {} if name.endswith("npz") else {"labels": tmp_path / "t.csv"}
    assert ":" in refused(tmp_path / "in", tmp_path / "out", **config)


def test_output_folder_not_empty_is_left_alone(tmp_path: Path) -> None:
    write_nifti_cohort(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(CohortError, match="not empty"):
        ingest(tmp_path / "in", tmp_path / "out", IngestConfig())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_scan_is_never_taken_for_a_patient(tmp_path: Path) -> None:
    write_nifti_cohort(tmp_path / "in")
    (tmp_path / "in" / "table.csv").unlink()
    assert "patient_id" in refused(tmp_path / "in", tmp_path / "out", **SMALL)


TABLES: dict[str, tuple[Any, str]] = {
    "unknown scan": (lambda rows: [*rows, {**rows[0], "file": "vol_9_9"}], "1 of 9 rows"),
    "absent scan": (lambda rows: rows[:-2], "2 of 8 scans are not in the table"),
    "repeated row": (lambda rows: [*rows, rows[0]], "repeat"),
    "missing value": (lambda rows: [{**rows[0], "group": ""}, *rows[1:]], "1 of 8 scans have no value"),
    "missing patient": (lambda rows: [{**rows[0], "patient_id": "n/a"}, *rows[1:]], "without a patient id"),
    "class of one": (lambda rows: [{**rows[0], "group": "c"}, *rows[1:]], "held by one patient only"),
    "no group": (lambda rows: [{k: v for k, v in r.items() if k != "group"} for r in rows], "no scan has a value"),
    "no patient column": (lambda rows: [{k: v for k, v in r.items() if k != "patient_id"} for r in rows], "patient_id"),
    "torn split": (lambda rows: [{**r, "split": ("train", "test")[i % 2]} for i, r in enumerate(rows)], "both splits"),
    "odd split": (lambda rows: [{**r, "split": "fold1"} for r in rows], "split column"),
}


@pytest.mark.parametrize("fault", TABLES)
def test_faulty_tables(tmp_path: Path, fault: str) -> None:
    change, words = TABLES[fault]
    rows = write_nifti_cohort(tmp_path / "in")
    write_table(tmp_path / "in" / "table.csv", change(rows))
    message = refused(tmp_path / "in", tmp_path / "out", conditions=("group",), **SMALL)
    assert words in message
    assert "vol_" not in message
    assert "pat0" not in message


def test_missing_table_file(tmp_path: Path) -> None:
    write_nifti_cohort(tmp_path / "in")
    assert "cannot be read" in refused(tmp_path / "in", tmp_path / "out", labels=tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (("weight",), "LOW:HIGH"),
        (("age=9:3",), "LOW below HIGH"),
        (("group=a|x",), "none of the 2 declared classes"),
        (("group=",), "cannot be read"),
        (("group", "group"), "twice"),
        (("file",), "held by one patient only"),
    ],
)
def test_conditions_that_cannot_be(tmp_path: Path, specs: tuple[str, ...], words: str) -> None:
    rows = write_nifti_cohort(tmp_path / "in", patients=6)
    write_table(tmp_path / "in" / "table.csv", [{**r, "weight": 50.5 + i} for i, r in enumerate(rows)])
    assert words in refused(tmp_path / "in", tmp_path / "out", conditions=specs, **SMALL)


@pytest.mark.parametrize(("fault", "reason"), [("nan", "not finite"), ("inf", "not finite"), ("flat", "constant")])
def test_nan_and_constant_images(tmp_path: Path, run: Any, fault: str, reason: str) -> None:
    write_nifti_cohort(tmp_path / "in", masks=False)
    bad = noise((8, 9, 7), 0, "f4")
    bad[0, 0, 0] = {"nan": np.nan, "inf": np.inf, "flat": 0}[fault]
    save(tmp_path / "in" / "images" / "vol_0_0.nii.gz", bad * 0 if fault == "flat" else bad)
    assert run(tmp_path / "in", **SMALL).info["skipped"] == [{"reason": reason, "count": 1}]
    for path in (tmp_path / "in" / "images").iterdir():
        shutil.copy(tmp_path / "in" / "images" / "vol_0_0.nii.gz", path.with_name("x"))
        path.with_name("x").replace(path)
    assert f"{reason} in 8 of 8 cases" in refused(tmp_path / "in", tmp_path / "out", **SMALL)


@pytest.mark.parametrize(
    ("affine", "reason"),
    [
        (np.diag([0.0, 1, 1, 1]), "affine is singular or not finite"),
        (np.diag([np.nan, 1, 1, 1]), "affine is singular or not finite"),
        (np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "affine has shear"),
    ],
)
def test_bad_affines(tmp_path: Path, run: Any, affine: np.ndarray, reason: str) -> None:
    from medvae.vault.preprocess import Grid, Intensity, prepare
    from medvae.vault.scan import Unusable, Volume

    grid = Grid((8, 8, 8), None, Intensity("percentile", 1, 99))
    with pytest.raises(Unusable) as caught:
        prepare(Volume(noise((8, 9, 7), 0, "f4"), affine), grid)
    assert caught.value.reason == reason


def test_torn_and_bombastic_nifti(tmp_path: Path, run: Any) -> None:
    write_nifti_cohort(tmp_path / "in", masks=False)
    folder = tmp_path / "in" / "images"
    whole = (folder / "vol_0_0.nii.gz").read_bytes()
    (folder / "vol_0_0.nii.gz").write_bytes(whole[: len(whole) // 2])
    header = nibabel.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000))
    header.set_data_dtype(np.float32)
    (folder / "vol_1_0.nii.gz").unlink()
    (folder / "vol_1_0.nii").write_bytes(header.binaryblock + b"\0" * 100)
    counted = {s["reason"]: s["count"] for s in run(tmp_path / "in", **SMALL).info["skipped"]}
    assert counted == {"truncated file": 1, "header claims an absurd size": 1}


MASKS: dict[str, tuple[Any, str]] = {
    "shape": (lambda m: m[:-1], "resample the mask"),
    "fraction": (lambda m: m.astype("f4") * 0.5, "whole numbers"),
    "negative": (lambda m: m.astype("i2") - 5, "outside 0 to 255"),
    "rare label": (lambda m: np.where(np.arange(m.size).reshape(m.shape) == 0, 3, m).astype("u1"), "one patient only"),
    "many labels": (lambda m: (np.arange(m.size).reshape(m.shape) % 12).astype("u1"), "more than 8"),
}


@pytest.mark.parametrize("fault", MASKS)
def test_faulty_masks(tmp_path: Path, fault: str) -> None:
    change, words = MASKS[fault]
    write_nifti_cohort(tmp_path / "in")
    path = tmp_path / "in" / "labels" / "vol_0_0.nii.gz"
    save(path, change(np.asarray(nibabel.load(path).dataobj)))
    assert words in refused(tmp_path / "in", tmp_path / "out", **SMALL)


def test_mask_missing_or_elsewhere(tmp_path: Path) -> None:
    write_nifti_cohort(tmp_path / "in")
    path = tmp_path / "in" / "labels" / "vol_0_0.nii.gz"
    mask = np.asarray(nibabel.load(path).dataobj)
    save(path, mask, np.diag([-1.0, -1, 1, 1]))
    assert "elsewhere" in refused(tmp_path / "in", tmp_path / "out", **SMALL)
    path.unlink()
    assert "1 of 8 scans have no mask" in refused(tmp_path / "in", tmp_path / "out", **SMALL)


def test_npz_that_cannot_be(tmp_path: Path) -> None:
    out = tmp_path / "out"
    images = noise((6, 5, 5), 0, "u1")

    def message(**arrays: Any) -> str:
        np.savez(tmp_path / "c.npz", **arrays)
        return refused(tmp_path / "c.npz", out)

    assert "colour" in message(images=noise((6, 5, 5, 3), 0, "u1")) or "grayscale" in message(
        images=noise((6, 5, 5, 3), 0, "u1")
    )
    assert "no array named" in message(pixels=images)
    assert "plain numbers" in message(images=np.array([{}], dtype=object))
    assert "one a row" in message(images=images, labels=np.zeros(5))
    assert "one mask an image" in message(images=images, masks=images[:2])
    assert "one patient only" in message(images=images, labels=[0, 0, 0, 0, 0, 1])
    np.savez(tmp_path / "c.npz", images=images)
    (tmp_path / "c.npz").write_bytes((tmp_path / "c.npz").read_bytes()[:-40])
    assert "truncated" in refused(tmp_path / "c.npz", out)


def test_wrong_shape_and_spacing(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", images=noise((6, 5, 5), 0, "u1"))
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="2D"):
        ingest(tmp_path / "c.npz", out, IngestConfig(shape=(5, 5, 5)))
    with pytest.raises(ConfigError, match="voxel size"):
        ingest(tmp_path / "c.npz", out, IngestConfig(spacing_mm=(1.0, 1.0)))
    with pytest.raises(ConfigError, match="low below high"):
        ingest(tmp_path / "c.npz", out, IngestConfig(intensity_low=300.0))
    assert not out.exists()


def test_too_few_patients(tmp_path: Path) -> None:
    write_nifti_cohort(tmp_path / "in", patients=1)
    assert "needs 2 or more" in refused(tmp_path / "in", tmp_path / "out", **SMALL)


# Nothing half-written


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    write_nifti_cohort(tmp_path / "in")

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise error

    with pytest.raises(type(error)):
        ingest(tmp_path / "in", tmp_path / "out", IngestConfig(**SMALL), stop)
    assert {p.name for p in tmp_path.iterdir()} == {"in"}


# Patients, splits, identity


def test_split_is_the_same_again_and_independent_of_the_others(tmp_path: Path, run: Any) -> None:
    from medvae.vault.split import split_of

    rows = write_nifti_cohort(tmp_path / "in", patients=12, scans=1, masks=False)
    config = {"holdout": 0.4, "shape": (4, 4, 4)}
    one, two = run(tmp_path / "in", **config), run(tmp_path / "in", **config)
    np.testing.assert_array_equal(one.split, two.split)
    np.testing.assert_array_equal(one.patient, two.patient)
    np.testing.assert_array_equal(one.load([0, 1, 2]).x, two.load([0, 1, 2]).x)
    expected = sum(split_of(r["patient_id"], 0.4, 0) == "holdout" for r in rows)
    assert one.info["split"] == {"train": 12 - expected, "holdout": expected}
    shares = [split_of(f"person {i}", 0.3, 7) == "holdout" for i in range(4000)]
    assert abs(np.mean(shares) - 0.3) < 5 * np.sqrt(0.21 / 4000)


def test_two_scans_of_one_person_are_one_unit_in_one_split(tmp_path: Path, run: Any) -> None:
    write_nifti_cohort(tmp_path / "in", patients=8, scans=2, masks=False)
    store = run(tmp_path / "in", holdout=0.5, shape=(4, 4, 4))
    assert (store.info["patients"], store.info["images"]) == (8, 16)
    assert (np.bincount(store.patient) == 2).all()
    train, holdout = store.patients("train"), store.patients("holdout")
    assert not set(train) & set(holdout)
    assert len(store.rows(train)) == 2 * len(train)


def test_split_column_of_the_table(tmp_path: Path, run: Any) -> None:
    rows = write_nifti_cohort(tmp_path / "in", masks=False)
    named = [{**r, "split": "val" if r["patient_id"] == "pat1" else "train"} for r in rows]
    write_table(tmp_path / "in" / "table.csv", named)
    assert run(tmp_path / "in", holdout=0.9 - 1e-9, **SMALL).info["split"] == {"train": 3, "holdout": 1}


def test_identical_images_of_two_patients_are_noted(tmp_path: Path, run: Any) -> None:
    write_nifti_cohort(tmp_path / "in", masks=False)
    assert not any("identical" in n for n in run(tmp_path / "in", **SMALL).info["notes"])
    images = tmp_path / "in" / "images"
    shutil.copy(images / "vol_0_0.nii.gz", images / "vol_1_0.nii.gz")
    shutil.copy(images / "vol_2_0.nii.gz", images / "vol_2_1.nii.gz")
    assert any(n.startswith("1 images are identical") for n in run(tmp_path / "in", **SMALL).info["notes"])


# Leaks

PLANTED = ("Xylophonius", "MRN7734991", "19010203")


@pytest.mark.parametrize("layout", ["dicom", "nifti"])
def test_planted_identifiers_reach_no_byte_and_no_message(tmp_path: Path, layout: str, capfd: Any) -> None:
    name, number, date = PLANTED
    folder = tmp_path / "in" / name
    rows = []
    for p in range(4):
        patient = f"{number}-{p}"
        if layout == "dicom":
            write_series(
                folder / patient, noise((4, 8, 8), p), patient, PatientName=f"{name}^{p}", PatientBirthDate=date,
                StudyDescription=f"{name} {number}", InstitutionName=name, AccessionNumber=number, PatientAge="050Y",
            )  # fmt: skip
        else:
            image = nibabel.Nifti1Image(noise((8, 8, 8), p, "f4"), np.eye(4))
            image.header["descrip"] = f"{name} {number}".encode()
            image.header["db_name"] = date.encode()
            folder.mkdir(parents=True, exist_ok=True)
            nibabel.save(image, folder / f"{patient}.nii.gz")
        rows.append(
            {"file": f"{patient}.nii.gz", "patient_id": patient, "name": name, "born": date, "group": "ab"[p % 2]}
        )
    if layout == "dicom":
        rows = [{k: v for k, v in r.items() if k != "file"} for r in rows]
    write_table(tmp_path / f"{name}.csv", rows)
    config = {"labels": tmp_path / f"{name}.csv", "conditions": ("group",), "holdout": 0.0, **SMALL}
    ingest(tmp_path / "in", tmp_path / "out", IngestConfig(**config))
    written = list((tmp_path / "out").rglob("*"))
    assert len(written) >= 4
    blob = b"".join(p.name.encode() + p.read_bytes() for p in written)
    with np.load(tmp_path / "out" / "index.npz") as index:  # compressed or not, its arrays are numbers
        assert all(index[k].dtype.kind in "iuf" for k in index)
    messages = [
        refused(tmp_path / "in", tmp_path / f"bad{i}", **{**config, **fault})
        for i, fault in enumerate(
            (
                {"conditions": ("patient_id",)}, {"conditions": ("weight",)}, {"conditions": ("group=x|y",)},
                {"labels": tmp_path / f"{name}-none.csv"}, {"shape": (8, 8), "spacing_mm": (1.0, 1.0, 1.0)},
            )
        )
    ]  # fmt: skip
    write_table(tmp_path / f"{name}.csv", [*rows, dict.fromkeys(rows[0], f"{number}-9")])
    messages.append(refused(tmp_path / "in", tmp_path / "bad", **config))
    for path in folder.rglob("*.*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-70])
    write_table(tmp_path / f"{name}.csv", rows)
    messages.append(refused(tmp_path / "in", tmp_path / "bad", **config))
    out, err = capfd.readouterr()
    for planted in PLANTED:
        assert planted.encode() not in blob
        assert planted not in "".join(messages) + out + err
    assert len(set(messages)) == len(messages)


def test_mixed_modalities(tmp_path: Path, run: Any) -> None:
    for i in range(4):
        write_slice(tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), PatientID=str(i), Modality=("CT", "MR")[i % 2])
    assert "several modalities" in refused(tmp_path / "in", tmp_path / "out", shape=(8, 8))
    assert run(tmp_path / "in", shape=(8, 8), conditions=("modality",)).space.modality == "OT"


def test_declared_modality(tmp_path: Path, run: Any) -> None:
    write_nifti_cohort(tmp_path / "in", masks=False)
    store = run(tmp_path / "in", modality="CT", **SMALL)
    assert (store.space.modality, store.space.intensity.low) == ("CT", -1000.0)


@pytest.mark.parametrize(
    ("ids", "alike"),
    [
        (("MUELLER01", "mueller01", "Mueller 1", "P2"), 3),
        (("P3", "P-3", "P 3", "0042", "42"), 5),
        (("1-23", "12-3", "100", "10", "1", "P10", "P1"), 0),
    ],
)
def test_one_person_in_two_spellings_is_noted(tmp_path: Path, run: Any, ids: tuple[str, ...], alike: int) -> None:
    """Two for one cannot be told from two, so it is said, by count and without the ids."""
    from vault_sources import write_slice

    for i, patient in enumerate(ids):
        write_slice(tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), PatientID=patient)
    info = run(tmp_path / "in", shape=(8, 8)).info
    said = [n for n in info["notes"] if "separators or leading zeros" in n]
    assert [n.split(" patient ids")[0] for n in said] == ([f"{alike} of {len(ids)}"] if alike else [])
    assert info["patients"] == len(ids)
    assert not any(i in n for n in said for i in ids if len(i) > 2)
