"""Phantoms: deterministic, separable by lesion, with an age that can be read off the image."""

from __future__ import annotations

import csv

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression, Ridge

from medvae.errors import ConfigError, RunError
from medvae.synth.phantom import AGE_RANGE, LESION, ORGAN, PhantomCohort, make_phantom
from medvae.synth.phantom_write import scan_names, write_phantom


@pytest.fixture(scope="module", params=[(2, 64), (2, 32), (3, 32)], ids=["2d64", "2d32", "3d32"])
def cohort(request: pytest.FixtureRequest) -> PhantomCohort:
    dims, size = request.param
    return make_phantom(dims, 160, seed=1, size=size)


def split(cohort: PhantomCohort) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of 8 cells a side, and the scans of the first and of the last patients."""
    side, dims = cohort.images.shape[1], cohort.spatial_dims
    shape = [len(cohort)]
    for _ in range(dims):
        shape += [8, side // 8]
    cells = cohort.images.reshape(shape).mean(axis=tuple(range(2, 2 * dims + 1, 2))).reshape(len(cohort), -1)
    train = cohort.patients < 110
    return cells, train, ~train


def test_shapes_ranges_and_labels(cohort):
    assert cohort.images.dtype == np.float32
    assert cohort.masks.dtype == np.uint8
    assert cohort.images.shape == cohort.masks.shape
    assert cohort.images.min() >= 0
    assert cohort.images.max() <= 1
    assert cohort.age.min() >= AGE_RANGE[0]
    assert cohort.age.max() <= AGE_RANGE[1]
    assert np.all(np.diff(cohort.patients) >= 0)
    assert set(np.bincount(cohort.patients)) == {1, 2, 3, 4}
    lesion = cohort.lesion[cohort.patients] == 1
    flat = cohort.masks.reshape(len(cohort), -1)
    assert np.array_equal((flat == LESION).any(axis=1), lesion)
    assert (flat == ORGAN).any(axis=1).all()
    assert 0.35 < cohort.lesion.mean() < 0.65


def test_a_simple_classifier_sees_the_lesion(cohort):
    cells, train, test = split(cohort)
    lesion = cohort.lesion[cohort.patients]
    model = LogisticRegression(C=10, max_iter=500).fit(cells[train], lesion[train])
    assert model.score(cells[test], lesion[test]) >= 0.95


def test_age_shows_in_the_ventricles(cohort):
    healthy = cohort.lesion[cohort.patients] == 0
    volume = (cohort.masks == ORGAN).reshape(len(cohort), -1).sum(axis=1)
    age = cohort.age[cohort.patients]
    assert np.corrcoef(volume[healthy], age[healthy])[0, 1] > 0.85


def test_age_can_be_regressed_from_pixels_alone(cohort):
    cells, train, test = split(cohort)
    age = cohort.age[cohort.patients]
    model = Ridge(alpha=1.0).fit(cells[train], age[train])
    assert model.score(cells[test], age[test]) > 0.4


def test_scans_of_a_patient_are_alike_and_not_the_same(cohort):
    flat = cohort.images.reshape(len(cohort), -1)
    first = np.flatnonzero(np.diff(cohort.patients) == 0)
    other = np.flatnonzero(np.diff(cohort.patients) == 1)
    within = np.abs(flat[first] - flat[first + 1]).mean(axis=1)
    between = np.abs(flat[other] - flat[other + 1]).mean(axis=1)
    assert within.min() > 0.005
    assert within.mean() < 0.75 * between.mean()


def test_same_seed_same_cohort_and_more_patients_change_none():
    few, again, more, other = (make_phantom(2, n, seed=s, size=32) for n, s in ((4, 7), (4, 7), (6, 7), (4, 8)))
    np.testing.assert_array_equal(few.images, again.images)
    np.testing.assert_array_equal(few.images, more.images[: len(few)])
    assert not np.array_equal(few.age, other.age)


@pytest.mark.parametrize(
    "bad", [{"spatial_dims": 4}, {"patients": 0}, {"size": 8}, {"scans": (0, 2)}, {"scans": (3, 2)}]
)
def test_bad_arguments_get_one_sentence(bad):
    with pytest.raises(ConfigError):
        make_phantom(**{"spatial_dims": 2, "patients": 2, "seed": 0, **bad})


def rows(path):
    with (path / "table.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("dims", [2, 3])
def test_nifti_source(dims, tmp_path):
    cohort = make_phantom(dims, 3, seed=0, size=16)
    write_phantom(cohort, tmp_path / "source")
    table = rows(tmp_path / "source")
    assert [r["scan"] for r in table] == scan_names(cohort)
    for i, row in enumerate(table):
        p = cohort.patients[i]
        assert row["patient_id"] == cohort.patient_ids[p]
        assert row["lesion"] == ("absent", "present")[cohort.lesion[p]]
        assert float(row["age"]) == pytest.approx(cohort.age[p], abs=0.051)
        image = nib.load(tmp_path / "source" / "images" / f"{row['scan']}.nii.gz").get_fdata()
        mask = nib.load(tmp_path / "source" / "labels" / f"{row['scan']}.nii.gz").get_fdata()
        assert np.abs(image.reshape(cohort.images[i].shape) / 4095 - cohort.images[i]).max() < 1 / 4095
        np.testing.assert_array_equal(mask.reshape(cohort.masks[i].shape), cohort.masks[i])


@pytest.mark.parametrize("dims", [2, 3])
def test_dicom_source(dims, tmp_path):
    cohort = make_phantom(dims, 3, seed=0, size=16)
    write_phantom(cohort, tmp_path / "source", "dicom")
    assert [r["patient_id"] for r in rows(tmp_path / "source")] == list(cohort.patient_ids)
    files = [pydicom.dcmread(p) for p in (tmp_path / "source").rglob("*.dcm")]
    assert len(files) == len(cohort) * (16 if dims == 3 else 1)
    assert len({f.SeriesInstanceUID for f in files}) == len(cohort)
    for f in files:
        p = cohort.patient_ids.index(f.PatientID)
        assert f.PatientAge == f"{round(float(cohort.age[p])):03d}Y"
        assert (f.SyntheticData, f.Modality) == ("YES", "MR")
    if dims == 2:
        first = next(f for f in files if f.PatientID == "PHANTOM-0003")
        stored = [np.rint(i * 4095) for i, p in zip(cohort.images, cohort.patients, strict=True) if p == 2]
        assert any(np.array_equal(first.pixel_array, s) for s in stored)


def test_png_and_npz_sources(tmp_path):
    cohort = make_phantom(2, 3, seed=0, size=16)
    write_phantom(cohort, tmp_path / "png", "png")
    for i, row in enumerate(rows(tmp_path / "png")):
        with Image.open(tmp_path / "png" / row["file"]) as picture:
            assert np.abs(np.asarray(picture) / 255 - cohort.images[i]).max() < 0.51 / 255
    write_phantom(cohort, tmp_path / "npz", "npz")
    with np.load(tmp_path / "npz" / "phantom.npz", allow_pickle=False) as data:
        assert len(data["images"]) == len(data["labels"]) == len(data["patients"]) == len(cohort)


def test_layouts_are_named_and_folders_kept(tmp_path):
    with pytest.raises(ConfigError, match="PNG"):
        write_phantom(make_phantom(3, 1, seed=0, size=16), tmp_path / "a", "png")
    with pytest.raises(ConfigError, match="nrrd"):
        write_phantom(make_phantom(2, 1, seed=0, size=16), tmp_path / "a", "nrrd")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "kept").write_text("x")
    with pytest.raises(RunError, match="not empty"):
        write_phantom(make_phantom(2, 1, seed=0, size=16), tmp_path / "b")
    assert not (tmp_path / "a").exists()
