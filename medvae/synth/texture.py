"""What a decoder's mean leaves out, added when sampling: sharp masks and fine texture as Gaussian random fields.

A decoder gives the mean of an image and the probability of a mask at each voxel: smooth, because it averages over
everything the code does not know. Fields with the released spectrum give the rest back:

    mask    voxel is foreground where g < Phi^-1(p), with g a unit Gaussian field: every voxel keeps its probability p,
            and neighbours agree as far as the field is smooth (a Gaussian copula)
    image   mean + regression on the drawn mask + a field with what is left of the spectrum, at edges where there are no
            masks; where the cohort's images are shapes, black and white, their ramp is drawn so, and cut at a level

Where the budget showed a mean alone there is no spectrum of the masks: their shape is then the mean's level set, and
the image is made-up tissue on its mean. Spectrum and mean are differentially private outputs of the closed-form stage,
so all of this is post-processing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from scipy.fft import idctn
from scipy.special import ndtri
from torch import Tensor

from medvae.nets.linear import shells
from medvae.nets.shape import LEVEL, ramp, sharpened

Array = npt.NDArray[np.float32]
Matrices = npt.NDArray[np.float64]

# Probabilities below this are noise of the released means, spread over the whole field of view.
FAINT = 0.1
# Islands smaller than this share of the largest are a field's chance crossings, not anatomy.
ISLAND = 0.1
SURE = 0.995
# Frequency, as a share of the finest that the grid can hold, from which on a mask's field has no power left.
SMOOTH = 0.1
# Between which levels that of shapes is sought, and in how many steps.
LEVELS, HALVINGS = (0.15, 0.8), 7
# Share of the leftover amplitude that is drawn where it lies everywhere: the rest of it is edges that moved, which such
# a field would draw as grain. At edges, all of it is.
FINE = 0.5
# Made-up tissue: how many kinds, how they differ from each other in grey level and within themselves, and the scale of
# their borders in half-cycles a field of view.
KINDS, BETWEEN, WITHIN, BORDERS = 6, 0.25, 0.06, 8.0


@dataclass(frozen=True)
class Texture:
    """Spectra by shell, of the masks' unit fields, of the image given the masks, and the regression between them."""

    shell: npt.NDArray[np.int64]
    mask: Matrices  # (SHELLS, M): amplitude of one coefficient of each mask's unit field
    image: Matrices  # (SHELLS,): amplitude of one coefficient of the image's field
    slope: Matrices  # (M,): how much brighter the image is inside each mask than its probability made the mean
    steepness: float = 0.0  # root mean square of `_edges` over draws; above 0, the image's field lies at edges


@dataclass(frozen=True)
class ShapeLook:
    """How shapes are cut out of ramps: how many voxels wide a border is, and at which level, or each at its own."""

    width: float
    level: float | None = None


def make_texture(spectrum: Array, explained: Array, contrast: Array, spatial_shape: tuple[int, ...]) -> Texture | None:
    """Prepare sampling from the released spectrum (SHELLS, C, C), less what the directions explain (same shape).

    contrast: (M,), the image's slope on each mask. Returns None where no spectrum was released.
    """
    if not np.any(spectrum):
        return None
    shell = shells(spatial_shape)
    slope = np.asarray(contrast, dtype=np.float64)
    left = np.asarray(spectrum, dtype=np.float64) - np.asarray(explained)
    masks = left[:, 1:, 1:]
    given = left[:, 0, 0] - 2 * left[:, 0, 1:] @ slope + np.einsum("a,sab,b->s", slope, masks, slope)
    count = np.bincount(shell.ravel(), minlength=len(left))
    power = np.maximum(np.einsum("sii->si", masks), 0.0) * _low_pass(spatial_shape, shell, len(left), SMOOTH)[:, None]
    total = (power * count[:, None]).sum(0) / shell.size
    unit = np.sqrt(power / np.where(total > 0, total, 1.0))
    return Texture(shell, unit, np.sqrt(np.maximum(given, 0.0)), slope)


def at_edges(texture: Texture | None, draws: Array) -> Texture | None:
    """Return the texture with its image's field where a decoded image is steep, as much as it is: for images alone.

    draws: (N, *spatial), decoded, by which the spectrum is kept on average. What a decoder leaves over is at edges, and
    flat images have little of it. Beside masks it would show a segmentation the labels by their grain.
    """
    if texture is None:
        return None
    steepness = float(np.sqrt(np.mean([np.square(_edges(x)).mean() for x in draws])))
    return replace(texture, steepness=steepness)


