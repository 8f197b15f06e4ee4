"""Ways to take weight gradients by patient of a convolution or a linear layer.

All give the same numbers up to rounding; which is fastest depends on the layer's shape, the batch and the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from medvae.train.engine.segments import Segments

# The copy of the kernel windows of some patients, in bytes: small enough to stay in the cache.
WINDOW_BYTES = 2 * 2**20
# Norms without gradients are not tried where a patient has more places than this: their cost grows with the square.
GHOST_PLACES = 64
# Patients that share one grouped convolution: few at a time stay in the cache.
GROUP_CHUNKS = (4, 8, 32)
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
            kept.append(row)
            biases.append(bias)
            norms.append(torch.linalg.vector_norm(row, dtype=torch.float32))
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
        return _weighted_rows((row for row, _ in again), self.segments, rows, factor)

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
        """Kernel windows as a matrix, one matrix product a patient; a few patients at a time."""
        parts = [part._products() for part in self._parts()]
        return Found(torch.cat(parts) if len(parts) > 1 else parts[0])

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
        small, windows = self.matrices()
        groups = self.geometry.groups
        split = zip(small.chunk(groups, dim=2), windows.chunk(groups, dim=2), strict=True)
        parts = [self.segments.products(a, b) for a, b in split]
        return torch.stack(parts, dim=1).view(-1, *self.weight.shape)

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
        return Found(None, norms=self.segments.squares(*self.matrices()).sqrt())

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

    def candidates(self) -> list[str]:
        """Return the names of the strategies worth trying here."""
        found = ["loop"]
        if self.segments.patients == 1:
            return found
        size = self.segments.size
        units = size.patients if self.segments.equal else size.scans
        found += [f"grouped{n}" for n in GROUP_CHUNKS if n <= units or n == GROUP_CHUNKS[0]]
        if size.most * self._window_bytes <= WINDOW_BYTES:
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
        return replace(self, x=_blank(self.x), gradient=_blank(self.gradient), weight=_blank(self.weight))

    def like(self, device: torch.device) -> ConvCall:
        """Return a call of these sizes on made-up numbers."""
        x, gradient, weight = (_made_up(t, device) for t in (self.x, self.gradient, self.weight))
        return replace(self, x=x, gradient=gradient, weight=weight)


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
        return _weighted_rows(self._by_patient(), self.segments, rows, factor)

    def _by_patient(self) -> Iterator[Tensor]:
        counts = list(self.segments.counts)
        for x, gradient in zip(*(t.split_with_sizes(counts) for t in (self.x, self.gradient)), strict=True):
            yield gradient.flatten(0, 1).T @ x.flatten(0, 1)

    def weighted(self, rows: Tensor | None, factor: Tensor) -> Tensor:
        """Return the sum of weight gradients over scans, each times its factor."""
        x, gradient = _selected(self.x, self.gradient, rows)
        return (gradient * factor.view(-1, 1, 1)).flatten(0, 1).T @ x.flatten(0, 1)

    @property
    def key(self) -> Key:
        """What the best strategy depends on."""
        return ("linear", tuple(self.x.shape[1:]), self.gradient.shape[2], *_machine(self.x), self.segments.size)

    def candidates(self) -> list[str]:
        """Return the names of the strategies worth trying here."""
        return ["products", GHOST] if self.x.shape[1] * self.segments.size.most <= GHOST_PLACES else ["products"]

    def strategy(self, name: str) -> Callable[[], Found]:
        """Return a strategy by its name."""
        return {"products": self.products, GHOST: self.squares}[name]

    def blank(self) -> LinearCall:
        """Return the sizes of this call without its numbers."""
        return replace(self, x=_blank(self.x), gradient=_blank(self.gradient))

    def like(self, device: torch.device) -> LinearCall:
        """Return a call of these sizes on made-up numbers."""
        return replace(self, x=_made_up(self.x, device), gradient=_made_up(self.gradient, device))


def _blank(t: Tensor) -> Tensor:
    """Return the shape, precision and layout of t, in no memory."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _made_up(t: Tensor, device: torch.device) -> Tensor:
    """Return random numbers in the shape, precision and layout of a blank."""
    layout = torch.contiguous_format if t.is_contiguous() else LAYOUTS.get(t.dim(), torch.contiguous_format)
    return torch.randn(t.shape, dtype=t.dtype, device=device).contiguous(memory_format=layout)


def norms_of(gradients: Rows) -> Rows:
    """Return the norm of each row of (P, ...)."""
    if isinstance(gradients, list):
        return [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    return torch.as_tensor(torch.linalg.vector_norm(gradients.flatten(1), dim=1))


def weighted_sum(gradients: list[Tensor], chosen: list[int], factors: list[float]) -> Tensor:
    """Return the weighted sum of some rows, in the memory of the first."""
    if not chosen:
        return torch.zeros_like(gradients[0])
    total = gradients[chosen[0]].mul_(factors[0])
    for index, factor in zip(chosen[1:], factors[1:], strict=True):
        total.add_(gradients[index], alpha=factor)
    return total


def _weighted_rows(gradients: Iterable[Tensor], segments: Segments, rows: Tensor | None, factor: Tensor) -> Tensor:
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


def _selected(x: Tensor, gradient: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the scans that count, in float32: a factor rounded to less could carry a patient over the bound."""
    return (x.float(), gradient.float()) if rows is None else (x[rows].float(), gradient[rows].float())


def _machine(x: Tensor) -> Key:
    return (str(x.dtype), x.device.type, torch.get_num_threads())
