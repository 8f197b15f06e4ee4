"""DICOM of every kind: transfer syntaxes, enhanced objects, mixed series, crooked stacks, segmentations, units."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from vault_sources import noise, write_series, write_slice, write_table

from medvae.vault.dicom import dicom_source
from medvae.vault.dicom_header import read_header
from medvae.vault.dicom_pixels import read_frames, read_slice
from medvae.vault.discover import discover
from medvae.vault.scan import REMEDIES, Rules, Unusable, quiet

# Largest difference from the plain file in HU. JPEG-LS promises its bound; the others are properties of these files,
# with some room (8-bit baseline keeps 256 of 4096 gray levels).
LOSSY = {
    "JPEG2000Transfer": 6, "JPEGLSLossyTransfer": 1, "JPEGProcess10_12": 40, "JPEGProcess1Transfer": 70,
    "JPEGProcess2_4": 40, "JPEGProcess6_8": 40,
}  # fmt: skip


def item(**elements: Any) -> Dataset:
    ds = Dataset()
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def scans(folder: Path, dims: int | None = 3, **rules: Any) -> Any:
    return dicom_source(discover(folder), dims, need_spacing=False, rules=Rules(**rules))


# Pixels


def test_all_syntaxes_of_one_slice_agree(test_data: Any) -> None:
    pytest.importorskip("libjpeg", reason="12-bit JPEG needs the extra gpl: pip install 'medvae-dp[gpl]'")
    files = sorted((test_data("dicom_variety") / "cornerstone").glob("CTImage.dcm_*"))
    assert len(files) == 15
    reference = read_slice(next(f for f in files if "LittleEndianExplicit" in f.name))
    assert (reference.min(), reference.max()) == (-3024, 1378)
    exact = 0
    for path in files:
        image = read_slice(path)
        bound = next((b for name, b in LOSSY.items() if name in path.name), 0)
        inside = reference > -2000  # outside the circle of reconstruction the padding value rings
        assert np.abs(image - reference)[inside].max() <= bound, path.name
        exact += bound == 0
    assert exact == 9


def test_each_odd_file_is_read_or_counted(test_data: Any) -> None:
    """Every file of the collection: images of a finite size, or a reason that has a remedy."""
    read, reasons = 0, set()
    with quiet():
        for path in sorted(test_data("dicom_variety").rglob("*")):
            if path.is_dir():
                continue
            try:
                header = read_header(path, Rules(colour="luminance", frames="all"))
                if not header.is_segmentation:
                    frames = read_frames(path, None, Rules(colour="luminance"))
                    assert all(np.isfinite(f).all() and f.dtype == np.float32 for f in frames)
                read += 1
            except Unusable as verdict:
                reasons.add(verdict.reason)
    assert reasons <= set(REMEDIES)
    assert read >= 115


@pytest.mark.parametrize("kind", ["u2", "i2"])
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_any_bits_stored_wherever_they_lie(tmp_path: Path, kind: str, bits: int) -> None:
    low, high = (0, 2**bits) if kind == "u2" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    values = np.random.default_rng(bits).integers(low, high, (6, 7))
    for shift in {0, 16 - bits}:
        words = ((values & (2**bits - 1)) << shift).astype("u2").view(kind)
        if shift:
            words = (words.view("u2") | 1).view(kind)  # an overlay in the bits below
        write_slice(tmp_path / "a.dcm", words, BitsStored=bits, HighBit=bits - 1 + shift)
        np.testing.assert_array_equal(read_slice(tmp_path / "a.dcm"), values)


def test_modality_lut_and_display_windows(tmp_path: Path) -> None:
    """Windows of PS3.3 C.11.2 against pydicom's own, a VOI LUT by hand, and a modality LUT by hand."""
    from pydicom.pixels import apply_voi_lut

    stored = noise((9, 9), 0, "u2")
    for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        write_slice(tmp_path / "a.dcm", stored, WindowCenter=400, WindowWidth=300, VOILUTFunction=function)
        theirs = apply_voi_lut(stored, pydicom.dcmread(tmp_path / "a.dcm"))
        ours = read_slice(tmp_path / "a.dcm", Rules(display=True))
        np.testing.assert_allclose(ours, theirs / 65535, atol=2e-5)
    lut = item(LUTDescriptor=[4, 2, 8], LUTData=[10, 20, 200, 255])
    lut["LUTDescriptor"].VR = "US"
    lut["LUTData"].VR = "US"
    small = np.array([[0, 2, 3], [4, 5, 9]], "u2")
    write_slice(tmp_path / "m.dcm", small, ModalityLUTSequence=Sequence([lut]))
    np.testing.assert_array_equal(read_slice(tmp_path / "m.dcm"), [[10, 10, 20], [200, 255, 255]])
    write_slice(tmp_path / "v.dcm", small, VOILUTSequence=Sequence([lut]), PhotometricInterpretation="MONOCHROME1")
    shown = read_slice(tmp_path / "v.dcm", Rules(display=True))
    np.testing.assert_allclose(shown, 1 - np.array([[10, 10, 20], [200, 255, 255]]) / 255, atol=1e-6)
    write_slice(tmp_path / "n.dcm", small)
    with pytest.raises(Unusable, match="no window"):
        read_slice(tmp_path / "n.dcm", Rules(display=True))