def _low_pass(spatial_shape: tuple[int, ...], shell: npt.NDArray[np.int64], count: int, smooth: float) -> Matrices:
    """Return a factor a shell for the masks' fields, smoother than the masks they cut out, whose edges are sharp."""
    squares = [np.square(np.arange(n) / n) for n in spatial_shape]
    frequency = np.sqrt(np.add.reduce(np.meshgrid(*squares, indexing="ij")))
    mean = np.bincount(shell.ravel(), frequency.ravel(), count) / np.maximum(np.bincount(shell.ravel(), None, count), 1)
    return np.asarray(np.exp(-0.5 * np.square(mean / smooth)))


def explained_spectrum(directions: Array, spatial_shape: tuple[int, ...], shell_count: int) -> Array:
    """Return the spectrum (SHELLS, C, C) that directions (d, C, *k) with standard normal codes account for."""
    shell = shells(spatial_shape)[tuple(slice(k) for k in directions.shape[2:])].ravel()
    flat = directions.reshape(*directions.shape[:2], -1)
    count = np.maximum(np.bincount(shells(spatial_shape).ravel(), minlength=shell_count), 1)
    out = np.zeros((shell_count, flat.shape[1], flat.shape[1]), dtype=np.float32)
    for s in np.unique(shell):
        part = flat[:, :, shell == s]
        out[s] = np.einsum("jcn,jdn->cd", part, part) / count[s]
    return out


def _field(amplitude: Matrices, texture: Texture, rng: np.random.Generator) -> Array:
    """Draw one field of shape `spatial` whose coefficient in shell s has standard deviation amplitude[s]."""
    white = rng.standard_normal(texture.shell.shape, dtype=np.float32)
    return np.asarray(idctn(white * amplitude.astype(np.float32)[texture.shell], norm="ortho"))


