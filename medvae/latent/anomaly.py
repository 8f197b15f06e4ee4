"""How unlike its training cohort a scan is: a score a scan, a map a voxel, and a threshold with a known error.

The score is the negative ELBO by importance weights, an upper bound of -log p(x | c) (Burda et al. 2016). The threshold
is split-conformal (Vovk et al. 2005): with n normal patients that the model was not trained on, the k-th smallest of
their scores, k = ceil((n + 1)(1 - alpha)), is exceeded by a further normal patient with probability at most alpha.

A likelihood is lower where a scan has more fine detail, whatever it shows, so an illness that blurs looks less strange
than health (the complexity of an input, Serrà et al. 2020). What detail alone explains can be taken away: a straight
line through the scores of training patients.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from medvae.errors import InputError
from medvae.nets.cvae import ConditionalVAE
from medvae.types import FloatArray

Floats = npt.NDArray[np.float64]
DRAWS = 16
# Errors of single voxels are smoothed over about a voxel: a lesion is larger than noise.
SMOOTH = 1.0


def score(model: ConditionalVAE, x: FloatArray, condition: FloatArray, seed: int = 0) -> Floats:
    """Return the anomaly score (B,) in nats a channel element, of scans (B, C, *spatial): higher is stranger."""
    noise = torch.randn(DRAWS, model.latent_dim, generator=torch.Generator().manual_seed(seed))
    scans, where = (torch.from_numpy(np.ascontiguousarray(a)) for a in (x, condition))
    with torch.inference_mode():
        weights = [model.log_weight(scans, where, code.expand(len(scans), -1)).double() for code in noise]
    bound = torch.logsumexp(torch.stack(weights), 0) - math.log(DRAWS)
    return np.asarray((-bound / x[0].size).numpy())


def detail(x: FloatArray) -> Floats:
    """Return the mean absolute difference of neighbours (B,) of the image channel of scans (B, C, *spatial)."""
    image = x[:, 0].astype(np.float64)
    steps = [np.abs(np.diff(image, axis=axis)).reshape(len(image), -1).mean(1) for axis in range(1, image.ndim)]
    return np.asarray(np.mean(steps, axis=0))


def detail_slope(scores: Floats, details: Floats) -> float:
    """Return the slope of the least-squares line of scores (B,) on details (B,); 0 where these are all the same."""
    apart = details - details.mean()
    spread = float(apart @ apart)
    return float(apart @ scores) / spread if spread > 0 else 0.0


def error_map(x: FloatArray, reconstructed: FloatArray) -> FloatArray:
    """Return the smoothed absolute error (B, *spatial) of the image channel, in units of the [0, 1] image."""
    error = np.abs(x[:, 0] - reconstructed[:, 0])
    return np.asarray(ndimage.gaussian_filter(error, (0, *[SMOOTH] * (error.ndim - 1))), dtype=np.float32)


def threshold(normal: Floats, false_alarm_rate: float) -> float:
    """Return the score that a further normal patient exceeds with probability at most `false_alarm_rate`.

    normal: one score each of n exchangeable patients, none of whom the model was trained on. Raises InputError, with
    the number needed, where n is too small for the rate.
    """
    needed = math.ceil(1 / false_alarm_rate) - 1
    rank = math.ceil((len(normal) + 1) * (1 - false_alarm_rate))
    if rank > len(normal):
        raise InputError(
            f"a false-alarm rate of {false_alarm_rate:g} is not measurable with {len(normal)} normal patients held "
            f"out: {needed} are needed, or a larger rate"
        )
    return float(np.sort(normal)[rank - 1])


def by_patient(scores: Floats, patient: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return patients and the largest score of each one's scans: one strange scan makes a patient strange."""
    patients, index = np.unique(patient, return_inverse=True)
    highest = np.full(len(patients), -np.inf)
    np.maximum.at(highest, index, scores)
    return patients, highest
