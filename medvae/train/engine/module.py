"""The engine as one of Opacus's grad-sample modules, and as a `GradSampler` of ours."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from opacus.grad_sample.gsm_base import AbstractGradSampleModule
from torch import Tensor, nn

from medvae.errors import ConfigError
from medvae.train.engine.book import Book
from medvae.train.engine.layers import Desk, install, remove
from medvae.train.engine.memory import Limits
from medvae.train.engine.segments import Segments
from medvae.train.engine.tuner import Tuner
from medvae.train.gradient import (
    FULL,
    ROUNDING_MARGIN,
    Compute,
    StepStats,
    check_sampler,
    micro_batches,
    refuse_unsupported,
    segments,
    step_stats,
)
from medvae.types import Batch, Private

# Each is checked before training, as any may be chosen later.
RECOMPUTE = "recompute"
STRATEGIES = ("loop", "grouped4", "unfold", "ghost", RECOMPUTE)


class BookkeepingModule(AbstractGradSampleModule):  # type: ignore[misc]  # Opacus ships no types
    """A model whose backward pass yields the sum of clipped per-patient gradients, at about a plain step's cost.

    Unlike its siblings it never fills `grad_sample`: what a patient adds is clipped and summed as soon as all norms
    are known. Raises ConfigError, with its name, for a layer whose gradients it cannot take.
    """

    def __init__(self, model: nn.Module, *, tuner: Tuner | None = None, compute: Compute = FULL) -> None:
        super().__init__(model, loss_reduction="sum")
        self._compute = compute
        self._desk = Desk(tuner or Tuner(), channels_last=compute.channels_last)
        self._layers = install(model, self._desk)
        self._named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    @property
    def choices(self) -> Mapping[str, str]:
        """The strategy chosen for each layer shape and batch size so far."""
        return dict(self._desk.tuner.choices)

    def remove_hooks(self) -> None:
        """Give the layers their own forward back."""
        remove(self._layers)

    def clipped_sum(
        self,
        inputs: tuple[Tensor, ...],
        weight: Tensor,
        counts: tuple[int, ...],
        max_norm: float,
        room: float = float("inf"),
    ) -> tuple[list[Tensor | None], Tensor, Tensor]:
        """Run the model forward and backward on scans sorted by patient.

        inputs: what the model takes, each (B, ...); it returns losses (B,). weight: (B,), the share of each scan in
        its patient's loss. counts: scans of each patient. Returns the sum of the patients' gradients, each clipped to
        `max_norm` over all parameters together, one float32 tensor a trainable parameter (None where it took no
        part), the norms (P,) before the clip and the losses a patient (P,). room: bytes of gradients that may be kept;
        the rest is recomputed.
        """
        book = Book(Segments(counts), room)
        for _, parameter in self._named:
            parameter.grad = None
        self._desk.book = book
        try:
            kind = weight.device.type
            with self._compute.precision(kind) if self._compute.bf16 else nullcontext():
                losses: Tensor = self._module(*(self._compute.laid_out(t) for t in inputs)).float()
            # Autocast is for the forward pass; backward repeats its precision by itself, and sums are in float32.
            with torch.autocast(kind, enabled=False):
                losses.backward(weight)  # type: ignore[no-untyped-call]
                self._refuse_plain_gradients()
                with torch.no_grad():
                    sums, norms = book.close(max_norm)
        finally:
            self._desk.book = None
        losses = losses.detach() * weight
        self._desk.tuner.settle()
        return [sums.get(id(p)) for _, p in self._named], norms, book.segments.sum(losses)

    def _refuse_plain_gradients(self) -> None:
        """Raise ConfigError where autograd found a way to a parameter past its layer."""
        found = [name for name, parameter in self._named if parameter.grad is not None]
        for _, parameter in self._named:
            parameter.grad = None
        if found:
            raise ConfigError(
                f"no gradient by patient can be taken of parameter {found[0]!r}: use its layer through its own forward"
            )


class BookkeepingSampler:
    """The engine behind the `GradSampler` protocol.

    A batch is split between patients, never inside one, so that at most `limits.scans` scans are in memory and the
    gradients that are kept take at most `limits.kept` bytes; one patient is always taken whole.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_grad_norm: float,
        limits: Limits,
        tuner: Tuner | None = None,
        compute: Compute = FULL,
    ) -> None:
        refuse_unsupported(model)
        self._module = BookkeepingModule(model.train(), tuner=tuner, compute=compute)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._max_grad_norm = max_grad_norm
        self._limits = limits
        self._max_patients = max(1, limits.kept // (4 * sum(p.numel() for p in self._parameters)))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order of the sums."""
        return self._parameters

    @property
    def choices(self) -> Mapping[str, str]:
        """The strategy chosen for each layer shape and batch size so far: facts about the machine, not the data."""
        return self._module.choices

    def clipped_sum(self, batch: Batch, latent: Tensor) -> tuple[list[Tensor], Private[StepStats]]:
        """See `GradSampler.clipped_sum`."""
        device = self._parameters[0].device
        totals: list[Tensor | None] = [None for _ in self._parameters]
        norms, losses = [torch.zeros(0)], [torch.zeros(0)]
        bound = self._max_grad_norm * (1 - ROUNDING_MARGIN)
        for part in self._parts(batch.patient):
            segment, counts = segments(batch.patient[part])
            arrays = (torch.from_numpy(batch.x[part]), torch.from_numpy(batch.condition[part]), latent[part])
            inputs = tuple(t.to(device) for t in arrays)
            weight = (1 / counts[segment]).to(device)
            lengths = tuple(counts.tolist())
            sums, norm, loss = self._module.clipped_sum(inputs, weight, lengths, bound, self._limits.room)
            totals = [b if a is None else a if b is None else a.add_(b) for a, b in zip(totals, sums, strict=True)]
            norms.append(norm.cpu())
            losses.append(loss.cpu())
        filled = [torch.zeros_like(p) if t is None else t for p, t in zip(self._parameters, totals, strict=True)]
        return filled, step_stats(torch.cat(norms), torch.cat(losses), self._max_grad_norm, len(batch.patient))

    def _parts(self, patient: np.ndarray) -> Iterator[slice]:
        """Split sorted patients (B,) into slices of whole patients that fit."""
        for part in micro_batches(patient, self._limits.scans):
            starts = part.start + np.flatnonzero(np.diff(patient[part], prepend=patient[part][:1] - 1))
            parts = -(-len(starts) // self._max_patients)
            edges = [int(some[0]) for some in np.array_split(starts, parts)] + [part.stop]
            yield from (slice(a, b) for a, b in pairwise(edges))


def checked_sampler(
    model: nn.Module,
    moved: nn.Module,
    batch: Batch,
    latent: Tensor,
    *,
    max_grad_norm: float,
    limits: Limits,
    tuner: Tuner,
    compute: Compute = FULL,
) -> BookkeepingSampler:
    """Return the engine for a model, after every strategy agreed with plain autograd on made-up scans.

    moved: a copy of the model off its start, where no layer hides another. The check is made in float32, as bfloat16
    would hide a fault behind its rounding. Raises ConfigError as `check_sampler`.
    """
    for strategy in STRATEGIES:
        probe = BookkeepingSampler(
            copy.deepcopy(moved),
            max_grad_norm=max_grad_norm,
            limits=replace(limits, room=0.0) if strategy == RECOMPUTE else limits,
            tuner=Tuner(fixed=strategy),
            compute=replace(compute, bf16=False),
        )
        check_sampler(probe, moved, batch, latent)
    return BookkeepingSampler(model, max_grad_norm=max_grad_norm, limits=limits, tuner=tuner, compute=compute)
