"""Ways to take weight gradients by patient of a convolution or a linear layer, and the choice between them.

All give the same numbers up to rounding; which is fastest depends on the layer's shape, the batch and the machine, so
each is timed once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from medvae.train.engine.segments import Segments

# Strategies that copy each kernel window are not tried above this size of the copy, in bytes.
WINDOW_BYTES = 64 * 2**20
# Norms without gradients are not tried where a patient has more places than this: their cost grows with the square.
GHOST_PLACES = 64
REPEATS = 3


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

    def loop(self) -> Tensor:
        """One call a patient, on its slice of the batch."""
        out = self.weight.new_empty((self.segments.patients, *self.weight.shape))
        for row, (start, stop) in zip(out, self.segments.bounds, strict=True):
            part = self.x[start:stop], self.gradient[start:stop]
            row.copy_(self.geometry.backward(*part, self.weight, (False, True, False))[1])
        return out

    def grouped(self) -> Tensor:
        """One call for all, with each patient's channels as groups of their own.

        Patients with equally many scans give (scans, patients x channels); else every scan is a group, then summed.
        """
        inner = self.segments.equal or 1
        outer = self.segments.scans // inner

        def merge(t: Tensor) -> Tensor:
            return t.reshape(outer, inner, *t.shape[1:]).transpose(0, 1).reshape(inner, -1, *t.shape[2:])

        weight = self.weight.expand(outer, *self.weight.shape).reshape(-1, *self.weight.shape[1:])
        groups = outer * self.geometry.groups
        mask = (False, True, False)
        found = self.geometry.backward(merge(self.x), merge(self.gradient), weight, mask, groups=groups)[1]
        found = found.view(outer, *self.weight.shape)
        return found if self.segments.equal else self.segments.sum(found)

    def unfold(self) -> Tensor:
        """Kernel windows as a matrix, one matrix product a patient."""
        small, windows = self.matrices()
        groups = self.geometry.groups
        split = zip(small.chunk(groups, dim=2), windows.chunk(groups, dim=2), strict=True)
        parts = [self.segments.products(a, b) for a, b in split]
        return torch.stack(parts, dim=1).view(-1, *self.weight.shape)

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

    def squares(self) -> Tensor:
        """Return the squared norms a patient without the gradients; for one group."""
        return self.segments.squares(*self.matrices())

    def weighted(self, rows: Tensor | None, factor: Tensor) -> Tensor:
        """Return the sum of weight gradients over scans, each times its factor."""
        x, gradient = (self.x, self.gradient) if rows is None else (self.x[rows], self.gradient[rows])
        gradient = gradient * factor.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1))
        return self.geometry.backward(x, gradient, self.weight, (False, True, False))[1]

    @property
    def key(self) -> str:
        """What the best strategy depends on, with the batch rounded up to a power of two."""
        shape = "x".join(map(str, self.x.shape[1:]))
        kernel = "x".join(map(str, self.weight.shape))
        kind = "transposed" if self.geometry.transposed else "conv"
        g = self.geometry
        details = f"s{g.stride[0]}d{g.dilation[0]}g{g.groups}"
        layout = "" if self.x.is_contiguous() else " strided"
        return f"{kind} {shape} {kernel} {details}{layout} {_batch_key(self.x, self.segments)}"

    def candidates(self) -> Mapping[str, Callable[[], Tensor]]:
        """Return the strategies worth trying here."""
        if self.segments.patients == 1:
            return {"loop": self.loop}
        found: dict[str, Callable[[], Tensor]] = {"loop": self.loop, "grouped": self.grouped}
        small = self.x if self.geometry.transposed else self.gradient
        places = math.prod(small.shape[2:])
        columns = math.prod(self.weight.shape[1:]) * self.geometry.groups
        if len(small) * places * columns * small.element_size() <= WINDOW_BYTES:
            found["unfold"] = self.unfold
        if self.geometry.groups == 1 and places * max(self.segments.counts) <= GHOST_PLACES:
            found["ghost"] = self.squares
        return found


@dataclass(frozen=True)
class LinearCall:
    """One backward call of a linear layer: x (B, places, in), gradient (B, places, out)."""

    x: Tensor
    gradient: Tensor
    segments: Segments

    def products(self) -> Tensor:
        """One matrix product a patient."""
        return self.segments.products(self.gradient, self.x)

    def squares(self) -> Tensor:
        """Return the squared norms a patient without the gradients."""
        return self.segments.squares(self.gradient, self.x)

    def weighted(self, rows: Tensor | None, factor: Tensor) -> Tensor:
        """Return the sum of weight gradients over scans, each times its factor."""
        x, gradient = (self.x, self.gradient) if rows is None else (self.x[rows], self.gradient[rows])
        gradient = gradient * factor.to(gradient.dtype).view(-1, 1, 1)
        return gradient.flatten(0, 1).T @ x.flatten(0, 1)

    @property
    def key(self) -> str:
        """What the best strategy depends on, with the batch rounded up to a power of two."""
        shape = "x".join(map(str, self.x.shape[1:]))
        return f"linear {shape} {self.gradient.shape[2]} {_batch_key(self.x, self.segments)}"

    def candidates(self) -> Mapping[str, Callable[[], Tensor]]:
        """Return the strategies worth trying here."""
        found: dict[str, Callable[[], Tensor]] = {"products": self.products}
        if self.x.shape[1] * max(self.segments.counts) <= GHOST_PLACES:
            found["ghost"] = self.squares
        return found


def _batch_key(x: Tensor, segments: Segments) -> str:
    patients, scans = (1 << (n - 1).bit_length() for n in (segments.patients, segments.scans))
    regular = "equal" if segments.equal else "mixed"
    return f"patients<={patients} scans<={scans} {regular} {x.dtype} {x.device.type} threads={torch.get_num_threads()}"


class Tuner:
    """Times the strategies once for each key and remembers the fastest.

    choices: key to strategy; given ones are used as they are, so that a run that resumes repeats its choices.
    """

    def __init__(self, choices: Mapping[str, str] | None = None, *, fixed: str | None = None) -> None:
        """`fixed` names a strategy to use wherever it can be, without timing: for tests and repeatable runs."""
        self.choices = dict(choices or {})
        self._fixed = fixed

    def choose(self, call: ConvCall | LinearCall, *, may_defer: bool) -> str:
        """Return the name of the strategy for this call."""
        found = {n: f for n, f in call.candidates().items() if may_defer or n != "ghost"}
        first = next(iter(found))
        if self._fixed is not None:
            return self._fixed if self._fixed in found else first
        if len(found) == 1:
            return first
        key = call.key if may_defer else f"{call.key} kept"
        if self.choices.get(key) not in found:
            self.choices[key] = fastest({n: _whole(call, n, f) for n, f in found.items()}, call.x.device)
        return self.choices[key]


def _whole(call: ConvCall | LinearCall, name: str, strategy: Callable[[], Tensor]) -> Callable[[], object]:
    """Return all the work that a strategy makes: norms and the weighted sum too."""
    factor = torch.ones(call.segments.patients, device=call.x.device)
    if name == "ghost":
        return lambda: (strategy(), call.weighted(None, call.segments.spread(factor)))

    def kept() -> object:
        gradients = strategy()
        return torch.linalg.vector_norm(gradients.flatten(1), dim=1), torch.tensordot(
            factor.to(gradients.dtype), gradients, dims=1
        )

    return kept


def fastest(works: Mapping[str, Callable[[], object]], device: torch.device) -> str:
    """Return the name of the work that took least, in its best of a few turns after one to warm up.

    One that takes three times as long as the best so far is not tried again.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(works, math.inf)
    for turn in range(REPEATS + 1):
        least = min(best.values())
        for name, work in works.items():
            if turn > 1 and best[name] > 3 * least:
                continue
            begun = clock()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                best[name] = min(best[name], clock() - begun)
    return min(best, key=lambda name: best[name])
