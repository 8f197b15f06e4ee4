"""What a released model generates with, as one function of codes and conditions, for runtimes other than torch.

    decoder(z, condition) -> image, mask probabilities, prior

`image` is the mean of p(x | z, c). `prior` is z read as standard normal numbers and turned into a draw of the model's
prior: prior(0) is its centre, and decoding prior(noise) is sampling. Which of a mixture's components is drawn depends
on one more number, the last of z, by its quantile; the decoder proper does not look at it. Texture, random deformations
and the choice by a teacher, which `medvae release` adds to a mean, are not part of this.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor, nn
from torch.nn import functional

from medvae.nets import field
from medvae.nets.codes import CodeFlow, CodeMixture, clip_codes, code_radius
from medvae.nets.cvae import ConditionalVAE
from medvae.nets.mixture import MixturePart, cell_of
from medvae.nets.prior import FieldPrior

T = TypeVar("T")
# Quantiles of a component that has no weight, or all of it: no normal number lies beyond.
FARTHEST = 40.0


class ReleasedDecoder(nn.Module):
    """The decoder of a model for evaluation, with the prior that `ConditionalVAE.draw` draws its codes from.

    code_size: how many numbers z has; components: of the mixture that the last of them chooses from, or 1.
    """

    def __init__(self, model: ConditionalVAE) -> None:
        """Take the model over: a decoder that was never trained is left out of it, since it adds nothing."""
        super().__init__()
        self.model = model
        if model.linear is not None and not _trained(model):
            model.decoder = _Nothing(model.space.channels, model.space.spatial_dims)  # type: ignore[assignment]
        self.drawn = _mixture_prior(model)
        # The closed form's mixture alone: no codes lie between a draw and its image.
        self.closed_form = model.code_prior is None and self.drawn is not None and not _trained(model)
        rank = 0 if self.drawn is None else self.drawn.rank
        self.components = 1 if self.drawn is None else self.drawn.components
        self.code_size = (rank if self.closed_form else max(model.latent_dim, rank)) + (self.components > 1)
        self.colour: Tensor | None
        self.register_buffer(
            "colour", _colour_matrix(model.prior) if isinstance(model.prior, FieldPrior) else None, persistent=False
        )

    def forward(self, z: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return image (B, *spatial), mask probabilities (B, M, *spatial) and prior (B, code_size).

        z: (B, code_size); condition: (B, K), encoded.
        """
        if self.closed_form:
            linear = _there(self.model.linear)
            x = linear.expand(linear.mean_coefficients(condition) + self._coefficients(z, condition)).clamp(0, 1)
            return x[:, 0], x[:, 1:], z * 1.0
        x = self.model.decode(z[:, : self.model.latent_dim], condition)
        return x[:, 0], x[:, 1:], self._prior(z, condition)

    def _coefficients(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return the mixture's draw (B, C, *k) as coefficients of the linear part's whole basis."""
        drawn = _there(self.drawn)(z, condition)
        whole = _there(self.model.linear).mean_map.shape[2:]
        missing = [n - kept for n, kept in zip(whole, drawn.shape[2:], strict=True)]
        return functional.pad(drawn, [n for gap in reversed(missing) for n in (0, gap)])

    def _prior(self, z: Tensor, condition: Tensor) -> Tensor:
        model, d = self.model, self.model.latent_dim
        noise = z[:, :d]
        if isinstance(model.code_prior, CodeMixture):
            around = _there(self.drawn)(z, condition).flatten(1) * code_radius(d)
            codes = model.prior_mean(condition) + around
        elif isinstance(model.code_prior, CodeFlow):
            for coupling in model.code_prior.couplings:
                noise = coupling(noise, condition)
            codes = model.prior_mean(condition) + clip_codes(noise) * code_radius(d)
        elif self.drawn is not None:
            codes = _there(model.linear).codes(self._coefficients(z, condition))
        elif self.colour is not None:
            maps = noise.view(len(z), -1, len(self.colour)) @ self.colour
            codes = model.prior_mean(condition) + maps.flatten(1)
        else:
            codes = model.prior_sample(condition, noise)
        return torch.cat([codes, z[:, d:]], dim=1)


class _Draw(nn.Module):
    """A draw of a mixture from standard normal numbers: `rank` of them, and a last one that chooses the component."""

    def __init__(self, mixture: MixturePart) -> None:
        super().__init__()
        self.mixture = mixture
        cells, self.components, self.rank, _ = mixture.factors.shape
        weights = mixture.weights.double().numpy() + 1e-12
        shares = np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)[:, :-1].clip(0, 1)
        quantiles = np.clip(ndtri(shares), -FARTHEST, FARTHEST).astype(np.float32)
        self.quantiles = nn.Buffer(torch.from_numpy(quantiles.reshape(cells, self.components - 1)))

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return coefficients (B, C, *box)."""
        mixture = self.mixture
        chosen = cell_of(condition, mixture.space.conditions) * self.components
        if self.components > 1:
            beyond = z[:, -1:] > self.quantiles[chosen // self.components]
            chosen = chosen + beyond.long().sum(1)
        means, factors = mixture.means.flatten(0, 1)[chosen], mixture.factors.flatten(0, 1)[chosen]
        drawn = means + (z[:, None, : self.rank] @ factors)[:, 0]
        return drawn.view(len(z), mixture.space.channels, *mixture.shapes.box)


class _Nothing(nn.Module):
    """What an untrained decoder adds to the linear part."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.zeros = nn.Buffer(torch.zeros(1, channels, *[1] * dims))

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Return zeros that fit every batch and shape."""
        return self.zeros


def _there(part: T | None) -> T:
    if part is None:
        raise ValueError("this model has no such part")
    return part


def _trained(model: ConditionalVAE) -> bool:
    if isinstance(model.decoder, _Nothing):
        return False
    return any(bool(p.any()) for p in model.decoder.final_parameters())


def _mixture_prior(model: ConditionalVAE) -> _Draw | None:
    """Return the mixture that codes are drawn from, in the order of `ConditionalVAE.draw`."""
    if model.code_prior is not None:
        return _Draw(model.code_prior.mixture) if isinstance(model.code_prior, CodeMixture) else None
    if model.linear is not None and model.linear.mixture is not None:
        return _Draw(model.linear.mixture)
    return None


def _colour_matrix(prior: FieldPrior) -> Tensor:
    """Return the matrix (cells, cells) that noise, a row a channel, is multiplied by: the field's FFT written out."""
    cells = int(np.prod(prior.grid))
    with torch.no_grad():
        logs = prior.shape.weight
        eigen = field.eigenvalues(prior.grid, prior.config.correlation, logs[:, 0].exp(), logs[:, 1].exp())
        rows = field.colour(torch.eye(cells).view(cells, 1, *prior.grid), eigen.expand(cells, *prior.grid))
    return rows.view(cells, cells)
