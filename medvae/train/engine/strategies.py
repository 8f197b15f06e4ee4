"""What a strategy for gradients by patient finds, what all share, and those of a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from medvae.train.engine.segments import Segments

# Norms without gradients are not tried where a patient has more places than this: their cost grows with the square.
GHOST_PLACES = 64
# Weights up to this size are joined with others and summed at once, since each call costs more than their arithmetic.
SMALL = 4096
GHOST = "ghost"

# The layouts with the channels last, by the axes of a batch.
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}

Key = tuple[object, ...]
Rows = Tensor | list[Tensor]


class Found(NamedTuple):
    """What a strategy found: gradients a patient, of the weight and, where they came along, of the bias.

    rows: (P, *shape), or one tensor a patient where copying them together would cost; by_bias: (P, channels);
    norms: of the weight's gradients where they were taken already, (P,) or one number a patient. Without rows the
    strategy defers: it found norms only, and the weighted sum is taken when the factors are known.
    """

    rows: Rows | None
    by_bias: Tensor | None = None
    norms: Rows | None = None


@dataclass(frozen=True)
class LinearCall:
    """One backward call of a linear layer: x (B, places, in), gradient (B, places, out)."""

    x: Tensor
    gradient: Tensor
    segments: Segments

    def products(self) -> Found:
        """One matrix product a patient."""
        return Found(self.segments.products(self.gradient, self.x))

    def squares(self) -> Found:
        """Return the squared norms a patient without the gradients."""
        return Found(None, norms=self.segments.squares(self.gradient, self.x).sqrt())

    def measured(self) -> Found:
        """Return the squared norms a patient; each gradient is dropped once its norm is known."""
        norms = [torch.linalg.vector_norm(row, dtype=torch.float32) for row in self._by_patient()]
        return Found(None, norms=norms)

    def measured_again(self, rows: Tensor | None, factor: Tensor) -> Tensor:
        """Return the weighted sum of the very gradients that `measured` saw."""
        return weighted_rows(self._by_patient(), self.segments, rows, factor)

    def _by_patient(self) -> Iterator[Tensor]:
        counts = list(self.segments.counts)
        for x, gradient in zip(*(t.split_with_sizes(counts) for t in (self.x, self.gradient)), strict=True):
            yield gradient.flatten(0, 1).T @ x.flatten(0, 1)

    def weighted(self, rows: Tensor | None, factor: Tensor) -> Tensor:
        """Return the sum of weight gradients over scans, each times its factor."""
        x, gradient = selected(self.x, self.gradient, rows)
        return (gradient * factor.view(-1, 1, 1)).flatten(0, 1).T @ x.flatten(0, 1)

    @property
    def key(self) -> Key:
        """What the best strategy depends on."""
        return ("linear", tuple(self.x.shape[1:]), self.gradient.shape[2], *machine(self.x), self.segments.size)

    def candidates(self) -> list[str]:
        """Return the names of the strategies worth trying here."""
        return ["products", GHOST] if self.x.shape[1] * self.segments.size.most <= GHOST_PLACES else ["products"]

    def strategy(self, name: str) -> Callable[[], Found]:
        """Return a strategy by its name."""
        return {"products": self.products, GHOST: self.squares}[name]

    def blank(self) -> LinearCall:
        """Return the sizes of this call without its numbers."""
        return replace(self, x=blank(self.x), gradient=blank(self.gradient))

    def like(self, device: torch.device) -> LinearCall:
        """Return a call of these sizes on made-up numbers."""
        return replace(self, x=made_up(self.x, device), gradient=made_up(self.gradient, device))


def blank(t: Tensor) -> Tensor:
    """Return the shape, precision and layout of t, in no memory."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def made_up(t: Tensor, device: torch.device) -> Tensor:
    """Return random numbers in the shape, precision and layout of a blank."""
    layout = torch.contiguous_format if t.is_contiguous() else LAYOUTS.get(t.dim(), torch.contiguous_format)
    return torch.randn(t.shape, dtype=t.dtype, device=device).contiguous(memory_format=layout)


def norms_of(gradients: Rows) -> Rows:
    """Return the norm of each row of (P, ...)."""
    if isinstance(gradients, list):
        return [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    return torch.as_tensor(torch.linalg.vector_norm(gradients, dim=tuple(range(1, gradients.dim()))))


def summed(factor: Tensor, gradients: Tensor) -> Tensor:
    """Return the sum of rows (P, ...), each times its factor (P,); read as they lie in memory."""
    axes = sorted(range(1, gradients.dim()), key=gradients.stride, reverse=True)
    flat = gradients.permute(0, *axes)
    total = (factor @ flat.flatten(1)).view(flat.shape[1:])
    return total.permute([axes.index(a) for a in range(1, gradients.dim())]).contiguous()


def weighted_sum(gradients: list[Tensor], chosen: list[int], factors: list[float]) -> Tensor:
    """Return the weighted sum of some rows, in the memory of the first."""
    if not chosen:
        return torch.zeros_like(gradients[0])
    total = gradients[chosen[0]].mul_(factors[0])
    for index, factor in zip(chosen[1:], factors[1:], strict=True):
        total.add_(gradients[index], alpha=factor)
    return total


def weighted_rows(gradients: Iterable[Tensor], segments: Segments, rows: Tensor | None, factor: Tensor) -> Tensor:
    """Sum gradients a patient, each times the factor of its scans; patients whose scans are not in `rows` are left out.

    rows: scans that count, or None for all; factor: one number for each of them.
    """
    scans = range(segments.scans) if rows is None else rows.tolist()
    share = dict(zip(scans, factor.tolist(), strict=True))
    total = None
    for gradient, (start, _) in zip(gradients, segments.bounds, strict=True):
        total = torch.zeros_like(gradient, dtype=torch.float32) if total is None else total
        if start in share:
            total.add_(gradient.float(), alpha=share[start])
    return torch.zeros(()) if total is None else total


def selected(x: Tensor, gradient: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the scans that count, in float32: a factor rounded to less could carry a patient over the bound."""
    return (x.float(), gradient.float()) if rows is None else (x[rows].float(), gradient[rows].float())


def machine(x: Tensor) -> Key:
    """Return what a choice depends on besides shapes: precision, device, threads."""
    return (str(x.dtype), x.device.type, torch.get_num_threads())
