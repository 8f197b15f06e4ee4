"""DICOM out: the standard's validators, other people's readers, and no trace of this machine."""

from __future__ import annotations

import getpass
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from medvae.errors import MedvaeError, RunError
from medvae.synth.write_dicom import write_dicom
from medvae.synth.write_nifti import write_nifti
from medvae.types import Intensity, SyntheticCohort

PERCENTILE = Intensity("percentile", 0.5, 99.5)
KINDS = {
    "mr3d": ((8, 10, 6), "MR", PERCENTILE),
    "mr3d-signed": ((8, 10, 6), "MR", Intensity("window", -10, 5000)),
    "mr2d": ((16, 12), "MR", PERCENTILE),
    "ct3d": ((8, 10, 6), "CT", Intensity("window", -1000, 400)),
    "ct2d": ((16, 12), "CT", Intensity("window", -160, 240)),
    "xray": ((16, 12), "DX", Intensity("window", 0, 255)),
    "xray-narrow": ((16, 12), "CR", Intensity("window", -0.5, 0.5)),
    "picture": ((16, 12), "OT", Intensity("window", 0, 255)),
    "pet3d": ((8, 10, 6), "PT", Intensity("window", 0, 20)),
    "other3d": ((8, 10, 6), "OT", Intensity("window", 0, 1)),
}
Maker = Callable[..., SyntheticCohort]


@pytest.fixture(params=sorted(KINDS))
def written(
    request: pytest.FixtureRequest, tmp_path: Path, make_cohort: Maker, claim: dict[str, object]
) -> tuple[str, SyntheticCohort, Path]:
    shape, modality, intensity = KINDS[request.param]
    cohort = make_cohort(shape, modality, intensity)
    cohort.masks[1] = 0  # an empty mask is a fair answer
    paths = write_dicom(cohort, tmp_path, claim)
    assert sorted(paths) == sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.dcm"))
    return request.param, cohort, tmp_path


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def images(folder: Path, name: str) -> list[Path]:
    return sorted((folder / "dicom" / name).glob("IM*.dcm"))


def raw_values(cohort: SyntheticCohort, index: int) -> np.ndarray:
    intensity = cohort.space.intensity
    low, high = (0, 4095) if intensity.mode == "percentile" else (intensity.low, intensity.high)
    return low + cohort.images[index] * (high - low)


def step(cohort: SyntheticCohort) -> float:
    intensity = cohort.space.intensity
    narrow = intensity.mode == "window" and intensity.high - intensity.low < 255
    return (intensity.high - intensity.low) / 4095 if narrow else 1.0


def test_dciodvfy_objects_only_to_the_synthetic_data_attribute(written):
    _, _, folder = written
    verifier = tool("dciodvfy")
    for path in folder.rglob("*.dcm"):
        done = subprocess.run([verifier, "-new", path], capture_output=True, text=True, check=False)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line or "Warning" in line]
        # The standard added (0008,001C) after this verifier was made.
        assert lines
        assert all("(0008,001c)" in line for line in lines), lines


