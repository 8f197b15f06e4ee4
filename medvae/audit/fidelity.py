"""How alike real and synthetic scans are: distances and coverage in the public embedding, and diversity.

Every number of this room stands beside the same number between two groups of real patients. Small groups bias all of
them, so both comparisons use groups of the same size; without that, a baseline would flatter or condemn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.audit.intervals import Estimate, mean_interval, normal_bootstrap, patient_weights, percentile_bootstrap

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Wang et al. 2003; with fewer scales the first weights are kept and brought to a sum of one.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
NEIGHBOURS = 5
PAIRS_AT_ONCE = 16


@dataclass(frozen=True)
class Group:
    """Embedded scans (N, D) and whose they are (N,)."""

    features: Floats
    patient: Ints

    def __len__(self) -> int:
        return len(self.features)


def frechet(mean_a: Floats, factor_a: Floats, mean_b: Floats, factor_b: Floats) -> float:
    """Return the squared Fréchet distance of two Gaussians (Dowson & Landau 1982, eq. 16).

    Covariances come as factors F (any rows, D) with cov = F^T F: then tr (cov_a cov_b)^(1/2) is the sum of the
    singular values of F_a F_b^T, which is small where groups are.
    """
    cross = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    spread = np.square(factor_a).sum() + np.square(factor_b).sum()
    return max(0.0, float(np.square(mean_a - mean_b).sum() + spread - 2 * cross))


def frechet_distance(a: Group, b: Group, confidence: float, replicates: int, rng: np.random.Generator) -> Estimate:
    """Return the squared Fréchet distance of two groups (Heusel et al. 2017), with a bootstrap over patients.

    The interval is about its average on this many scans. With few scans that lies above the distance of the two laws,
    so it is read beside the distance between two groups of real patients, which is raised likewise.
    """
    value = frechet(*gaussian_of(a.features, np.ones(len(a))), *gaussian_of(b.features, np.ones(len(b))))
    weights = zip(patient_weights(a.patient, replicates, rng), patient_weights(b.patient, replicates, rng), strict=True)
    draws = [frechet(*gaussian_of(a.features, u), *gaussian_of(b.features, v)) for u, v in weights]
    return normal_bootstrap(value, draws, confidence, _persons(a, b), floor=0.0)


def gaussian_of(x: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """Return the mean (D,) and a factor of the covariance of rows (N, D) that count `weight` times each."""
    used, total = weight > 0, weight.sum()
    mean = weight @ x / total
    factor = (x[used] - mean) * np.sqrt(weight[used] / max(total - 1, 1))[:, None]
    return mean, np.asarray(np.linalg.qr(factor, mode="r")) if len(factor) > factor.shape[1] else factor


def kernel_distance(a: Group, b: Group, confidence: float, replicates: int, rng: np.random.Generator) -> Estimate:
    """Return the unbiased squared MMD with the cubic kernel (Bińkowski et al. 2018), with a bootstrap over patients.

    Pairs of scans of one patient are left out: they are alike for a reason that says nothing about the group. That
    also keeps a patient drawn twice by the bootstrap from being compared with themself.
    """
    d = a.features.shape[1]

    def kernel(x: Floats, y: Floats) -> Floats:
        return np.asarray((x @ y.T / d + 1) ** 3)

    aa = kernel(a.features, a.features) * (a.patient[:, None] != a.patient[None, :])
    bb = kernel(b.features, b.features) * (b.patient[:, None] != b.patient[None, :])
    ab = kernel(a.features, b.features)
    others_a = (a.patient[:, None] != a.patient[None, :]).astype(np.float64)
    others_b = (b.patient[:, None] != b.patient[None, :]).astype(np.float64)

    def squared(u: Floats, v: Floats) -> float:
        within = u @ aa @ u / (u @ others_a @ u) + v @ bb @ v / (v @ others_b @ v)
        return float(within - 2 * (u @ ab @ v) / (u.sum() * v.sum()))

    value = squared(np.ones(len(a)), np.ones(len(b)))
    draws = [
        squared(u, v)
        for u, v in zip(
            patient_weights(a.patient, replicates, rng), patient_weights(b.patient, replicates, rng), strict=True
        )
        if (u > 0).sum() > 1 and u @ others_a @ u > 0 and v @ others_b @ v > 0
    ]
    return normal_bootstrap(value, draws, confidence, _persons(a, b))


def manifold(
    real: Group, made: Group, confidence: float, replicates: int, rng: np.random.Generator
) -> dict[str, Estimate]:
    """Return precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A radius is the distance to the 5th nearest scan of *another* patient. The intervals resample patients while the
    neighbourhoods stay as they are: they tell sampling noise of the scans judged, not of the neighbourhoods.
    """
    k = min(NEIGHBOURS, len(np.unique(real.patient)) - 1, len(np.unique(made.patient)) - 1)
    around_real, around_made = _radii(real, k), _radii(made, k)
    between = distances(made.features, real.features)  # (made, real)
    inside_real = between <= around_real[None, :]
    inside_made = between <= around_made[:, None]
    by_made = {"precision": inside_real.any(1), "density": inside_real.sum(1) / k}
    by_real = {"recall": inside_made.any(0), "coverage": inside_real.any(0)}
    found = {}
    for values, patient in ((by_made, made.patient), (by_real, real.patient)):
        for name, hits in values.items():
            score = np.asarray(hits, dtype=np.float64)
            found[name] = percentile_bootstrap(
                lambda rows, score=score: float(score[rows].mean()),  # type: ignore[misc]
                patient,
                confidence,
                replicates,
                rng,
            )
    return found


def _radii(group: Group, k: int) -> Floats:
    apart = distances(group.features, group.features)
    apart[group.patient[:, None] == group.patient[None, :]] = np.inf
    return np.asarray(np.partition(apart, k - 1, axis=1)[:, k - 1])


def distances(a: Floats, b: Floats) -> Floats:
    """Return the Euclidean distances (len(a), len(b))."""
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(a, b))


def diversity(images: npt.NDArray[Any], patient: Ints, pairs: int, confidence: float, seed: int) -> Estimate | None:
    """Return the mean MS-SSIM between scans of two different patients: 1 when all scans are the same.

    Pairs share no patient, so that Student's interval holds. None where there are fewer than two patients.
    """
    import torch
    from monai.metrics.regression import compute_ms_ssim

    rng = np.random.default_rng(seed)
    persons = rng.permutation(np.unique(patient))
    firsts = np.asarray([int(np.flatnonzero(patient == p)[0]) for p in persons])
    count = min(pairs, len(firsts) // 2)
    if count < 2:
        return None
    left, right = firsts[:count], firsts[count : 2 * count]
    kernel, weights = ms_ssim_settings(images.shape[1:])
    pairs_of = [torch.from_numpy(np.ascontiguousarray(images[side])).float().unsqueeze(1) for side in (left, right)]
    with torch.inference_mode():
        values = [
            compute_ms_ssim(x, y, spatial_dims=images.ndim - 1, kernel_size=kernel, weights=weights).squeeze(1)
            for x, y in zip(*(torch.split(side, PAIRS_AT_ONCE) for side in pairs_of), strict=True)
        ]
    return mean_interval(torch.cat(values).numpy(), confidence)


def ms_ssim_settings(shape: tuple[int, ...]) -> tuple[int, tuple[float, ...]]:
    """Return a window and weights that the smallest axis can carry: up to 5 scales, an 11, 7 or 5 wide window."""
    smallest = min(shape)
    kernel = 11 if smallest >= 64 else 7 if smallest >= 16 else 3
    scales = max([s for s in range(1, 6) if smallest // max(1, s - 1) ** 2 > kernel - 1 and smallest >> s > 0] or [1])
    chosen = MS_SSIM_WEIGHTS[:scales]
    return min(kernel, smallest - 1 + smallest % 2), tuple(w / sum(chosen) for w in chosen)


def _persons(a: Group, b: Group) -> int:
    return min(len(np.unique(a.patient)), len(np.unique(b.patient)))
