"""What follows from noisy moments whose noise is known: all of it post-processing, none of it sees a scan."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medvae.nets.linear import design_width
from medvae.types import Condition, condition_width

Array = npt.NDArray[np.float64]

# A contrast counts from this many standard deviations of its noise on.
CERTAIN = 3.0
# How large the difference between conditions may be, as a variance over that within one: candidates.
SCALES = np.geomspace(1e-3, 1e3, 61)


def shrink(rows: Array, noise_sd: Array, shell: npt.NDArray[np.int64]) -> Array:
    """Shrink rows (H, C, *k) towards zero, band by band, by the positive-part James-Stein factor.

    noise_sd: (H,), the known noise of one coefficient of each row. Post-processing.
    """
    out = rows.copy()
    for band in np.unique(shell):
        inside = shell == band
        energy = np.square(rows[:, :, inside]).sum(-1)
        expected = np.square(noise_sd)[:, None] * inside.sum()
        factor = np.clip(1 - expected / np.maximum(energy, 1e-30), 0, 1)
        out[:, :, inside] *= factor[:, :, None]
    return out


def shrink_along(rows: Array, noise_sd: Array, directions: Array, left: Array, longest: float = 1.0) -> Array:
    """Shrink rows (H, C, *k) to where scans vary: the mean of each row given its noise.

    A row is taken for N(0, t S), with S the covariance within a condition: `directions` (d, C, *k), mutually
    orthogonal, each scaled by its standard deviation, and the variance `left` (C, *k) of single coefficients beyond
    them; t is the likeliest. Without this, noise in a coefficient in which scans hardly vary looks to a classifier like
    the surest sign of all. noise_sd: (H,), the known noise of one coefficient of each row. Post-processing.
    """
    lengths = np.linalg.norm(directions.reshape(len(directions), -1), axis=1)
    unit = directions.reshape(len(directions), -1)[lengths > 0] / lengths[lengths > 0, None]
    flat, rest = rows.reshape(len(rows), -1), left.ravel()
    along = flat @ unit.T
    values = np.concatenate([along, flat - along @ unit], axis=1)
    variance = np.concatenate([lengths[lengths > 0] ** 2 + np.square(unit) @ rest, rest])
    noise = np.maximum(np.square(noise_sd), 1e-30)[:, None]
    for row, mine in zip(values, noise, strict=True):
        total = SCALES[:, None] * variance + mine
        scale = SCALES[np.argmin((np.square(row) / total + np.log(total)).sum(1))]
        factor = scale * variance / (scale * variance + mine)
        row *= factor
        known, unknown = np.square(row).sum(), (factor * mine).sum()
        row *= min(longest, (1 + unknown / max(known, 1e-30)) ** 0.5)
    out = values[:, : len(unit)] @ unit + values[:, len(unit) :]
    return np.asarray(out.reshape(rows.shape))


def contrast_operator(gram: Array, gram_noise_sd: float, conditions: tuple[Condition, ...]) -> Array:
    """Return the operator (H, H) from sums T = sum h phi' to the rows of m(c) that differ between conditions.

    Least squares G^-1 T with G = sum h h'; of each class block its count-weighted mean is taken away, and the
    intercept row is zero: the overall mean comes from a release of its own. Post-processing.
    """
    width = len(gram)
    gram = (gram + gram.T) / 2
    floor = max(1.0, 2 * gram_noise_sd * width**0.5)
    values, vectors = np.linalg.eigh(gram)
    inverse = (vectors / np.maximum(values, floor)) @ vectors.T
    weights = np.maximum(np.diag(gram), floor)
    contrast = np.eye(width)
    start = design_width(conditions) - condition_width(conditions)
    contrast[:start] = 0.0
    for c in conditions:
        if c.kind == "class":
            block = slice(start, start + c.width)
            contrast[block, block] -= weights[block] / weights[block].sum()
        start += c.width
    return np.asarray(contrast @ inverse)


def principal_directions(second: Array, noise_sd: float, count: int) -> Array:
    """Return up to `count` directions (count, D), scaled by their standard deviation, from a noisy covariance.

    noise_sd: of one entry off the diagonal, released once. Eigenvalues below the edge of the noise (2 sigma sqrt(D) for
    a symmetric Gaussian matrix) are noise and dropped; the others are shrunk by what the noise is expected to add.
    Post-processing.
    """
    values, vectors = np.linalg.eigh((second + second.T) / 2)
    edge = noise_sd * len(second) ** 0.5
    order = np.argsort(values)[::-1][:count]
    # An eigenvalue l above the edge appears at l + edge^2 / l (Benaych-Georges & Nadakuditi 2011): invert that.
    seen = np.maximum(values[order], 0.0)
    kept = np.where(seen > 2 * edge, (seen + np.sqrt(np.maximum(seen**2 - 4 * edge**2, 0.0))) / 2, 0.0)
    return np.asarray((vectors[:, order] * np.sqrt(kept)).T)


def strongest(directions: Array, count: int) -> Array:
    """Return at most `count` mutually orthogonal directions (n, C, *k) that hold most of what (N, C, *k) add up to.

    Found where the noise is white, directions are neither orthogonal nor in order in the coefficients themselves.
    """
    _, lengths, axes = np.linalg.svd(directions.reshape(len(directions), -1), full_matrices=False)
    kept = lengths[:count, None] * axes[:count]
    return np.asarray(kept.reshape(-1, *directions.shape[1:]))


def mask_contrast(total: Array, noise_sd: float) -> Array:
    """Return the slope (M,) of the image on its masks from their noisy total covariance (C, C). Post-processing.

    noise_sd: of the average of an entry and its mirror image.

    Cross terms are shrunk by three times their noise, and the masks' own matrix is kept above it. A contrast of the
    wrong sign is worse than none: it undoes a segmentation trained on the samples.
    """
    cross = (total[0, 1:] + total[1:, 0]) / 2
    cross = cross * np.maximum(1 - (CERTAIN * noise_sd) ** 2 / np.maximum(cross**2, 1e-30), 0.0)
    within = (total[1:, 1:] + total[1:, 1:].T) / 2
    values, vectors = np.linalg.eigh(within)
    return np.asarray((vectors / np.maximum(values, 2 * noise_sd + 1e-12)) @ vectors.T @ cross)


def tame_spectra(spectra: Array, noise_sd: Array) -> Array:
    """Return covariances by shell that could be an image's, near the noisy (S, C, C). Post-processing.

    Power falls with frequency, in each channel: isotonic regression, weighted by the known noise (S, C), which pools
    the few coefficients of low shells with their neighbours. Cross terms are kept below the powers, and the whole is
    made positive semi-definite.
    """
    from sklearn.isotonic import IsotonicRegression

    symmetric = (spectra + spectra.transpose(0, 2, 1)) / 2
    order, weight = np.arange(len(spectra)), 1 / np.maximum(noise_sd, 1e-12) ** 2
    power = np.stack(
        [
            IsotonicRegression(y_min=0.0, increasing=False).fit_transform(order, column, sample_weight=mine)
            for column, mine in zip(np.einsum("scc->cs", symmetric), weight.T, strict=True)
        ],
        axis=1,
    )
    bound = 0.95 * np.sqrt(power[:, :, None] * power[:, None, :])
    tamed = np.clip(symmetric, -bound, bound)
    np.einsum("scc->sc", tamed)[...] = power
    values, vectors = np.linalg.eigh(tamed)
    return np.asarray(np.einsum("sij,sj,skj->sik", vectors, np.maximum(values, 0.0), vectors))
