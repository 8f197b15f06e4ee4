"""Histograms of norms: what a scan puts in, and the clip or typical norm that is read off what was released."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]

# Edges of the norm histograms, as root mean square per element of [0, 1] channels: public constants.
RMS_EDGES = np.geomspace(0.01, 1.0, 25)
COARSE_EDGES = np.geomspace(0.08, 1.0, 8)
# The same for the lowest coefficients alone, whose norms are smaller.
LOW_EDGES = 0.4
# A bin of a histogram counts from this many standard deviations of its noise on.
SEEN = 2.0
# The clip is the norm that this share of patients stays under: more clips the anatomy, less adds noise.
CLIP_QUANTILE = 0.8


def norm_buckets(norms: Tensor, size: int, edges: Array = RMS_EDGES) -> Tensor:
    """Return one-hot buckets (B, bins) of norms (B,) of vectors with `size` elements."""
    bounds = torch.as_tensor(edges, dtype=norms.dtype) * size**0.5
    return torch.nn.functional.one_hot(torch.bucketize(norms, bounds), len(edges) + 1).double()


def _shown(histogram: Array, noise_sd: float) -> Array:
    """Return the bins of a noisy histogram that show, and zero for the others."""
    return np.where(histogram > min(SEEN * noise_sd, histogram.max() / 2), np.maximum(histogram, 0.0), 0.0)


def radius_of(histogram: Array, size: int, noise_sd: float = 0.0, edges: Array = RMS_EDGES) -> float:
    """Return the clip norm at CLIP_QUANTILE of a noisy histogram, of the bins that show: post-processing."""
    shown = _shown(histogram, noise_sd)
    cumulative = np.cumsum(shown)
    bucket = int(np.searchsorted(cumulative, CLIP_QUANTILE * cumulative[-1])) if cumulative[-1] > 0 else 0
    return float(edges[min(bucket, len(edges) - 1)] * size**0.5)


def typical_norm(histogram: Array, size: int, noise_sd: float, edges: Array) -> float:
    """Return the average norm around the median of a noisy histogram, by the middles of its bins: post-processing.

    Around the median, since in one histogram of five an empty bin shows by chance, and it may lie anywhere.
    """
    shown = _shown(histogram, noise_sd)
    median = np.searchsorted(np.cumsum(shown), shown.sum() / 2)
    near = shown * (np.abs(np.arange(len(shown)) - median) <= 1)
    middles = np.sqrt(np.append(edges[0], edges) * np.append(edges, edges[-1]))
    weights = near if near.any() else np.ones(len(near))
    return float(middles @ weights / weights.sum() * size**0.5)
