"""Mixtures by class from noisy sums: a few noisy Lloyd steps find centres, one more release the rest.

Both are sums over patients of vectors that belong to one group of scans, a component of a cell. A patient adds the
average over the patient's scans of e_group (x) v with |v| <= 1, whose norm is at most 1, whichever groups the scans
fall into; so each release is the Gaussian mechanism with sensitivity 1, as those of train/moments.py.

    clusters_1 ...  counts and sums around the centres so far: Lloyd's algorithm (Su et al. 2016 analyse its noise)
    mixture         counts, means and second moments around the last centres
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from medvae.nets.mixture import MixturePart, MixtureShapes, cell_of
from medvae.train.denoise import Array, principal_directions
from medvae.types import Batch

# How a release splits its unit of sensitivity between counts, means and second moments (squares add to 1).
CLUSTER_COUNT_WEIGHT = 0.3
COUNT_WEIGHT, MEAN_WEIGHT = 0.15, 0.3
# Distance of the first centres from the mean, and where second moments are clipped, in units of the clip of residuals.
SPREAD, REACH = 0.4, 0.9
# A component counts from this many standard deviations of the noise in its count on.
PRESENT = 3.0


@dataclass(frozen=True)
class Grouped:
    """A batch's contributions: vectors (B, D), each of one group (B,) out of `groups`; released as (groups, D)."""

    vectors: Tensor
    group: Tensor
    groups: int


Release = Callable[[str, Callable[[Batch], Grouped]], Array]


class Residuals(Protocol):
    """What of a batch is left over by the mean: clipped to norm at most 1, (B, D), in units of `radius`."""

    def __call__(self, batch: Batch) -> Tensor:
        """Return the clipped residuals."""
        ...


def release_names(components: int, lloyd_steps: int) -> tuple[str, ...]:
    """Return the names of the releases, in order; one component needs no search for centres."""
    steps = lloyd_steps if components > 1 else 0
    return (*(f"clusters_{i + 1}" for i in range(steps)), "mixture")


def fit_mixture(
    mixture: MixturePart,
    residuals: Residuals,
    radius: float,
    release: Release,
    noise_multipliers: Mapping[str, float],
    lloyd_steps: int,
) -> None:
    """Fill `mixture` from the releases named by `release_names`; all else is post-processing."""
    centres = _first_centres(*mixture.means.shape)
    for name in release_names(mixture.shapes.components, lloyd_steps)[:-1]:
        centres = _lloyd_step(mixture, residuals, release, name, noise_multipliers[name], centres)
    _release_mixture(mixture, residuals, radius, release, noise_multipliers["mixture"], centres)


def box_of(coefficients: Tensor, shapes: MixtureShapes) -> Tensor:
    """Return the mixture's coefficients (B, D) of the basis' (B, C, *k)."""
    return coefficients[(slice(None), slice(None), *(slice(k) for k in shapes.box))].flatten(1)


