"""White-box attack on the closed form, from what it releases: a mean map, directions and spectra.

Scores are computed from cosine coefficients:

    mean map          The released mean m is a noisy average of clipped scans, so the best test of one summand is the
                      inner product of the scan with what m has too much of, each coefficient weighed by its noise:
                      (m - mu)' V^-1 (x - mu), in units of its standard deviation (Dwork et al. 2015, "Robust
                      Traceability from Trace Amounts"; Sankararaman et al. 2009 for the weights). mu and V are mean
                      and covariance of a released mean of which one knows neither the noise nor who was drawn.
    exact likelihood  log N(x; m(c), U'U + Sigma), directions U and spectra Sigma by shell, by Woodbury's identity.
    mixture           the same where a mixture by class stands in place of the directions.

A patient of more than one scan is summed by patient later on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medvae.audit.material import Scans
from medvae.types import FloatArray, ImageSpace

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Part = Mapping[str, npt.NDArray[np.float32]]

# Least standard deviation of a coefficient: a spectrum that the noise swallowed must not make a scan impossible.
FLOOR = 0.01
# Least share of a released mean's variance that counts as noise: keeps the weights finite where there is none.
SURE = 1e-3
# Rows worked on at a time.
CHUNK = 64


@dataclass(frozen=True)
class Coefficients:
    """Scans as the closed form sees them.

    low: (N, C, D) cosine coefficients of the mean's basis; gram: (N, SHELLS, C, C) products of the higher ones by
    shell; design: (N, H) regression rows; shell: (D,) of the low ones; counts: (SHELLS,) of the higher ones;
    cell: (N,), which combination of classes.
    """

    low: Floats
    gram: Floats
    design: Floats
    shell: Ints
    counts: Ints
    cell: Ints

    def take(self, rows: npt.NDArray[np.bool_] | Ints) -> Coefficients:
        """Return some of the scans."""
        return Coefficients(
            self.low[rows], self.gram[rows], self.design[rows], self.shell, self.counts, self.cell[rows]
        )


def cosines(x: FloatArray) -> FloatArray:
    """Return all orthonormal DCT-II coefficients (N, C, *spatial) of scans (N, C, *spatial)."""
    from scipy.fft import dctn

    return np.asarray(dctn(x, axes=tuple(range(2, x.ndim)), norm="ortho"), dtype=np.float32)


def coefficients(full: FloatArray, condition: FloatArray, space: ImageSpace, basis: tuple[int, ...]) -> Coefficients:
    """Reduce all coefficients (N, C, *spatial) to what the scores need."""
    import torch

    from medvae.nets.linear import SHELLS, design, shells
    from medvae.nets.mixture import cell_of

    shell = shells(space.spatial_shape)
    inside = np.zeros(space.spatial_shape, dtype=bool)
    inside[tuple(slice(k) for k in basis)] = True
    low = full[(slice(None), slice(None), *(slice(k) for k in basis))].reshape(*full.shape[:2], -1)
    gram = np.zeros((len(full), SHELLS, full.shape[1], full.shape[1]))
    for s in np.unique(shell[~inside]):
        part = full[:, :, (shell == s) & ~inside].astype(np.float64)
        gram[:, s] = np.einsum("ncj,ndj->ncd", part, part)
    rows = design(torch.from_numpy(condition), space.conditions).double().numpy()
    counts = np.bincount(shell[~inside].ravel(), minlength=SHELLS)
    of_low = shell[tuple(slice(k) for k in basis)].ravel()
    cell = cell_of(torch.from_numpy(condition), space.conditions).numpy()
    return Coefficients(low.astype(np.float64), gram, rows, of_low, counts.astype(np.int64), cell)


def of_scans(scans: Scans, basis: tuple[int, ...]) -> Coefficients:
    """Return the coefficients of scans."""
    return coefficients(cosines(scans.x), scans.condition, scans.space, basis)


def likelihood(part: Part, scans: Coefficients, space: ImageSpace) -> Floats:
    """Return log p(x | c) of the linear-Gaussian model in nats, (N,)."""
    inverse, log_det = _noise(part, space)
    n, channels, size = scans.low.shape
    mean = np.tensordot(scans.design, _flat(part["mean_map"]), axes=1)
    residual = scans.low - mean
    at = inverse[scans.shell]  # (D, C, C)
    whitened = np.einsum("dab,nbd->nad", at, residual)
    quadratic = np.einsum("nad,nad->n", residual, whitened) + np.einsum("nsab,sab->n", scans.gram, inverse)
    directions = _flat(part["directions"])
    seen = np.einsum("dab,jbd->jad", at, directions).reshape(len(directions), -1)
    core = np.eye(len(directions)) + seen @ directions.reshape(len(directions), -1).T
    codes = whitened.reshape(n, -1) @ directions.reshape(len(directions), -1).T
    quadratic = quadratic - np.einsum("nj,nj->n", codes, np.linalg.solve(core, codes.T).T)
    volume = log_det[scans.shell].sum() + float(scans.counts @ log_det) + np.linalg.slogdet(core)[1]
    elements = channels * (size + int(scans.counts.sum()))
    return np.asarray(-0.5 * (quadratic + volume + elements * math.log(2 * math.pi)))


def mixture_likelihood(part: Part, scans: Coefficients, basis: tuple[int, ...], box: tuple[int, ...]) -> Floats:
    """Return log sum_j w_j N(r; mu_j, F_j' F_j + S) of what the mean map leaves over, in nats, (N,).

    r: the coefficients of the box; S: the diagonal of the released spectra, for what the factors leave out.
    """
    inside = np.arange(math.prod(basis)).reshape(basis)[tuple(slice(k) for k in box)].ravel()
    residual = (scans.low - np.tensordot(scans.design, _flat(part["mean_map"]), axes=1))[:, :, inside]
    power = np.diagonal(part["spectrum"], axis1=1, axis2=2)[scans.shell[inside]].T.astype(np.float64).ravel()
    noise = np.maximum(power, 0.0) + FLOOR**2
    rows, found = residual.reshape(len(residual), -1), np.empty(len(residual))
    weights, means, factors = (part[f"mixture.{k}"].astype(np.float64) for k in ("weights", "means", "factors"))
    for cell in np.unique(scans.cell):
        mine = scans.cell == cell
        terms = [
            np.log(max(w, 1e-12)) + _low_rank_normal(rows[mine] - mu, f, noise)
            for w, mu, f in zip(weights[cell], means[cell], factors[cell], strict=True)
        ]
        found[mine] = np.logaddexp.reduce(terms, axis=0)
    return found


def _low_rank_normal(rows: Floats, factor: Floats, noise: Floats) -> Floats:
    """Return log N(row; 0, factor' factor + diag(noise)) of each row (N, E), factor (rank, E)."""
    seen = factor / noise
    core = np.eye(len(factor)) + seen @ factor.T
    codes = rows @ seen.T
    quadratic = (rows**2 / noise).sum(1) - np.einsum("nj,nj->n", codes, np.linalg.solve(core, codes.T).T)
    volume = np.log(noise).sum() + np.linalg.slogdet(core)[1] + len(noise) * math.log(2 * math.pi)
    return np.asarray(-0.5 * (quadratic + volume))


def _noise(part: Part, space: ImageSpace) -> tuple[Floats, Floats]:
    """Return inverse (SHELLS, C, C) and log determinant (SHELLS,) of what the directions leave of the spectra."""
    from medvae.nets.linear import SHELLS
    from medvae.synth.texture import explained_spectrum

    explained = explained_spectrum(part["directions"], space.spatial_shape, SHELLS)
    left = np.asarray(part["spectrum"], dtype=np.float64) - explained
    values, vectors = np.linalg.eigh((left + left.transpose(0, 2, 1)) / 2)
    values = np.maximum(values, 0.0) + FLOOR**2
    return np.einsum("sij,sj,skj->sik", vectors, 1 / values, vectors), np.log(values).sum(1)


def mean_map(models: Floats, shadows: Floats, scans: Coefficients, seen: float) -> Floats:
    """Return the mean-map score (M, N) of each scan under each released mean map.

    models: (M, H, C, D), judged; shadows: (S, H, C, D), from which the attacker learns the population's mean mu, and
    beside the scans' own covariance, how far released means stray (V); seen: share of the patients that a model sees.
    """
    n = len(scans.low)
    centre = shadows.mean(0)
    residual = scans.low - np.tensordot(scans.design, centre, axes=1)
    flat = residual.reshape(n, -1)
    # Which of the n scans a model saw is a coin for the attacker: the mean strays by (1 - q) / (q n) of their spread.
    drawn = (1 - seen) / (seen * n)
    toward = _solve(flat, drawn / n, _noise_variance(shadows, scans, residual, drawn)).reshape(residual.shape)
    length = np.sqrt(np.maximum((residual * toward).sum((1, 2)), 1e-30))
    found = np.empty((len(models), n))
    away = models - centre
    for start in range(0, n, CHUNK):
        rows = slice(start, start + CHUNK)
        shift = np.einsum("mhcd,ncd->mnh", away, toward[rows], optimize=True)
        found[:, rows] = np.einsum("mnh,nh->mn", shift, scans.design[rows]) / length[rows]
    return found


def _solve(flat: Floats, scale: float, noise: Floats) -> Floats:
    """Return each row of flat (N, E) times the inverse of diag(noise) + scale flat' flat, through the smaller side."""
    weighed = flat / noise
    if flat.shape[1] <= len(flat):
        return np.asarray(np.linalg.solve(np.diag(noise) + scale * flat.T @ flat, flat.T).T)
    kernel = weighed @ flat.T
    return np.asarray(np.linalg.solve(np.eye(len(flat)) + scale * kernel, weighed))


def _noise_variance(shadows: Floats, scans: Coefficients, residual: Floats, drawn: float) -> Floats:
    """Return what of the variance of released means (C * D,) is noise: what who was drawn does not explain.

    Pooled by channel and shell, so that few shadows do.
    """
    gram = scans.design.T @ scans.design / len(scans.design)
    away = shadows - shadows.mean(0)
    strays = np.einsum("shcd,hg,sgcd->cd", away, gram, away, optimize=True) / max(1, len(shadows) - 1)
    left = np.empty_like(strays)
    for s in np.unique(scans.shell):
        band = scans.shell == s
        whole = strays[:, band].mean(1)
        left[:, band] = np.maximum(whole - drawn * np.square(residual[:, :, band]).mean((0, 2)), SURE * whole)[:, None]
    return np.asarray(np.maximum(left, 1e-9 * max(float(left.max()), 1e-30))).ravel()


def _flat(array: npt.NDArray[np.float32]) -> Floats:
    """Return (R, C, *k) as (R, C, D)."""
    return array.reshape(*array.shape[:2], -1).astype(np.float64)


def flat_means(parts: list[Part]) -> Floats:
    """Return the mean maps of models, (M, H, C, D)."""
    return np.stack([_flat(part["mean_map"]) for part in parts])
