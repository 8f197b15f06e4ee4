"""How alike made and real scans are: Fréchet distance, precision and recall, density and coverage, Inception FID.

All compare a group of made scans with the held-out real ones, equally many, and with the same composition by class:
shares of classes are public here and chosen equal, so they say nothing about a method.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from leaderboard.rows import labels_of
from medvae.audit.embedding import embed
from medvae.audit.fidelity import Group, frechet, gaussian_of, manifold
from medvae.audit.material import Scans

Ints = npt.NDArray[np.int64]

MOST = 2_000  # scans in a group: distances between all pairs are computed
REPLICATES, CONFIDENCE = 1, 0.95  # the seeds tell the spread; no bootstrap is wanted here


def fidelity(made: Scans, test: Scans, seed: int) -> dict[str, float]:
    """Return frechet, precision, recall, density and coverage in the shipped embedding."""
    rng = np.random.default_rng(seed)
    real = test.take(np.sort(rng.permutation(len(test))[:MOST]))
    alike = made.take(matched(labels_of(made), labels_of(real), rng))
    a, b = (Group(embed(s.images), np.arange(len(s))) for s in (real, alike))
    a = Group(a.features, real.patient)
    found = {name: e.value for name, e in manifold(a, b, CONFIDENCE, REPLICATES, rng).items()}
    ones = np.ones(len(a)), np.ones(len(b))
    distance = frechet(*gaussian_of(a.features, ones[0]), *gaussian_of(b.features, ones[1]))
    return {"frechet": distance, **{name: float(value) for name, value in found.items()}}


def matched(labels: Ints, wanted: Ints, rng: np.random.Generator) -> Ints:
    """Return rows of `labels` in the numbers that `wanted` has of each class, without repeats where they suffice."""
    rows = []
    for c, count in zip(*np.unique(wanted, return_counts=True), strict=True):
        have = np.flatnonzero(labels == c)
        if not len(have):
            continue
        rows.append(rng.choice(have, size=count, replace=len(have) < count))
    return np.sort(np.concatenate(rows))


def inception_fid(made: Scans, test: Scans, weights: Path | None) -> float | None:
    """Return FID by torch-fidelity's InceptionV3 in 2D, or None where it or its weights are not there.

    Nothing is ever downloaded: `weights` is the file the user has.
    """
    if weights is None or made.space.spatial_dims != 2:
        return None
    try:
        from torch_fidelity import calculate_metrics
    except ImportError:
        return None
    import torch

    found: dict[str, Any] = calculate_metrics(
        input1=_Pictures(made.images),
        input2=_Pictures(test.images),
        fid=True,
        cuda=torch.cuda.is_available(),
        feature_extractor_weights_path=str(weights),
        verbose=False,
    )
    return float(found["frechet_inception_distance"])


class _Pictures:
    """Grey images as the uint8 RGB tensors that torch-fidelity wants."""

    def __init__(self, images: npt.NDArray[np.float32]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        import torch

        grey = np.rint(255 * np.clip(self._images[index], 0, 1)).astype(np.uint8)
        return torch.from_numpy(grey).expand(3, *grey.shape)
