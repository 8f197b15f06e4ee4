"""Speed of the writers beside bare nibabel, pydicom and numpy: python pipelines/benchmarks/write.py --count 20

The bare writers store the same integers with the least that makes a readable file (pydicom: one data set a series,
five attributes changed a slice). Files go to a temporary folder. `ratio` is our speed over theirs, best of three; `cpu`
is the same of processor time, which a busy machine leaves alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from medvae.synth.write_dicom import write_dicom
from medvae.synth.write_nifti import write_nifti
from medvae.synth.write_npz import write_npz
from medvae.types import ImageSpace, Intensity, SyntheticCohort


def smooth_cohort(count: int, shape: tuple[int, ...]) -> SyntheticCohort:
    waves = np.stack(np.meshgrid(*[np.linspace(0, 6, n) for n in shape], indexing="ij")).sum(axis=0)
    noise = np.random.default_rng(0).normal(0, 0.02, (count, *shape))
    images = np.clip(0.5 + 0.4 * np.sin(waves) + noise, 0, 1).astype(np.float32)
    space = ImageSpace(shape, (1.0,) * len(shape), "MR", Intensity("percentile", 0.5, 99.5), ())
    return SyntheticCohort(images, None, tuple({} for _ in range(count)), space)


def bare_nifti(cohort: SyntheticCohort, folder: Path) -> None:
    for i, image in enumerate(cohort.images):
        nib.Nifti1Image((image * 4095).astype(np.int16), np.eye(4)).to_filename(folder / f"{i}.nii.gz")


def bare_dicom(cohort: SyntheticCohort, folder: Path) -> None:
    for i, image in enumerate(cohort.images):
        d = _bare_series(image.shape)
        for z, frame in enumerate((image * 4095).astype("<u2").transpose(2, 1, 0)):
            d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid()
            d.InstanceNumber = z + 1
            d.ImagePositionPatient = [0, 0, z]
            d.PixelData = frame.tobytes()
            d.save_as(folder / f"{i}_{z}.dcm", enforce_file_format=True)


def _bare_series(shape: tuple[int, ...]) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    d.SOPClassUID = MRImageStorage
    d.Modality, d.PatientName, d.PatientID = "MR", "A^B", "1"
    d.PatientBirthDate = d.PatientSex = d.StudyDate = d.StudyTime = d.AccessionNumber = d.ReferringPhysicianName = ""
    d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = generate_uid(), generate_uid(), generate_uid()
    d.StudyID, d.SeriesNumber, d.Manufacturer = "1", 1, "bare"
    d.ImageOrientationPatient, d.PixelSpacing, d.SliceThickness = [1, 0, 0, 0, 1, 0], [1, 1], 1
    d.ScanningSequence, d.SequenceVariant, d.MRAcquisitionType = "RM", "NONE", "3D"
    d.SamplesPerPixel, d.PhotometricInterpretation, d.Rows, d.Columns = 1, "MONOCHROME2", shape[1], shape[0]
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 12, 11, 0
    return d


def bare_npz(cohort: SyntheticCohort, folder: Path) -> None:
    np.savez_compressed(folder / "cohort.npz", images=cohort.images)


def seconds(write: Callable[[SyntheticCohort, Path], object], cohort: SyntheticCohort) -> tuple[float, float]:
    """Return wall and processor seconds."""
    with tempfile.TemporaryDirectory() as folder:
        start, cpu = time.perf_counter(), time.process_time()
        write(cohort, Path(folder))
        return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 64, 48))
    args = parser.parse_args()
    cohort = smooth_cohort(args.count, tuple(args.shape))
    shape = "x".join(map(str, args.shape))
    print(f"{'format':8} {'ours/s':>8} {'bare/s':>8} {'ratio':>6} {'cpu':>6}   volumes of {shape}")
    pairs = (("nifti", write_nifti, bare_nifti), ("dicom", write_dicom, bare_dicom), ("npz", write_npz, bare_npz))
    for name, ours, bare in pairs:
        # Taken in turns, so that a busy machine slows both alike.
        times = [(seconds(ours, cohort), seconds(bare, cohort)) for _ in range(3)]
        our, their = (np.min(side, axis=0) for side in zip(*times, strict=True))
        wall, cpu = their / our
        print(f"{name:8} {args.count / our[0]:8.1f} {args.count / their[0]:8.1f} {wall:6.2f} {cpu:6.2f}")


if __name__ == "__main__":
    main()
