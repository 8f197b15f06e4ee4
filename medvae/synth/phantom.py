"""Procedural head phantoms in 2D and 3D: a cohort that anyone may see, made like a hospital's.

A phantom is painted from the outside in: scalp, skull, fluid, grey and white matter, deep nuclei and ventricles, each
an ellipsoid with an edge roughened by a smooth random field, on coordinates bent by the patient's own pose and shape.
Ventricles widen and the cortex thins with age, which can be read off the image; a lesion is a bright ball with a
darker core in the right hemisphere. Scans of one patient share the anatomy and differ in pose, shading and noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import fft

from medvae.errors import ConfigError
from medvae.types import FloatArray

LESION_CLASSES = ("absent", "present")
AGE_RANGE = (20.0, 90.0)
ORGAN, LESION = 1, 2  # mask labels: ventricles, lesion
SCANS = (1, 4)
_DEFAULT_SIZE = {2: 64, 3: 32}
_SMALLEST = 16
_HEAD_MM = 192.0  # side of the field of view

Field = npt.NDArray[np.float64]
Pixel = TypeVar("Pixel", np.float32, np.uint8)
# Tissue intensities in the order of a T1-weighted image.
_SCALP, _SKULL, _FLUID, _GREY, _WHITE, _NUCLEI, _VENTRICLE = 0.62, 0.08, 0.18, 0.44, 0.68, 0.54, 0.13
_LESION_RIM, _LESION_CORE = 1.0, 0.82


@dataclass(frozen=True)
class PhantomCohort:
    """N scans of P phantom patients.

    images: (N, *spatial) float32 in [0, 1]; masks: (N, *spatial) uint8, 1 ventricles, 2 lesion; patients: (N,) int64,
    sorted; lesion: (P,) index into LESION_CLASSES; age: (P,) years. Volumes lie in RAS; 2D images are axial slices in
    (rows, columns) as a radiologist sees them, the patient's right on the left.
    """

    images: FloatArray
    masks: npt.NDArray[np.uint8]
    patients: npt.NDArray[np.int64]
    lesion: npt.NDArray[np.int64]
    age: FloatArray
    spacing_mm: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def spatial_dims(self) -> int:
        """2 or 3."""
        return self.images.ndim - 1

    @property
    def patient_ids(self) -> tuple[str, ...]:
        """One name a patient, in the form of a hospital's record number."""
        return tuple(f"PHANTOM-{i + 1:04d}" for i in range(len(self.age)))


@dataclass(frozen=True)
class _Anatomy:
    """What the scans of one patient share. Lengths in halves of the field of view."""

    age: float
    lesion: bool
    scale: Field
    turn: float
    shift: Field
    bend: Field
    folds: Field
    ventricles: float
    lesion_at: Field
    lesion_radius: float


def make_phantom(
    spatial_dims: int, patients: int, seed: int, *, size: int | None = None, scans: tuple[int, int] = SCANS
) -> PhantomCohort:
    """Draw a cohort: half of the patients with a lesion, ages uniform over 20..90, `scans` (least, most) a patient.

    The same arguments give the same cohort, bit by bit; patient i does not depend on how many come after.
    Raises ConfigError for dimensions other than 2 or 3, no patients, or a size below 16.
    """
    if spatial_dims not in _DEFAULT_SIZE:
        raise ConfigError(f"phantoms have 2 or 3 dimensions, not {spatial_dims}")
    side = _DEFAULT_SIZE[spatial_dims] if size is None else size
    if patients < 1 or side < _SMALLEST:
        raise ConfigError(f"phantoms need at least one patient and {_SMALLEST} voxels a side")
    if not 1 <= scans[0] <= scans[1]:
        raise ConfigError(f"scans a patient must be a range from at least 1, not {scans[0]} to {scans[1]}")
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side)] * spatial_dims, indexing="ij"))
    images, masks, owner, lesion, age = [], [], [], [], []
    for i in range(patients):
        rng = np.random.default_rng([seed, spatial_dims, side, i])
        anatomy = _draw_anatomy(rng, grid)
        lesion.append(int(anatomy.lesion))
        age.append(anatomy.age)
        for _ in range(int(rng.integers(scans[0], scans[1] + 1))):
            image, mask = _scan(rng, grid, anatomy)
            images.append(image)
            masks.append(mask)
            owner.append(i)
    return PhantomCohort(
        images=_as_seen(np.stack(images)),
        masks=_as_seen(np.stack(masks)),
        patients=np.asarray(owner, dtype=np.int64),
        lesion=np.asarray(lesion, dtype=np.int64),
        age=np.asarray(age, dtype=np.float32),
        spacing_mm=(round(_HEAD_MM / side, 4),) * spatial_dims,
    )


