"""NIfTI, PNG and npz out: values, geometry, and no text that nobody asked for."""

from __future__ import annotations

import getpass
import gzip
import socket
import struct

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medvae.errors import RunError
from medvae.synth.values import codes, scale_of
from medvae.synth.write_nifti import write_nifti
from medvae.synth.write_npz import write_npz
from medvae.synth.write_png import montage, write_png
from medvae.types import ImageSpace, Intensity, SyntheticCohort, decode_conditions


@pytest.mark.parametrize(
    ("intensity", "low", "step"),
    [
        (Intensity("percentile", 0.5, 99.5), 0, 1),
        (Intensity("window", -1000, 400), -1000, 1),
        (Intensity("window", 0, 1), 0, 1 / 4095),
        (Intensity("window", -0.5, 300.25), -0.5, 300.75 / 4095),
        (Intensity("window", -40000, 60000), -40000, 100000 / 4095),
    ],
)
def test_raw_values_are_within_half_a_step(intensity, low, step):
    image = np.linspace(0, 1, 10001, dtype=np.float32)
    scale = scale_of(intensity)
    assert (scale.intercept, scale.slope) == pytest.approx((low, step))
    raw = codes(image, scale) * scale.slope + scale.intercept
    top = 4095 if intensity.mode == "percentile" else intensity.high - intensity.low
    assert np.abs(raw - (low + image * top)).max() <= step / 2 * 1.001


@pytest.mark.parametrize("shape", [(8, 10, 6), (9, 7)])
@pytest.mark.parametrize("intensity", [Intensity("window", -1000, 400), Intensity("window", 0, 1)])
def test_nifti_reads_back(shape, intensity, tmp_path, make_cohort):
    sitk = pytest.importorskip("SimpleITK")
    cohort = make_cohort(shape, "CT", intensity)
    paths = write_nifti(cohort, tmp_path)
    assert paths[:2] == [
        "nifti/sub-SYN0001/anat/sub-SYN0001_image.nii.gz",
        "nifti/sub-SYN0001/anat/sub-SYN0001_dseg.nii.gz",
    ]
    full = (*shape, 1)[:3]
    spacing = (*cohort.space.spacing_mm, 1.0)[:3]
    width = intensity.high - intensity.low
    for i in range(3):
        image, mask = (nib.load(tmp_path / p) for p in paths[2 * i : 2 * i + 2])
        assert image.shape == mask.shape == full
        np.testing.assert_allclose(nib.affines.voxel_sizes(image.affine), spacing, rtol=1e-6)
        np.testing.assert_array_equal(image.affine, mask.affine)
        assert nib.aff2axcodes(image.affine) == (("R", "A", "S") if len(shape) == 3 else ("P", "L", "S"))
        middle = nib.affines.apply_affine(image.affine, (np.asarray(full) - 1) / 2)
        np.testing.assert_allclose(middle, 0, atol=1e-5)
        expected = intensity.low + cohort.images[i].reshape(full) * width
        assert np.abs(image.get_fdata() - expected).max() <= max(0.5, 0) if width > 255 else width / 4095
        np.testing.assert_array_equal(np.asarray(mask.dataobj), cohort.masks[i].reshape(full))
        assert image.get_data_dtype() == np.int16
        other = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / paths[2 * i]))).T
        np.testing.assert_allclose(other, image.get_fdata(), atol=1e-5)


def test_nifti_header_holds_no_text_and_the_gzip_no_name_or_time(tmp_path, make_cohort):
    for path in write_nifti(make_cohort(), tmp_path):
        data = (tmp_path / path).read_bytes()
        # RFC 1952: no flags (so no name), no time
        assert data[3] == 0
        assert struct.unpack("<I", data[4:8]) == (0,)
        header = nib.load(tmp_path / path).header
        assert header["descrip"].item() == b"synthetic"
        assert all(header[k].item() == b"" for k in ("aux_file", "db_name", "intent_name", "data_type"))
        assert len(header.extensions) == 0
        assert header.get_xyzt_units() == ("mm", "sec")
        plain = gzip.decompress(data)
        assert socket.gethostname().encode() not in plain
        assert getpass.getuser().encode() not in plain[:352]


