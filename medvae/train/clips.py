"""The two releases that choose clips: histograms of norms, and with the first whether images are shapes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from medvae.nets.shape import grey_shares
from medvae.train.mixture import box_of
from medvae.train.moment_fit import Fit
from medvae.train.norms import LOW_EDGES, RMS_EDGES, radius_of, typical_norm
from medvae.types import Batch

# Clips where a cohort is too small to show its own (the rule decides): a scan in [0, 1], and what a mean leaves of it.
PUBLIC_RMS, PUBLIC_RESIDUAL_RMS = 0.4, 0.2
# Weights in the first release of how grey images are off borders and at them; below which share off borders they count
# as shapes. All grey at their borders, samples get borders so many voxels wide: they fill two, but classifiers learn a
# little more from softer ones (docs/quality.md).
GREY_WEIGHTS, TWO_VALUED, ALL_GREY = (0.4, 0.3), 0.15, 3.0
# What is below so many standard deviations of its noise counts as not seen.
SEEN = 3.0
# A mean alone clips nearly every scan, at this share of the typical norm: a clip that some stay under is longer than
# theirs, and its noise with it.
TIGHT = 0.8


def norms(fit: Fit) -> None:
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
        looks = ((grey[:, 0] < TWO_VALUED) | fit.part.two_valued).view(-1, *[1] * (x.ndim - 1))
        mean = fit.part.mean_coefficients(torch.from_numpy(batch.condition))
        as_they_are, as_ramps = (fit.part.reduce(v) - mean for v in (x, fit.as_shapes.levels(x)))
        residual = torch.where(looks, as_ramps, fit.weighted(as_they_are))
        return torch.cat([fit.buckets(residual[low], fit.edges) * rest, grey * weights], dim=1)

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
        if fit.part.two_valued:
            fit.emphasis[0] = 1.0
        fit.part.border_width.fill_(ALL_GREY * min(at, 1.0) if at > SEEN * noise[1] else 0.0)


def residual_norms(fit: Fit) -> None:
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
