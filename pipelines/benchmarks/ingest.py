"""Ingest beside plain decoding: the same files through pydicom or nibabel and the same resampling.

    python pipelines/benchmarks/ingest.py speed SOURCE [--labels table.csv] [--shape 64 64] [--workers 1 2]
    python pipelines/benchmarks/ingest.py speed --generate dicom --studies 60
    python pipelines/benchmarks/ingest.py memory --generate dicom --studies 100 1000 10000

The plain loop knows neither patients nor tables, checks nothing and keeps nothing: the ratio is what grouping,
checking, masks and storing cost. Sides take turns, each in a process of its own that has done the same once before, so
that imports are not counted; medians of `--rounds`. CPU seconds are those of all processes, and tell on a busy machine
what wall seconds cannot.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from medvae.config import IngestConfig
from medvae.vault.discover import discover
from medvae.vault.ingest import ingest

SLICES = {"speed": (32, 256), "memory": (4, 32)}  # slices of a generated study, and their rows and columns


def plain_dicom(files: tuple[Path, ...], shape: tuple[int, ...]) -> int:
    import pydicom

    resize = _resize(shape)
    series: dict[str, list[tuple[float, np.ndarray]]] = defaultdict(list)
    for path in files:
        ds = pydicom.dcmread(path)
        pixels = ds.pixel_array * np.float32(ds.get("RescaleSlope", 1)) + np.float32(ds.get("RescaleIntercept", 0))
        pixels = pixels.astype(np.float32)
        if len(shape) == 2:
            resize(pixels[None])
            continue
        if ds.SeriesInstanceUID not in series and series:  # the files lie series by series
            _stack(series.popitem()[1], resize)
        series[ds.SeriesInstanceUID].append((float(ds.ImagePositionPatient[2]), pixels))
    for slices in series.values():
        _stack(slices, resize)
    return len(files)


def _stack(slices: list[tuple[float, np.ndarray]], resize: Any) -> None:
    resize(np.stack([p.T for _, p in sorted(slices, key=lambda s: s[0])], axis=-1)[None])


def plain_nifti(files: tuple[Path, ...], shape: tuple[int, ...]) -> int:
    import nibabel

    resize = _resize(shape)
    for path in files:
        resize(nibabel.load(path).get_fdata(dtype=np.float32)[None])
    return len(files)


def _resize(shape: tuple[int, ...]) -> Any:
    """Return what ingest resamples with: the mean over areas where no axis grows, else smoothed and linear."""
    from monai.transforms import Resize

    down = Resize(shape, mode="area")
    other = Resize(shape, mode="trilinear" if len(shape) == 3 else "bilinear", anti_aliasing=True)

    def resize(array: np.ndarray) -> Any:
        smaller = all(new <= old for new, old in zip(shape, array.shape[1:], strict=True))
        return down(array) if smaller else other(array)

    return resize


def ours(source: Path, config: IngestConfig, room: Path) -> int:
    with tempfile.TemporaryDirectory(dir=room) as folder:
        return len(discover(source).files) if ingest(source, Path(folder) / "cohort", config)["images"] else 0


def measure(work: Callable[..., int], *args: Any, before: int = 1) -> dict[str, float]:
    """Run in a fresh process, after as many runs that are not counted."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_timed, work, args, before).result()


def _timed(work: Callable[..., int], args: tuple[Any, ...], warm: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    for _ in range(warm):
        work(*args)
    before, begin = _cpu(), time.perf_counter()
    files = work(*args)
    seconds, cpu = time.perf_counter() - begin, _cpu() - before
    own, children = (resource.getrusage(w).ru_maxrss / 1024 for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"files": files, "seconds": seconds, "cpu": cpu, "peak_mb": own, "worker_mb": children}


def _cpu() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in both)


def generate(kind: str, folder: Path, studies: int, slices: int, side: int) -> Path:
    """Write studies of one series each: CT-like DICOM slices, or one .nii.gz."""
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(side), np.arange(side)) % 1000
    source = folder / f"{kind}-{studies}"
    source.mkdir()
    for study in range(studies):
        volume = (ramp + rng.integers(0, 1000, (slices, side, side))).astype(np.int16)
        if kind == "nifti":
            import nibabel

            nibabel.save(nibabel.Nifti1Image(volume.T, np.eye(4)), source / f"s{study:05}.nii.gz")
        else:
            _write_series(source / f"s{study:05}", volume, study)
    if kind == "nifti":
        rows = "".join(f"s{s:05}.nii.gz,{s}\n" for s in range(studies))
        (folder / f"{kind}-{studies}.csv").write_text("file,patient_id\n" + rows)
    return source


