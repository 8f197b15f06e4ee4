"""One Gaussian release of sums by class over coarse scans: what the baselines that are not this product learn from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from leaderboard.rows import CHUNK, class_condition
from medvae.audit.material import Scans, shrink
from medvae.dp.accounting import calibrate_noise, pld_epsilon
from medvae.dp.delta import default_delta
from medvae.dp.noise import NoiseSource
from medvae.types import ImageSpace, Mechanism
from medvae.vault.store import CohortStore

Array = npt.NDArray[np.float64]
Feature = Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]

MOST = {2: 32, 3: 12}  # voxels an axis
COUNT_WEIGHT = 0.3  # of the release's sensitivity; the rest is the sums'


@dataclass(frozen=True)
class Released:
    """Noisy class means of features (K, D), and what they cost: (epsilon, delta), unit patient, add/remove, PLD."""

    means: Array
    epsilon: float
    delta: float


def coarse(scans: Scans) -> Scans:
    """Return the scans block-averaged to the baselines' grid."""
    return shrink(scans, MOST[scans.space.spatial_dims])


def coarse_shape(space: ImageSpace, longest: int) -> tuple[int, ...]:
    """Return (channels, *grid) of coarse scans."""
    empty = np.zeros((1, space.channels, *space.spatial_shape), dtype=np.float32)
    scans = Scans(empty, np.zeros((1, space.condition_width), np.float32), np.zeros(1, np.int64), space)
    return tuple(coarse(shrink(scans, longest)).x.shape[1:])


def release_means(store: CohortStore, longest: int, feature: Feature, epsilon: float, noise: NoiseSource) -> Released:
    """Release the mean of `feature` over the scans of each class, by one Gaussian mechanism at the default delta.

    Counts are released in the same mechanism; noisy ones below a tenth of an equal share are raised to it.
    """
    patients = store.patients("train")
    delta = default_delta(len(patients))
    sigma = calibrate_noise(lambda z: [Mechanism("class sums", z)], epsilon, delta)
    sums = patient_sums(store, patients, longest, feature)
    sums += sigma * noise.normal(sums.size).reshape(sums.shape)
    counts = np.maximum(sums[:, -1] / COUNT_WEIGHT, len(patients) / (10 * len(sums)))
    means = sums[:, :-1] / math.sqrt(1 - COUNT_WEIGHT**2) / counts[:, None]
    return Released(means, pld_epsilon([Mechanism("class sums", sigma)], delta), delta)


def patient_sums(store: CohortStore, patients: npt.NDArray[np.int64], longest: int, feature: Feature) -> Array:
    """Return the sums (K, D + 1) by class of [weighted feature, weighted 1] over patients, not noised.

    feature: coarse scans (B, C, *grid) -> (B, D), of which each row is clipped to norm 1. A patient adds the average
    over their scans of vectors of norm at most 1, so the L2 sensitivity to one patient with all their scans is 1.
    """
    rows = store.rows(patients)
    share = 1 / np.bincount(store.patient)
    total: Array | None = None
    for start in range(0, len(rows), CHUNK):
        batch = store.load(rows[start : start + CHUNK])
        scans = coarse(shrink(Scans(batch.x, batch.condition, batch.patient, store.space), longest))
        phi = np.asarray(feature(scans.x), dtype=np.float64)
        phi /= np.maximum(1.0, np.linalg.norm(phi, axis=1, keepdims=True))
        one = np.full((len(phi), 1), COUNT_WEIGHT)
        members = scans.column(class_condition(scans)).astype(np.float64) * share[scans.patient][:, None]
        part = members.T @ np.concatenate([phi * math.sqrt(1 - COUNT_WEIGHT**2), one], axis=1)
        total = part if total is None else total + part
    if total is None:
        raise SystemExit("the cohort has no training patients")
    return total


def scans_of(maps: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], space: ImageSpace, longest: int) -> Scans:
    """Bring coarse maps (N, C, *grid) in [0, 1] to the judge's resolution, masks as the likeliest label.

    labels: the class index (N,); other conditions are not set.
    """
    empty = np.zeros((1, space.channels, *space.spatial_shape), dtype=np.float32)
    fine = shrink(Scans(empty, np.zeros((1, 0), np.float32), np.zeros(1, np.int64), space), longest)
    shape = fine.x.shape[2:]
    factor = math.ceil(max(shape) / MOST[len(shape)])
    x = torch.from_numpy(np.ascontiguousarray(maps))
    if factor > 1:
        mode = "bilinear" if len(shape) == 2 else "trilinear"
        x = functional.interpolate(x, scale_factor=factor, mode=mode, align_corners=False)
        rest = [n for full, now in zip(shape[::-1], x.shape[:1:-1], strict=True) for n in (0, full - now)]
        x = functional.pad(x, rest, mode="replicate")
    if space.mask_labels:
        likeliest = torch.cat([torch.full_like(x[:, :1], 0.5), x[:, 1:]], dim=1).argmax(1)
        one_hot = functional.one_hot(likeliest, space.channels).movedim(-1, 1)[:, 1:]
        x = torch.cat([x[:, :1], one_hot.to(x.dtype)], dim=1)
    condition = np.zeros((len(labels), space.condition_width), dtype=np.float32)
    start = 0
    for c in space.conditions:
        if c.kind == "class":
            condition[np.arange(len(labels)), start + labels % c.width] = 1
        start += c.width
    return Scans(x.numpy(), condition, np.arange(len(labels)), fine.space)