def _below(field: Array, probability: Array, inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return where a unit field lies below the quantile of a probability; asked only inside, since it is slow."""
    inside[inside] = field[inside] < ndtri(np.clip(probability[inside], 1e-6, SURE))
    return inside


def draw_labels(probability: Array, texture: Texture | None, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return a label map of 0 .. M from mask probabilities (M, *spatial): 0 background, m + 1 for channel m."""
    probability = np.where(probability < FAINT, 0.0, probability)
    total = probability.sum(0)
    best = probability.argmax(0).astype(np.uint8) + 1
    if texture is None:
        return np.where(total > 0.5, best, 0).astype(np.uint8)
    weights = probability.reshape(len(probability), -1).sum(1)
    amplitude = texture.mask @ (weights / max(float(weights.sum()), 1e-6))
    if amplitude.any():
        foreground = _below(_field(amplitude, texture, rng), total, total > 0)
    else:  # nothing is known of how shapes vary: the level that keeps the volume
        foreground = (total > 0) & (total >= np.quantile(total, 1 - min(1.0, float(total.mean()))))
    islands, count = ndimage.label(foreground)
    if count > 1:
        sizes = np.bincount(islands.ravel())[1:]
        foreground &= np.concatenate([[False], sizes >= ISLAND * sizes.max()])[islands]
    if len(probability) > 1:
        # Between labels: the same construction, so that their border is sharp and keeps its odds.
        tilt = np.stack([_field(texture.mask[:, m], texture, rng) for m in range(len(probability))])
        best = (np.log(np.maximum(probability, 1e-6)) + 0.5 * tilt).argmax(0).astype(np.uint8) + 1
    return np.where(foreground, best, 0).astype(np.uint8)


def _tissue(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Return grey levels (*shape) around 0 of made-up tissue: patches, each of one kind, with a grain."""
    radius = np.sqrt(np.add.reduce(np.meshgrid(*[np.square(np.arange(n)) for n in shape], indexing="ij")))
    smooth = np.exp(-0.5 * np.square(radius / BORDERS))
    fields = [idctn(rng.standard_normal(shape) * smooth, norm="ortho") for _ in range(KINDS)]
    levels = rng.normal(0, BETWEEN, KINDS)
    grain = ndimage.gaussian_filter(rng.standard_normal(shape), 1.0)
    return np.asarray(levels[np.argmax(fields, axis=0)] + grain * (WITHIN / grain.std()), dtype=np.float32)


def draw_shapes(means: Array, texture: Texture | None, look: ShapeLook, rng: np.random.Generator) -> Array:
    """Return images (N, *spatial) of shapes: white where ramps with these means lie above a level, at 0 elsewhere.

    Without a level of the look, each is cut at its own, at which the shape's ramp has the drawn one's sum.
    """
    dims = means.ndim - 1
    drawn = torch.from_numpy(np.stack([_with_field(mean, texture, rng) for mean in means]))
    if look.level is None:
        drawn = drawn + LEVEL - _level(drawn, torch.from_numpy(means).flatten(1).mean(1)).view(-1, *[1] * dims)
    else:
        drawn = drawn + LEVEL - look.level
    return np.asarray(sharpened(drawn, dims, look.width).numpy(), dtype=np.float32)


def common_level(draws: Array, texture: Texture | None, wanted: float, rng: np.random.Generator) -> float:
    """Return the level at which ramps (N, *spatial) are cut, so that the ramps of all shapes have mean `wanted`."""
    drawn = torch.from_numpy(np.stack([_with_field(mean, texture, rng) for mean in draws]))
    return float(_level(drawn, torch.tensor([wanted])))


def _level(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Return the level (N,), or (1,) for all together, at which shapes cut out of ramps have ramps with mean `wanted`.

    A sum of few patterns is flatter than a ramp is, and cut at the border's own level it would lose what is thin.
    """
    low, high = (torch.full_like(wanted, bound) for bound in LEVELS)
    for _ in range(HALVINGS):
        level = (low + high) / 2
        shapes = drawn > level.view(-1, *[1] * (drawn.ndim - 1))
        found = ramp(shapes.to(drawn.dtype), drawn.ndim - 1).flatten(1).mean(1)
        found = found if len(wanted) == len(drawn) else found.mean(0, keepdim=True)
        low, high = torch.where(found > wanted, level, low), torch.where(found > wanted, high, level)
    return (low + high) / 2


def _with_field(mean: Array, texture: Texture | None, rng: np.random.Generator) -> Array:
    """Return an image (*spatial) around its mean, with what the decoder leaves out.

    A value in [0, 1] with mean m varies by at most m (1 - m): black stays black, and the average variance is kept.
    """
    if texture is None:
        return mean
    field = _field(texture.image, texture, rng)
    if texture.steepness > 0:
        return np.asarray(mean + field * _edges(mean) / texture.steepness, dtype=np.float32)
    room = _room(mean)
    return np.asarray(mean + FINE * field * np.sqrt(room / max(float(room.mean()), 1e-6)), dtype=np.float32)


def _room(mean: Array) -> Array:
    """Return the most that values in [0, 1] with these means can vary."""
    inside = np.clip(mean, 0, 1)
    return np.asarray(inside * (1 - inside))


def _edges(mean: Array) -> Array:
    """Return how steep an image (*spatial) is at each voxel, times the room that its values leave."""
    slopes = [np.square(np.gradient(mean, axis=axis)) for axis in range(mean.ndim)]
    return np.asarray(np.sqrt(np.add.reduce(slopes) * _room(mean)))


def draw_image(
    mean: Array, probability: Array, labels: npt.NDArray[np.uint8], texture: Texture | None, rng: np.random.Generator
) -> Array:
    """Return an image (*spatial) in [0, 1] around its mean, agreeing with the drawn labels."""
    if texture is None:
        return np.clip(mean, 0, 1)
    if len(probability) and not texture.mask.any():
        # Only a mean was released. Tissue is made up and follows no label, so that what is trained on it goes by place:
        # a contrast as uncertain as this teaches a segmentation what real scans do not hold (docs/quality.md).
        blurred = ndimage.gaussian_filter(_tissue(mean.shape, rng), 0.6)
        return np.asarray(np.clip(mean + blurred, 0, 1), dtype=np.float32)
    out = _with_field(mean, texture, rng)
    for m, p in enumerate(probability):
        out = out + texture.slope[m] * ((labels == m + 1).astype(np.float32) - p)
    return np.asarray(np.clip(out, 0, 1), dtype=np.float32)
