"""DICOM: pixel values and geometry against known answers, and every fault of a series in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vault_sources import noise, write_series, write_slice, write_table

from medvae.config import IngestConfig
from medvae.errors import CohortError
from medvae.vault.dicom import dicom_source
from medvae.vault.dicom_pixels import read_slice
from medvae.vault.discover import discover
from medvae.vault.ingest import ingest


def refused(source: Path, out: Path, **config: Any) -> str:
    """Ingest, expect one sentence and no output, and return the sentence."""
    with pytest.raises(CohortError) as caught:
        ingest(source, out, IngestConfig(holdout=0.0, **config))
    assert caught.value.exit_code == 2
    assert not out.exists()
    assert not list(out.parent.glob(".*partial*"))
    return str(caught.value)


def test_rescale_and_signed_pixels(tmp_path: Path) -> None:
    stored = noise((5, 6), 0)
    write_slice(tmp_path / "a.dcm", stored, RescaleSlope="2.5", RescaleIntercept="-1024")
    np.testing.assert_allclose(read_slice(tmp_path / "a.dcm"), stored * 2.5 - 1024)


@pytest.mark.parametrize("kind", ["u2", "i2"])
def test_monochrome1_is_turned_over_its_bit_range(tmp_path: Path, kind: str) -> None:
    stored = noise((5, 6), 0, kind)
    write_slice(
        tmp_path / "a.dcm", stored, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11,
        RescaleSlope="1", RescaleIntercept="10",
    )  # fmt: skip
    top = 4095 if kind == "u2" else -1
    np.testing.assert_allclose(read_slice(tmp_path / "a.dcm"), top - stored.astype(float) + 10)


@pytest.mark.parametrize("declared", [-2000, 63536])
def test_padding_becomes_the_least_value_beside_it(tmp_path: Path, declared: int) -> None:
    stored = noise((5, 6), 0) + 5
    stored[0] = -2000
    write_slice(tmp_path / "a.dcm", stored)
    import pydicom

    ds = pydicom.dcmread(tmp_path / "a.dcm")
    # Some scanners write the padding value unsigned beside signed pixels.
    ds.add_new("PixelPaddingValue", "SS" if declared < 0 else "US", declared)
    ds.save_as(tmp_path / "a.dcm")
    values = read_slice(tmp_path / "a.dcm")
    assert (values[0] == stored[1:].min()).all()
    np.testing.assert_array_equal(values[1:], stored[1:])


def test_affine_of_an_oblique_series_is_the_standards_formula(tmp_path: Path) -> None:
    """PS3.3 C.7.6.2.1.1 by hand: spacing (rows 0.5, columns 0.8), 3 mm steps, turned about the x axis."""
    along_row, along_column = np.array([1.0, 0, 0]), np.array([0, 0.8, 0.6])
    normal = np.cross(along_row, along_column)
    volume = noise((4, 5, 6), 1)
    start = np.array([10.0, -20.0, 30.0])
    for k in range(4):
        write_slice(
            tmp_path / f"{3 - k}.dcm", volume[k], SeriesInstanceUID="1.2.3", PixelSpacing=[0.5, 0.8],
            ImageOrientationPatient=[*along_row, *along_column], ImagePositionPatient=list(start + 3 * k * normal),
        )  # fmt: skip
    source = dicom_source(discover(tmp_path), None, need_spacing=True)
    assert source.dims == 3
    (scan,) = source.scans
    read = scan.read()
    np.testing.assert_array_equal(read.array, volume.transpose(2, 1, 0))
    assert read.affine is not None
    lps = np.diag([-1, -1, 1, 1]) @ read.affine
    np.testing.assert_allclose(lps[:3, 0], 0.8 * along_row, atol=1e-9)
    np.testing.assert_allclose(lps[:3, 1], 0.5 * along_column, atol=1e-9)
    np.testing.assert_allclose(lps[:3, 2], 3 * normal, atol=1e-9)
    np.testing.assert_allclose(lps[:3, 3], start, atol=1e-9)


def test_series_equals_dicom2nifti_in_space(tmp_path: Path, test_data: Any) -> None:
    """A real MR series: every voxel lies at the same RAS place with the same value as in dicom2nifti's file."""
    convert = pytest.importorskip("dicom2nifti.convert_dicom")
    import nibabel

    study = test_data("btp_hcrop_dicom") / "Study1"
    # The crops do not carry what dicom2nifti wants of a scanner's file; its checks are no part of the geometry.
    from dicom2nifti import settings

    settings.disable_validate_slicecount()
    settings.disable_validate_orthogonal()
    settings.disable_validate_slice_increment()
    folder = next(p for p in study.iterdir() if p.is_dir())
    convert.dicom_series_to_nifti(str(folder), str(tmp_path / "x.nii.gz"), reorient_nifti=False)
    theirs = nibabel.as_closest_canonical(nibabel.load(tmp_path / "x.nii.gz"))
    (scan,) = dicom_source(discover(study), None, need_spacing=True).scans
    read = scan.read()
    ours = nibabel.as_closest_canonical(nibabel.Nifti1Image(read.array, read.affine))
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)
    np.testing.assert_allclose(ours.get_fdata(), theirs.get_fdata())


