"""The book of one backward pass: what each patient adds to each parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medvae.train.engine.segments import Segments
from medvae.train.engine.strategies import SMALL, Found, Rows, norms_of, summed, weighted_sum


@dataclass(frozen=True)
class Deferred:
    """A layer whose gradients are not kept: norms a patient, and the weighted sum once the weights are known.

    weighted: takes the scans that count (rows, or None for all) and a factor for each, and returns the sum (*shape).
    """

    norms: Rows
    weighted: Callable[[Tensor | None, Tensor], Tensor]


class Book:
    """Per-patient gradients of one backward pass. Parameters are known by their `id`.

    A parameter that is used more than once gets its contributions added before any norm is taken: the square of a sum
    is not the sum of the squares. So only parameters used once may be deferred.

    room: bytes that kept gradients may take; where they would take more, a layer used once is deferred.
    """

    def __init__(self, segments: Segments, room: float = float("inf")) -> None:
        self.segments = segments
        self.anchor = torch.zeros((), requires_grad=True)
        self._room = room
        self._uses: dict[int, int] = {}
        self._scans: dict[int, Tensor] = {}
        self._kept: dict[int, Rows] = {}
        self._norms: dict[int, Rows] = {}
        self._deferred: dict[int, Deferred] = {}
        self._copies: list[tuple[int, Tensor]] = []
        self._shapes: dict[int, torch.Size] = {}

    def announce(self, parameter: Tensor) -> None:
        """Count a use in the forward pass."""
        key = id(parameter)
        self._uses[key] = self._uses.get(key, 0) + 1
        self._shapes[key] = parameter.shape

    def used_once(self, parameter: Tensor) -> bool:
        """Return whether the forward pass used the parameter in one place only."""
        return self._uses.get(id(parameter), 0) == 1

    def has_room(self, parameter: Tensor) -> bool:
        """Return whether a gradient a patient of this parameter may still be kept."""
        return self.segments.patients == 1 or 4 * self.segments.patients * parameter.numel() <= self._room

    def keep(self, parameter: Tensor, found: Found) -> None:
        """Write down what a strategy found of a weight: rows (P, *shape), in float32 from here on."""
        if found.rows is None:
            raise ValueError("a strategy that defers is written down by `defer`")
        key, rows = id(parameter), _float(found.rows)
        self._room -= 4 * self.segments.patients * parameter.numel()
        if key in self._kept:
            self._kept[key] = _added(self._kept[key], rows)
            return
        self._kept[key] = rows
        if self.used_once(parameter):
            if found.norms is not None:
                self._norms[key] = found.norms
            elif parameter.numel() > SMALL:
                self._norms[key] = norms_of(rows)  # now, while they are in the cache

    def keep_scans(self, parameter: Tensor, gradients: Tensor) -> None:
        """Write down gradients a scan (B, ...) of a small parameter."""
        key, rows = id(parameter), gradients.reshape(len(gradients), -1).float()
        self._scans[key] = self._scans[key] + rows if key in self._scans else rows

    def copies(self, parameter: Tensor, scans: int, dtype: torch.dtype) -> Tensor:
        """Return a copy of a small parameter for each scan, as one vector: autograd itself then tells scans apart."""
        copies = parameter.detach().to(dtype).expand(scans, -1).reshape(-1)
        if parameter.requires_grad:
            self._copies.append((id(parameter), copies.requires_grad_()))
        return copies

    def defer(self, parameter: Tensor, entry: Deferred) -> None:
        """Note the norms of a parameter that is used once, and how to sum it later."""
        self._deferred[id(parameter)] = entry

    def close(self, max_norm: float) -> tuple[dict[int, Tensor], Tensor]:
        """Clip each patient's gradient to `max_norm` and sum: one float32 tensor a parameter that took part, by id.

        Returns the sums and the norms (P,) before the clip, in float64, over all parameters together. A patient whose
        gradient is not finite counts as zero: its norm has no bound to scale by. Empties the book.
        """
        small, joined = self._join_small()
        parts = [entry.norms for entry in self._deferred.values()]
        parts += [self._norms[k] if k in self._norms else norms_of(g) for k, g in self._kept.items()]
        parts += [norms_of(joined)] if joined is not None else []
        if not parts:
            return {}, torch.zeros(self.segments.patients, dtype=torch.float64)
        norms = self._together(parts)

        finite = torch.isfinite(norms)
        factor = torch.where(finite, max_norm / norms.clamp(min=1e-30), 0.0).clamp(max=1.0).float()
        whole = bool(finite.all())
        rows = None if whole else torch.nonzero(self.segments.spread(finite)).flatten()
        scans = self.segments.spread(factor)
        scans = scans if rows is None else scans[rows]
        sums = {}
        for key in list(self._deferred):
            sums[key] = self._deferred.pop(key).weighted(rows, scans).float()
        patients = None if whole else torch.nonzero(finite).flatten()
        factor = factor if patients is None else factor[patients]
        if joined is not None:
            total = factor @ (joined if patients is None else joined[patients])
            pieces = torch.split(total, [self._shapes[k].numel() for k in small])
            sums |= {k: t.view(self._shapes[k]) for k, t in zip(small, pieces, strict=True)}
        chosen = list(range(self.segments.patients)) if patients is None else patients.tolist()
        factors = factor.tolist() if any(isinstance(g, list) for g in self._kept.values()) else []
        for key in list(self._kept):
            gradients = self._kept.pop(key)
            if isinstance(gradients, list):
                sums[key] = weighted_sum(gradients, chosen, factors)
            else:
                gradients = gradients if patients is None else gradients[patients]
                sums[key] = summed(factor, gradients)
        self._norms = {}
        return sums, norms

    def _together(self, parts: list[Rows]) -> Tensor:
        """Return the norms (P,) over several parameters, in float64, from those of each."""
        single = [n for part in parts if isinstance(part, list) for n in part]
        rows = [part.double() for part in parts if isinstance(part, Tensor)]
        rows += [torch.stack(single).view(-1, self.segments.patients).double().square().sum(0).sqrt()] if single else []
        return torch.as_tensor(torch.linalg.vector_norm(torch.stack(rows), dim=0))

    def _join_small(self) -> tuple[list[int], Tensor | None]:
        """Take the small parameters out of the book: their keys, and their gradients side by side (P, all)."""
        for key, copies in self._copies:
            if copies.grad is not None:
                rows = copies.grad.view(self.segments.scans, -1).float()
                self._scans[key] = self._scans[key] + rows if key in self._scans else rows
        self._copies = []
        for key in [k for k in self._scans if k in self._kept]:
            rows = self.segments.sum(self._scans.pop(key))
            self._kept[key] = _added(self._kept[key], rows.view(-1, *self._shapes[key]))
        by_patient = [k for k, g in self._kept.items() if isinstance(g, Tensor) and self._shapes[k].numel() <= SMALL]
        keys = [*self._scans, *by_patient]
        parts = [self._kept.pop(k).flatten(1) for k in by_patient]  # type: ignore[union-attr]
        if self._scans:
            parts.insert(0, self.segments.sum(torch.cat(list(self._scans.values()), dim=1)))
            self._scans = {}
        return keys, None if not parts else torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _added(first: Rows, second: Rows) -> Rows:
    if isinstance(first, list) and isinstance(second, list):
        return [a + b for a, b in zip(first, second, strict=True)]
    whole = [torch.stack(t) if isinstance(t, list) else t for t in (first, second)]
    return whole[0] + whole[1]


def _float(rows: Rows) -> Rows:
    return [r.float() for r in rows] if isinstance(rows, list) else rows.float()