def test_palette_and_colour_become_luminance(test_data: Any) -> None:
    from pydicom.pixels import apply_color_lut, convert_color_space

    folder = test_data("dicom_variety")
    take = Rules(colour="luminance")
    weights = np.array([0.299, 0.587, 0.114])
    for name in (
        "pydicom/examples_palette.dcm",
        "pydicom/examples_rgb_color.dcm",
        "pydicom/SC_ybr_full_422_uncompressed.dcm",
    ):
        ds = pydicom.dcmread(folder / name)
        rgb = apply_color_lut(ds.pixel_array, ds) if "palette" in name else pydicom.pixels.pixel_array(ds)
        np.testing.assert_allclose(read_slice(folder / name, take), rgb @ weights, rtol=1e-5, atol=1e-3)
        with pytest.raises(Unusable, match="colour"):
            read_header(folder / name)
    raw = pydicom.pixels.pixel_array(pydicom.dcmread(folder / name), raw=True)
    np.testing.assert_array_equal(rgb, convert_color_space(raw, "YBR_FULL", "RGB"))


def test_suv_by_body_weight_is_the_formula(tmp_path: Path) -> None:
    """70 kg, 350 MBq of F-18 injected an hour before the scan; without the weight, values stay in Bq/ml."""
    stored = noise((5, 5), 0, "u2")
    drug = item(RadionuclideTotalDose="350e6", RadionuclideHalfLife="6588", RadiopharmaceuticalStartTime="090000")
    tags: dict[str, Any] = {
        "Modality": "PT", "Units": "BQML", "DecayCorrection": "START", "CorrectedImage": ["ATTN", "DECY"],
        "PatientWeight": "70", "SeriesDate": "20200102", "SeriesTime": "100000.5", "AcquisitionDate": "20200102",
        "AcquisitionTime": "100010", "RescaleSlope": "2", "RescaleIntercept": "0",
        "RadiopharmaceuticalInformationSequence": Sequence([drug]),
    }  # fmt: skip
    write_slice(tmp_path / "a.dcm", stored, **tags)
    dose = 350e6 * 2 ** (-3600 / 6588)
    np.testing.assert_allclose(read_slice(tmp_path / "a.dcm"), stored * 2.0 * 70000 / dose, rtol=1e-5)
    write_slice(tmp_path / "b.dcm", stored, leave_out=["PatientWeight"], **tags)
    np.testing.assert_allclose(read_slice(tmp_path / "b.dcm"), stored * 2.0)
    write_slice(tmp_path / "c.dcm", stored, **{**tags, "DecayCorrection": "ADMIN"})
    np.testing.assert_allclose(read_slice(tmp_path / "c.dcm"), stored * 2.0 * 70000 / 350e6, rtol=1e-5)
    (tmp_path / "a.dcm").unlink()
    assert any("1 of 2 PET" in n for n in scans(tmp_path, 2).notes)