def test_2d_images_come_out_as_they_are_viewed(tmp_path: Path, run: Any) -> None:
    """A prone scan, turned by 180 degrees, gives the same picture as a supine one of the same anatomy."""
    picture = noise((8, 8), 3)
    write_slice(tmp_path / "in" / "a.dcm", picture, PatientID="A")
    turned = picture[::-1, ::-1].copy()
    write_slice(tmp_path / "in" / "b.dcm", turned, PatientID="B", ImageOrientationPatient=[-1, 0, 0, 0, -1, 0])
    store = run(tmp_path / "in", shape=(8, 8), intensity="window", intensity_low=0.0, intensity_high=1000.0)
    x = store.load([0, 1]).x
    np.testing.assert_array_equal(x[0], x[1])
    np.testing.assert_allclose(x[0, 0], picture / 1000, atol=1e-5)


def test_spacing_in_2d_is_millimetres(tmp_path: Path, run: Any) -> None:
    """A square of 16 mm at 0.5 by 1 mm has the same size for every pixel spacing after resampling to 2 mm."""
    for name, spacing in (("A", (0.5, 1.0)), ("B", (1.0, 2.0))):
        y, x = np.meshgrid(*(np.arange(s / 2, 64, s) for s in spacing), indexing="ij")
        inside = (abs(y - 32) < 8) & (abs(x - 32) < 8)
        write_slice(
            tmp_path / "in" / f"{name}.dcm", (inside * 1000).astype("i2"), PatientID=name, PixelSpacing=list(spacing)
        )
    store = run(
        tmp_path / "in",
        shape=(32, 32),
        spacing_mm=(2.0, 2.0),
        intensity="window",
        intensity_low=0.0,
        intensity_high=1e3,
    )
    for image in store.load([0, 1]).x[:, 0]:
        assert image.sum() == pytest.approx(64, rel=0.15)
        assert image[image > 0.5].size == pytest.approx(64, rel=0.15)


def test_conditions_come_from_allow_listed_tags(tmp_path: Path, run: Any) -> None:
    for i in range(4):
        tags = {"ContrastBolusAgent": "yes"} if i % 2 else {}
        write_slice(
            tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), PatientID=str(i), PatientAge=f"{20 + i:03d}Y", **tags
        )
    store = run(tmp_path / "in", conditions=("age", "contrast"), shape=(8, 8))
    assert store.info["conditions"]["contrast"] == {"kind": "class", "classes": ["no", "yes"]}
    assert store.info["conditions"]["age"] == {"kind": "continuous", "range": [0.0, 100.0]}
    ages = sorted((store.condition[:, 0] + 1) * 50)
    np.testing.assert_allclose(ages, [20, 21, 22, 23], atol=1e-4)


def test_same_id_of_two_issuers_is_two_patients(tmp_path: Path, run: Any) -> None:
    for i, issuer in enumerate(("north", "south", "south")):
        write_slice(tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), PatientID="1", IssuerOfPatientID=issuer)
    store = run(tmp_path / "in", shape=(8, 8))
    assert store.info["patients"] == 2
    assert store.info["images"] == 3


def test_blank_ids_of_one_issuer_are_no_patient(tmp_path: Path, run: Any) -> None:
    for i, patient in enumerate(("1", "2", "3", "", "", "")):
        write_slice(tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), PatientID=patient, IssuerOfPatientID="north")
    info = run(tmp_path / "in", shape=(8, 8)).info
    assert info["patients"] == 3
    assert info["skipped"] == [{"reason": "no PatientID", "count": 3}]