def test_dcentvfy_finds_one_consistent_set(written):
    _, _, folder = written
    done = subprocess.run([tool("dcentvfy"), *folder.rglob("*.dcm")], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""


def test_attributes_say_that_it_is_synthetic(written):
    kind, _, folder = written
    for path in folder.rglob("*.dcm"):
        d = pydicom.dcmread(path)
        assert d.SyntheticData == "YES"
        assert d.PatientIdentityRemoved == "YES"
        assert d.LongitudinalTemporalInformationModified == "REMOVED"
        assert d.RecognizableVisualFeatures == d.BurnedInAnnotation == "NO"
        method = list(d.DeidentificationMethod)
        assert all(len(piece) <= 64 for piece in method)
        assert "epsilon=8, delta=1e-05" in " ".join(method)
        assert "unit=patient" in " ".join(method)
        equipment = d.ContributingEquipmentSequence[0]
        assert equipment.PurposeOfReferenceCodeSequence[0].CodeValue == "109100"
        assert re.fullmatch(r"SYN\d{4}", d.PatientID)
        assert d.IssuerOfPatientID
        assert d.StudyID
        assert d.SpecificCharacterSet == "ISO_IR 192"
        assert "SYNTHETIC" in d.SeriesDescription
        assert "SYNTHETIC" in d.ImageComments
        assert d.ContentQualification == "RESEARCH"
        if d.Modality != "SEG":
            assert list(d.ImageType[:2]) == ["DERIVED", "SECONDARY"]
            assert "SourceImageSequence" not in d
            assert d.Modality == {"mr": "MR", "ct": "CT", "xr": "CR"}.get(kind[:2], "OT")


def test_age_sex_and_conditions_are_those_asked_for(written):
    _, cohort, folder = written
    for i, row in enumerate(cohort.conditions):
        for path in (folder / "dicom" / f"SYN{i + 1:04d}").iterdir():
            d = pydicom.dcmread(path)
            assert (d.PatientAge, d.PatientSex) == (f"{round(row['age']):03d}Y", row["sex"])
            assert f"lesion={row['lesion']}" in d.ImageComments


def test_uids_are_fresh_and_below_the_uuid_root(tmp_path, make_cohort):
    cohort = make_cohort()
    seen: list[str] = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        for path in write_dicom(cohort, folder):
            d = pydicom.dcmread(folder / path)
            own = {d.SOPInstanceUID, d.SeriesInstanceUID, d.StudyInstanceUID, d.FrameOfReferenceUID}
            if d.Modality == "SEG":
                own |= {d.DimensionOrganizationSequence[0].DimensionOrganizationUID}
            assert all(re.fullmatch(r"2\.25\.[1-9]\d{10,38}", uid) for uid in own)
            seen.append(d.SOPInstanceUID)
    assert len(set(seen)) == len(seen)


def test_simpleitk_reads_the_same_voxels_and_places(written):
    sitk = pytest.importorskip("SimpleITK")
    _, cohort, folder = written
    for i in range(len(cohort)):
        files = [str(p) for p in images(folder, f"SYN{i + 1:04d}")]
        if cohort.space.spatial_dims == 3 and len(files) > 1:
            uid = str(pydicom.dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID)
            image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(Path(files[0]).parent), uid))
        else:
            image = sitk.ReadImage(files[0])
        array = sitk.GetArrayFromImage(image)
        expected = raw_values(cohort, i)
        if cohort.space.spatial_dims == 2:
            assert np.abs(array.reshape(expected.shape) - expected).max() <= 0.5 * step(cohort) + 1e-3
            np.testing.assert_allclose(image.GetSpacing()[:2], cohort.space.spacing_mm[::-1])
            continue
        assert image.GetSize() == cohort.space.spatial_shape
        np.testing.assert_allclose(image.GetSpacing(), cohort.space.spacing_mm, rtol=1e-6)
        rng = np.random.default_rng(0)
        middle = (np.asarray(cohort.space.spatial_shape) - 1) / 2
        for index in rng.integers(0, cohort.space.spatial_shape, (20, 3)):
            ras = (index - middle) * cohort.space.spacing_mm
            at = image.TransformPhysicalPointToIndex([-ras[0], -ras[1], ras[2]])
            assert abs(image[at] - expected[tuple(index)]) <= 0.5 * step(cohort) + 1e-3


@pytest.mark.parametrize("kind", ["mr3d", "mr3d-signed", "ct3d", "mr2d", "ct2d"])
def test_dcm2niix_gives_the_niftis_we_write(kind, tmp_path, make_cohort):
    converter = tool("dcm2niix")
    shape, modality, intensity = KINDS[kind]
    cohort = make_cohort(shape, modality, intensity, count=1, masks=False)
    write_dicom(cohort, tmp_path)
    write_nifti(cohort, tmp_path)
    (tmp_path / "converted").mkdir()
    command = [converter, "-z", "n", "-f", "out", "-o", tmp_path / "converted", tmp_path / "dicom"]
    subprocess.run(command, capture_output=True, check=True)
    theirs = nib.as_closest_canonical(nib.load(next((tmp_path / "converted").glob("*.nii"))))
    ours = nib.as_closest_canonical(nib.load(next((tmp_path / "nifti").rglob("*.nii.gz"))))
    np.testing.assert_allclose(theirs.affine, ours.affine, atol=1e-4)
    np.testing.assert_array_equal(theirs.get_fdata(), ours.get_fdata())


def test_slices_rise_along_a_right_handed_normal(tmp_path, make_cohort):
    cohort = make_cohort(count=1, masks=False)
    write_dicom(cohort, tmp_path)
    slices = [pydicom.dcmread(p) for p in images(tmp_path, "SYN0001")]
    normal = np.cross(slices[0].ImageOrientationPatient[:3], slices[0].ImageOrientationPatient[3:])
    heights = [np.dot(normal, d.ImagePositionPatient) for d in slices]
    np.testing.assert_allclose(np.diff(heights), 2.5)
    assert [d.InstanceNumber for d in slices] == list(range(1, 7))


