"""Ingest rate against plain decoding: the same files through pydicom or nibabel and the same resampling.

    python pipelines/benchmarks/ingest.py SOURCE [--labels table.csv] [--shape 64 64] [--json]

The plain loop knows neither patients nor tables, checks nothing and keeps nothing: the ratio is what grouping,
checking, masks and storing cost. Each side runs in its own process, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from medvae.config import IngestConfig
from medvae.vault.discover import discover
from medvae.vault.ingest import ingest


def plain_dicom(files: tuple[Path, ...], shape: tuple[int, ...]) -> int:
    import pydicom
    from monai.transforms import Resize

    resize = Resize(shape, mode="area")
    for path in files:
        ds = pydicom.dcmread(path)
        pixels = ds.pixel_array * np.float32(ds.get("RescaleSlope", 1)) + np.float32(ds.get("RescaleIntercept", 0))
        resize(pixels[None].astype(np.float32))
    return len(files)


def plain_nifti(files: tuple[Path, ...], shape: tuple[int, ...]) -> int:
    import nibabel
    from monai.transforms import Resize

    resize = Resize(shape, mode="trilinear", anti_aliasing=True)
    for path in files:
        resize(nibabel.load(path).get_fdata(dtype=np.float32)[None])
    return len(files)


def ours(source: Path, config: IngestConfig) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return int(ingest(source, Path(folder) / "cohort", config)["images"])


def measure(work: Callable[..., int], *args: Any) -> dict[str, float]:
    """Run in a fresh process; the first import of torch and MONAI is not counted."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_timed, (work, args))


def _timed(work: Callable[..., int], args: tuple[Any, ...]) -> dict[str, float]:
    import monai.data
    import monai.transforms  # noqa: F401
    import torch

    torch.set_num_threads(1)
    begin = time.perf_counter()
    count = work(*args)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "items": count,
        "seconds": round(seconds, 3),
        "per_second": round(count / seconds, 1),
        "peak_mb": round(peak),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--shape", type=int, nargs="+")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = discover(args.source)
    plain = plain_dicom if found.layout == "dicom" else plain_nifti
    shape = tuple(args.shape or ((64, 64) if found.layout == "dicom" else (32, 32, 32)))
    config = IngestConfig(labels=args.labels, shape=shape, holdout=0.0)
    result = {
        "layout": found.layout,
        "files": len(found.files),
        "shape": shape,
        "plain decoding (files)": measure(plain, found.files, shape),
        "medvae ingest (scans)": measure(ours, args.source, config),
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['layout']}, {result['files']} files, to {'x'.join(map(str, shape))}")
    for name in ("plain decoding (files)", "medvae ingest (scans)"):
        row = result[name]
        print(
            f"{name:<24}{row['items']:>7} {row['seconds']:>8.2f} s {row['per_second']:>8.1f}/s {row['peak_mb']:>6} MB"
        )


if __name__ == "__main__":
    main()
