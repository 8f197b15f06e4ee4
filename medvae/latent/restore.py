"""What the model makes of a scan when it has passed through its codes, and how near that is to what it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from medvae.nets.cvae import ConditionalVAE
from medvae.types import FloatArray

Filter = Callable[[FloatArray], FloatArray]


def reconstruct(model: ConditionalVAE, x: FloatArray, condition: FloatArray) -> FloatArray:
    """Return the model's images and mask probabilities (B, C, *spatial) at the posterior means of x."""
    with torch.inference_mode():
        where = torch.from_numpy(np.ascontiguousarray(condition))
        mean, _ = model.encode(torch.from_numpy(np.ascontiguousarray(x)), where)
        return np.asarray(model.decode(mean, where).numpy())


def non_local_means(image: FloatArray) -> FloatArray:
    """Return scikit-image's non-local means (Buades et al. 2005) at the noise that it estimates."""
    from skimage.restoration import denoise_nl_means, estimate_sigma

    sigma = float(estimate_sigma(image))
    found = denoise_nl_means(image, patch_size=3, patch_distance=4, h=0.8 * sigma, sigma=sigma, fast_mode=True)
    return np.asarray(found, dtype=np.float32)


def total_variation(image: FloatArray) -> FloatArray:
    """Return scikit-image's total variation filter (Chambolle 2004) at the noise that it estimates."""
    from skimage.restoration import denoise_tv_chambolle, estimate_sigma

    return np.asarray(denoise_tv_chambolle(image, weight=max(1e-4, float(estimate_sigma(image)))), dtype=np.float32)


BASELINES: Mapping[str, Filter] = {"non-local means": non_local_means, "total variation": total_variation}


def psnr(clean: FloatArray, found: FloatArray) -> FloatArray:
    """Return the peak signal-to-noise ratio (N,) in dB of images (N, *spatial) in [0, 1]."""
    error = np.square(clean - found, dtype=np.float64).reshape(len(clean), -1).mean(1)
    return np.asarray(-10 * np.log10(np.maximum(error, 1e-12)), dtype=np.float32)


def ssim(clean: FloatArray, found: FloatArray) -> FloatArray:
    """Return the structural similarity (N,) (Wang et al. 2004) of images (N, *spatial) in [0, 1]."""
    from skimage.metrics import structural_similarity

    window = min(7, min(clean.shape[1:]) - (min(clean.shape[1:]) + 1) % 2)
    pairs = zip(clean, found, strict=True)
    return np.asarray([structural_similarity(a, b, data_range=1.0, win_size=window) for a, b in pairs], np.float32)
