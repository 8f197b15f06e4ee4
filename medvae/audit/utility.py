"""What synthetic scans are good for: train on synthetic, test on real patients who were never trained on.

Beside each number stand the ceiling (the same learner, steps and number of scans seen, trained on real patients) and
the floor (trained on nothing but the synthetic class means with noise). All three are tested once on the same scans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medvae.audit.intervals import Estimate, percentile_bootstrap
from medvae.audit.material import Scans
from medvae.types import Condition

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LEARNING_RATE = 2e-3
BATCH = 32
SEGMENTER_BATCH = 4
FLOOR_NOISE = 0.05
RIDGE = 1.0


@dataclass(frozen=True)
class Budget:
    """How long a learner may train, and how intervals are drawn."""

    steps: int
    confidence: float
    replicates: int
    seed: int


def class_means(made: Scans, condition: Condition, copies: int, seed: int) -> Scans:
    """Return the floor's training set: each class's mean synthetic scan, `copies` times with noise."""
    labels, rng = made.labels(condition), np.random.default_rng(seed)
    present = np.unique(labels)
    x = np.concatenate([np.repeat(made.x[labels == c].mean(0, keepdims=True), copies, axis=0) for c in present])
    x = x + rng.normal(0, FLOOR_NOISE, x.shape).astype(np.float32)
    rows = np.concatenate([np.repeat(np.flatnonzero(labels == c)[:1], copies) for c in present])
    return Scans(np.clip(x, 0, 1), made.condition[rows], np.arange(len(x)), made.space)


def classify(train: Scans, test: Scans, condition: Condition, budget: Budget) -> dict[str, Estimate]:
    """Train a small CNN on one group, test on another: AUC (mean over classes) and balanced accuracy."""
    probabilities = _class_probabilities(train, test.images, condition, budget)
    truth = test.labels(condition)

    def area(rows: Ints) -> float:
        return mean_auc(probabilities[rows], truth[rows])

    def accuracy(rows: Ints) -> float:
        hit = probabilities[rows].argmax(1) == truth[rows]
        return float(np.mean([hit[truth[rows] == c].mean() for c in np.unique(truth[rows])]))

    return {
        "auc": _interval(area, test.patient, budget),
        "balanced accuracy": _interval(accuracy, test.patient, budget),
    }


def mean_auc(probabilities: Floats, truth: Ints) -> float:
    """Return the AUC of each class against the rest, averaged over the classes present; nan with only one class."""
    from medvae.audit.intervals import auc

    present = np.unique(truth)
    if len(present) < 2:
        return float("nan")
    areas = [auc(probabilities[truth == c, c], probabilities[truth != c, c]) for c in present]
    return float(np.mean(areas))


def _class_probabilities(train: Scans, images: npt.NDArray[Any], condition: Condition, budget: Budget) -> Floats:
    import torch
    from torch import nn

    dims = images.ndim - 1
    convolution, pool = (nn.Conv2d, nn.AdaptiveAvgPool2d) if dims == 2 else (nn.Conv3d, nn.AdaptiveAvgPool3d)
    rng, labels = np.random.default_rng(budget.seed), train.labels(condition)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(budget.seed)
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 32)):
            layers += [convolution(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
        net = nn.Sequential(*layers, pool(2), nn.Flatten(), nn.Linear(32 * 2**dims, condition.width))
        optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
        # Classes are drawn equally often, so that a rare class is learned and not merely counted.
        rows_of = [np.flatnonzero(labels == c) for c in np.unique(labels)]
        for _ in range(budget.steps):
            rows = np.concatenate([rng.choice(r, size=max(1, BATCH // len(rows_of))) for r in rows_of])
            x, y = torch.from_numpy(train.images[rows]).unsqueeze(1), torch.from_numpy(labels[rows])
            x = x + 0.02 * torch.randn_like(x)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        net.eval()
        with torch.inference_mode():
            parts = torch.split(torch.from_numpy(np.ascontiguousarray(images)).unsqueeze(1), BATCH)
            return np.concatenate([net(p).softmax(1).double().numpy() for p in parts])


def segment(train: Scans, test: Scans, budget: Budget) -> dict[int, Estimate]:
    """Train a small U-Net on image-mask pairs, test on others: Dice of each label, averaged over patients."""
    import torch
    from monai.losses.dice import DiceCELoss
    from monai.networks.nets.unet import UNet

    dims, space, rng = test.space.spatial_dims, test.space, np.random.default_rng(budget.seed)
    x, y = _padded(train.images), _padded(_label_map(train))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(budget.seed)
        net = UNet(dims, 1, space.channels, channels=(8, 16, 32), strides=(2, 2), num_res_units=1, norm="instance")
        loss = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
        optimizer = torch.optim.AdamW(net.parameters(), lr=3 * LEARNING_RATE)
        for _ in range(budget.steps):
            rows = rng.choice(len(x), size=min(SEGMENTER_BATCH, len(x)), replace=False)
            optimizer.zero_grad()
            value = loss(net(torch.from_numpy(x[rows])[:, None]), torch.from_numpy(y[rows])[:, None])
            value.backward()
            optimizer.step()
        net.eval()
        with torch.inference_mode():
            parts = torch.split(torch.from_numpy(_padded(test.images))[:, None], SEGMENTER_BATCH)
            predicted = np.concatenate([net(p).argmax(1).numpy() for p in parts])
    inside = tuple(slice(0, n) for n in space.spatial_shape)
    return _dice_by_label(predicted[(slice(None), *inside)], test, budget)


def segment_floor(made: Scans, test: Scans, budget: Budget) -> dict[int, Estimate]:
    """Predict the mean synthetic mask for everyone: what a segmenter must beat."""
    mean = np.concatenate([np.full((1, *made.x.shape[2:]), 0.5, np.float32), made.x[:, 1:].mean(0)])
    return _dice_by_label(np.broadcast_to(mean.argmax(0), test.images.shape), test, budget)


def _dice_by_label(predicted: npt.NDArray[Any], test: Scans, budget: Budget) -> dict[int, Estimate]:
    truth, found = _label_map(test), {}
    for index, label in enumerate(test.space.mask_labels, start=1):
        scores = dice(predicted == index, truth == index)
        found[label] = _interval(lambda rows, s=scores: float(np.nanmean(s[rows])), test.patient, budget)  # type: ignore[misc]
    return found


def dice(predicted: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> Floats:
    """Return Dice (N,) of boolean masks (N, *spatial); 1 where both are empty."""
    axes = tuple(range(1, truth.ndim))
    size = predicted.sum(axes) + truth.sum(axes)
    both = (predicted & truth).sum(axes)
    return np.where(size > 0, 2 * both / np.maximum(size, 1), 1.0)


def _label_map(scans: Scans) -> npt.NDArray[np.float32]:
    """Return 0 or 1 + the index of the mask channel, (N, *spatial)."""
    background = np.full((len(scans), 1, *scans.x.shape[2:]), 0.5, dtype=np.float32)
    labels = np.concatenate([background, scans.x[:, 1:]], axis=1).argmax(1)
    return np.asarray(labels, dtype=np.float32)


def _padded(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Pad to multiples of 4, which two halvings of the U-Net need."""
    return np.pad(x, [(0, 0), *((0, -n % 4) for n in x.shape[1:])])


def regress(
    train_features: Floats,
    train_target: Floats,
    test_features: Floats,
    test_target: Floats,
    patient: Ints,
    budget: Budget,
) -> dict[str, Estimate]:
    """Ridge regression of a covariate on the embedding: R2 against the test mean, and mean absolute error."""
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_features)
    model = Ridge(alpha=RIDGE * train_features.shape[1]).fit(scaler.transform(train_features), train_target)
    error = np.asarray(model.predict(scaler.transform(test_features))) - test_target

    def r2(rows: Ints) -> float:
        spread = np.square(test_target[rows] - test_target[rows].mean()).sum()
        return float(1 - np.square(error[rows]).sum() / spread) if spread > 0 else float("nan")

    return {
        "r2": _interval(r2, patient, budget),
        "mean absolute error": _interval(lambda rows: float(np.abs(error[rows]).mean()), patient, budget),
    }


def _interval(statistic: Callable[[Ints], float], patient: Ints, budget: Budget) -> Estimate:
    rng = np.random.default_rng(budget.seed)
    return percentile_bootstrap(statistic, patient, budget.confidence, budget.replicates, rng)
