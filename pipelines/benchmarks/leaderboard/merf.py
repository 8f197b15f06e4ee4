"""DP-MERF (Harder, Adamczewski & Park 2021, "DP-MERF: Differentially Private Mean Embeddings with Random Features").

Random Fourier features of scans are averaged by class and released once with Gaussian noise; a small generator is
then trained, without any further look at the data, so that the mean features of its scans agree with what was
released (a maximum mean discrepancy). Features, generator and training follow the paper's settings for MNIST; the
kernel's width is a public constant per voxel, as a width by the data's own distances would have to be paid for.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

FREQUENCIES = 2_500
WIDTH_PER_VOXEL = 105 / 784  # the paper's squared kernel width on MNIST
CODE, HIDDEN, CHANNELS = 5, 200, (16, 8)
STEPS, RATE, DECAY_STEPS, DECAY = 800, 1e-2, 120, 0.9
BATCH, KERNEL = {2: 500, 3: 150}, {2: 5, 3: 3}  # smaller in 3D, where the paper has no settings, for time
DRAW_AT_ONCE = 1_000


class FourierFeatures:
    """Random features of a Gaussian kernel (Rahimi & Recht 2007): rows (B, 2 * FREQUENCIES) of norm 1."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        size = math.prod(shape)
        draws = torch.randn(size, FREQUENCIES, generator=torch.Generator().manual_seed(seed))
        self.frequencies = draws / math.sqrt(WIDTH_PER_VOXEL * size)

    def __call__(self, x: Tensor) -> Tensor:
        phase = x.flatten(1) @ self.frequencies
        return torch.cat([phase.cos(), phase.sin()], dim=1) / math.sqrt(FREQUENCIES)

    def of_array(self, x: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Return the features of an array (B, C, *grid)."""
        return np.asarray(self(torch.from_numpy(np.ascontiguousarray(x))).numpy())


class Generator(nn.Module):
    """The paper's convolutional generator in two or three dimensions: (code, class) -> (C, *grid) in [0, 1]."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        convolution: Any = nn.Conv2d if len(shape) == 3 else nn.Conv3d
        kernel = KERNEL[len(shape) - 1]
        self.classes, self.grid = classes, shape[1:]
        self.base = tuple(math.ceil(n / 4) for n in self.grid)
        inner = CHANNELS[0] * math.prod(self.base)
        self.dense = nn.Sequential(
            nn.Linear(CODE + classes, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, inner)
        )
        self.first = nn.Sequential(nn.BatchNorm1d(inner), nn.ReLU())
        self.middle = nn.Sequential(convolution(*CHANNELS, kernel, padding=kernel // 2), nn.ReLU())
        self.last = convolution(CHANNELS[1], shape[0], kernel, padding=kernel // 2)

    def forward(self, labels: Tensor, noise: Tensor) -> Tensor:
        code = torch.cat([noise, functional.one_hot(labels, self.classes).to(noise.dtype)], dim=1)
        x = self.first(self.dense(code)).view(-1, CHANNELS[0], *self.base)
        mode = "bilinear" if len(self.grid) == 2 else "trilinear"
        x = functional.interpolate(x, size=tuple(math.ceil(n / 2) for n in self.grid), mode=mode)
        x = functional.interpolate(self.middle(x), size=self.grid, mode=mode)
        return torch.sigmoid(self.last(x))


def fit_generator(
    target: npt.NDArray[np.float64], features: FourierFeatures, shape: tuple[int, ...], seed: int
) -> Generator:
    """Train a generator of coarse scans whose class means of features are near `target` (K, 2 * FREQUENCIES)."""
    wanted = torch.from_numpy(target.astype(np.float32))
    classes = len(wanted)
    each = max(2, BATCH[len(shape) - 1] // classes)
    labels = torch.arange(classes).repeat_interleave(each)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Generator(shape, classes)
        optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, DECAY_STEPS, DECAY)
        for _ in range(STEPS):
            made = net(labels, torch.randn(len(labels), CODE))
            means = features(made).view(classes, each, -1).mean(1)
            optimizer.zero_grad()
            (means - wanted).square().sum().backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def draw_scans(net: Generator, labels: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.float32]:
    """Return coarse scans (N, C, *grid) of the given classes."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    with torch.inference_mode():
        for part in torch.split(torch.from_numpy(labels), DRAW_AT_ONCE):
            parts.append(net(part, torch.randn(len(part), CODE, generator=generator)).numpy())
    return np.concatenate(parts)
