"""Per-element negative log-likelihoods. Each takes the decoder's output on its own scale and returns nats.

Images have values in [0, 1]. The decoder's output `out` is a mean for the continuous families and a logit for
Bernoulli; `log_scale` is one learned number a channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

LogDensity = Callable[[Tensor, Tensor, Tensor], Tensor]


def gaussian(x: Tensor, out: Tensor, log_scale: Tensor) -> Tensor:
    """Return -log N(x; out, exp(log_scale)^2), elementwise."""
    return 0.5 * ((x - out) * torch.exp(-log_scale)).square() + log_scale + 0.5 * math.log(2 * math.pi)


def laplace(x: Tensor, out: Tensor, log_scale: Tensor) -> Tensor:
    """Return -log Laplace(x; out, exp(log_scale)), elementwise."""
    return (x - out).abs() * torch.exp(-log_scale) + log_scale + math.log(2.0)


def bernoulli(x: Tensor, out: Tensor, log_scale: Tensor) -> Tensor:
    """Return the cross-entropy of x in [0, 1] under the logit `out`; the scale plays no part."""
    return functional.binary_cross_entropy_with_logits(out, x, reduction="none") + 0.0 * log_scale


def discretised_logistic(x: Tensor, out: Tensor, log_scale: Tensor) -> Tensor:
    """Return -log P(x) of a logistic integrated over bins of 1/255 (Salimans et al. 2017, eq. 2)."""
    half_bin = 0.5 / 255.0
    inverse = torch.exp(-log_scale)
    upper = (x + half_bin - out) * inverse
    lower = (x - half_bin - out) * inverse
    # log(sigmoid(u) - sigmoid(l)) without cancellation; the outermost bins reach to infinity.
    inner = functional.logsigmoid(upper) + functional.logsigmoid(-lower) + torch.log1p(-torch.exp(lower - upper))
    log_mass = torch.where(
        x < half_bin,
        functional.logsigmoid(upper),
        torch.where(x > 1 - half_bin, functional.logsigmoid(-lower), inner),
    )
    return -log_mass


LIKELIHOODS: dict[str, LogDensity] = {
    "gaussian": gaussian,
    "laplace": laplace,
    "bernoulli": bernoulli,
    "discretised_logistic": discretised_logistic,
}
