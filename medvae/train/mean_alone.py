"""The closed form of a cohort so small that only a mean can be seen: it has the budget alone.

It is measured around a public level; spread and texture are public constants.
"""

from __future__ import annotations

import numpy as np
import torch

from medvae.nets.linear import SHELLS
from medvae.train.moment_fit import Fit, falling_power, shell_radius
from medvae.train.noisy_sums import clip_rows

# The grey level that a mean alone is measured from, and how far scans are taken to vary around it.
PUBLIC_LEVEL, PUBLIC_SPREAD = 0.4, 0.5


def public_level(fit: Fit) -> None:
    """Start from an even grey image and no masks."""
    level = np.zeros((fit.space.channels, *[1] * fit.space.spatial_dims))
    level[0] = PUBLIC_LEVEL * float(np.prod(fit.space.spatial_shape)) ** 0.5
    fit.add_overall(level)


def mean_alone(fit: Fit) -> None:
    """The overall mean: of directions, nearly all scans being clipped, times the norm that is typical."""
    released = fit.release("means", lambda b: clip_rows(fit.residual(b).flatten(1), fit.radius))
    scale = fit.length / fit.count
    noise_sd = fit.noise_multipliers["means"] * scale
    fit.set_overall(released.reshape(fit.space.channels, *fit.shapes.basis) * scale, noise_sd)


def public_spread(fit: Fit) -> None:
    """Texture of the image that no scan was asked for: power that falls with the fourth power of frequency."""
    power = falling_power(shell_radius(fit.shell.shape))
    count = np.bincount(fit.shell.ravel(), minlength=SHELLS)
    power *= PUBLIC_SPREAD**2 * fit.shell.size / (power * count).sum()
    fit.part.spectrum[:, 0, 0] = torch.as_tensor(power, dtype=torch.float32)