# Enhanced objects and series of several volumes


def write_enhanced(path: Path, volume: np.ndarray, patient: str, echoes: int = 1, slopes: Any = None) -> None:
    """Write (frames, rows, columns) as one enhanced MR object: frames 2 mm apart, `echoes` of them at each place."""
    groups = []
    for i in range(len(volume)):
        group = item(
            PlanePositionSequence=Sequence([item(ImagePositionPatient=[1, 2, 2.0 * (i // echoes)])]),
            MREchoSequence=Sequence([item(EffectiveEchoTime=10.0 * (1 + i % echoes))]),
        )
        if slopes is not None:
            values = item(RescaleIntercept="0", RescaleSlope=str(slopes[i]), RescaleType="US")
            group.PixelValueTransformationSequence = Sequence([values])
        groups.append(group)
    shared = item(
        PlaneOrientationSequence=Sequence([item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]),
        PixelMeasuresSequence=Sequence([item(PixelSpacing=[0.5, 0.8], SliceThickness="2")]),
    )
    write_slice(
        path, volume, leave_out=["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"], Modality="MR",
        PatientID=patient, NumberOfFrames=len(volume), PerFrameFunctionalGroupsSequence=Sequence(groups),
        SharedFunctionalGroupsSequence=Sequence([shared]),
    )  # fmt: skip


def test_enhanced_object_is_the_volume_of_its_classic_twin(tmp_path: Path) -> None:
    volume, slopes = noise((4, 5, 6), 0), [1, 2, 3, 4]
    write_enhanced(tmp_path / "e" / "a.dcm", volume[::-1], "A", slopes=slopes)
    for k in range(4):
        write_slice(
            tmp_path / "c" / f"{k}.dcm", volume[::-1][k], SeriesInstanceUID="1.2", PixelSpacing=[0.5, 0.8],
            ImagePositionPatient=[1, 2, 2.0 * k], RescaleSlope=str(slopes[k]), RescaleIntercept="0",
        )  # fmt: skip
    ours, twin = (scans(tmp_path / k).scans[0].read() for k in "ec")
    np.testing.assert_array_equal(ours.array, twin.array)
    np.testing.assert_allclose(ours.affine, twin.affine)
    np.testing.assert_array_equal(ours.array[:, :, 3], volume[0].T * 4)


def test_echoes_of_an_enhanced_object_are_volumes_of_one_patient(tmp_path: Path) -> None:
    volume = noise((8, 5, 6), 0)
    write_enhanced(tmp_path / "a.dcm", volume, "A", echoes=2)
    found = scans(tmp_path).scans
    assert [s.patient for s in found] == ["A", "A"]
    for echo, scan in enumerate(found):
        np.testing.assert_array_equal(scan.read().array, volume[echo::2].transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("tag", "values"),
    [
        ("EchoTime", ["5", "10"]),
        ("DiffusionBValue", [0.0, 1000.0]),
        ("TemporalPositionIdentifier", [1, 2]),
        ("AcquisitionNumber", [1, 2]),
        ("TriggerTime", ["0", "50"]),
        ("ImageType", [["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]]),
    ],
)
def test_a_series_of_several_volumes_is_split(tmp_path: Path, tag: str, values: list[Any]) -> None:
    for v, value in enumerate(values):
        volume = noise((4, 5, 6), v)
        write_series(tmp_path / str(v), volume, "A", SeriesInstanceUID="1.2.3", **{tag: value})
    source = scans(tmp_path)
    assert not source.skipped
    arrays = [s.read().array for s in source.scans]
    assert len(arrays) == 2
    for v in range(2):
        assert any(np.array_equal(a, noise((4, 5, 6), v).transpose(2, 1, 0)) for a in arrays)


def test_a_tag_that_varies_along_one_volume_does_not_tear_it(tmp_path: Path) -> None:
    for k in range(6):
        write_slice(
            tmp_path / f"{k}.dcm", noise((5, 6), k), SeriesInstanceUID="1.2", ImagePositionPatient=[0, 0, 2.0 * k],
            AcquisitionNumber=k, EchoTime=str(5 + k % 2),
        )  # fmt: skip
    assert [s.read().array.shape for s in scans(tmp_path).scans] == [(6, 5, 6)]


def test_a_localizer_in_another_orientation_is_a_stack_of_its_own(tmp_path: Path) -> None:
    write_series(tmp_path / "a", noise((4, 5, 6), 0), "A", SeriesInstanceUID="1.2")
    for k in range(3):
        write_slice(
            tmp_path / "b" / f"{k}.dcm", noise((5, 6), 10 + k), SeriesInstanceUID="1.2", PatientID="A",
            ImageOrientationPatient=[0, 1, 0, 0, 0, -1], ImagePositionPatient=[3.0 * k, 0, 0],
        )  # fmt: skip
    assert sorted(s.read().array.shape[2] for s in scans(tmp_path).scans) == [3, 4]


def test_copies_are_dropped(tmp_path: Path) -> None:
    """The same instance twice, and the same pixels at the same place under a new instance."""
    write_series(tmp_path / "a", noise((4, 5, 6), 0), "A", SeriesInstanceUID="1.2")
    (tmp_path / "copy.dcm").write_bytes((tmp_path / "a" / "0.dcm").read_bytes())
    ds = pydicom.dcmread(tmp_path / "a" / "1.dcm")
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    ds.save_as(tmp_path / "again.dcm")
    source = scans(tmp_path)
    assert dict(source.skipped) == {"duplicate file": 1, "same pixels as another file": 1}
    np.testing.assert_array_equal(source.scans[0].read().array, noise((4, 5, 6), 0).transpose(2, 1, 0))
    ds.PixelData = noise((5, 6), 99).tobytes()
    ds.save_as(tmp_path / "again.dcm")
    source = scans(tmp_path)
    assert source.skipped["two slices at one place"] == 1


def test_cine_by_rule(tmp_path: Path) -> None:
    frames = noise((3, 5, 6), 0)
    tags = {"Modality": "US", "NumberOfFrames": 3}
    write_slice(tmp_path / "a.dcm", frames, leave_out=["ImagePositionPatient"], **tags)
    assert scans(tmp_path, 2).skipped == {"several frames and no rule for them": 1}
    (first,) = scans(tmp_path, 2, frames="first").scans
    np.testing.assert_array_equal(first.read().array[..., 0], frames[0].T)
    (mean,) = scans(tmp_path, 2, frames="mean").scans
    np.testing.assert_allclose(mean.read().array[..., 0], frames.mean(axis=0).T, rtol=1e-5)
    every = scans(tmp_path, 2, frames="all").scans
    assert [np.array_equal(s.read().array[..., 0], f.T) for s, f in zip(every, frames, strict=True)] == [True] * 3


def test_burned_in_text_is_noted_or_left(tmp_path: Path, run: Any) -> None:
    for i, tags in enumerate(({}, {"BurnedInAnnotation": "YES"}, {"BurnedInAnnotation": "NO"}, {})):
        write_slice(tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), PatientID=str(i), **tags)
    assert any(n.startswith("1 images are of a kind") for n in run(tmp_path / "in", shape=(8, 8)).info["notes"])
    info = run(tmp_path / "in", shape=(8, 8), burned_in="skip").info
    assert info["skipped"] == [{"reason": "may show burned-in text", "count": 1}]


def test_burned_in_text_is_refused(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3, one sentence with counts and the remedy, and nothing written; without such images all is well."""
    from medvae.cli_run import run as command

    kinds = ({"BurnedInAnnotation": "YES"}, {"Modality": "US"}, {}, {"BurnedInAnnotation": "NO"}, {})
    for i, tags in enumerate(kinds):
        write_slice(tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), PatientID=f"planted{i}", **tags)
    asked = [
        *("ingest", str(tmp_path / "in"), "-o", str(tmp_path / "cohort"), "--shape", "8x8", "--holdout", "0"),
        *("--burned-in", "refuse", "--quiet"),
    ]
    monkeypatch.setenv("MEDVAE_TRACKING", "off")
    assert command(asked) == 3
    said = capfd.readouterr().err
    assert "2 of 5 files may show burned-in text" in said
    assert "--burned-in skip" in said
    assert not any(word in said for word in ("planted", str(tmp_path), "Traceback"))
    assert {p.name for p in tmp_path.iterdir()} == {"in"}
    for i in (0, 1):
        (tmp_path / "in" / f"{i}.dcm").unlink()
    assert command(asked) == 0


# Geometry


def ramp(x: Any, y: Any, z: Any) -> Any:
    """A linear function of the place in LPS mm, which linear interpolation keeps."""
    return 500 + 3.0 * x - 2.0 * y + 4.0 * z


@pytest.mark.parametrize("fault", ["tilt", "uneven", "both"])
def test_crooked_stacks_are_resampled_onto_a_true_grid(tmp_path: Path, fault: str) -> None:
    """Wherever slices cover it, the straight volume shows at each voxel the value of that place in the patient."""
    x, y = np.meshgrid(np.arange(20) * 0.8, np.arange(24) * 0.5)
    z = np.arange(9) * 2.0
    if fault != "tilt":
        z[3] += 0.7
        z[6] -= 0.4
    tilt = 0.3 if fault != "uneven" else 0.0
    for k, height in enumerate(z):
        place = (5.0, -7.0 + tilt * height, height)
        pixels = ramp(x + place[0], y + place[1], place[2])
        write_slice(
            tmp_path / f"{k}.dcm", np.rint(pixels * 10).astype("i2"), SeriesInstanceUID="1.2", PixelSpacing=[0.5, 0.8],
            ImagePositionPatient=list(place), RescaleSlope="0.1", RescaleIntercept="0",
        )  # fmt: skip
    assert sum(scans(tmp_path).skipped.values()) == 1
    (scan,) = scans(tmp_path, slice_gap="resample").scans
    volume = scan.read()
    lps = np.diag([-1, -1, 1, 1]) @ volume.affine
    index = np.indices(volume.array.shape).reshape(3, -1)
    places = lps[:3, :3] @ index + lps[:3, 3:]
    want = ramp(*places).reshape(volume.array.shape)
    inside = places[1].reshape(want.shape) >= -7 + tilt * places[2].reshape(want.shape) + 0.51
    inside &= places[1].reshape(want.shape) <= -7 + 23 * 0.5 + tilt * places[2].reshape(want.shape) - 0.51
    assert inside.mean() > 0.6
    np.testing.assert_allclose(volume.array[inside], want[inside], atol=0.2)
    steps = np.linalg.norm(lps[:3, :3], axis=0)
    np.testing.assert_allclose(steps, [0.8, 0.5, 2.0], atol=1e-6)
    assert abs(lps[:3, 1] @ lps[:3, 2]) < 1e-9


def test_a_long_hole_is_not_made_up(tmp_path: Path) -> None:
    for k, z in enumerate((0, 2, 4, 20, 22, 24)):
        write_slice(
            tmp_path / f"{k}.dcm", noise((5, 6), k), SeriesInstanceUID="1", ImagePositionPatient=[0, 0, float(z)]
        )
    assert dict(scans(tmp_path, slice_gap="resample").skipped) == {"too long a hole in the series": 1}


def dcm2niix(folder: Path, out: Path) -> list[Any]:
    out.mkdir()
    command = ["dcm2niix", "-b", "n", "-z", "n", "-f", "%p_%s_%d_%i", "-o", str(out), str(folder)]
    try:
        subprocess.run(command, capture_output=True, check=False, timeout=120)
    except FileNotFoundError:
        pytest.skip("dcm2niix is not here: apt-get install dcm2niix")
    return [nibabel.load(p) for p in sorted(out.glob("*.nii"))]


def same_in_space(ours: Any, theirs: Any) -> bool:
    """Whether both hold the same values at the same places, whatever the order of their axes."""
    a = nibabel.as_closest_canonical(nibabel.Nifti1Image(ours.array, ours.affine))
    b = nibabel.as_closest_canonical(theirs)
    near = a.shape == b.shape and np.allclose(a.affine, b.affine, atol=2e-3)
    if not near:
        return False
    x, y = a.get_fdata(), b.get_fdata()
    padding = y == y.min()  # we give it the least value beside it, dcm2niix keeps its own
    return np.allclose(x[~padding], y[~padding], rtol=1e-4, atol=0.6) and bool((x[padding] <= x[~padding].min()).all())


def test_volumes_equal_dcm2niix(tmp_path: Path, test_data: Any) -> None:
    """Three real MR series: the same voxels at the same places."""
    for i, study in enumerate(sorted(p for p in test_data("btp_hcrop_dicom").iterdir() if p.is_dir())):
        theirs = dcm2niix(study, tmp_path / str(i))
        ours = [s.read() for s in scans(study).scans]
        assert len(ours) == len(theirs) == 1
        assert same_in_space(ours[0], theirs[0])


def test_slices_equal_dcm2niix(tmp_path: Path, test_data: Any) -> None:
    """Single CT slices, prone and turned ones among them, and an enhanced CT: the same voxels at the same places."""
    with tarfile.open(test_data("ct_tcga_luad") / "slices.tar.xz") as archive:
        archive.extractall(tmp_path / "all", filter="data")
    files = sorted(p for p in (tmp_path / "all").rglob("*") if p.is_file())[:8]
    files.append(next((test_data("dicom_variety") / "cornerstone").glob("CT0012*")))
    same = 0
    for i, path in enumerate(files):
        (tmp_path / f"in{i}").mkdir()
        (tmp_path / f"in{i}" / "a.dcm").write_bytes(path.read_bytes())
        theirs = dcm2niix(tmp_path / f"in{i}", tmp_path / f"out{i}")
        found = scans(tmp_path / f"in{i}", None).scans
        if len(theirs) != 1 or theirs[0].ndim != 3:
            continue  # dcm2niix does not decode it
        (scan,) = found
        assert same_in_space(scan.read(), theirs[0]), i
        same += 1
    assert same >= 7


# Segmentations


def write_seg(path: Path, series: Path, mask: np.ndarray) -> None:
    """Write a segmentation of (slices, rows, columns) with highdicom, for images in the order of their heights."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    images = sorted((pydicom.dcmread(p) for p in series.iterdir()), key=lambda d: float(d.ImagePositionPatient[2]))
    for ds in images:
        ds.SliceThickness = 2
        for tag in ("StudyInstanceUID", "FrameOfReferenceUID"):
            setattr(ds, tag, "1.2.3")
        for tag in ("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber",
                    "ReferringPhysicianName", "StudyID"):  # fmt: skip
            setattr(ds, tag, "")
    described = [
        hd.seg.SegmentDescription(
            n, f"part {n}", codes.SCT.Organ, codes.SCT.Liver, hd.seg.SegmentAlgorithmTypeValues.MANUAL
        )
        for n in range(1, int(mask.max()) + 1)
    ]
    hd.seg.Segmentation(
        images, mask, hd.seg.SegmentationTypeValues.BINARY, described, hd.UID(), 9, hd.UID(), 1, "m", "n", "1", "2",
        omit_empty_frames=True,
    ).save_as(path)  # fmt: skip


def test_segmentations_are_masks(tmp_path: Path, run: Any) -> None:
    masks = {}
    for p in "AB":
        volume = noise((5, 8, 9), ord(p))
        write_series(tmp_path / "in" / p / "mr", volume, p, FrameOfReferenceUID="1.2.3")
        mask = np.zeros(volume.shape, np.uint8)
        mask[1:3, 2:5, 1:4] = 1
        mask[3, 6:8, 5:9] = 2
        masks[p] = mask
        write_seg(tmp_path / "in" / p / "seg.dcm", tmp_path / "in" / p / "mr", mask)
    source = scans(tmp_path / "in")
    for scan in source.scans:
        volume = scan.read()
        np.testing.assert_array_equal(volume.mask, masks[scan.patient].transpose(2, 1, 0))
    store = run(tmp_path / "in", shape=(9, 8, 5))
    assert store.space.mask_labels == (1, 2)
    assert store.info["masks"]
    flat = scans(tmp_path / "in", 2).scans
    got = sum(int((s.read().mask > 0).sum()) for s in flat)
    assert got == sum(int((m > 0).sum()) for m in masks.values())
    import shutil

    shutil.rmtree(tmp_path / "in" / "A" / "mr")
    write_series(tmp_path / "in" / "C", noise((5, 8, 9), 7), "C")
    assert scans(tmp_path / "in").skipped["mask without an image"] == 1


def test_a_segmentation_on_another_grid_is_counted(tmp_path: Path) -> None:
    volume = noise((5, 8, 9), 0)
    write_series(tmp_path / "mr", volume, "A", FrameOfReferenceUID="1.2.3")
    write_seg(tmp_path / "seg.dcm", tmp_path / "mr", (volume > 500).astype(np.uint8))
    for path in (tmp_path / "mr").iterdir():
        ds = pydicom.dcmread(path)
        ds.ImagePositionPatient = [float(ds.ImagePositionPatient[0]) + 3, *ds.ImagePositionPatient[1:]]
        ds.save_as(path)
    (scan,) = scans(tmp_path).scans
    with pytest.raises(Unusable, match="fits no series"):
        scan.read()


# Patients and tables


def test_an_id_with_and_without_an_issuer_is_one_patient(tmp_path: Path, run: Any) -> None:
    """Taking two persons for one costs quality, one for two costs privacy."""
    for i, issuer in enumerate(("north", "", "")):
        write_slice(tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), PatientID="1", IssuerOfPatientID=issuer)
    write_slice(tmp_path / "in" / "9.dcm", noise((8, 8), 9), PatientID="2")
    info = run(tmp_path / "in", shape=(8, 8)).info
    assert (info["patients"], info["images"]) == (2, 4)
    assert any("with and without an issuer" in n for n in info["notes"])


def test_a_dicom_tree_uses_its_own_table(tmp_path: Path, run: Any) -> None:
    rows = []
    for i in range(4):
        write_slice(tmp_path / "in" / f"{i}.dcm", noise((8, 8), i), PatientID=f"p{i}")
        rows.append({"PatientID": f"p{i}", "grade": "ab"[i % 2]})
    write_table(tmp_path / "in" / "table.csv", rows)
    assert run(tmp_path / "in", shape=(8, 8), conditions=("grade",)).info["conditions"]["grade"]["classes"] == [
        "a",
        "b",
    ]
    write_table(tmp_path / "in" / "table.csv", [{"protocol": "x", "kvp": "120"}])
    assert any("does not fit" in n for n in run(tmp_path / "in", shape=(8, 8)).info["notes"])
