"""Faults of acquisition on images in [0, 1], 2D or 3D: what denoising is tried on, and what an anomaly looks like.

Noise and bias field are MONAI's transforms; motion, ghosting and missing slices follow the k-space models that TorchIO
documents (Shaw et al. 2019). `severity` 1 is plainly visible, 0 changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy import ndimage

from medvae.errors import ConfigError
from medvae.types import FloatArray

Corruption = Callable[[FloatArray, float, np.random.Generator], FloatArray]
MOVES = 3  # positions that a patient takes in a scan with motion
GHOSTS = 4


def noise(image: FloatArray, severity: float, rng: np.random.Generator) -> FloatArray:
    """Add Rician noise of standard deviation 0.1 severity: the magnitude of a complex Gaussian (Gudbjartsson 1995)."""
    from monai.transforms import RandRicianNoise

    transform = RandRicianNoise(prob=1.0, mean=0.0, std=0.1 * severity, sample_std=False, relative=False)
    transform.set_random_state(seed=int(rng.integers(2**31)))
    spoiled: FloatArray = np.asarray(transform(image), dtype=np.float32)
    return spoiled


def bias(image: FloatArray, severity: float, rng: np.random.Generator) -> FloatArray:
    """Multiply by a smooth field, the exponential of a random cubic polynomial."""
    from monai.transforms import RandBiasField

    transform = RandBiasField(degree=3, coeff_range=(-0.3 * severity, 0.3 * severity), prob=1.0)
    transform.set_random_state(seed=int(rng.integers(2**31)))
    spoiled: FloatArray = np.asarray(transform(image[None]), dtype=np.float32)[0]
    return spoiled


def motion(image: FloatArray, severity: float, rng: np.random.Generator) -> FloatArray:
    """Take bands of k-space lines from the image in several rigid positions."""
    cuts = np.sort(rng.choice(np.arange(1, image.shape[0]), size=min(MOVES - 1, image.shape[0] - 1), replace=False))
    bands = np.split(np.arange(image.shape[0]), cuts)
    spectrum = _spectrum(image)
    still = int(rng.integers(len(bands)))
    for index, band in enumerate(bands):
        if index == still:
            continue
        angle = float(rng.uniform(-10, 10)) * severity
        shift = rng.uniform(-0.1, 0.1, image.ndim) * severity * np.asarray(image.shape)
        moved = ndimage.rotate(image, angle, axes=(0, 1), reshape=False, order=1, mode="nearest")
        moved = ndimage.shift(moved, shift, order=1, mode="nearest")
        spectrum[band] = _spectrum(moved)[band]
    return _image(spectrum)


def ghosting(image: FloatArray, severity: float, rng: np.random.Generator) -> FloatArray:
    """Weaken every GHOSTS-th line of k-space but the middle ones: copies appear along the axis."""
    axis = int(rng.integers(image.ndim))
    spectrum = np.moveaxis(_spectrum(image), axis, 0)
    kept = spectrum.copy()
    spectrum[:: min(GHOSTS, len(spectrum))] *= max(0.0, 1 - 0.8 * severity)
    middle = len(spectrum) // 2
    spectrum[middle] = kept[middle]
    return _image(np.moveaxis(spectrum, 0, axis))


def missing_slices(image: FloatArray, severity: float, rng: np.random.Generator) -> FloatArray:
    """Set a quarter (times severity) of the slices along the first axis to zero; rows in 2D."""
    lost = rng.permutation(len(image))[: round(0.25 * severity * len(image))]
    out = image.copy()
    out[lost] = 0
    return out


CORRUPTIONS: Mapping[str, Corruption] = {
    "noise": noise,
    "bias": bias,
    "motion": motion,
    "ghosting": ghosting,
    "missing_slices": missing_slices,
}


def corrupt(images: FloatArray, kind: str, severity: float, seed: int) -> FloatArray:
    """Return images (N, *spatial) with one fault each, in [0, 1]. Raises ConfigError for an unknown kind."""
    if kind not in CORRUPTIONS:
        raise ConfigError(f"there is no corruption {kind!r}: use one of {', '.join(CORRUPTIONS)}")
    rng = np.random.default_rng(seed)
    found = [CORRUPTIONS[kind](image, severity, rng) if severity > 0 else image for image in images]
    return np.asarray(np.stack(found).clip(0, 1), dtype=np.float32)


def _spectrum(image: FloatArray) -> np.ndarray:
    return np.fft.fftshift(np.fft.fftn(image))


def _image(spectrum: np.ndarray) -> FloatArray:
    return np.asarray(np.abs(np.fft.ifftn(np.fft.ifftshift(spectrum))), dtype=np.float32)
