"""Out and in again: scans written as DICOM come back, voxel for voxel and place for place, by three readers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest

from medvae.config import IngestConfig
from medvae.synth.write_dicom import write_dicom
from medvae.synth.write_nifti import write_nifti
from medvae.types import Intensity, SyntheticCohort
from medvae.vault.dicom import dicom_source
from medvae.vault.discover import discover
from medvae.vault.ingest import ingest
from medvae.vault.store import open_cohort

Maker = Callable[..., SyntheticCohort]
Array = np.ndarray[Any, Any]
KINDS = {
    "mr": ("MR", Intensity("percentile", 0.5, 99.5)),
    "mr-raw": ("MR", Intensity("window", -10, 5000)),
    "ct": ("CT", Intensity("window", -160, 240)),
    "ct-narrow": ("CT", Intensity("window", 0, 80)),
    "pt": ("PT", Intensity("window", 0, 20)),  # multi-frame Secondary Capture
}


def by_medvae(folder: Path) -> tuple[Array, Array]:
    images = folder / "images"
    images.mkdir()
    for path in folder.glob("IM*.dcm"):
        shutil.copy(path, images)
    volume = dicom_source(discover(images), 3, False).scans[0].read()
    assert volume.affine is not None
    return np.asarray(volume.array), volume.affine


def by_simpleitk(folder: Path) -> tuple[Array, Array]:
    sitk = pytest.importorskip("SimpleITK")
    files = sorted(str(p) for p in folder.glob("IM*.dcm"))
    if len(files) > 1:
        uid = str(pydicom.dcmread(files[0], stop_before_pixels=True).SeriesInstanceUID)
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
    image = sitk.ReadImage(files if len(files) > 1 else files[0])
    lps = np.eye(4)
    lps[:3, :3] = np.asarray(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, np.diag([-1, -1, 1, 1]) @ lps


def by_dcm2niix(folder: Path) -> tuple[Array, Array]:
    converter = shutil.which("dcm2niix")
    if converter is None:
        pytest.skip("dcm2niix is not here: apt-get install dcm2niix")
    out = folder.parent / "converted"
    out.mkdir()
    for mask in folder.glob("SEG*"):
        mask.unlink()
    command = [converter, "-z", "n", "-f", "out", "-o", out, folder]
    subprocess.run(command, capture_output=True, check=True)
    image = nib.load(next(out.glob("*.nii")))
    return image.get_fdata(), image.affine


def same(theirs: tuple[Array, Array], path: Path, atol: float = 1e-3) -> None:
    """Compare with a NIfTI of ours, both turned to RAS."""
    ours = nib.as_closest_canonical(nib.load(path))
    image = nib.as_closest_canonical(nib.Nifti1Image(np.asarray(theirs[0], dtype=np.float64), theirs[1]))
    assert image.shape == ours.shape
    np.testing.assert_allclose(image.affine, ours.affine, atol=1e-4)
    np.testing.assert_allclose(image.get_fdata(), ours.get_fdata(), atol=atol)


READERS = (by_medvae, by_simpleitk, by_dcm2niix)
# Debian's dcm2niix reads no multi-frame Secondary Capture.
PAIRS = [(kind, read) for kind in sorted(KINDS) for read in READERS if (kind, read) != ("pt", by_dcm2niix)]


@pytest.mark.parametrize(("kind", "read"), PAIRS)
def test_made_up_scans_come_back(
    kind: str, read: Callable[[Path], tuple[Array, Array]], tmp_path: Path, make_cohort: Maker
) -> None:
    modality, intensity = KINDS[kind]
    cohort = make_cohort((8, 10, 6), modality, intensity, count=1)
    write_dicom(cohort, tmp_path)
    write_nifti(cohort, tmp_path)
    image = next(p for p in (tmp_path / "nifti").rglob("*.nii.gz") if "dseg" not in p.name)
    same(read(tmp_path / "dicom" / "SYN0001"), image)


@pytest.fixture(scope="module")
def hippocampi(tmp_path_factory: pytest.TempPathFactory, test_data: Callable[[str], Path]) -> SyntheticCohort:
    """A real NIfTI cohort, ingested, and put where a synthetic one stands."""
    source = test_data("msd_hippocampus")
    folder = tmp_path_factory.mktemp("cohort")
    for kind in ("images", "labels"):
        (folder / "scans" / kind).mkdir(parents=True)
        for path in sorted((source / kind).glob("*.nii.gz"))[:6]:
            shutil.copy(path, folder / "scans" / kind)
    names = sorted(p.name for p in (folder / "scans" / "images").iterdir())
    (folder / "table.csv").write_text("file,patient_id\n" + "".join(f"images/{n},{n[:15]}\n" for n in names))
    config = IngestConfig(
        shape=(32, 48, 32), spacing_mm=(1.0, 1.0, 1.0), modality="MR", holdout=0.2, labels=folder / "table.csv"
    )
    ingest(folder / "scans", folder / "out", config)
    store = open_cohort(folder / "out").reveal()
    rows = range(len(store))
    images = np.asarray(store.load(rows).x[:, 0])
    return SyntheticCohort(images, store.masks(rows), tuple({} for _ in rows), replace(store.space, conditions=()))


@pytest.mark.parametrize("read", READERS)
def test_a_real_cohort_comes_back(
    read: Callable[[Path], tuple[Array, Array]], hippocampi: SyntheticCohort, tmp_path: Path
) -> None:
    some = replace(hippocampi, images=hippocampi.images[:2], masks=None, conditions=hippocampi.conditions[:2])
    some = replace(some, space=replace(some.space, mask_labels=()))
    write_dicom(some, tmp_path / "a")
    write_nifti(some, tmp_path / "a")
    for name in ("SYN0001", "SYN0002"):
        image = next((tmp_path / "a" / "nifti").rglob(f"*{name}*.nii.gz"))
        folder = Path(shutil.copytree(tmp_path / "a" / "dicom" / name, tmp_path / name / "scan"))
        same(read(folder), image)


def test_a_released_cohort_is_ingested_as_the_one_it_was(
    hippocampi: SyntheticCohort, tmp_path: Path, make_cohort: Maker
) -> None:
    """CT, since its window gives absolute values: images within half a Hounsfield unit, masks from SEG exactly."""
    space = replace(hippocampi.space, modality="CT", intensity=Intensity("window", -160.0, 240.0))
    write_dicom(replace(hippocampi, space=space), tmp_path)
    config = IngestConfig(
        shape=(32, 48, 32), intensity="window", intensity_low=-160, intensity_high=240, holdout=0.2,
    )  # fmt: skip
    ingest(tmp_path / "dicom", tmp_path / "again", config)
    store = open_cohort(tmp_path / "again").reveal()
    assert store.space.spacing_mm == (1.0, 1.0, 1.0)
    rows = range(len(store))
    theirs, masks = np.asarray(store.load(rows).x[:, 0]), store.masks(rows)
    # Patients are numbered anew: pair by what they look like.
    for image, mask in zip(theirs, masks, strict=True) if masks is not None else ():
        gaps = np.abs(hippocampi.images - image).max(axis=(1, 2, 3))
        assert gaps.min() <= 0.5 / 400 + 1e-5
        np.testing.assert_array_equal(mask, hippocampi.masks[int(gaps.argmin())])
    assert masks is not None