def _write_series(folder: Path, volume: np.ndarray, study: int) -> None:
    import pydicom
    from pydicom.dataset import FileMetaDataset

    folder.mkdir()
    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    ds.Modality, ds.PatientID, ds.PatientName = "CT", f"P{study}", "Doe"
    ds.SeriesInstanceUID, ds.StudyInstanceUID = f"1.2.{study}.1", f"1.2.{study}"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = volume.shape[1:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleSlope, ds.RescaleIntercept, ds.WindowCenter, ds.WindowWidth = 1, -1024, 40, 400
    ds.PixelSpacing, ds.SliceThickness, ds.ImageOrientationPatient = [1, 1], 2, [1, 0, 0, 0, 1, 0]
    ds.Manufacturer, ds.KVP, ds.StudyDate, ds.BodyPartExamined = "Made up", 120, "20200101", "CHEST"
    for k, pixels in enumerate(volume):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.{study}.1.{k}"
        ds.ImagePositionPatient, ds.InstanceNumber = [0, 0, 2.0 * k], k + 1
        ds.PixelData = pixels.tobytes()
        ds.save_as(folder / f"{k:03}.dcm", enforce_file_format=True)


def speed(args: argparse.Namespace, room: Path) -> dict[str, Any]:
    source, labels = args.source, args.labels
    if source is None:
        source = generate(args.generate, room, args.studies[0], *SLICES["speed"])
        labels = room / f"{source.name}.csv" if args.generate == "nifti" else None
    found = discover(source)
    plain = plain_dicom if found.layout == "dicom" else plain_nifti
    shape = tuple(args.shape or (32, 32, 32))
    sides: dict[str, Callable[[], dict[str, float]]] = {"plain": lambda: measure(plain, found.files, shape)}
    for workers in args.workers:
        config = IngestConfig(labels=labels, shape=shape, holdout=0.0, workers=workers)
        sides[f"ingest, {workers} processes"] = lambda config=config: measure(ours, source, config, room)
    rounds = [{name: side() for name, side in sides.items()} for _ in range(args.rounds)]
    rows = {name: {key: statistics.median(r[name][key] for r in rounds) for key in rounds[0][name]} for name in sides}
    for row in rows.values():
        row["speed"] = rows["plain"]["seconds"] / row["seconds"] * row["files"] / rows["plain"]["files"]
        row["cpu_speed"] = rows["plain"]["cpu"] / row["cpu"] * row["files"] / rows["plain"]["files"]
    return {"layout": found.layout, "shape": shape, "rows": rows}


def memory(args: argparse.Namespace, room: Path) -> dict[str, Any]:
    rows = {}
    for studies in args.studies:
        source = generate(args.generate, room, studies, *SLICES["memory"])
        labels = room / f"{source.name}.csv" if args.generate == "nifti" else None
        config = IngestConfig(labels=labels, shape=(8, 8, 4), holdout=0.0)
        rows[f"{studies} studies"] = row = measure(ours, source, config, room, before=0)
        print(f"{studies} studies, {row['files']} files: {row['seconds']:.0f} s, {row['peak_mb']:.0f} MB", flush=True)
    return {"layout": args.generate, "shape": (8, 8, 4), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--generate", choices=("dicom", "nifti"), default="dicom")
    parser.add_argument("--studies", type=int, nargs="+", default=[60])
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--shape", type=int, nargs="+")
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        result = (speed if args.what == "speed" else memory)(args, Path(room))
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['layout']} to {'x'.join(map(str, result['shape']))}")
    for name, row in result["rows"].items():
        beside = f" {row['speed']:>6.2f} {row['cpu_speed']:>6.2f}" if "speed" in row else ""
        print(
            f"{name:<22}{row['files']:>7.0f} files {row['seconds']:>8.2f} s {row['cpu']:>8.2f} s CPU "
            f"{row['peak_mb']:>6.0f} MB{beside}"
        )


if __name__ == "__main__":
    main()