def test_mr_images_carry_a_bids_suffix(tmp_path, make_cohort):
    paths = write_nifti(make_cohort(masks=False), tmp_path)
    assert paths == [f"nifti/sub-SYN000{i}/anat/sub-SYN000{i}_T1w.nii.gz" for i in (1, 2, 3)]


def test_png_2d_is_the_image_itself(tmp_path, make_cohort):
    cohort = make_cohort((16, 12), "DX")
    paths = write_png(cohort, tmp_path)
    assert paths[:2] == ["png/SYN0001.png", "png/SYN0001_mask.png"]
    for i in range(3):
        with Image.open(tmp_path / paths[2 * i]) as picture:
            assert picture.mode == "L"
            assert picture.info == {}
            assert np.abs(np.asarray(picture) / 255 - cohort.images[i]).max() <= 0.5 / 255 + 1e-6
        with Image.open(tmp_path / paths[2 * i + 1]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), cohort.masks[i])


def test_png_has_no_metadata_chunks(tmp_path, make_cohort):
    for path in write_png(make_cohort(), tmp_path):
        data = (tmp_path / path).read_bytes()
        chunks, at = [], 8
        while at < len(data):
            (length,) = struct.unpack(">I", data[at : at + 4])
            chunks.append(data[at + 4 : at + 8])
            at += 12 + length
        assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}


def test_montage_hangs_the_head_up_and_the_right_on_the_left():
    volume = np.zeros((6, 8, 4), dtype=np.uint8)
    volume[5, 4, 2] = 1  # far right
    volume[3, 7, 2] = 2  # front
    volume[3, 4, 3] = 3  # top
    picture = montage(volume)
    assert picture.shape == (8, 6 + 6 + 8)
    axial, coronal, sagittal = picture[:, :6], picture[:, 6:12], picture[:, 12:]
    assert axial[3, 0] == 1
    assert axial[0, 2] == 2
    assert coronal[-4, 2] == 3
    assert coronal[-3, 0] == 1
    assert sagittal[-3, 7] == 2


def test_npz_opens_without_pickle(tmp_path, make_cohort):
    cohort = make_cohort()
    assert write_npz(cohort, tmp_path) == ["cohort.npz"]
    with np.load(tmp_path / "cohort.npz", allow_pickle=False) as data:
        np.testing.assert_array_equal(data["images"], cohort.images)
        assert data["images"].dtype == np.float32
        np.testing.assert_array_equal(data["masks"], cohort.masks)
        assert data["labels"].tolist() == [0, 1, 0]
        assert data["label_names"].tolist() == ["absent", "present"]
        assert data["condition_names"].tolist() == ["lesion=absent", "lesion=present", "age", "sex=F", "sex=M"]
        for vector, row in zip(data["conditions"], cohort.conditions, strict=True):
            decoded = decode_conditions(cohort.space.conditions, vector)
            assert decoded == {**row, "age": pytest.approx(row["age"])}


def test_npz_without_classes_or_masks(tmp_path):
    space = ImageSpace((4, 4), (1.0, 1.0), "OT", Intensity("window", 0, 255), ())
    cohort = SyntheticCohort(np.zeros((2, 4, 4), np.float32), None, ({}, {}), space)
    write_npz(cohort, tmp_path)
    with np.load(tmp_path / "cohort.npz", allow_pickle=False) as data:
        assert data["labels"].tolist() == [-1, -1]
        assert data["conditions"].shape == (2, 0)
        assert "masks" not in data.files


@pytest.mark.parametrize("write", [write_nifti, write_png, write_npz])
def test_a_second_writing_is_refused(write, tmp_path, make_cohort):
    write(make_cohort(count=1), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(RunError):
        write(make_cohort(count=2), tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
