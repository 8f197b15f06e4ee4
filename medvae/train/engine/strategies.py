"""Ways to take weight gradients by patient of a convolution or a linear layer.

All give the same numbers up to rounding; which is fastest depends on the layer's shape, the batch and the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from medvae.train.engine.segments import Segments

# Strategies that copy each kernel window are not tried above this size of the copy, in bytes.
WINDOW_BYTES = 16 * 2**20
# Norms without gradients are not tried where a patient has more places than this: their cost grows with the square.
GHOST_PLACES = 64
# Patients that share one grouped convolution: few at a time stay in the cache.
GROUP_CHUNKS = (4, 8, 32)
GHOST = "ghost"


# Gradients a patient of the weight (P, *shape), and of the bias (P, channels) where they come along; of a strategy
# that defers, squared norms (P,).
Found = tuple[Tensor, Tensor | None]
Key = tuple[object, ...]


@dataclass(frozen=True)
class Geometry:
    """What a convolution does, besides its weights. Hashable, so that layers of one shape share a choice."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def backward(
        self, x: Tensor, gradient: Tensor, weight: Tensor, mask: tuple[bool, bool, bool], *, groups: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of (input, weight, bias) that `mask` asks for."""
        channels = gradient.shape[1]
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            gradient,
            x,
            weight,
            [channels],
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups if groups is None else groups,
            mask,
        )
        return found


@dataclass(frozen=True)
class ConvCall:
    """One backward call of a convolution: x (B, C, *in), gradient (B, O, *out), weight in torch's layout."""

    geometry: Geometry
    x: Tensor
    gradient: Tensor
    weight: Tensor
    segments: Segments

    def loop(self) -> Found:
        """One call a patient, on its slice of the batch."""
        out = self.weight.new_empty((self.segments.patients, *self.weight.shape))
        by_bias = self.weight.new_empty((self.segments.patients, self.gradient.shape[1]))
        for row, bias, (start, stop) in zip(out, by_bias, self.segments.bounds, strict=True):
            part = self.x[start:stop], self.gradient[start:stop]
            found = self.geometry.backward(*part, self.weight, (False, True, True))
            row.copy_(found[1])
            bias.copy_(found[2])
        return out, by_bias

    def grouped(self, chunk: int) -> Found:
        """One call for `chunk` patients, with each one's channels as groups of their own.

        Patients with equally many scans give (scans, patients x channels); else every scan is a group, then summed.
        """
        inner = self.segments.equal or 1
        x, gradient = (t.view(-1, inner, *t.shape[1:]).transpose(0, 1) for t in (self.x, self.gradient))
        many = self.weight.expand(chunk, *self.weight.shape).flatten(0, 1)
        parts = []
        for start in range(0, x.shape[1], chunk):
            some, outward = (t[:, start : start + chunk].flatten(1, 2) for t in (x, gradient))
            count = min(chunk, x.shape[1] - start)
            weight, groups = many[: count * len(self.weight)], count * self.geometry.groups
            found = self.geometry.backward(some, outward, weight, (False, True, True), groups=groups)
            parts.append((found[1].view(count, *self.weight.shape), found[2].view(count, -1)))
        out, by_bias = (torch.cat(t) if len(t) > 1 else t[0] for t in zip(*parts, strict=True))
        if self.segments.equal:
            return out, by_bias
        return self.segments.sum(out), self.segments.sum(by_bias)

    def unfold(self) -> Found:
        """Kernel windows as a matrix, one matrix product a patient."""
        small, windows = self.matrices()
        groups = self.geometry.groups
        split = zip(small.chunk(groups, dim=2), windows.chunk(groups, dim=2), strict=True)
        parts = [self.segments.products(a, b) for a, b in split]
        return torch.stack(parts, dim=1).view(-1, *self.weight.shape), None

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return (B, places, weight rows) and (B, places, groups x weight columns): the weight's gradient is a product.

        A transposed convolution is the same with input and output changed round.
        """
        geometry = self.geometry
        small, big = (self.x, self.gradient) if geometry.transposed else (self.gradient, self.x)
        padded = functional.pad(big, [p for p in reversed(geometry.padding) for _ in range(2)])
        steps = padded.stride()[2:]
        size = (*padded.shape[:2], *self.weight.shape[2:], *small.shape[2:])
        over = [s * d for s, d in zip(steps, geometry.dilation, strict=True)]
        along = [s * d for s, d in zip(steps, geometry.stride, strict=True)]
        windows = padded.as_strided(size, (*padded.stride()[:2], *over, *along))
        places = math.prod(small.shape[2:])
        return small.flatten(2).transpose(1, 2), windows.reshape(len(small), -1, places).transpose(1, 2)

    def squares(self) -> Found:
        """Return the squared norms a patient without the gradients; for one group."""
        return self.segments.squares(*self.matrices()), None

    def weighted(self, rows: Tensor | None, factor: Tensor) -> Tensor:
        """Return the sum of weight gradients over scans, each times its factor."""
        x, gradient = _selected(self.x, self.gradient, rows)
        gradient = gradient * factor.view(-1, *[1] * (gradient.dim() - 1))
        return self.geometry.backward(x, gradient, self.weight.float(), (False, True, False))[1]

    @property
    def key(self) -> Key:
        """What the best strategy depends on."""
        kind = "transposed" if self.geometry.transposed else "conv"
        g = self.geometry
        options = (g.stride, g.padding, g.dilation, g.groups, self.x.is_contiguous())
        return (
            kind,
            tuple(self.x.shape[1:]),
            tuple(self.weight.shape),
            *options,
            *_machine(self.x),
            self.segments.size,
        )

    def candidates(self) -> Mapping[str, Callable[[], Found]]:
        """Return the strategies worth trying here."""
        if self.segments.patients == 1:
            return {"loop": self.loop}
        found: dict[str, Callable[[], Found]] = {"loop": self.loop}
        size = self.segments.size
        units = size.patients if self.segments.equal else size.scans
        for chunk in (n for n in GROUP_CHUNKS if n <= units or n == GROUP_CHUNKS[0]):
            found[f"grouped{chunk}"] = partial(self.grouped, chunk)
        small = self.x if self.geometry.transposed else self.gradient
        places = math.prod(small.shape[2:])
        columns = math.prod(self.weight.shape[1:]) * self.geometry.groups
        if size.scans * places * columns * small.element_size() <= WINDOW_BYTES:
            found["unfold"] = self.unfold
        if self.geometry.groups == 1 and places * size.most <= GHOST_PLACES:
            found[GHOST] = self.squares
        return found


@dataclass(frozen=True)
class LinearCall:
    """One backward call of a linear layer: x (B, places, in), gradient (B, places, out)."""

    x: Tensor
    gradient: Tensor
    segments: Segments

    def products(self) -> Found:
        """One matrix product a patient."""
        return self.segments.products(self.gradient, self.x), None

    def squares(self) -> Found:
        """Return the squared norms a patient without the gradients."""
        return self.segments.squares(self.gradient, self.x), None

    def weighted(self, rows: Tensor | None, factor: Tensor) -> Tensor:
        """Return the sum of weight gradients over scans, each times its factor."""
        x, gradient = _selected(self.x, self.gradient, rows)
        return (gradient * factor.view(-1, 1, 1)).flatten(0, 1).T @ x.flatten(0, 1)

    @property
    def key(self) -> Key:
        """What the best strategy depends on."""
        return ("linear", tuple(self.x.shape[1:]), self.gradient.shape[2], *_machine(self.x), self.segments.size)

    def candidates(self) -> Mapping[str, Callable[[], Found]]:
        """Return the strategies worth trying here."""
        found: dict[str, Callable[[], Found]] = {"products": self.products}
        if self.x.shape[1] * self.segments.size.most <= GHOST_PLACES:
            found[GHOST] = self.squares
        return found


def _selected(x: Tensor, gradient: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the scans that count, in float32: a factor rounded to less could carry a patient over the bound."""
    return (x.float(), gradient.float()) if rows is None else (x[rows].float(), gradient[rows].float())


def _machine(x: Tensor) -> Key:
    return (str(x.dtype), x.device.type, torch.get_num_threads())
