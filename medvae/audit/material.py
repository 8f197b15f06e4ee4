"""What an audit looks at: scans as arrays with their patients, real or synthetic, a bounded number of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from medvae.types import Batch, Condition, ConditionValue, FloatArray, ImageSpace, SyntheticCohort, encode_conditions

Ints = npt.NDArray[np.int64]

# A gigabyte of float32 in each of the real splits: the audit streams no further than it needs.
MAX_ELEMENTS = 250_000_000
LOAD_ROWS = 64


class Store(Protocol):
    """What the audit asks of a cohort store (vault/store.py)."""

    @property
    def space(self) -> ImageSpace:
        """The image space of the cohort."""

    def patients(self, split: Any) -> Ints:
        """Indices of the patients of "train" or "holdout"."""

    def rows(self, patients: Ints) -> Ints:
        """Rows of the scans of these patients."""

    def load(self, rows: Ints) -> Batch:
        """Scans of these rows."""

    def fingerprint(self) -> str:
        """Keyed digest of the cohort's content."""


@dataclass(frozen=True)
class Scans:
    """x: (N, C, *spatial) with the image in channel 0 and masks after it; condition: (N, K); patient: (N,)."""

    x: FloatArray
    condition: FloatArray
    patient: Ints
    space: ImageSpace

    def __len__(self) -> int:
        return len(self.x)

    @property
    def images(self) -> FloatArray:
        """Images alone, (N, *spatial)."""
        return self.x[:, 0]

    @property
    def patients(self) -> Ints:
        """Distinct patients, sorted."""
        return np.unique(self.patient)

    def take(self, rows: npt.NDArray[Any]) -> Scans:
        """Return the scans of these rows (indices or a boolean mask)."""
        return Scans(self.x[rows], self.condition[rows], self.patient[rows], self.space)

    def of(self, patients: Ints) -> Scans:
        """Return the scans of these patients."""
        return self.take(np.isin(self.patient, patients))

    def column(self, condition: Condition) -> FloatArray:
        """Return the encoded columns (N, width) of one condition."""
        start = 0
        for c in self.space.conditions:
            if c.name == condition.name:
                return self.condition[:, start : start + c.width]
            start += c.width
        raise KeyError(condition.name)

    def labels(self, condition: Condition) -> Ints:
        """Return the class index (N,) of a class condition."""
        return np.asarray(self.column(condition).argmax(1), dtype=np.int64)

    def halves(self, rng: np.random.Generator) -> tuple[Scans, Scans]:
        """Split by patient at random into two halves."""
        order = rng.permutation(self.patients)
        half = len(order) // 2
        return self.of(order[:half]), self.of(order[half:])


def load_scans(store: Store, split: str, max_patients: int, rng: np.random.Generator) -> Scans:
    """Load at most `max_patients` random patients of a split with all of their scans, up to MAX_ELEMENTS numbers.

    Rows are read in small batches into one array.
    """
    space = store.space
    room = max(1, MAX_ELEMENTS // (space.channels * math.prod(space.spatial_shape)))
    every = rng.permutation(np.asarray(store.patients(split), dtype=np.int64))[:max_patients]
    rows = [np.asarray(store.rows(np.asarray([p], dtype=np.int64))) for p in every]
    fits = int(np.searchsorted(np.cumsum([len(r) for r in rows]), room, side="right")) if rows else 0
    flat = np.sort(np.concatenate(rows[: max(1, fits)])) if rows else np.zeros(0, dtype=np.int64)
    x = np.empty((len(flat), space.channels, *space.spatial_shape), dtype=np.float32)
    condition = np.empty((len(flat), space.condition_width), dtype=np.float32)
    patient = np.empty(len(flat), dtype=np.int64)
    for start in range(0, len(flat), LOAD_ROWS):
        batch = store.load(flat[start : start + LOAD_ROWS])
        stop = start + len(batch.x)
        x[start:stop], condition[start:stop], patient[start:stop] = batch.x, batch.condition, batch.patient
    return Scans(x, condition, patient, space)


def subset(scans: Scans, max_patients: int, max_scans: int, rng: np.random.Generator) -> Scans:
    """Return at most `max_patients` random patients, each with at most `max_scans` of their scans."""
    chosen = rng.permutation(scans.patients)[:max_patients]
    rows = [rng.permutation(np.flatnonzero(scans.patient == p))[:max_scans] for p in chosen]
    flat = np.sort(np.concatenate(rows)) if rows else np.zeros(0, dtype=np.int64)
    return scans if len(flat) == len(scans) else scans.take(flat)


def join(a: Scans, b: Scans) -> Scans:
    """Return the scans of both; their patients must differ."""
    return Scans(
        np.concatenate([a.x, b.x]),
        np.concatenate([a.condition, b.condition]),
        np.concatenate([a.patient, b.patient]),
        a.space,
    )


def synthetic_scans(cohort: SyntheticCohort) -> Scans:
    """Return a synthetic cohort in the same form; every scan is its own patient."""
    space = cohort.space
    x = cohort.images[:, None]
    if cohort.masks is not None:
        one_hot = [cohort.masks == label for label in space.mask_labels]
        x = np.concatenate([x, np.stack(one_hot, axis=1)], axis=1, dtype=np.float32)
    rows = [encode_conditions(space.conditions, dict(row)) for row in cohort.conditions]
    condition = np.stack(rows) if rows else np.zeros((0, space.condition_width), dtype=np.float32)
    return Scans(np.asarray(x, dtype=np.float32), condition, np.arange(len(x)), space)


def shrink(scans: Scans, longest: int) -> Scans:
    """Return the scans block-averaged by one whole factor, so that no axis is longer than `longest`.

    Axes are cut to a multiple of the factor; masks become the majority of their block.
    """
    images = block_average(scans.images, longest)
    if images.shape == scans.images.shape:
        return scans
    masks = [block_average(scans.x[:, c], longest) > 0.5 for c in range(1, scans.x.shape[1])]
    x = np.stack([images, *masks], axis=1).astype(np.float32)
    return Scans(x, scans.condition, scans.patient, resized(scans.space, images.shape[1:]))


def block_average(images: FloatArray, longest: int) -> FloatArray:
    """Return images (N, *spatial) averaged over blocks of one whole factor, so that no axis is above `longest`."""
    shape = images.shape[1:]
    factor = math.ceil(max(shape) / longest)
    if factor == 1:
        return images
    small = tuple(max(1, n // factor) for n in shape)
    cut = images[(slice(None), *(slice(0, n * min(factor, o)) for n, o in zip(small, shape, strict=True)))]
    blocks: Sequence[int] = [k for n, o in zip(small, shape, strict=True) for k in (n, min(factor, o))]
    pooled = cut.reshape(len(cut), *blocks).mean(axis=tuple(range(2, 2 + 2 * len(small), 2)))
    return np.asarray(pooled, dtype=np.float32)


def resized(space: ImageSpace, shape: tuple[int, ...]) -> ImageSpace:
    """Return the space with another grid over the same field of view."""
    spacing = tuple(s * o / n for s, o, n in zip(space.spacing_mm, space.spatial_shape, shape, strict=True))
    return ImageSpace(shape, spacing, space.modality, space.intensity, space.conditions, space.mask_labels)


def values_of(condition: Condition, encoded: FloatArray) -> list[ConditionValue]:
    """Return the plain values of encoded columns (N, width)."""
    return [condition.decode(row) for row in encoded]