def _first_centres(cells: int, components: int, size: int) -> Tensor:
    """Return centres (cells, J, D) around the mean: one sits on it, more start at random, which costs nothing.

    They start at one distance from the mean, so that each of them has scans on its side.
    """
    if components == 1:
        return torch.zeros(cells, 1, size)
    start = torch.randn(components, size, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(start, dim=1).mul(SPREAD).repeat(cells, 1, 1)


def _assign(mixture: MixturePart, vectors: Tensor, batch: Batch, centres: Tensor) -> Tensor:
    """Return the group (B,) of each scan: the nearest centre of its cell."""
    cell = cell_of(torch.from_numpy(batch.condition), mixture.space.conditions)
    own = centres[cell]
    nearest = (own.square().sum(2) - 2 * torch.einsum("bjd,bd->bj", own, vectors)).argmin(1)
    group: Tensor = cell * centres.shape[1] + nearest
    return group


def _lloyd_step(
    mixture: MixturePart, residuals: Residuals, release: Release, name: str, noise_multiplier: float, centres: Tensor
) -> Tensor:
    groups, size = centres.shape[0] * centres.shape[1], centres.shape[2]
    sum_weight = (1 - CLUSTER_COUNT_WEIGHT**2) ** 0.5

    def contribution(batch: Batch) -> Grouped:
        vectors = residuals(batch)
        counts = torch.full((len(vectors), 1), CLUSTER_COUNT_WEIGHT)
        group = _assign(mixture, vectors, batch, centres)
        return Grouped(torch.cat([counts, vectors * sum_weight], dim=1), group, groups)

    released = torch.from_numpy(release(name, contribution))
    count = released[:, :1] / CLUSTER_COUNT_WEIGHT
    floor = max(1.0, PRESENT * noise_multiplier / CLUSTER_COUNT_WEIGHT)
    moved = (released[:, 1:] / sum_weight / count.clamp(min=floor)).float()
    # A centre that hardly anybody is near would be all noise: it stays where it was.
    return torch.where(count > floor, moved, centres.view(groups, size)).view_as(centres)


def _release_mixture(
    mixture: MixturePart,
    residuals: Residuals,
    radius: float,
    release: Release,
    noise_multiplier: float,
    centres: Tensor,
) -> None:
    groups, size = centres.shape[0] * centres.shape[1], centres.shape[2]
    reach = 1.0 if centres.shape[1] == 1 else REACH
    second_weight = (1 - COUNT_WEIGHT**2 - MEAN_WEIGHT**2) ** 0.5
    upper = torch.triu_indices(size, size)
    root = torch.where(upper[0] == upper[1], 1.0, 2**0.5)  # so that the norm of a triangle is the matrix's

    def contribution(batch: Batch) -> Grouped:
        vectors = residuals(batch)
        group = _assign(mixture, vectors, batch, centres)
        around = vectors - centres.view(groups, size)[group]
        length = torch.linalg.vector_norm(around, dim=1, keepdim=True)
        around = around / length.clamp(min=reach)
        products = around[:, upper[0]] * around[:, upper[1]] * root
        counts = torch.full((len(vectors), 1), COUNT_WEIGHT)
        return Grouped(torch.cat([counts, around * MEAN_WEIGHT, products * second_weight], dim=1), group, groups)

    released = release("mixture", contribution)
    count = released[:, 0] / COUNT_WEIGHT
    floor = max(1.0, PRESENT * noise_multiplier / COUNT_WEIGHT)
    shift = released[:, 1 : 1 + size] / MEAN_WEIGHT / np.maximum(count, floor)[:, None]
    means = centres.view(groups, size).numpy() + shift * reach
    factors = np.zeros((groups, mixture.factors.shape[2], size))
    for g in np.flatnonzero(count > floor):
        covariance = np.zeros((size, size))
        covariance[upper[0].numpy(), upper[1].numpy()] = released[g, 1 + size :] / second_weight / root.numpy()
        covariance = (covariance + np.triu(covariance, 1).T) / count[g] - np.outer(shift[g], shift[g])
        # An entry off the diagonal was released once, with weight sqrt 2.
        noise_sd = noise_multiplier / second_weight / count[g] / 2**0.5
        factors[g] = principal_directions(covariance, noise_sd, factors.shape[1]) * reach
    _store(mixture, np.where(count > floor, count, 0.0), means * radius, factors * radius)


def _store(mixture: MixturePart, count: Array, means: Array, factors: Array) -> None:
    """Put counts (G,), means (G, D) and factors (G, rank, D) into the buffers."""
    weights = np.asarray(count, dtype=np.float64).reshape(mixture.weights.shape)
    # A cell in which nobody was seen above the noise keeps the class's mean alone.
    weights = np.where(weights.sum(1, keepdims=True) > 0, weights, 1.0)
    mixture.weights.copy_(torch.as_tensor(weights / weights.sum(1, keepdims=True), dtype=torch.float32))
    mixture.means.copy_(torch.as_tensor(means, dtype=torch.float32).view_as(mixture.means))
    mixture.factors.copy_(torch.as_tensor(factors, dtype=torch.float32).view_as(mixture.factors))