def test_2d_shape_makes_every_slice_a_scan_of_one_patient(tmp_path: Path, run: Any) -> None:
    for patient in "AB":
        write_series(tmp_path / "in" / patient, noise((5, 8, 8), ord(patient)), patient)
    store = run(tmp_path / "in", shape=(8, 8))
    assert (store.info["patients"], store.info["images"]) == (2, 10)
    capped = run(tmp_path / "in", shape=(8, 8), max_scans_per_patient=3)
    assert capped.info["images"] == 6
    assert capped.info["skipped"] == [{"reason": "over max_scans_per_patient", "count": 4}]


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("gap", "slice gaps or uneven spacing"),
        ("size", "slices of different size or spacing"),
        ("tilt", "gantry tilt"),
    ],
)
def test_series_that_cannot_be_stacked(tmp_path: Path, run: Any, fault: str, word: str) -> None:
    for patient in "ABC":
        write_series(tmp_path / "in" / patient, noise((5, 8, 8), ord(patient)), patient)
    import pydicom

    for path in sorted((tmp_path / "in" / "C").iterdir())[: 5 if fault == "tilt" else 1]:
        ds = pydicom.dcmread(path)
        if fault == "gap":
            ds.ImagePositionPatient = [0, 0, 77]
        elif fault == "size":
            ds.PixelSpacing = [3, 3]
        else:
            ds.ImagePositionPatient = [0, float(ds.ImagePositionPatient[2]) * 0.3, ds.ImagePositionPatient[2]]
        ds.save_as(path)
    message = refused(tmp_path / "in", tmp_path / "out", shape=(8, 8, 8))
    assert "1 of 3 series" in message
    assert word in message
    store = run(tmp_path / "in", shape=(8, 8, 8), slice_gap="skip")
    assert store.info["skipped"] == [{"reason": word, "count": 1}]
    assert store.info["patients"] == 2


def test_progress_counts_headers_and_then_scans(tmp_path: Path) -> None:
    for patient in "AB":
        write_series(tmp_path / "in" / patient, noise((3, 8, 8), ord(patient)), patient)
    steps: list[tuple[int, int]] = []
    ingest(tmp_path / "in", tmp_path / "out", IngestConfig(holdout=0.0, shape=(8, 8, 8)), lambda *s: steps.append(s))
    assert steps == [(i, 6) for i in range(1, 7)] + [(1, 2), (2, 2)]


def test_table_of_patients_without_a_usable_scan(tmp_path: Path, run: Any) -> None:
    """A patient whose only file is unusable may stand in the table; one who has no file may not."""
    for i in range(3):
        write_slice(tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), PatientID=f"p{i}")
    write_slice(tmp_path / "in" / "3.dcm", noise((8, 8), 3), PatientID="p3", leave_out=["PixelSpacing"])
    rows = [{"PatientID": f"p{i}", "grade": "a"} for i in range(4)]
    write_table(tmp_path / "t.csv", rows)
    config = {"shape": (8, 8), "spacing_mm": (1.0,), "labels": tmp_path / "t.csv", "conditions": ("grade",)}
    assert run(tmp_path / "in", **config).info["skipped"] == [{"reason": "no PixelSpacing", "count": 1}]
    write_table(tmp_path / "t.csv", [*rows, {"PatientID": "p9", "grade": "a"}])
    assert "1 of 5 rows" in refused(tmp_path / "in", tmp_path / "out", **config)


FAULTS = {
    "no pixel data": {"leave_out": ["PixelData"]},
    "no image size (Rows, Columns)": {"leave_out": ["Rows"]},
    "colour": {"SamplesPerPixel": 3},
    "several frames and no rule for them": {"NumberOfFrames": 2},
    "header claims an absurd size": {"Rows": 60000, "Columns": 60000},
    "constant": {"RescaleSlope": "0", "RescaleIntercept": "0"},
    "no PatientID": {"PatientID": ""},
    "truncated file": {"Rows": 200},
    "undecodable pixel data": {"BitsAllocated": 13},
}


@pytest.mark.parametrize("reason", FAULTS)
def test_unusable_files_are_counted_by_reason(tmp_path: Path, run: Any, reason: str) -> None:
    for i in range(2):
        write_slice(tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), PatientID=str(i))
    write_slice(tmp_path / "in" / "bad.dcm", noise((8, 8), 9), **{"PatientID": "9", **FAULTS[reason]})
    store = run(tmp_path / "in", shape=(8, 8))
    assert store.info["skipped"] == [{"reason": reason, "count": 1}]
    assert store.info["images"] == 2


