"""The processes of one run: who leads, and what passes between them.

One process leads. It alone holds what the guarantee rests on: the ledger, the run folder, the randomness, the
optimizer. The others hold a copy of the weights and compute. A step goes

    leader:  draws patients over the whole cohort, once, and deals the drawn ones out, whole
    all:     sum of the clipped gradients of the own share; zeros for an empty one
    leader:  adds the sums up, adds the noise, once, takes the step, and sends the weights to all

so there is no mask to agree on, no seed to share and no noise to split. The draw is the Poisson sampling of the
accountant, made in one place over all patients; which process computes a drawn patient's gradient changes only the
rounding of the sum. An empty share is a share: every process takes part in every step.

Small messages travel over gloo, sums and weights over gloo or NCCL, by where they lie. Nothing is pickled. What
passes is private: sums before their noise, rows of drawn patients.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medvae.errors import RunError
from medvae.train.gradient import GradSampler, StepStats
from medvae.train.sampler import IntArray
from medvae.types import Batch, Private

# How long the others' last words are waited for when something failed.
FAREWELL_S = 10.0
STOP = -1
LOST = "another process of this run was lost or did not answer: start the same command again with --resume"


class TeamError(RunError):
    """Another process of the run failed; exit code and sentence are its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Team:
    """The processes of a run, as one of them sees them; `Team()` is a process alone, for which nothing is sent."""

    rank: int = 0
    size: int = 1
    store: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process holds ledger, randomness and run folder."""
        return self.rank == 0

    # --- what the leader does ---

    def begin(self, job: Mapping[str, Any]) -> None:
        """Tell the others what to train: JSON, and nothing secret."""
        if self.size > 1:
            with self._spoken():
                self.store.set("job", json.dumps(job))

    def deal(self, patients: Sequence[IntArray], latent: Tensor) -> tuple[IntArray, Tensor]:
        """Send each process its share of a step; return the leader's own rows (B,) and latent draws (B, d).

        patients: the rows of each drawn patient; latent: (sum of rows, d), in the same order.
        """
        shares = split_evenly([len(rows) for rows in patients], self.size)
        rows = [_joined([patients[i] for i in share]) for share in shares]
        latents = torch.split(latent, [len(r) for r in rows])
        if self.size > 1:
            with self._spoken():
                _broadcast(torch.tensor([len(r) for r in rows], dtype=torch.int64))
                for rank in range(1, self.size):
                    if len(rows[rank]):
                        _send(torch.from_numpy(rows[rank]), rank)
                        _send(latents[rank].contiguous(), rank)
        return rows[0], latents[0]

    def share_weights(self, tensors: Sequence[Tensor]) -> None:
        """Send the leader's values of these tensors to all, in place."""
        if self.size == 1:
            return
        for group in _by_device_and_type(tensors):
            flat = torch.cat([t.detach().flatten() for t in group])
            with self._spoken():
                _broadcast(flat)
            if not self.leads:
                with torch.no_grad():
                    for tensor, part in zip(group, torch.split(flat, [t.numel() for t in group]), strict=True):
                        tensor.copy_(part.view_as(tensor))

    def stop(self) -> None:
        """Tell the others that there is no further step."""
        if self.size > 1:
            with self._spoken():
                _broadcast(torch.full((self.size,), STOP, dtype=torch.int64))

    def conclude(self, result: Mapping[str, Any]) -> None:
        """Tell the others how the run ended: what `train` returns."""
        if self.size > 1:
            with self._spoken():
                self.store.set("result", json.dumps(result))

    # --- what the others do ---

    def await_word(self, *names: str) -> tuple[str, Any]:
        """Wait for what the leader says first of "job" and "result"; it may take its time. Return name and content."""
        while True:
            with self._spoken():
                for name in names:
                    if self.store.check([name]):
                        return name, json.loads(self.store.get(name))
                if self.store.check(["ended"]):
                    raise SystemExit(0)  # the leader says why
            time.sleep(0.05)

    def receive_share(self, latent_dim: int) -> tuple[IntArray, Tensor] | None:
        """Return the rows and latent draws of the next step, or None where there is no further one."""
        with self._spoken():
            counts = torch.zeros(self.size, dtype=torch.int64)
            _broadcast(counts)
            count = int(counts[self.rank])
            if count == STOP:
                return None
            rows, latent = torch.zeros(count, dtype=torch.int64), torch.zeros(count, latent_dim)
            if count:
                _receive(rows, 0)
                _receive(latent, 0)
        return rows.numpy(), latent

    # --- what all do ---

    def add_up(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums over all processes, for the leader alone: what others get back means nothing."""
        if self.size == 1:
            return list(sums)
        flat = torch.cat([s.flatten() for s in sums])
        with self._spoken():
            _reduce(flat)
        return [part.view_as(s) for part, s in zip(torch.split(flat, [s.numel() for s in sums]), sums, strict=True)]

    def gather(self, stats: Private[StepStats]) -> Private[StepStats]:
        """Return the private statistics of the whole step, for the leader alone."""
        if self.size == 1:
            return stats
        own = _pack(stats.reveal())
        with self._spoken():
            sizes = torch.zeros(self.size, dtype=torch.int64)
            sizes[self.rank] = len(own)
            _reduce(sizes)
            if not self.leads:
                _send(own, 0)
                return stats
            packed = [own]
            for rank in range(1, self.size):
                packed.append(torch.zeros(int(sizes[rank]), dtype=torch.float64))
                _receive(packed[-1], rank)
        return Private(_merge(packed))

    @contextlib.contextmanager
    def _spoken(self) -> Iterator[None]:
        """Turn the loss of another process, which shows as an error of the backend, into one sentence or an end."""
        try:
            yield
        except RuntimeError:
            raise self._loss() from None

    def _loss(self) -> BaseException:
        deadline = time.monotonic() + FAREWELL_S / 5
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                if not self.leads and self.store.check(["ended"]):
                    return SystemExit(0)  # the leader says why
                for rank in range(self.size) if self.leads else ():
                    if self.store.check([f"failed/{rank}"]):
                        said = json.loads(self.store.get(f"failed/{rank}"))
                        message = f"process {rank + 1} of {self.size} failed: {said['message']}"
                        return TeamError(message, said["exit_code"])
                time.sleep(0.05)
        return RunError(LOST)


class TeamSampler:
    """The leader's engine and the others' as one `GradSampler`: takes the leader's share, returns the whole sum."""

    def __init__(self, engine: GradSampler, team: Team) -> None:
        self._engine, self._team = engine, team

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order of the sums."""
        return self._engine.parameters

    def clipped_sum(self, batch: Batch, latent: Tensor) -> tuple[list[Tensor], Private[StepStats]]:
        """See `GradSampler.clipped_sum`."""
        sums, stats = self._engine.clipped_sum(batch, latent)
        return self._team.add_up(sums), self._team.gather(stats)


def split_evenly(sizes: Sequence[int], parts: int) -> list[range]:
    """Split patients with so many scans each into `parts` runs of neighbours, about equal in scans, none cut.

    A patient goes to the part in which the middle of its scans lies, so no part has more than an even share and
    one patient. Parts may be empty.
    """
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    middles = 2 * ends - np.asarray(sizes, dtype=np.int64)  # twice the middle, to stay in whole numbers
    owner = middles * parts // max(1, 2 * total)
    edges = np.searchsorted(owner, np.arange(parts + 1))
    return [range(int(a), int(b)) for a, b in pairwise(edges)]


def _pack(stats: StepStats) -> Tensor:
    return torch.cat(
        [torch.tensor([stats.scans, stats.loss, stats.clipped], dtype=torch.float64), stats.norms.double().cpu()]
    )


def _merge(packed: Sequence[Tensor]) -> StepStats:
    """Put the statistics of the shares together, each weighted by its patients."""
    norms = [p[3:] for p in packed]
    # Without clipping there are no norms to count patients by: scans weigh then, for a comparison's log.
    weights = [float(len(n) or p[0]) for n, p in zip(norms, packed, strict=True)]
    total = sum(weights)

    def mean(index: int) -> float:
        return sum(w * float(p[index]) for w, p in zip(weights, packed, strict=True) if w) / total

    return StepStats(
        norms=torch.cat(norms),
        clipped=mean(2) if total else 0.0,
        loss=mean(1) if total else math.nan,
        scans=int(sum(float(p[0]) for p in packed)),
    )


def _joined(rows: Sequence[IntArray]) -> IntArray:
    return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)


def _by_device_and_type(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())


def _broadcast(tensor: Tensor) -> None:
    import torch.distributed as dist

    dist.broadcast(tensor, src=0)


def _reduce(tensor: Tensor) -> None:
    import torch.distributed as dist

    dist.reduce(tensor, dst=0)


def _send(tensor: Tensor, rank: int) -> None:
    import torch.distributed as dist

    dist.send(tensor, rank)


def _receive(tensor: Tensor, rank: int) -> None:
    import torch.distributed as dist

    dist.recv(tensor, rank)
