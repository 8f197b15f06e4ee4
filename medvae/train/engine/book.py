"""The book of one backward pass: what each patient adds to each parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medvae.train.engine.segments import Segments

# Parameters up to this size are summed together, since each call costs more than their arithmetic.
SMALL = 4096


@dataclass(frozen=True)
class Deferred:
    """A layer whose gradients are not kept: squared norms (P,), and the weighted sum once the weights are known.

    weighted: takes the scans that count (rows, or None for all) and a factor for each, and returns the sum (*shape).
    """

    squares: Tensor
    weighted: Callable[[Tensor | None, Tensor], Tensor]


class Book:
    """Per-patient gradients of one backward pass.

    A parameter that is used more than once gets its contributions added before any norm is taken: the square of a sum
    is not the sum of the squares. So only parameters used once may be deferred.
    """

    def __init__(self, segments: Segments) -> None:
        self.segments = segments
        self._uses: dict[nn.Parameter, int] = {}
        self._kept: dict[nn.Parameter, Tensor] = {}
        self._squares: dict[nn.Parameter, Tensor] = {}
        self._deferred: dict[nn.Parameter, Deferred] = {}

    def announce(self, parameter: nn.Parameter) -> None:
        """Count a use in the forward pass."""
        self._uses[parameter] = self._uses.get(parameter, 0) + 1

    def used_once(self, parameter: nn.Parameter) -> bool:
        """Return whether the forward pass used the parameter in one place only."""
        return self._uses.get(parameter, 0) == 1

    def keep(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """Add gradients a patient (P, *shape)."""
        gradients = gradients.to(torch.float32)
        if parameter in self._kept:
            self._kept[parameter] = self._kept[parameter] + gradients
            return
        self._kept[parameter] = gradients
        if self.used_once(parameter) and parameter.numel() > SMALL:
            self._squares[parameter] = squared_norms(gradients)  # now, while they are in the cache

    def defer(self, parameter: nn.Parameter, entry: Deferred) -> None:
        """Note the norms of a parameter that is used once, and how to sum it later."""
        self._deferred[parameter] = entry

    def close(self, max_norm: float) -> tuple[dict[nn.Parameter, Tensor], Tensor]:
        """Clip each patient's gradient to `max_norm` and sum: one float32 tensor a parameter that took part.

        Returns the sums and the norms (P,) before the clip, in float64, over all parameters together. A patient whose
        gradient is not finite counts as zero: its norm has no bound to scale by. Empties the book.
        """
        small = {p: g for p, g in self._kept.items() if p.numel() <= SMALL}
        joined = torch.cat([g.flatten(1) for g in small.values()], dim=1) if small else None
        parts = [entry.squares.double() for entry in self._deferred.values()]
        large = {p: g for p, g in self._kept.items() if p not in small}
        parts += [self._squares[p] if p in self._squares else squared_norms(g) for p, g in large.items()]
        parts += [squared_norms(joined)] if joined is not None else []
        if not parts:
            return {}, torch.zeros(self.segments.patients, dtype=torch.float64)
        norms = torch.stack(parts).sum(0).sqrt()

        finite = torch.isfinite(norms)
        factor = torch.where(finite, max_norm / norms.clamp(min=1e-30), 0.0).clamp(max=1.0).float()
        rows = None if bool(finite.all()) else torch.nonzero(self.segments.spread(finite)).flatten()
        scans = self.segments.spread(factor)
        scans = scans if rows is None else scans[rows]
        sums = {}
        for parameter in list(self._deferred):
            sums[parameter] = self._deferred.pop(parameter).weighted(rows, scans).float()
        if rows is not None:
            factor = factor[finite]
        if joined is not None:
            total = factor @ (joined if rows is None else joined[finite])
            pieces = torch.split(total, [p.numel() for p in small])
            sums |= {p: t.view(p.shape) for p, t in zip(small, pieces, strict=True)}
        for parameter in [p for p in self._kept if p not in small]:
            gradients = self._kept.pop(parameter)
            sums[parameter] = torch.tensordot(factor, gradients if rows is None else gradients[finite], dims=1)
        self._kept, self._squares = {}, {}
        return sums, norms


def squared_norms(gradients: Tensor) -> Tensor:
    """Return the squared norm of each row of (P, ...), as float64 (P,)."""
    return torch.as_tensor(torch.linalg.vector_norm(gradients.flatten(1), dim=1).double().square())