@pytest.mark.parametrize("reason", [r for r in FAULTS if r != "no PatientID"])
def test_nothing_usable_names_the_most_frequent_reason(tmp_path: Path, reason: str) -> None:
    for i in range(2):
        write_slice(tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), **{"PatientID": str(i), **FAULTS[reason]})
    message = refused(tmp_path / "in", tmp_path / "out", shape=(8, 8))
    assert f"{reason} in 2 of 2 cases" in message


def test_files_torn_at_any_byte(tmp_path: Path, run: Any) -> None:
    for i in range(2):
        write_slice(tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), PatientID=str(i))
    whole = (tmp_path / "in" / "0.dcm").read_bytes()
    cuts = [0, 10, 131, 140, 200, len(whole) // 2, len(whole) - 130, len(whole) - 64, len(whole) - 1]
    for cut in cuts:
        (tmp_path / "in" / f"torn{cut}.dcm").write_bytes(whole[:cut])
    store = run(tmp_path / "in", shape=(8, 8))
    assert store.info["images"] == 2
    assert sum(s["count"] for s in store.info["skipped"]) == len(cuts)


def test_missing_spacing_is_refused_only_where_it_is_needed(tmp_path: Path, run: Any) -> None:
    for i in range(2):
        write_slice(tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), PatientID=str(i), leave_out=["PixelSpacing"])
    assert run(tmp_path / "in", shape=(8, 8)).info["images"] == 2
    message = refused(tmp_path / "in", tmp_path / "out", shape=(8, 8), spacing_mm=(1.0, 1.0))
    assert "no PixelSpacing in 2 of 2" in message


def test_table_by_file_and_by_patient(tmp_path: Path, run: Any) -> None:
    rows = []
    for i in range(4):
        write_slice(tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), PatientID=f"p{i}")
        rows.append({"file": f"{i}.dcm", "PatientID": f"p{i}", "grade": "ab"[i % 2]})
    write_table(tmp_path / "by_file.csv", rows)
    write_table(tmp_path / "by_patient.csv", [{k: r[k] for k in ("PatientID", "grade")} for r in rows])
    stores = [
        run(tmp_path / "in", shape=(8, 8), labels=tmp_path / f"{n}.csv", conditions=("grade",))
        for n in ("by_file", "by_patient")
    ]
    np.testing.assert_array_equal(stores[0].condition, stores[1].condition)
    np.testing.assert_array_equal(stores[0].load([0, 1, 2, 3]).x, stores[1].load([0, 1, 2, 3]).x)


def test_table_must_not_tear_a_patient_apart(tmp_path: Path) -> None:
    rows = []
    for i in range(4):
        write_slice(tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), PatientID=f"p{i // 2}")
        rows.append({"file": f"{i}.dcm", "patient_id": f"q{i}"})
    write_table(tmp_path / "t.csv", rows)
    message = refused(tmp_path / "in", tmp_path / "out", shape=(8, 8), labels=tmp_path / "t.csv")
    assert "2 of 2 patients" in message


def test_every_transfer_syntax_gives_the_same_pixels(test_data: Any) -> None:
    """One CT slice in many lossless transfer syntaxes decodes to the same values."""
    folder = test_data("dicom_variety") / "cornerstone"
    plain = next(folder.glob("CTImage.dcm_LittleEndianExplicitTransferSyntax_1.2.840.10008.1.2.1*"))
    reference = read_slice(plain)
    names = ("BigEndian", "DeflatedExplicit", "RLELossless", "JPEG2000LosslessOnly", "JPEGLSLosslessTransfer")
    for name in names:
        for path in folder.glob(f"CTImage.dcm_{name}*.dcm"):
            np.testing.assert_array_equal(read_slice(path), reference)


def test_a_tree_of_everything_never_breaks(tmp_path: Path, test_data: Any) -> None:
    """Some 200 odd files: a verdict or a scan for each, and no exception but ours."""
    from medvae.vault.preprocess import Grid, Intensity, prepare
    from medvae.vault.scan import Unusable, quiet

    with quiet():
        source = dicom_source(discover(test_data("dicom_variety") / "pydicom"), 2, need_spacing=False)
        assert sum(source.skipped.values()) > 10
        read = 0
        for scan in source.scans:
            try:
                prepare(scan.read(), Grid((16, 16), None, Intensity("percentile", 1, 99)))
                read += 1
            except Unusable:
                continue
    assert read > 20
