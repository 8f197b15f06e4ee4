"""The patients of a batch: each one's scans lie together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Size(NamedTuple):
    """Patients, scans and the most scans of a patient, each rounded up to a power of two.

    Poisson draws differ from step to step; what is chosen for one holds for its neighbours.
    """

    patients: int
    scans: int
    most: int
    equal: bool


@dataclass(frozen=True)
class Segments:
    """How many scans each patient of a batch has, in the order of the batch."""

    counts: tuple[int, ...]

    @cached_property
    def scans(self) -> int:
        """Scans of the batch, B."""
        return sum(self.counts)

    @cached_property
    def patients(self) -> int:
        """Patients of the batch, P."""
        return len(self.counts)

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """First scan of each patient, and the one after its last."""
        return list(pairwise(accumulate(self.counts, initial=0)))

    @cached_property
    def equal(self) -> int | None:
        """The scans of a patient, where all have as many."""
        return self.counts[0] if len(set(self.counts)) == 1 else None

    @cached_property
    def size(self) -> Size:
        """The size of the batch, rounded."""
        patients, scans, most = (1 << (n - 1).bit_length() for n in (self.patients, self.scans, max(self.counts)))
        return Size(patients, scans, most, self.equal is not None)

    @cached_property
    def _index(self) -> Tensor:
        return torch.repeat_interleave(torch.tensor(self.counts, dtype=torch.int64))

    def index(self, device: torch.device) -> Tensor:
        """Return the number of each scan's patient, (B,)."""
        return self._index.to(device)

    def sum(self, scans: Tensor) -> Tensor:
        """Sum values a scan (B, ...) to values a patient (P, ...)."""
        if self.equal == 1:
            return scans
        if self.equal is not None:
            return scans.reshape(self.patients, self.equal, *scans.shape[1:]).sum(1)
        zeros = scans.new_zeros((self.patients, *scans.shape[1:]))
        return zeros.index_add_(0, self.index(scans.device), scans)

    def spread(self, patients: Tensor) -> Tensor:
        """Repeat a value a patient (P,) for each of its scans, (B,)."""
        return patients if self.equal == 1 else patients[self.index(patients.device)]

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """Return for each patient the sum over scans and places of outer products, (P, m, n).

        left: (B, places, m); right: (B, places, n). Where a product is small beside its factors, it is taken a scan:
        that copies no factor into a patient's order and is one call, whatever scans a patient has.
        """
        places, m, n = left.shape[1], left.shape[2], right.shape[2]
        if self.equal == 1 or m * n <= SHORT * places * min(m, n):
            return self.sum(torch.bmm(left.transpose(1, 2), right))
        if self.equal is not None:
            left = left.reshape(self.patients, -1, left.shape[-1])
            right = right.reshape(self.patients, -1, right.shape[-1])
            return torch.bmm(left.transpose(1, 2), right)
        out = left.new_empty((self.patients, left.shape[-1], right.shape[-1]))
        for row, (start, stop) in zip(out, self.bounds, strict=True):
            torch.mm(left[start:stop].flatten(0, 1).T, right[start:stop].flatten(0, 1), out=row)
        return out

    def squares(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the squared norms (P,) of `products`, in float64 and without forming them, never too small.

        |sum_t a_t b_t^T|^2 = sum_{t,u} (a_t a_u)(b_t b_u) (Li et al. 2022, "ghost clipping"). Where the terms cancel,
        the product that is formed later in float32 has an error in proportion to |a||b| and not to its own norm; the
        allowance makes up for it, so that the clip holds for what is released.
        """
        left, right = left.double(), right.double()
        if self.equal is not None:
            pairs = [(t.reshape(self.patients, -1, t.shape[-1])) for t in (left, right)]
            grams = [torch.bmm(t, t.transpose(1, 2)) for t in pairs]
            found = (grams[0] * grams[1]).sum((1, 2))
            sizes = [t.diagonal(dim1=1, dim2=2).sum(1) for t in grams]
        else:
            flat = [[t[a:b].flatten(0, 1) for a, b in self.bounds] for t in (left, right)]
            single = [(a @ a.T, b @ b.T) for a, b in zip(*flat, strict=True)]
            found = torch.stack([(a * b).sum() for a, b in single])
            sizes = [torch.stack([t.trace() for t in some]) for some in zip(*single, strict=True)]
        return found.clamp(min=0) + ROUNDING_ALLOWANCE**2 * sizes[0] * sizes[1]


# A product a scan is small where it has so few numbers for each number of its smaller factor.
SHORT = 0.5

# A float32 product a b^T is off by at most about 2e-7 |a||b|. With v = 1e-4 and a margin of 1e-5 in the clip bound,
# n + 2e-7 s <= (1 + 1e-5) sqrt(n^2 + v^2 s^2) holds for every norm n and size s = |a||b|.
ROUNDING_ALLOWANCE = 1e-4
