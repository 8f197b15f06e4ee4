"""Groups of codes, and how well they agree with what is known: k-means and its scores, of scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medvae.audit.material import Ints
from medvae.errors import ConfigError
from medvae.types import FloatArray

SCORED = 5000  # the silhouette needs every pair: it is taken on so many codes


@dataclass(frozen=True)
class Clustering:
    """label: (N,) cluster of each code; silhouette in [-1, 1], None for one cluster; agreement with known classes by
    condition: {"nmi", "ari"}, both 1 for the same groups and about 0 for unrelated ones."""

    label: Ints
    clusters: int
    silhouette: float | None
    agreement: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Return everything but the labels."""
        return {k: v for k, v in asdict(self).items() if k != "label"}


def cluster(codes: FloatArray, clusters: int, known: dict[str, Sequence[str]], seed: int = 0) -> Clustering:
    """Group codes (N, d), each column scaled to unit variance, by k-means; compare with known classes by name.

    Raises ConfigError where there are fewer scans than clusters.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

    if clusters > len(codes):
        raise ConfigError(f"{clusters} clusters were asked for and there are {len(codes)} scans: ask for fewer")
    spread = codes.std(0)
    scaled = codes[:, spread > 0] / spread[spread > 0] if (spread > 0).any() else codes
    label = KMeans(clusters, n_init=4, random_state=seed).fit(scaled).labels_
    silhouette = None
    if 1 < len(set(label.tolist())) < len(label):
        silhouette = float(silhouette_score(scaled, label, sample_size=min(SCORED, len(label)), random_state=seed))
    agreement = {
        name: {
            "nmi": float(normalized_mutual_info_score(list(values), label)),
            "ari": float(adjusted_rand_score(list(values), label)),
        }
        for name, values in known.items()
    }
    return Clustering(np.asarray(label, dtype=np.int64), clusters, silhouette, agreement)


def two_dimensions(codes: FloatArray) -> FloatArray:
    """Return codes (N, d) on their first two principal axes, (N, 2); a second axis of zeros where d is 1."""
    centred = codes - codes.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    flat = centred @ axes[:2].T
    return np.asarray(np.pad(flat, ((0, 0), (0, 2 - flat.shape[1]))), dtype=np.float32)