def _as_seen(stack: npt.NDArray[Pixel]) -> npt.NDArray[Pixel]:
    # Painted in (x, y); a 2D image is (rows, columns): the front on top, the patient's right on the left.
    return np.ascontiguousarray(stack[:, ::-1, ::-1].swapaxes(1, 2)) if stack.ndim == 3 else stack


def _draw_anatomy(rng: np.random.Generator, grid: Field) -> _Anatomy:
    dims = len(grid)
    age = float(rng.uniform(*AGE_RANGE))
    direction = rng.normal([1.0, -0.15, 0.1][:dims], 0.22)
    return _Anatomy(
        age=age,
        lesion=bool(rng.random() < 0.5),
        scale=np.asarray([0.78, 0.90, 0.80][:dims]) * rng.normal(1.0, 0.035, dims),
        turn=float(rng.normal(0.0, math.radians(6))),
        shift=rng.normal(0.0, 0.03, dims),
        bend=np.stack([_smooth(rng, grid[0].shape, 0.22) for _ in range(dims)]) * 0.026,
        folds=_smooth(rng, grid[0].shape, 0.045),
        ventricles=(0.60 + 1.0 * (age - AGE_RANGE[0]) / (AGE_RANGE[1] - AGE_RANGE[0])) * float(rng.normal(1, 0.05)),
        lesion_at=direction / np.linalg.norm(direction) * rng.uniform(0.45, 0.52),
        lesion_radius=float(rng.uniform(0.27, 0.36)) * (1.15 if dims == 3 else 1.0),
    )


def _scan(rng: np.random.Generator, grid: Field, anatomy: _Anatomy) -> tuple[FloatArray, npt.NDArray[np.uint8]]:
    shape = grid[0].shape
    turn = anatomy.turn + float(rng.normal(0, math.radians(2)))
    shift = anatomy.shift + rng.normal(0.0, 0.012, len(grid))
    x = _pose(grid, turn, shift) / anatomy.scale.reshape(-1, *[1] * len(shape)) + anatomy.bend
    image, mask = _paint(x, anatomy)
    shading = 1 + 0.05 * _smooth(rng, shape, 0.35)
    texture = 0.025 * _smooth(rng, shape, 0.03) + rng.normal(0, 0.015, shape)
    head = image > 0.05
    gain = rng.uniform(0.92, 1.0)
    noisy = image * shading * gain + texture * np.where(head, 1.0, 0.4)
    return np.clip(noisy, 0.0, 1.0).astype(np.float32), mask


