"""What the releases of the closed form hand on to each other: noisy sums, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medvae.dp.noise import NoiseSource
from medvae.nets.linear import SHELLS, LinearPart, design_norm, shells
from medvae.synth.warp import move, paired_warps
from medvae.train import noisy_sums
from medvae.train.denoise import shrink
from medvae.train.mixture import Grouped
from medvae.train.moment_shapes import MomentShapes
from medvae.train.noisy_sums import Canaries, Pass
from medvae.train.norms import COARSE_EDGES, RMS_EDGES, norm_buckets
from medvae.train.occupancy import smooth_occupancy
from medvae.train.subspace import LowestCosines, Subspace
from medvae.types import Batch

Array = npt.NDArray[np.float64]

# Weight of the image in all norms where there are masks: what a segmentation learns from is the masks. A mean alone
# shows its masks well enough, and gets the image at full weight: docs/quality.md.
IMAGE_WEIGHT = 0.5
# Where images stand alone, weights of their coefficients grow with this power of frequency. Weights w_k cost noise of
# sum(v_k w_k^2) sum(1 / w_k^2) in all coefficients together, v_k their variances: least at w_k = v_k^(-1/4), which is
# the root of frequency where power falls as 1 / f^2. What it gains: docs/quality.md.
EMPHASIS = 0.5
# Size of the warps that `warped_pairs` asks for, by which hippocampi were rebuilt best: docs/family.md.
WARP = 0.75
# Up to which frequency the power of images is taken to be even, where no scan was asked.
PUBLIC_CORNER = 4.0


class Fit:
    """What the five releases hand on to each other: only noisy sums and what follows from them."""

    def __init__(
        self,
        scans: Pass,
        noise_multipliers: Mapping[str, float],
        shapes: MomentShapes,
        noise: NoiseSource,
        part: type[LinearPart],
        canaries: Canaries | None,
    ) -> None:
        space = scans.source.space
        self.scans, self.noise_multipliers, self.shapes, self.noise = scans, noise_multipliers, shapes, noise
        self.space, self.canaries = space, canaries
        self.count = len(scans.patients)
        self.warps = paired_warps(space.spatial_shape, shapes.warped_pairs, WARP) if shapes.warped_pairs else ()
        self.elements = space.channels * int(np.prod(space.spatial_shape))
        self.shell = shells(space.spatial_shape)
        self.part = part(space, shapes.basis, shapes.latent_dim, shapes.mixture)
        self.part.two_valued.fill_(shapes.two_valued is True and not space.mask_labels)
        self.full, self.as_shapes = part(space, space.spatial_shape, 1), part(space, space.spatial_shape, 1)
        self.as_shapes.two_valued.fill_(True)
        inside = self.shell[tuple(slice(k) for k in shapes.basis)]
        lowest = LowestCosines(space.channels, shapes.basis, shapes.coarse, inside)
        self.coarse = lowest.corner
        self.subspace: Subspace = lowest  # of second moments
        # Clips: of coefficients of the basis, of all, of the coarse ones, and of those that a mixture covers.
        self.radius = self.full_radius = self.coarse_radius = self.box_radius = 0.0
        self.length = 0.0  # the typical norm, of a mean alone
        # Factors of coefficients in all norms, by channel and shell of frequency: (C, SHELLS).
        self.emphasis = np.ones((space.channels, SHELLS))
        if not shapes.mean_alone and not self.part.two_valued:
            self.emphasis[0] = IMAGE_WEIGHT if space.mask_labels else rising_weights(self.shell)
        # Contrasts between conditions as released, the noise of a coefficient of each, and those that m(c) has.
        self.noisy_contrasts = self.contrasts = np.zeros(self.part.mean_map.shape)
        self.contrast_noise = np.zeros(len(self.contrasts))
        self.edges = COARSE_EDGES if shapes.mean_alone else RMS_EDGES  # of the first histogram

    def release(self, name: str, contribution: Callable[[Batch], Tensor | Grouped], width: int = 1) -> Array:
        """Return the noisy sum of a contribution over the patients: what the plan charged under this name."""
        multiplier, scans = self.noise_multipliers[name], replace(self.scans, width=width)
        released = noisy_sums.noisy_sum(scans, contribution, multiplier, self.noise, name, self.canaries)
        if self.canaries is not None:
            self.canaries.rehearse(name, contribution, multiplier)
        return released

    def levels(self, batch: Batch) -> Tensor:
        """Return what is summed: the scans, or the ramps of shapes."""
        x = torch.from_numpy(batch.x)
        return self.as_shapes.levels(x) if self.part.two_valued else x

    def residual(self, batch: Batch) -> Tensor:
        """Return the coefficients (B, C, *basis) of what the mean so far leaves over, each times its weight."""
        mean = self.part.mean_coefficients(torch.from_numpy(batch.condition))
        return self.weighted(self.part.reduce(self.levels(batch)) - mean)

    def full_residual(self, batch: Batch) -> Tensor:
        """Return the same in all coefficients (B, C, *spatial)."""
        mean = self.part.mean_coefficients(torch.from_numpy(batch.condition))
        return self.weighted(self.full.reduce(self.levels(batch) - self.part.expand(mean)))

    def warped(self, batch: Batch) -> Iterator[Batch]:
        """Yield the scans as they are and, by `warped_pairs`, moved by fixed warps: what to make of one is public."""
        yield batch
        for grid in self.warps:
            images = self.full.pixels(torch.from_numpy(batch.x))
            moved = move(images, grid.expand(len(images), *grid.shape))
            yield batch._replace(x=self.full.from_pixels(moved).numpy())

    def weighted(self, coefficients: Tensor) -> Tensor:
        """Return coefficients (B, C, *k), each times its weight."""
        return coefficients * torch.as_tensor(self.weights(coefficients.shape[2:]), dtype=coefficients.dtype)

    def weights(self, shape: Sequence[int]) -> Array:
        """Return the factors (C, *k) of the lowest coefficients in all norms."""
        return self.emphasis[:, self.shell[tuple(slice(k) for k in shape)]]

    def buckets(self, vectors: Tensor, edges: Array = RMS_EDGES) -> Tensor:
        """Return one-hot buckets (B, bins) of the norms of vectors (B, ...)."""
        return norm_buckets(torch.linalg.vector_norm(vectors.flatten(1), dim=1), self.elements, edges)

    def overall(self) -> Array:
        """Return the coefficients (C, *basis) of m(c) at classes of equal weight and covariates in their middle."""
        rows = np.zeros((1, self.space.condition_width), dtype=np.float32)
        start = 0
        for c in self.space.conditions:
            if c.kind == "class":
                rows[0, start : start + c.width] = 1 / c.width
            start += c.width
        return np.asarray(self.part.mean_coefficients(torch.from_numpy(rows))[0].numpy(), dtype=np.float64)

    def set_overall(self, residual: Array, noise_sd: float) -> None:
        """Put the noisy mean residual (C, *basis) on top of m(c): shrunk, masks as occupancies. noise_sd: known."""
        shell = self.shell[tuple(slice(k) for k in self.shapes.basis)]
        change = shrink(residual[None], np.asarray([noise_sd]), shell)[0] / self.weights(self.shapes.basis)
        if self.space.mask_labels:
            before = self.overall()[1:]
            change[1:] = smooth_occupancy(before + residual[1:], noise_sd, self.space.spatial_shape) - before
        self.add_overall(change)

    def set_contrasts(self, contrasts: Array) -> None:
        """Put contrasts (H, C, *basis), each coefficient times its weight, in place of those that m(c) has so far."""
        self.part.mean_map += torch.as_tensor(
            (contrasts - self.contrasts) / self.weights(self.shapes.basis), dtype=torch.float32
        )
        self.contrasts = contrasts

    def add_overall(self, coefficients: Array) -> None:
        """Add coefficients (C, *k) to m(c) for every condition; with classes, each block carries its share."""
        space, low = self.space, tuple(slice(k) for k in coefficients.shape[1:])
        classes = [c for c in space.conditions if c.kind == "class"]
        constant = torch.as_tensor(coefficients * design_norm(space.conditions), dtype=torch.float32)
        if not classes:
            self.part.mean_map[(slice(1), slice(None), *low)] += constant
            return
        start = 0
        for c in space.conditions:
            if c.kind == "class":
                self.part.mean_map[(slice(start, start + c.width), slice(None), *low)] += constant / len(classes)
            start += c.width


def rising_weights(shell: npt.NDArray[np.int64]) -> Array:
    """Return a weight a shell (SHELLS,), rising with frequency, that leaves the norm of images about as it is."""
    radius = shell_radius(shell.shape)
    count = np.bincount(shell.ravel(), minlength=SHELLS)
    factor = (1 + radius**2) ** (EMPHASIS / 2)
    power = count * falling_power(radius)
    return np.asarray(factor * np.sqrt(power.sum() / (power * factor**2).sum()))


def shell_radius(spatial_shape: Sequence[int]) -> Array:
    """Return the frequency (SHELLS,) in the middle of each shell, in half-cycles a field of view."""
    return np.asarray(np.expm1((np.arange(SHELLS) + 0.5) / SHELLS * np.log1p(np.linalg.norm(spatial_shape))))


def falling_power(radius: Array) -> Array:
    """Return the power of a coefficient as it is taken to fall with frequency where no scan was asked."""
    return np.asarray((1 + (radius / PUBLIC_CORNER) ** 2) ** -2)
