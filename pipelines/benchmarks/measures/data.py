"""The cohorts of the measurements: arrays written as .npz and ingested by the product, once a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from leaderboard.rows import ROWS, _from_idx
from PIL import Image

from medvae.config import IngestConfig, build
from medvae.synth.phantom import make_phantom
from medvae.types import Batch
from medvae.vault.ingest import ingest
from medvae.vault.store import CohortStore, open_cohort

Images = npt.NDArray[Any]
FACTORS = ("row", "column", "radius", "elongation", "brightness")


def cohort(folder: Path, arrays: dict[str, Images], **options: Any) -> tuple[Path, CohortStore]:
    """Ingest arrays (train_images, test_images, and labels) into `folder`, unless that was done before."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = folder.with_suffix(".npz")
        np.savez(source, **arrays)
        ingest(source, folder, build(IngestConfig, **options))
    return folder, open_cohort(folder).reveal()


def split(store: CohortStore, name: str) -> Batch:
    """Return all scans of "train" or "holdout"."""
    return store.load(store.rows(store.patients(name)))


def rows_of(batch: Batch, images: Images) -> npt.NDArray[np.int64]:
    """Return where in `images` (N, *spatial), in [0, 1], each scan came from: a cohort has an order of its own."""
    a, b = (x.reshape(len(x), -1).astype(np.float32) for x in (batch.x[:, 0], images))
    return np.asarray((np.square(b).sum(1) - 2 * a @ b.T).argmin(1), dtype=np.int64)


def mnist(data: Path, work: Path) -> dict[str, Images]:
    """Return MNIST's four arrays."""
    npz = work / "sources" / "mnist.npz"
    if not npz.exists():
        _from_idx(data / "mnist", npz)
    with np.load(npz) as found:
        return dict(found)


def mnist_part(data: Path, work: Path, seed: int, train: int, test: int) -> dict[str, Images]:
    """Return `train` training and `test` test digits, chosen by the seed."""
    full, rng = mnist(data, work), np.random.default_rng(seed)
    kept = rng.permutation(len(full["train_images"]))[:train], rng.permutation(len(full["test_images"]))[:test]
    return {
        f"{part}_{kind}": full[f"{part}_{kind}"][rows]
        for part, rows in zip(("train", "test"), kept, strict=True)
        for kind in ("images", "labels")
    }


def pneumonia(data: Path) -> dict[str, Images]:
    """Return PneumoniaMNIST's 4,708 training images, and as test its 524 validation images; 1 is pneumonia."""
    with np.load(data / ROWS["pneumoniamnist"].source) as found:
        return {
            f"{to}_{kind}": found[f"{part}_{kind}"].reshape(len(found[f"{part}_{kind}"]), *tail)
            for part, to in (("train", "train"), ("val", "test"))
            for kind, tail in (("images", (28, 28)), ("labels", ()))
        }


def write_folder(folder: Path, images: Images, column: str, values: Sequence[str]) -> None:
    """Write uint8 images (N, h, w) as PNG, one a patient, with a table of one condition; "" is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"patient_id,file,{column}"]
    for i, (image, value) in enumerate(zip(images, values, strict=True)):
        Image.fromarray(image).save(folder / f"{i}.png")
        rows.append(f"{i},{i}.png,{value}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def hippocampus(data: Path, work: Path, seed: int) -> tuple[Path, CohortStore]:
    """Return hippocampus volumes of 16x24x16 voxels of 2 mm, no masks; the seed holds a fifth of the persons out."""
    folder = work / "cohorts" / f"hippocampus-{seed}"
    if not folder.exists():
        source = data / "msd_hippocampus" / "images"
        options = {"shape": (16, 24, 16), "spacing_mm": (2.0, 2.0, 2.0), "split_seed": seed}
        table = data / "msd_hippocampus" / "volumes.csv"
        ingest(source, folder, build(IngestConfig, **options, labels=table))
    return folder, open_cohort(folder).reveal()


def heads(seed: int, patients: int, side: int) -> tuple[Images, Images]:
    """Return images (N, side, side) of head phantoms, one scan a patient, and their ages (N,)."""
    made = make_phantom(2, patients, seed, size=side, scans=(1, 1))
    return made.images, made.age


def factor_phantoms(seed: int, count: int, side: int = 32) -> tuple[Images, npt.NDArray[np.float64]]:
    """Return images (N, side, side) of one soft ellipse each, and its factors (N, 5), independent and uniform."""
    rng = np.random.default_rng([seed, count])
    unit = rng.random((count, len(FACTORS)))
    row, column = (unit[:, k] * 0.8 - 0.4 for k in (0, 1))
    radius, stretch, level = 0.2 + 0.25 * unit[:, 2], np.exp((unit[:, 3] - 0.5) * 1.2), 0.4 + 0.6 * unit[:, 4]
    axis = np.linspace(-1, 1, side)
    y, x = np.meshgrid(axis, axis, indexing="ij")

    def over(values: Images) -> Images:
        return values[:, None, None]

    far = np.hypot((y - over(row)) / over(radius * stretch), (x - over(column)) / over(radius / stretch))
    return (over(level) / (1 + np.exp((far - 1) * 12))).astype(np.float32), unit


def textures(seed: int, count: int, side: int, length: float) -> Images:
    """Return stationary textures (N, side, side) in [0, 1]: smoothed white noise of correlation length `length`."""
    rng = np.random.default_rng([seed, count, int(100 * length)])
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij"))
    gain = np.exp(-((math.pi * length * frequency) ** 2))
    field = np.fft.ifft2(np.fft.fft2(rng.normal(size=(count, side, side))) * gain / np.sqrt((gain**2).mean())).real
    return np.clip(0.5 + 0.15 * field, 0, 1).astype(np.float32)
