"""The closed-form stage: a linear conditional VAE from noisy moments, with no training.

Five Gaussian releases, each of a sum over patients of a vector whose norm is at most 1, so that adding or removing
one patient (with all of their scans) moves the sum by at most 1 and noise of standard deviation `noise_multiplier`
gives exactly the mechanism that the plan charged:

    norms            histogram of feature norms, to choose the clip of the next release; whether images are shapes
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

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medvae.dp.noise import NoiseSource
from medvae.nets.linear import SHELLS, LinearPart, design, design_width
from medvae.train.clips import norms, residual_norms
from medvae.train.denoise import contrast_operator, mask_contrast, principal_directions, shrink, strongest, tame_spectra
from medvae.train.mean_alone import mean_alone, public_level, public_spread
from medvae.train.mixture import Grouped, box_of, fit_mixture
from medvae.train.moment_fit import Fit
from medvae.train.moment_shapes import MomentShapes
from medvae.train.noisy_sums import Canaries, Pass, ScanSource, clip_rows
from medvae.train.subspace import window
from medvae.types import Batch, ImageSpace, Progress

Array = npt.NDArray[np.float64]

# Images alone are told apart by class, and classes that differ too little cannot be: contrasts get their likely length
# back, up to this factor. Masks beside them are learned from m(c) itself, where every error counts.
LENGTHEN = 2.0
# How the release of the means splits its unit of sensitivity (squares add to 1): counts, and contrasts of two classes.
COUNT_WEIGHT = 0.3
CONTRAST_WEIGHT = 0.5


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
    steps: tuple[Callable[[Fit], None], ...] = (norms, _centre, residual_norms, _means, _second)
    if shapes.mean_alone:
        steps = (public_level, norms, mean_alone, public_spread)
    if shapes.mixture is not None:
        steps = (*steps, _mixture)
    fit = Fit(Pass(source, patients), noise_multipliers, shapes, noise, part, canaries)
    for done, step in enumerate(steps):
        step(fit)
        if progress is not None:
            progress(done + 1, len(steps))
    return fit.part


def _centre(fit: Fit) -> None:
    """A coarse overall mean: it only has to make the next norms small."""
    shape = (1, fit.space.channels, *fit.shapes.coarse)
    released = fit.release("centre", lambda b: clip_rows(fit.residual(b)[fit.coarse].flatten(1), fit.radius))
    scale = fit.radius / fit.count
    noise_sd = np.asarray([fit.noise_multipliers["centre"] * scale])
    change = shrink(released.reshape(shape) * scale, noise_sd, fit.shell[fit.coarse[2:]])[0]
    fit.add_overall(change / fit.weights(fit.shapes.coarse))


def _means(fit: Fit) -> None:
    """The overall mean, and its contrasts between classes and along covariates."""
    conditions, channels = fit.space.conditions, fit.space.channels
    width, shape = design_width(conditions), (channels, *fit.shapes.basis)
    features = int(np.prod(shape))
    overall_weight, contrast_weight = mean_weights(fit.space, fit.shapes)

    def contribution(batch: Batch) -> Tensor:
        h = design(torch.from_numpy(batch.condition), conditions)
        phi = clip_rows(fit.residual(batch).flatten(1), fit.radius)
        by_condition = torch.einsum("bh,bd->bhd", h, phi).flatten(1)
        gram = torch.einsum("bh,bg->bhg", h, h).flatten(1)
        return torch.cat([phi * overall_weight, by_condition * contrast_weight, gram * COUNT_WEIGHT], dim=1)

    released = fit.release("means", contribution)
    sigma, shell = fit.noise_multipliers["means"], fit.shell[tuple(slice(k) for k in fit.shapes.basis)]
    overall, by_condition, gram = np.split(released, [features, features * (1 + width)])
    gram_noise = sigma / COUNT_WEIGHT
    operator = contrast_operator(gram.reshape(width, width) / COUNT_WEIGHT, gram_noise, conditions)
    scale = fit.radius / contrast_weight
    fit.noisy_contrasts = np.tensordot(operator, by_condition.reshape(width, *shape) * scale, axes=1)
    fit.contrast_noise = sigma * scale * np.linalg.norm(operator, axis=1)
    scale = fit.radius / overall_weight / fit.count
    fit.set_overall(overall.reshape(shape) * scale, sigma * scale)
    if fit.part.two_valued:
        fit.subspace = window(fit.overall()[0], fit.space.spatial_shape, fit.shapes.functions, shell)
        fit.coarse_radius = fit.radius
    fit.set_contrasts(shrink(fit.noisy_contrasts, fit.contrast_noise, shell))


def mean_weights(space: ImageSpace, shapes: MomentShapes) -> tuple[float, float]:
    """Return the weights of the overall mean and of contrasts in the release of the means.

    Many classes have few patients each: the noise of a class's mean grows with their number and that of the overall
    mean does not, so for images alone the overall mean gets less the more classes there are. Masks are learned from
    the overall mean, and a mixture releases the means of its components anew.
    """
    overall = 1 - COUNT_WEIGHT**2 - CONTRAST_WEIGHT**2
    if not space.mask_labels and shapes.mixture is None:
        overall *= 2 / max([2, *(c.width for c in space.conditions if c.kind == "class")])
    return overall**0.5, (1 - COUNT_WEIGHT**2 - overall) ** 0.5


def _second(fit: Fit) -> None:
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
    found = fit.subspace.spread(principal_directions(covariance, noise_sd, size))
    kept = strongest(found / fit.weights(fit.shapes.basis), fit.shapes.latent_dim)
    part.directions[: len(kept)] = torch.as_tensor(kept, dtype=torch.float32)
    scale_full = fit.full_radius**2 / spectrum_weight / fit.count
    energy = spectra.reshape(SHELLS, channels, channels) * scale_full
    noise_sd = fit.noise_multipliers["second"] * scale_full
    by_shell = fit.emphasis.T
    per_band = np.maximum(np.bincount(fit.shell.ravel(), minlength=SHELLS), 1)[:, None]
    per_pair = per_band[:, None] * by_shell[:, :, None] * by_shell[:, None, :]
    spectrum = tame_spectra(energy / per_pair, noise_sd / per_band / by_shell**2)
    power = np.einsum("scc->cs", spectrum) * fit.emphasis**2
    if power.any():  # now that it shows where scans vary, the contrasts are shrunk anew
        longest = 1.0 if fit.space.mask_labels else LENGTHEN
        directions = found[: fit.shapes.latent_dim]
        revised = fit.subspace.shrink(fit.noisy_contrasts, fit.contrast_noise, directions, power, longest)
        fit.set_contrasts(revised)
    part.spectrum.copy_(torch.as_tensor(spectrum, dtype=torch.float32))
    # Beside masks an image has one weight for all frequencies; alone, it has no contrast.
    contrast = mask_contrast(energy.sum(0), noise_sd * (SHELLS / 2) ** 0.5) / fit.emphasis[0].mean()
    part.contrast.copy_(torch.as_tensor(contrast, dtype=torch.float32))


def _mixture(fit: Fit) -> None:
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
    per_coefficient = torch.as_tensor(fit.weights(mixture.shapes.box).ravel(), dtype=torch.float32)
    mixture.means.div_(per_coefficient)
    mixture.factors.div_(per_coefficient)
