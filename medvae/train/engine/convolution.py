"""Ways to take weight gradients by patient of a convolution.

All give the same numbers up to rounding; which is fastest depends on the layer's shape, the batch and the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from medvae.train.engine.segments import Segments
from medvae.train.engine.strategies import (
    GHOST,
    GHOST_PLACES,
    SMALL,
    Found,
    Key,
    blank,
    machine,
    made_up,
    norms_of,
    selected,
    weighted_rows,
)

# The copy of the kernel windows of some patients, in bytes: small enough to stay in the cache.
WINDOW_BYTES = 2 * 2**20
# Patients that share one grouped convolution: few at a time stay in the cache.
GROUP_CHUNKS = (4, 8, 32)
# Windows are copied along channels where there are so many: long runs of memory copy fastest.
WIDE = 8


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
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward.default(
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
    """One backward call of a convolution: x (B, C, *in), gradient (B, O, *out), weight in torch's layout.

    bias: whether there is a bias to take gradients of.
    """

    geometry: Geometry
    x: Tensor
    gradient: Tensor
    weight: Tensor
    segments: Segments
    bias: bool = False

    def _by_patient(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each patient's gradients of (weight, bias): one call on its slice of the batch."""
        mask = (False, True, self.bias)
        counts = list(self.segments.counts)
        for x, gradient in zip(*(t.split_with_sizes(counts) for t in (self.x, self.gradient)), strict=True):
            _, by_weight, by_bias = self.geometry.backward(x, gradient, self.weight, mask)
            yield by_weight, by_bias

    def loop(self) -> Found:
        """One call a patient; large gradients are not copied together, and measured while in the cache."""
        if self.weight.numel() <= SMALL:
            rows, by_bias = zip(*self._by_patient(), strict=True)
            return Found(torch.stack(rows), torch.stack(by_bias) if self.bias else None)
        kept, biases, norms = [], [], []
        for row, bias in self._by_patient():
            kept.append(row.float())
            biases.append(bias)
            norms.append(torch.linalg.vector_norm(kept[-1]))
        return Found(kept, torch.stack(biases) if self.bias else None, norms)

    def measured(self) -> Found:
        """As `loop`, but each gradient is dropped once its norm is known: for when there is no room to keep them."""
        norms, biases = [], []
        for row, bias in self._by_patient():
            norms.append(torch.linalg.vector_norm(row, dtype=torch.float32))
            biases.append(bias)
        return Found(None, torch.stack(biases) if self.bias else None, norms)

    def measured_again(self, rows: Tensor | None, factor: Tensor) -> Tensor:
        """Return the weighted sum of the very gradients that `measured` saw, to the last bit, as its norms demand."""
        again = replace(self, bias=False)._by_patient()
        return weighted_rows((row for row, _ in again), self.segments, rows, factor)

    def grouped(self, chunk: int) -> Found:
        """One call for `chunk` patients, with each one's channels as groups of their own.

        Patients with equally many scans give (scans, patients x channels); else every scan is a group, then summed.
        """
        inner = self.segments.equal or 1
        x, gradient = (t.reshape(-1, inner, *t.shape[1:]).transpose(0, 1) for t in (self.x, self.gradient))
        many = self.weight.expand(chunk, *self.weight.shape).flatten(0, 1)
        shapes = (self.weight.shape, self.gradient.shape[1:2]) if self.bias else (self.weight.shape,)
        parts = []
        for start in range(0, x.shape[1], chunk):
            some, outward = (t[:, start : start + chunk].flatten(1, 2) for t in (x, gradient))
            count = min(chunk, x.shape[1] - start)
            weight, groups = many[: count * len(self.weight)], count * self.geometry.groups
            found = self.geometry.backward(some, outward, weight, (False, True, self.bias), groups=groups)
            parts.append(tuple(t.view(count, *s) for t, s in zip(found[1:], shapes, strict=False)))
        joined = (torch.cat(t) if len(t) > 1 else t[0] for t in zip(*parts, strict=True))
        return Found(*(t if self.segments.equal else self.segments.sum(t) for t in joined))

    def unfold(self) -> Found:
        """Kernel windows as a matrix, one matrix product a patient; a few patients at a time, as `loop` keeps them."""
        narrow, large = self._narrow, self.weight.numel() > SMALL
        kept: list[Tensor] = []
        norms: list[Tensor] = []
        for part in narrow._parts():
            rows = part._products()
            rows = rows if narrow is self else rows.transpose(1, 2).flip(*range(3, rows.dim()))
            if large:
                rows = rows.float()
                norms.append(torch.as_tensor(norms_of(rows)))
            kept += rows.unbind() if large else [rows]
        if large:
            return Found(kept, None, torch.cat(norms))
        return Found(torch.cat(kept) if len(kept) > 1 else kept[0])

    @property
    def _narrow(self) -> ConvCall:
        """This call, or one with smaller windows whose gradients are the same with axes changed round and mirrored.

        With stride 1, dW[o, c, k] = sum_p g[o, p] x[c, p + k - padding] is as well a sum over the places q of x,
        sum_q x[c, q] g[o, q - k + padding]: that of a transposed convolution, with k counted from the other end.
        """
        g, (rows, columns) = self.geometry, self.weight.shape[:2]
        if g.groups > 1 or rows >= columns or max(g.stride) > 1 or any(g.output_padding):
            return self
        kernel = zip(g.dilation, self.weight.shape[2:], g.padding, strict=True)
        turned = replace(g, transposed=not g.transposed, padding=tuple(d * (k - 1) - p for d, k, p in kernel))
        return replace(self, geometry=turned, weight=self.weight.transpose(0, 1))

    def _parts(self) -> Iterator[ConvCall]:
        """Split between patients, so that the windows of each part stay in the cache."""
        bounds, most = self.segments.bounds, max(1, WINDOW_BYTES // self._window_bytes)
        first = 0
        while first < len(bounds):
            last = first + 1
            while last < len(bounds) and bounds[last][1] - bounds[first][0] <= most:
                last += 1
            scans = slice(bounds[first][0], bounds[last - 1][1])
            segments = self.segments if last - first == len(bounds) else Segments(self.segments.counts[first:last])
            yield replace(self, x=self.x[scans], gradient=self.gradient[scans], segments=segments)
            first = last

    def _products(self) -> Tensor:
        """Return the gradients (P, *weight); in memory the kernel's axes may come before the last channels."""
        small, windows = self.matrices()
        kernel, groups = self.weight.shape[2:], self.geometry.groups
        windows = windows.view(*windows.shape[:2], math.prod(kernel), groups, -1)
        split = zip(small.chunk(groups, dim=2), windows.unbind(3), strict=True)
        parts = [self.segments.products(a, b.flatten(2)) for a, b in split]
        rows = parts[0] if groups == 1 else torch.cat(parts, dim=1)
        return rows.view(*rows.shape[:2], *kernel, -1).movedim(-1, 2)

    @property
    def _window_bytes(self) -> int:
        """Bytes that the kernel windows of one scan take."""
        columns = math.prod(self.weight.shape[1:]) * self.geometry.groups
        return self._places * columns * self.x.element_size()

    @property
    def _places(self) -> int:
        small = self.x if self.geometry.transposed else self.gradient
        return math.prod(small.shape[2:])

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return (B, places, weight rows) and (B, places, kernel x channels): the weight's gradient is a product.

        A transposed convolution is the same with input and output changed round.
        """
        g, axes = self.geometry, len(self.geometry.stride)
        small, big = (self.x, self.gradient) if g.transposed else (self.gradient, self.x)
        padded = functional.pad(big.movedim(1, -1), [0, 0, *(p for p in reversed(g.padding) for _ in range(2))])
        step = padded.stride()
        along, over = ([a * b for a, b in zip(step[1:-1], by, strict=True)] for by in (g.stride, g.dilation))
        size = (len(big), *small.shape[2:], *self.weight.shape[2:], padded.shape[-1])
        windows = padded.as_strided(size, (step[0], *along, *over, step[-1]))
        if padded.shape[-1] >= WIDE and max(self.weight.shape[2:]) > 1:
            columns = windows.reshape(len(big), self._places, -1)
        else:
            along_places = windows.movedim(tuple(range(1, 1 + axes)), tuple(range(-axes, 0)))
            columns = along_places.reshape(len(big), -1, self._places).transpose(1, 2)
        return small.flatten(2).transpose(1, 2), columns

    def squares(self) -> Found:
        """Return the squared norms a patient without the gradients; for one group."""
        return Found(None, norms=self.segments.squares(*self.matrices()).sqrt())

    def weighted(self, rows: Tensor | None, factor: Tensor) -> Tensor:
        """Return the sum of weight gradients over scans, each times its factor."""
        x, gradient = selected(self.x, self.gradient, rows)
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
            *machine(self.x),
            self.segments.size,
        )

    def candidates(self) -> list[str]:
        """Return the names of the strategies worth trying here."""
        found = ["loop"]
        if self.segments.patients == 1:
            return found
        size = self.segments.size
        units = size.patients if self.segments.equal else size.scans
        found += [f"grouped{n}" for n in GROUP_CHUNKS if n <= units or n == GROUP_CHUNKS[0]]
        if size.most * self._narrow._window_bytes <= WINDOW_BYTES:
            found.append("unfold")
        if self.geometry.groups == 1 and self._places * size.most <= GHOST_PLACES:
            found.append(GHOST)
        return found

    def strategy(self, name: str) -> Callable[[], Found]:
        """Return a strategy by its name."""
        if name.startswith("grouped"):
            return partial(self.grouped, int(name.removeprefix("grouped")))
        return {"loop": self.loop, "unfold": self.unfold, GHOST: self.squares}[name]

    def blank(self) -> ConvCall:
        """Return the sizes of this call without its numbers."""
        return replace(self, x=blank(self.x), gradient=blank(self.gradient), weight=blank(self.weight))

    def like(self, device: torch.device) -> ConvCall:
        """Return a call of these sizes on made-up numbers."""
        x, gradient, weight = (made_up(t, device) for t in (self.x, self.gradient, self.weight))
        return replace(self, x=x, gradient=gradient, weight=weight)
