"""The judges: networks trained on what a method made, tested once on real scans that were held out.

A judge gets the same architecture, steps, batch and augmentation for real and for synthetic scans. Classes are drawn
equally often, so class shares are worth nothing to anybody; the last weights count, so no real scan selects anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from leaderboard.rows import Row, class_condition, labels_of
from medvae.audit.material import Scans
from medvae.audit.utility import dice, mean_auc

Ints = npt.NDArray[np.int64]

NOISE = 0.03  # standard deviation of the only augmentation of classifiers
SMOOTHING = 0.05
WEIGHT_DECAY = 1e-2
# Largest learning rate; those of classifiers were chosen on parts of the real training scans, never on a test set.
RATE = {"cnn": 6e-3, "wide_resnet": 6e-3, "resnext": 6e-3, "unet": 3e-3}
TEST_BATCH = 250


def judge(row: Row, train: Scans, test: Scans, seed: int) -> dict[str, float]:
    """Train the row's judges on `train`, test on `test`; return every score and, under the measure's name, the mean.

    Scores: "accuracy/cnn", "auc/cnn" or "dice/1", each a mean over the row's repeats.
    """
    found: dict[str, list[float]] = {}
    for kind in row.kinds:
        for repeat in range(row.repeats):
            for name, value in _once(row, kind, train, test, 1_000 * seed + repeat).items():
                found.setdefault(name, []).append(value)
    scores = {name: float(np.mean(values)) for name, values in found.items()}
    return {row.measure: float(np.mean([v for n, v in scores.items() if n.startswith(row.measure)])), **scores}


def _once(row: Row, kind: str, train: Scans, test: Scans, seed: int) -> dict[str, float]:
    if kind == "unet":
        return _segment(row, train, test, seed)
    return _classify(row, kind, train, test, seed)


def _classify(row: Row, kind: str, train: Scans, test: Scans, seed: int) -> dict[str, float]:
    condition, dims = class_condition(train), train.space.spatial_dims
    labels, truth, device = labels_of(train), labels_of(test), _device()
    images = torch.from_numpy(np.ascontiguousarray(train.images))[:, None]
    order = balanced_order(labels, row.steps * row.batch, np.random.default_rng(seed))
    targets = torch.from_numpy(labels)

    def loss_of(net: nn.Module, rows: Tensor) -> Tensor:
        x = images[rows].to(device)
        x = x + NOISE * torch.randn_like(x)
        return functional.cross_entropy(net(x), targets[rows].to(device), label_smoothing=SMOOTHING)

    net = _fit(lambda: KINDS[kind](dims, condition.width), loss_of, torch.from_numpy(order), row, RATE[kind], seed)
    with torch.inference_mode():
        parts = torch.split(torch.from_numpy(np.ascontiguousarray(test.images))[:, None], TEST_BATCH)
        probabilities = np.concatenate([net(p.to(device)).softmax(1).double().cpu().numpy() for p in parts])
    accuracy = float((probabilities.argmax(1) == truth).mean())
    return {f"accuracy/{kind}": accuracy, f"auc/{kind}": mean_auc(probabilities, truth)}


def _segment(row: Row, train: Scans, test: Scans, seed: int) -> dict[str, float]:
    """Train a small U-Net on pairs; Dice of each label, averaged over a patient's scans and then over patients."""
    from monai.losses.dice import DiceCELoss
    from monai.networks.nets.unet import UNet

    space, device = train.space, _device()
    x, y = torch.from_numpy(_padded(train.images)), torch.from_numpy(_padded(_label_map(train)))
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(x)) for _ in range(-(-row.steps * row.batch // len(x)))])
    criterion = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)

    def loss_of(net: nn.Module, rows: Tensor) -> Tensor:
        scans = _vary(x[rows].to(device))
        value: Tensor = criterion(net(scans[:, None]), y[rows, None].to(device))
        return value

    def make() -> nn.Module:
        return UNet(space.spatial_dims, 1, space.channels, channels=(12, 24, 48), strides=(2, 2), num_res_units=1)

    net = _fit(make, loss_of, torch.from_numpy(order[: row.steps * row.batch]), row, RATE["unet"], seed)
    with torch.inference_mode():
        parts = torch.split(torch.from_numpy(_padded(test.images))[:, None], 10)
        predicted = np.concatenate([net(p.to(device)).argmax(1).cpu().numpy() for p in parts])
    predicted = predicted[(slice(None), *(slice(0, n) for n in test.x.shape[2:]))]
    truth, scores = _label_map(test), {}
    for index, label in enumerate(space.mask_labels, start=1):
        each = dice(predicted == index, truth == index)
        scores[f"dice/{label}"] = float(np.mean([each[test.patient == p].mean() for p in test.patients]))
    return scores


def _fit(
    make: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    order: Tensor,
    row: Row,
    rate: float,
    seed: int,
) -> nn.Module:
    """Train by AdamW on one cycle of the learning rate, batch after batch of `order`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make().to(_device())
        if not any(isinstance(m, nn.Conv3d) for m in net.modules()):
            net = net.to(memory_format=torch.channels_last)  # half the time on a CPU
        optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=row.steps + 1)
        for rows in torch.split(order, row.batch):
            optimizer.zero_grad()
            loss_of(net, rows).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def balanced_order(labels: Ints, total: int, rng: np.random.Generator) -> Ints:
    """Return `total` indices in which every class comes equally often and all scans of a class alike.

    A class is walked through in random order again and again; any stretch of K indices holds each of K classes once.
    """
    columns = []
    classes = np.unique(labels)
    each = -(-total // len(classes))
    for c in classes:
        rows = np.flatnonzero(labels == c)
        columns.append(np.concatenate([rng.permutation(rows) for _ in range(-(-each // len(rows)))])[:each])
    return np.stack(columns, axis=1).reshape(-1)[:total]


def _vary(x: Tensor) -> Tensor:
    """Change contrast and brightness of scans (B, *spatial) and add noise: the same augmentation for all."""
    ones = (len(x), *[1] * (x.ndim - 1))
    gamma, gain = (torch.empty(ones, device=x.device).uniform_(low, high) for low, high in ((0.7, 1.4), (0.8, 1.2)))
    return (x.clamp(0, 1) ** gamma * gain + NOISE * torch.randn_like(x)).clamp(0, 1.2)


def _label_map(scans: Scans) -> npt.NDArray[np.float32]:
    """Return 0 or 1 + the index of the mask channel, (N, *spatial)."""
    background = np.full((len(scans), 1, *scans.x.shape[2:]), 0.5, dtype=np.float32)
    return np.concatenate([background, scans.x[:, 1:]], axis=1).argmax(1).astype(np.float32)


def _padded(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Pad to multiples of 4, which two halvings of the U-Net need."""
    return np.pad(x, [(0, 0), *((0, -n % 4) for n in x.shape[1:])])


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _conv(dims: int, before: int, after: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> Iterator[nn.Module]:
    convolution: Any = nn.Conv2d if dims == 2 else nn.Conv3d
    norm: Any = nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
    yield convolution(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    yield norm(after)


class Residual(nn.Module):
    """Two 3x3 convolutions (He et al. 2016) or, with groups, a bottleneck (Xie et al. 2017), and a shortcut."""

    def __init__(self, dims: int, before: int, after: int, stride: int, inner: int = 0, groups: int = 1) -> None:
        super().__init__()
        if groups == 1:
            layers = [*_conv(dims, before, after, 3, stride), nn.ReLU(), *_conv(dims, after, after)]
        else:
            layers = [*_conv(dims, before, inner, 1), nn.ReLU(), *_conv(dims, inner, inner, 3, stride, groups)]
            layers += [nn.ReLU(), *_conv(dims, inner, after, 1)]
        self.branch = nn.Sequential(*layers)
        plain = before == after and stride == 1
        self.shortcut = nn.Identity() if plain else nn.Sequential(*_conv(dims, before, after, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.branch(x) + self.shortcut(x))


def _head(dims: int, width: int, classes: int) -> tuple[nn.Module, ...]:
    pool = nn.AdaptiveAvgPool2d(1) if dims == 2 else nn.AdaptiveAvgPool3d(1)
    return pool, nn.Flatten(), nn.Linear(width, classes)


def cnn(dims: int, classes: int) -> nn.Module:
    """Three convolutions with pooling; in 3D the first has stride 2 in place of a 5x5x5 kernel."""
    pool: Any = nn.MaxPool2d if dims == 2 else nn.MaxPool3d
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        first = before == 1
        kernel, stride = (5, 1) if dims == 2 and first else (3, 2 if dims == 3 and first else 1)
        convolution, norm = _conv(dims, before, after, kernel, stride)
        layers += [convolution, pool(2), norm, nn.ReLU()]
    last: Any = nn.AdaptiveAvgPool2d(3) if dims == 2 else nn.AdaptiveAvgPool3d(2)
    return nn.Sequential(*layers, last, nn.Flatten(), nn.Linear(64 * (9 if dims == 2 else 8), classes))


def wide_resnet(dims: int, classes: int) -> nn.Module:
    """A stem and two wide residual blocks (Zagoruyko & Komodakis 2016), small."""
    stem = (*_conv(dims, 1, 16, 5, 2), nn.ReLU())
    return nn.Sequential(*stem, Residual(dims, 16, 48, 2), Residual(dims, 48, 96, 2), *_head(dims, 96, classes))


def resnext(dims: int, classes: int) -> nn.Module:
    """A stem and three grouped bottlenecks (Xie et al. 2017), small."""
    stem = (*_conv(dims, 1, 24, 5, 2), nn.ReLU())
    blocks = ((24, 64, 2, 32, 4), (64, 64, 1, 32, 4), (64, 128, 2, 64, 8))
    return nn.Sequential(*stem, *(Residual(dims, *block) for block in blocks), *_head(dims, 128, classes))


KINDS: dict[str, Callable[[int, int], nn.Module]] = {"cnn": cnn, "wide_resnet": wide_resnet, "resnext": resnext}
