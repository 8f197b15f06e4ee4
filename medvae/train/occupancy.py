"""Mean masks from the noisy low cosines that were released: post-processing, none of it sees a scan.

A mean mask is a probability at each voxel, and those of all labels add up to at most one. So the means are read as the
softmax of smooth fields, one a label against the background,

    p = softmax(0, b + f_1, ..., b + f_M),   f_m = sum_k w_mk s_k phi_k,   w ~ N(0, I),

with a Gaussian process prior on the fields (squared exponential, in the cosine basis phi), and the w of largest
posterior density given the released coefficients and the known noise in them is found by L-BFGS. Far from the organ
such a p is zero of itself, where shrinkage band by band leaves ripples: docs/quality.md has the difference.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medvae.nets.linear import cosine_matrix
from medvae.train.denoise import Array

# The prior on the fields, in logits, and their length as a share of the field of view; set on phantoms.
BIAS, AMPLITUDE, LENGTH = -4.0, 2.5, 0.2
# Points of the grid for each cosine of an axis, enough to integrate their products.
POINTS = 4
ITERATIONS = 40
# Noise is taken for at least this, in coefficients of [0, 1] masks over a grid of one voxel: without noise, no limit.
LEAST_NOISE = 1e-3


def smooth_occupancy(
    coefficients: Array, noise_sd: npt.NDArray[np.float64] | float, spatial_shape: tuple[int, ...]
) -> Array:
    """Return the coefficients (M, *k) of the likeliest mean masks given noisy ones (M, *k).

    noise_sd: of one coefficient, for all masks. spatial_shape: of the scans; the work is done on a grid of at most
    POINTS times k points, so it does not grow with them.
    """
    basis = coefficients.shape[1:]
    grid = tuple(min(n, POINTS * k) for n, k in zip(spatial_shape, basis, strict=True))
    axes = [torch.as_tensor(cosine_matrix(k, n), dtype=torch.float64) for k, n in zip(basis, grid, strict=True)]
    # An orthonormal coefficient grows with the square root of the number of points.
    scale = math.sqrt(math.prod(spatial_shape) / math.prod(grid))
    seen = torch.as_tensor(coefficients / scale, dtype=torch.float64)
    noise = max(float(np.max(noise_sd)) / scale, LEAST_NOISE * math.sqrt(math.prod(grid)))
    prior = torch.as_tensor(_prior(basis, math.prod(grid)), dtype=torch.float64)
    w = torch.zeros_like(seen, requires_grad=True)

    def occupancy() -> Tensor:
        fields = _along(w * prior, axes) + BIAS
        return torch.cat([torch.zeros_like(fields[:1]), fields]).softmax(0)[1:]

    def found() -> Tensor:
        return _along(occupancy(), [a.T for a in axes])

    optimizer = torch.optim.LBFGS([w], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = 0.5 * w.square().sum() + 0.5 * ((found() - seen) / noise).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return np.asarray(found().numpy() * scale, dtype=np.float64)


def _prior(basis: tuple[int, ...], points: int) -> Array:
    """Return the standard deviations (*k) of a field's coefficients: squared exponential, AMPLITUDE a voxel."""
    frequencies = np.meshgrid(*(np.arange(k, dtype=np.float64) for k in basis), indexing="ij")
    power = np.exp(-0.5 * (math.pi * LENGTH) ** 2 * sum(np.square(f) for f in frequencies))
    return np.asarray(AMPLITUDE * np.sqrt(power * points / power.sum()))


def _along(x: Tensor, axes: list[Tensor]) -> Tensor:
    """Multiply each spatial axis of (M, *a) by a matrix (a, b)."""
    for axis, matrix in enumerate(axes, start=1):
        x = (x.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return x