def _paint(x: Field, a: _Anatomy) -> tuple[Field, npt.NDArray[np.uint8]]:
    """Paint the tissues over coordinates x: (dims, *spatial), in which the head is the unit ball."""
    # Soft edges, a bit narrower than a voxel.
    edge = 1.6 / x.shape[1]
    thin = (a.age - AGE_RANGE[0]) / (AGE_RANGE[1] - AGE_RANGE[0])
    image = np.zeros(x.shape[1:])

    def layer(value: float | Field, depth: Field) -> Field:
        # depth is positive inside; the edge is a logistic step
        weight: Field = 1 / (1 + np.exp(np.clip(-depth / (edge / 2), -30, 30)))
        image[...] += weight * (value - image)
        return weight

    r = np.sqrt((x**2).sum(axis=0))
    layer(_SCALP, 1.0 - r)
    layer(_SKULL, 0.93 - r)
    layer(_FLUID, 0.84 - r)
    brain = 0.82 - 0.035 * thin
    fissure = 0.05 * np.exp(-((x[0] / 0.05) ** 2)) * (r > 0.45)
    layer(_GREY, brain - r - fissure + 0.025 * a.folds)
    layer(_WHITE, brain - 0.15 - r - 1.4 * fissure + 0.085 * a.folds)
    for side in (-1, 1):
        layer(_NUCLEI, _ball(x, (0.27 * side, 0.02, -0.02), (0.13, 0.22, 0.18)))
    ventricle = np.zeros_like(image)
    for centre, radii in _ventricle_parts(a.ventricles):
        ventricle = np.maximum(ventricle, layer(_VENTRICLE, _ball(x, centre, radii)))
    mask = np.where(ventricle > 0.5, ORGAN, 0).astype(np.uint8)
    if a.lesion:
        distance = np.sqrt(((x - a.lesion_at.reshape(-1, *[1] * (x.ndim - 1))) ** 2).sum(axis=0))
        inside = a.lesion_radius - distance + 0.025 * a.folds
        weight = layer(_LESION_RIM, inside)
        layer(_LESION_CORE, inside - 0.5 * a.lesion_radius)
        mask[weight > 0.5] = LESION
    return image, mask


def _ventricle_parts(size: float) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Centres and radii of front horns, bodies and back horns, left and right: a butterfly that opens with `size`."""
    parts: list[tuple[tuple[float, ...], tuple[float, ...]]] = []
    root = math.sqrt(size)
    for side in (-1.0, 1.0):
        parts += [
            ((0.13 * side, 0.22, 0.08), (0.075 * size, 0.16 * root, 0.15 * size)),
            ((0.08 * side, 0.0, 0.10), (0.055 * size, 0.20, 0.13 * size)),
            ((0.19 * side, -0.25, 0.05), (0.095 * size, 0.17 * root, 0.16 * size)),
        ]
    return parts


def _ball(x: Field, centre: tuple[float, ...], radii: tuple[float, ...]) -> Field:
    """Depth below the surface of an ellipsoid: positive inside, about a length near the surface."""
    dims = len(x)
    scaled = [(x[k] - centre[k]) / radii[k] for k in range(dims)]
    return np.asarray((1 - np.sqrt(sum(s**2 for s in scaled))) * min(radii[:dims]))


def _pose(grid: Field, turn: float, shift: Field) -> Field:
    """Turn in the axial plane and shift: the coordinates of the head at each voxel."""
    moved = grid - shift.reshape(-1, *[1] * (grid.ndim - 1))
    c, s = math.cos(turn), math.sin(turn)
    return np.stack([c * moved[0] + s * moved[1], c * moved[1] - s * moved[0], *moved[2:]])


def _smooth(rng: np.random.Generator, shape: tuple[int, ...], width: float) -> Field:
    """Periodic Gaussian random field of mean 0 and variance 1; `width` is its scale as a share of the side."""
    spectrum = fft.rfftn(rng.standard_normal(shape)) * _filter(shape, width)
    return np.asarray(fft.irfftn(spectrum, shape))


@lru_cache(maxsize=16)
def _filter(shape: tuple[int, ...], width: float) -> Field:
    """Gaussian low-pass on the half spectrum, without its mean, scaled so that white noise keeps its variance."""
    frequencies = np.meshgrid(*[fft.fftfreq(n) * n for n in shape], indexing="ij")
    response = np.exp(-2 * (math.pi * width) ** 2 * sum(f**2 for f in frequencies))
    response[(0,) * len(shape)] = 0.0
    response /= math.sqrt(float((response**2).mean()))
    return np.asarray(response[..., : shape[-1] // 2 + 1])
