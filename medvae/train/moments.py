"""The closed-form stage: a linear conditional VAE from noisy moments, with no training.

Five Gaussian releases, each of a sum over patients of a vector whose norm is at most 1, so that adding or removing
one patient (with all of their scans) moves the sum by at most 1 and noise of standard deviation `noise_multiplier`
gives exactly the mechanism that the plan charged:

    norms            histogram of feature norms, to choose the clip of the next release
    centre           a coarse mean, which makes the next norms small
    residual_norms   the same around that centre
    means            overall mean, sums by class and covariate, and their counts: the conditional mean m(c)
    second           second moments around m(c): directions (probabilistic PCA) and spectra by shell of frequency

A patient's vector is the average over the patient's scans of vectors of norm at most 1, so its norm is at most 1 too.
Whatever is computed from the noisy sums afterwards is post-processing.

Where a cohort is so small that only a mean can be seen, that mean has the budget alone (`mean_alone`): norms on a
coarser histogram, and an overall mean around a public level; spread and texture are public constants then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medvae.dp.noise import NoiseSource
from medvae.nets.linear import SHELLS, LinearPart, design, design_norm, design_width, shells
from medvae.nets.mixture import MixtureShapes
from medvae.nets.shape import grey_shares
from medvae.synth.warp import move, paired_warps
from medvae.train import noisy_sums
from medvae.train.denoise import (
    contrast_operator,
    mask_contrast,
    principal_directions,
    shrink,
    tame_spectra,
)
from medvae.train.mixture import Grouped, box_of, fit_mixture, release_names
from medvae.train.noisy_sums import Canaries, Pass, ScanSource, clip_rows
from medvae.train.norms import COARSE_EDGES, LOW_EDGES, RMS_EDGES, norm_buckets, radius_of, typical_norm
from medvae.train.occupancy import smooth_occupancy
from medvae.train.subspace import LowestCosines, Subspace, window
from medvae.types import Batch, Progress

Array = npt.NDArray[np.float64]

RELEASES = ("norms", "centre", "residual_norms", "means", "second")
CLIP_RELEASES = ("norms", "residual_norms")
ALONE = ("norms", "means")
# Clips where a cohort is too small to show its own (the rule decides): a scan in [0, 1], and what a mean leaves of it.
PUBLIC_RMS, PUBLIC_RESIDUAL_RMS = 0.4, 0.2
# The grey level that a mean alone is measured from, and how far scans are taken to vary around it.
PUBLIC_LEVEL, PUBLIC_SPREAD, PUBLIC_CORNER = 0.4, 0.5, 4.0
# Weight of the image in all norms where there are masks: what a segmentation learns from is the masks. A mean alone
# shows its masks well enough, and gets the image at full weight: docs/quality.md.
IMAGE_WEIGHT = 0.5
# Weights in the first release of how grey images are off borders and at them; below which share off borders they count
# as shapes. All grey at their borders, samples get borders so many voxels wide: they fill two, but classifiers learn a
# little more from softer ones (docs/quality.md).
GREY_WEIGHTS, TWO_VALUED, ALL_GREY = (0.4, 0.3), 0.15, 3.0
# What is below so many standard deviations of its noise counts as not seen.
SEEN = 3.0
# A mean alone clips nearly every scan, at this share of the typical norm: a clip that some stay under is longer than
# theirs, and its noise with it.
TIGHT = 0.8
# Size of the warps that `warped_pairs` asks for, by which hippocampi were rebuilt best: docs/family.md.
WARP = 0.75
# Images alone are told apart by class, and classes that differ too little cannot be: contrasts get their likely length
# back, up to this factor. Masks beside them are learned from m(c) itself, where every error counts.
LENGTHEN = 2.0
# How a release splits its unit of sensitivity between its parts (squares add to 1).
COUNT_WEIGHT = 0.3
CONTRAST_WEIGHT = 0.5


@dataclass(frozen=True)
class MomentShapes:
    """How fine each release is, in cosines an axis: public numbers, chosen by the rule.

    basis: of the mean; coarse: of the centre and of second moments; latent_dim: directions kept at most;
    spectrum_weight: share of the last release's sensitivity that spectra get, against directions (squares add to 1);
    public_clips: clips are public constants, and the two histograms are left out. mean_alone: only the overall mean
    is released, and a histogram of norms before it. warped_pairs: of copies that a scan's second moments average over.
    two_valued: whether images are shapes, where that is public; functions: that second moments of shapes are of, in
    place of the lowest cosines.
    """

    basis: tuple[int, ...]
    coarse: tuple[int, ...]
    latent_dim: int
    spectrum_weight: float
    mixture: MixtureShapes | None = None
    lloyd_steps: int = 0
    public_clips: bool = False
    mean_alone: bool = False
    warped_pairs: int = 0
    two_valued: bool | None = None
    functions: int = 64

    @property
    def releases(self) -> tuple[str, ...]:
        """The names of all releases of the stage, in order."""
        stages = ALONE if self.mean_alone else RELEASES
        first = tuple(name for name in stages if not (self.public_clips and name in CLIP_RELEASES))
        if self.mixture is None:
            return first
        return (*first, *release_names(self.mixture.components, self.lloyd_steps))


def fit_moments(
    source: ScanSource,
    patients: npt.NDArray[np.int64],
    noise_multipliers: Mapping[str, float],
    shapes: MomentShapes,
    *,
    noise: NoiseSource,
    progress: Progress | None = None,
    part: type[LinearPart] = LinearPart,
    canaries: Canaries | None = None,
) -> LinearPart:
    """Fit the linear part with the Gaussian releases named by `shapes.releases`, each with its own noise multiplier.

    Guarantee: the composition of those Gaussian mechanisms, by patient, add/remove; each patient adds a vector of
    norm at most 1 to each sum. `patients` must be the training patients that the plan counted. part: how scans
    become coefficients; another class is for sources that hold coefficients already.
    """
    steps: tuple[Callable[[_Fit], None], ...] = (_norms, _centre, _residual_norms, _means, _second)
    if shapes.mean_alone:
        steps = (_public_level, _norms, _mean_alone, _public_spread)
    if shapes.mixture is not None:
        steps = (*steps, _mixture)
    fit = _Fit(Pass(source, patients), noise_multipliers, shapes, noise, part, canaries)
    for done, step in enumerate(steps):
        step(fit)
        if progress is not None:
            progress(done + 1, len(steps))
    return fit.part


class _Fit:
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
        image = IMAGE_WEIGHT if space.mask_labels and not shapes.mean_alone else 1.0
        weights = [image, *[1.0] * (space.channels - 1)]
        self.weights = np.asarray(weights).reshape(-1, *[1] * space.spatial_dims)
        # Contrasts between conditions as released, the noise of a coefficient of each, and those that m(c) has.
        self.noisy_contrasts = self.contrasts = np.zeros(self.part.mean_map.shape)
        self.contrast_noise = np.zeros(len(self.contrasts))
        self.edges = COARSE_EDGES if shapes.mean_alone else RMS_EDGES  # of the first histogram

    def release(self, name: str, contribution: Callable[[Batch], Tensor | Grouped], width: int = 1) -> Array:
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
        """Return the coefficients (B, C, *basis) of what the mean so far leaves over, each channel times its weight."""
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
        return coefficients * torch.as_tensor(self.weights, dtype=coefficients.dtype)

    def buckets(self, vectors: Tensor, edges: Array = RMS_EDGES) -> Tensor:
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
        change = shrink(residual[None], np.asarray([noise_sd]), shell)[0] / self.weights
        if self.space.mask_labels:
            before = self.overall()[1:]
            change[1:] = smooth_occupancy(before + residual[1:], noise_sd, self.space.spatial_shape) - before
        self.add_overall(change)

    def set_contrasts(self, contrasts: Array) -> None:
        """Put contrasts (H, C, *basis), each channel times its weight, in place of those that m(c) has so far."""
        self.part.mean_map += torch.as_tensor((contrasts - self.contrasts) / self.weights, dtype=torch.float32)
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


def _norms(fit: _Fit) -> None:
    """Choose the first clip and, where no masks stand beside images, whether they are shapes, to be summed as ramps."""
    if fit.shapes.public_clips:
        fit.radius = (PUBLIC_RESIDUAL_RMS if fit.shapes.mean_alone else PUBLIC_RMS) * fit.elements**0.5
        fit.length = fit.radius
        return
    low = fit.coarse if not fit.shapes.mean_alone else ...
    asked = fit.shapes.two_valued is not False and not fit.space.mask_labels
    weights = torch.tensor(GREY_WEIGHTS if asked else (0.0, 0.0))
    rest = (1 - float(weights.square().sum())) ** 0.5

    def contribution(batch: Batch) -> Tensor:
        if not asked:
            buckets: Tensor = fit.buckets(fit.residual(batch)[low], fit.edges)
            return buckets
        x = torch.from_numpy(batch.x)
        grey = grey_shares(fit.full.pixels(x)[:, 0])
        # The clip is for what is summed next: the norm of a scan that looks like a shape is its ramp's.
        looks = grey[:, 0] < TWO_VALUED
        x = x.clone()
        x[looks] = fit.as_shapes.levels(x[looks])
        buckets = fit.buckets(fit.residual(batch._replace(x=x.numpy()))[low], fit.edges)
        return torch.cat([buckets * rest, grey * weights], dim=1)

    released, noise_sd = fit.release("norms", contribution), fit.noise_multipliers["norms"]
    histogram = released[: len(fit.edges) + 1] / rest
    if fit.shapes.mean_alone:
        fit.length = typical_norm(histogram, fit.elements, noise_sd / rest, fit.edges)
        fit.radius = TIGHT * fit.length
    else:
        fit.radius = radius_of(histogram, fit.elements, noise_sd / rest, fit.edges)
    if asked:
        (off, at), noise = released[-2:] / GREY_WEIGHTS / fit.count, noise_sd / np.asarray(GREY_WEIGHTS) / fit.count
        if fit.shapes.two_valued is None:
            fit.part.two_valued.fill_(SEEN * noise[0] < TWO_VALUED and off < TWO_VALUED)
        fit.part.border_width.fill_(ALL_GREY * min(at, 1.0) if at > SEEN * noise[1] else 0.0)


def _centre(fit: _Fit) -> None:
    """A coarse overall mean: it only has to make the next norms small."""
    shape = (1, fit.space.channels, *fit.shapes.coarse)
    released = fit.release("centre", lambda b: clip_rows(fit.residual(b)[fit.coarse].flatten(1), fit.radius))
    scale = fit.radius / fit.count
    noise_sd = np.asarray([fit.noise_multipliers["centre"] * scale])
    fit.add_overall(shrink(released.reshape(shape) * scale, noise_sd, fit.shell[fit.coarse[2:]])[0] / fit.weights)


def _residual_norms(fit: _Fit) -> None:
    """Choose the clips of means and second moments: each release has that of the coefficients that it sums."""
    if fit.shapes.public_clips:
        fit.radius = fit.full_radius = fit.coarse_radius = fit.box_radius = PUBLIC_RESIDUAL_RMS * fit.elements**0.5
        return
    mixture, edges = fit.part.mixture, RMS_EDGES * LOW_EDGES
    parts = 3 if mixture is None else 4

    def contribution(batch: Batch) -> Tensor:
        residual = fit.residual(batch)
        low = [residual[fit.coarse]] + ([] if mixture is None else [box_of(residual, mixture.shapes)])
        found = [fit.buckets(residual), fit.buckets(fit.full_residual(batch)), *(fit.buckets(v, edges) for v in low)]
        scaled: Tensor = torch.cat(found, dim=1) / parts**0.5
        return scaled

    histograms = np.split(fit.release("residual_norms", contribution), parts)
    noise_sd = fit.noise_multipliers["residual_norms"]
    fit.radius, fit.full_radius = (radius_of(h, fit.elements, noise_sd) for h in histograms[:2])
    low = [min(fit.radius, radius_of(h, fit.elements, noise_sd, edges)) for h in histograms[2:]]
    fit.coarse_radius, fit.box_radius = low[0], low[-1]


def _public_level(fit: _Fit) -> None:
    """Start from an even grey image and no masks."""
    level = np.zeros((fit.space.channels, *[1] * fit.space.spatial_dims))
    level[0] = PUBLIC_LEVEL * float(np.prod(fit.space.spatial_shape)) ** 0.5
    fit.add_overall(level)


def _mean_alone(fit: _Fit) -> None:
    """The overall mean: of directions, nearly all scans being clipped, times the norm that is typical."""
    released = fit.release("means", lambda b: clip_rows(fit.residual(b).flatten(1), fit.radius))
    scale = fit.length / fit.count
    noise_sd = fit.noise_multipliers["means"] * scale
    fit.set_overall(released.reshape(fit.space.channels, *fit.shapes.basis) * scale, noise_sd)


def _public_spread(fit: _Fit) -> None:
    """Texture of the image that no scan was asked for: power that falls with the fourth power of frequency."""
    radius = np.expm1((np.arange(SHELLS) + 0.5) / SHELLS * np.log1p(np.linalg.norm(fit.shell.shape)))
    power = (1 + (radius / PUBLIC_CORNER) ** 2) ** -2
    count = np.bincount(fit.shell.ravel(), minlength=SHELLS)
    power *= PUBLIC_SPREAD**2 * fit.shell.size / (power * count).sum()
    fit.part.spectrum[:, 0, 0] = torch.as_tensor(power, dtype=torch.float32)


def _means(fit: _Fit) -> None:
    """The overall mean, and its contrasts between classes and along covariates."""
    conditions, channels = fit.space.conditions, fit.space.channels
    width, shape = design_width(conditions), (channels, *fit.shapes.basis)
    features = int(np.prod(shape))
    overall_weight = (1 - COUNT_WEIGHT**2 - CONTRAST_WEIGHT**2) ** 0.5

    def contribution(batch: Batch) -> Tensor:
        h = design(torch.from_numpy(batch.condition), conditions)
        phi = clip_rows(fit.residual(batch).flatten(1), fit.radius)
        by_condition = torch.einsum("bh,bd->bhd", h, phi).flatten(1)
        gram = torch.einsum("bh,bg->bhg", h, h).flatten(1)
        return torch.cat([phi * overall_weight, by_condition * CONTRAST_WEIGHT, gram * COUNT_WEIGHT], dim=1)

    released = fit.release("means", contribution)
    sigma, shell = fit.noise_multipliers["means"], fit.shell[tuple(slice(k) for k in fit.shapes.basis)]
    overall, by_condition, gram = np.split(released, [features, features * (1 + width)])
    gram_noise = sigma / COUNT_WEIGHT
    operator = contrast_operator(gram.reshape(width, width) / COUNT_WEIGHT, gram_noise, conditions)
    scale = fit.radius / CONTRAST_WEIGHT
    fit.noisy_contrasts = np.tensordot(operator, by_condition.reshape(width, *shape) * scale, axes=1)
    fit.contrast_noise = sigma * scale * np.linalg.norm(operator, axis=1)
    scale = fit.radius / overall_weight / fit.count
    fit.set_overall(overall.reshape(shape) * scale, sigma * scale)
    if fit.part.two_valued:
        fit.subspace = window(fit.overall()[0], fit.space.spatial_shape, fit.shapes.functions, shell)
        fit.coarse_radius = fit.radius
    fit.set_contrasts(shrink(fit.noisy_contrasts, fit.contrast_noise, shell))


def _second(fit: _Fit) -> None:
    """Second moments around m(c): directions of the coarse coefficients, and spectra of all of them by shell.

    With r the clipped residual, |r| <= 1: the matrix of coarse products has norm at most |r|^2, and the spectra are
    positive semi-definite with total trace |r|^2, so their joint norm is at most that too. The average over a scan and
    its warped copies, each clipped, has no larger norm than one of them.
    """
    channels, part = fit.space.channels, fit.part
    size = fit.subspace.size
    upper = torch.triu_indices(size, size)
    root = torch.where(upper[0] == upper[1], 1.0, 2**0.5)  # so that the norm of a triangle is the matrix's
    bands = torch.nn.functional.one_hot(torch.from_numpy(fit.shell.ravel()), SHELLS).float()
    spectrum_weight = fit.shapes.spectrum_weight
    second_weight = (1 - spectrum_weight**2) ** 0.5

    def contribution(batch: Batch) -> Tensor:
        views = [fit.full_residual(view) for view in fit.warped(batch)]
        small = torch.stack([clip_rows(fit.subspace.take(v), fit.coarse_radius) for v in views], dim=1)
        products = (small.transpose(1, 2) @ small)[:, upper[0], upper[1]] * root / len(views)
        flat = clip_rows(views[0].flatten(1), fit.full_radius).view(len(batch.x), channels, -1)
        spectra = torch.einsum("bcn,bdn,ns->bscd", flat, flat, bands).flatten(1)
        return torch.cat([products * second_weight, spectra * spectrum_weight], dim=1)

    released = fit.release("second", contribution, upper.shape[1])
    products, spectra = np.split(released, [upper.shape[1]])
    scale = fit.coarse_radius**2 / second_weight / fit.count
    covariance = np.zeros((size, size))
    covariance[upper[0].numpy(), upper[1].numpy()] = products * scale / root.numpy()
    covariance += np.triu(covariance, 1).T
    noise_sd = fit.noise_multipliers["second"] * scale / 2**0.5
    directions = fit.subspace.spread(principal_directions(covariance, noise_sd, fit.shapes.latent_dim))
    part.directions[: len(directions)] = torch.as_tensor(directions / fit.weights, dtype=torch.float32)
    scale_full = fit.full_radius**2 / spectrum_weight / fit.count
    energy = spectra.reshape(SHELLS, channels, channels) * scale_full
    noise_sd = fit.noise_multipliers["second"] * scale_full
    per_band = np.maximum(np.bincount(fit.shell.ravel(), minlength=SHELLS), 1)
    spectrum = tame_spectra(energy / per_band[:, None, None], noise_sd / per_band)
    power = np.einsum("scc->cs", spectrum)
    if power.any():  # now that it shows where scans vary, the contrasts are shrunk anew
        longest = 1.0 if fit.space.mask_labels else LENGTHEN
        revised = fit.subspace.shrink(fit.noisy_contrasts, fit.contrast_noise, directions, power, longest)
        fit.set_contrasts(revised)
    weights = fit.weights.ravel()
    part.spectrum.copy_(torch.as_tensor(spectrum / np.outer(weights, weights), dtype=torch.float32))
    contrast = mask_contrast(energy.sum(0), noise_sd * (SHELLS / 2) ** 0.5) / weights[0]
    part.contrast.copy_(torch.as_tensor(contrast, dtype=torch.float32))


def _mixture(fit: _Fit) -> None:
    """Mixtures by class of the lowest coefficients around m(c)."""
    mixture = fit.part.mixture
    if mixture is None:
        return
    groups = mixture.weights.numel()

    def residuals(batch: Batch) -> Tensor:
        return clip_rows(box_of(fit.residual(batch), mixture.shapes), fit.box_radius)

    def release(name: str, contribution: Callable[[Batch], Grouped]) -> Array:
        return fit.release(name, contribution).reshape(groups, -1)

    fit_mixture(mixture, residuals, fit.box_radius, release, fit.noise_multipliers, fit.shapes.lloyd_steps)
    per_channel = torch.as_tensor(fit.weights.ravel(), dtype=torch.float32)
    per_coefficient = per_channel.repeat_interleave(math.prod(mixture.shapes.box))
    mixture.means.div_(per_coefficient)
    mixture.factors.div_(per_coefficient)