def test_segmentation_lies_on_its_images(written):
    hd = pytest.importorskip("highdicom")
    _, cohort, folder = written
    for i in range(len(cohort)):
        name = f"SYN{i + 1:04d}"
        seg = hd.seg.segread(folder / "dicom" / name / "SEG.dcm")
        assert seg.number_of_segments == 2
        assert [d.segment_label for d in (seg.get_segment_description(1), seg.get_segment_description(2))] == [
            "label 1",
            "label 2",
        ]
        sources = [pydicom.dcmread(p) for p in images(folder, name)]
        if len(sources) == 1 and "NumberOfFrames" in sources[0]:
            numbers = range(1, int(sources[0].NumberOfFrames) + 1)
            stack = seg.get_pixels_by_source_frame(
                sources[0].SOPInstanceUID, numbers, combine_segments=True, assert_missing_frames_are_empty=True
            )
        else:
            uids = [d.SOPInstanceUID for d in sources]
            stack = seg.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
        mask = cohort.masks[i]
        expected = mask[None] if mask.ndim == 2 else mask[::-1, ::-1].transpose(2, 1, 0)
        np.testing.assert_array_equal(stack, expected)


def test_no_byte_tells_of_this_machine(written):
    _, _, folder = written
    traces = {socket.gethostname(), getpass.getuser(), str(folder), str(Path.home()), str(Path.cwd())}
    traces = {t.encode() for t in traces if len(t) > 4}
    for path in folder.rglob("*.dcm"):
        data = path.read_bytes()
        assert not [t for t in traces if t in data]


def test_no_time_of_day_is_written(written):
    _, _, folder = written
    for path in folder.rglob("*.dcm"):
        for element in pydicom.dcmread(path).iterall():
            if element.VR == "TM":
                assert element.value == "000000"
            if element.VR == "DT":
                assert re.fullmatch(r"\d{8}", element.value)


@pytest.mark.parametrize(("given", "said"), [(None, False), ({"epsilon": None}, True)])
def test_without_epsilon_no_privacy_is_claimed(given, said, tmp_path, make_cohort):
    paths = write_dicom(make_cohort(count=1, masks=False), tmp_path, given)
    method = str(pydicom.dcmread(tmp_path / paths[0]).DeidentificationMethod)
    assert "epsilon" not in method
    assert ("Not differentially private" in method) is said


def test_a_full_folder_is_refused_and_kept(tmp_path, make_cohort):
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "kept").write_text("x")
    with pytest.raises(RunError, match="not empty"):
        write_dicom(make_cohort(count=1), tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["dicom", "kept"]


def test_a_failure_leaves_nothing(tmp_path, make_cohort):
    cohort = make_cohort()
    cohort.images[2, 0, 0, 0] = np.nan
    with pytest.raises(MedvaeError, match="not finite"):
        write_dicom(cohort, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_scans_and_body_part_may_be_told(tmp_path, make_cohort):
    seen: list[tuple[int, int]] = []
    cohort = replace(make_cohort(masks=False), notes={"body_part": "HEAD"})
    paths = write_dicom(cohort, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert pydicom.dcmread(tmp_path / paths[0]).BodyPartExamined == "HEAD"


@pytest.mark.parametrize(
    ("modality", "shape", "intensity"),
    [
        ("MR", (8, 10, 6), Intensity("percentile", 0.5, 99.5)),
        ("CT", (8, 10, 6), Intensity("window", -1000.0, 1000.0)),
        ("CR", (8, 10), Intensity("window", 0.0, 255.0)),
        ("OT", (8, 10, 6), Intensity("window", 0.0, 255.0)),
    ],
)
def test_files_are_byte_for_byte_those_of_pydicom(modality, shape, intensity, tmp_path, make_cohort, monkeypatch):
    """What a series shares is encoded once: that must not show in any byte."""
    from medvae.synth import dicom_encode

    compared = 0
    ours = dicom_encode.write_series

    def both(files):
        nonlocal compared
        ours(files)
        for path, dataset in files.items():
            dataset.save_as(tmp_path / "theirs.dcm", enforce_file_format=True)
            assert path.read_bytes() == (tmp_path / "theirs.dcm").read_bytes()
            compared += 1

    monkeypatch.setattr(dicom_encode, "write_series", both)
    write_dicom(make_cohort(shape, modality, intensity, masks=len(shape) == 3), tmp_path / "out")
    assert compared == 3 * (6 if modality in ("MR", "CT") else 1)
