"""One clipped gradient a patient.

A patient's loss is the mean of the losses of the drawn scans, so the per-scan gradients are weighted by 1/k, summed
over the patient and only then clipped: patient after patient, one norm over all parameters (Abadi et al. 2016,
algorithm 1, with the patient as the example). Removing a patient then changes the sum by at most `max_grad_norm`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from medvae.errors import ConfigError
from medvae.types import Batch, Private

# Gradients are clipped to C (1 - margin), so that rounding in float32 never carries the change of a sum over C: of the
# patient's own gradient, and of all others', whose last digits depend on who else is in the batch (a library chooses
# its kernels by size). Others' moved by 1e-4 together where gradients had norms of millions.
ROUNDING_MARGIN = 1e-3
# Largest relative error of a gradient in the check before training.
PROBE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class StepStats:
    """What one step saw. All of it is private.

    norms: (patients,) gradient norms before the clip; clipped: share of patients above the bound;
    loss: mean loss a patient, NaN where none was drawn; scans: how many were drawn.
    """

    norms: Tensor
    clipped: float
    loss: float
    scans: int


@dataclass(frozen=True)
class Compute:
    """How forward and backward are computed; sums, noise and weights are float32 all the same.

    bf16: in bfloat16 where autocast knows how; channels_last: convolutions with the channels as the innermost axis.
    """

    bf16: bool = False
    channels_last: bool = False

    def precision(self, device: str) -> torch.autocast:
        """Return the context of the forward pass."""
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16)

    def laid_out(self, x: Tensor) -> Tensor:
        """Return x (B, C, ...) in the layout that convolutions compute in."""
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        return x if layout is None or not self.channels_last else x.to(memory_format=layout)


FULL = Compute()


class GradSampler(Protocol):
    """An engine that turns the scans of one step into the sum of clipped per-patient gradients."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order of the sums."""

    def clipped_sum(self, batch: Batch, latent: Tensor) -> tuple[list[Tensor], Private[StepStats]]:
        """Return one float32 tensor a parameter, zeros for an empty batch, and the private statistics.

        batch: scans sorted by patient; latent: (B, d) standard normal draws for the ELBO.
        Guarantee: adding or removing all scans of one patient changes the sums by at most `max_grad_norm` in L2.
        """


class FunctorchSampler:
    """Per-scan gradients by Opacus in `functorch` mode, which is right wherever it runs; segment sum; clip.

    A batch is split into micro-batches of at most `max_scans` scans, between patients and never inside one.
    """

    def __init__(self, model: nn.Module, *, max_grad_norm: float, max_scans: int) -> None:
        refuse_unsupported(model)
        self._module = GradSampleModule(model, loss_reduction="sum", strict=True, force_functorch=True)
        self._module.train()
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._max_grad_norm = max_grad_norm
        self._max_scans = max_scans

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order of the sums."""
        return self._parameters

    def clipped_sum(self, batch: Batch, latent: Tensor) -> tuple[list[Tensor], Private[StepStats]]:
        """See `GradSampler.clipped_sum`."""
        totals = [torch.zeros_like(p, dtype=torch.float32) for p in self._parameters]
        norms, losses = [torch.zeros(0)], [torch.zeros(0)]
        for part in micro_batches(batch.patient, self._max_scans):
            segment, counts = segments(batch.patient[part])
            loss = self._backward(batch, latent, part, 1 / counts[segment])
            sums, norm = clip_patients(self._collect(len(segment)), segment, len(counts), self._max_grad_norm)
            for total, value in zip(totals, sums, strict=True):
                total += value
            norms.append(norm.cpu())
            losses.append(torch.zeros(len(counts)).index_add_(0, segment, loss.cpu()))
        return totals, step_stats(torch.cat(norms), torch.cat(losses), self._max_grad_norm, len(batch.patient))

    def _backward(self, batch: Batch, latent: Tensor, part: slice, weight: Tensor) -> Tensor:
        """Leave the weighted per-scan gradients on the parameters; return the weighted losses (B,)."""
        device = self._parameters[0].device
        x, condition = (torch.from_numpy(a[part]).to(device) for a in (batch.x, batch.condition))
        with warnings.catch_warnings():
            # The first layer's input needs no gradient, and Opacus knows no other precision than the model's.
            warnings.filterwarnings("ignore", message="Full backward hook is firing|In CPU autocast")
            loss = self._module(x, condition, latent[part].to(device)) * weight.to(device)
            loss.sum().backward()
        return torch.as_tensor(loss.detach())

    def _collect(self, scans: int) -> list[Tensor]:
        """Take the per-scan gradients (B, *shape) off the parameters and forget the plain gradients."""
        found = []
        for name, parameter in zip(self._names, self._parameters, strict=True):
            sample, plain = getattr(parameter, "grad_sample", None), parameter.grad
            setattr(parameter, "grad_sample", None)  # noqa: B010 -- Opacus's attribute, unknown to torch's types
            parameter.grad = None
            if sample is None and plain is not None:
                raise ConfigError(
                    f"no gradient by patient can be taken of parameter {name!r}: use its layer through its own forward"
                )
            # A parameter that took no part has the gradient zero; it still gets its share of noise.
            found.append(parameter.new_zeros((scans, *parameter.shape)) if sample is None else sample.detach())
        return found


class PlainSampler:
    """The plain sum of gradients, without clipping: for comparison only, never releasable."""

    def __init__(self, model: nn.Module, *, max_scans: int, compute: Compute = FULL) -> None:
        self._model = model.train()
        self._compute = compute
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._max_scans = max_scans

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order of the sums."""
        return self._parameters

    def clipped_sum(self, batch: Batch, latent: Tensor) -> tuple[list[Tensor], Private[StepStats]]:
        """Return the sum over patients of plain gradients; nothing is clipped."""
        device = self._parameters[0].device
        totals = [torch.zeros_like(p, dtype=torch.float32) for p in self._parameters]
        losses = [torch.zeros(0)]
        for part in micro_batches(batch.patient, self._max_scans):
            segment, counts = segments(batch.patient[part])
            x, condition = (torch.from_numpy(a[part]).to(device) for a in (batch.x, batch.condition))
            with self._compute.precision(device.type):
                loss = self._model(self._compute.laid_out(x), condition, latent[part].to(device))
            loss = loss.float() * (1 / counts[segment]).to(device)
            gradients = torch.autograd.grad(loss.sum(), self._parameters, allow_unused=True)
            for total, value in zip(totals, gradients, strict=True):
                total += 0 if value is None else value
            losses.append(torch.zeros(len(counts)).index_add_(0, segment, loss.detach().cpu()))
        return totals, step_stats(torch.zeros(0), torch.cat(losses), float("inf"), len(batch.patient))


def segments(patient: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return for sorted patients (B,) the number of each scan's segment (B,) and the scans of each segment (n,)."""
    _, segment, counts = np.unique(patient, return_inverse=True, return_counts=True)
    return torch.from_numpy(segment.reshape(-1)), torch.from_numpy(counts)


def micro_batches(patient: np.ndarray, max_scans: int) -> Iterator[slice]:
    """Split sorted patients (B,) into slices of at most `max_scans` scans that never cut a patient in two.

    A patient with more scans than that makes a slice alone.
    """
    edges = np.flatnonzero(np.diff(patient, prepend=patient[:1] - 1, append=patient[-1:] + 1))
    start = 0
    for previous, edge in pairwise(edges):
        if edge - start > max_scans and previous > start:
            yield slice(start, int(previous))
            start = int(previous)
    if len(patient):
        yield slice(start, len(patient))


def clip_patients(
    samples: list[Tensor], segment: Tensor, patients: int, max_grad_norm: float
) -> tuple[list[Tensor], Tensor]:
    """Sum per-scan gradients by patient, clip each patient's, sum over patients.

    samples: one (B, *shape) a parameter, already weighted; segment: (B,) in 0 .. patients - 1.
    Returns the sums, one (*shape) a parameter, and the norms (patients,) before the clip, over all parameters
    together. A patient whose gradient is not finite counts as zero: its norm has no bound to scale by.
    """
    segment = segment.to(samples[0].device)
    if patients < len(segment):
        samples = [g.new_zeros((patients, *g.shape[1:])).index_add_(0, segment, g) for g in samples]
    squares = torch.stack([g.flatten(1).norm(dim=1).double().square() for g in samples])
    norms = squares.sum(0).sqrt()
    finite = torch.isfinite(norms)
    factor = torch.where(finite, max_grad_norm * (1 - ROUNDING_MARGIN) / norms.clamp(min=1e-30), 0.0).clamp(max=1.0)
    if not bool(finite.all()):
        samples = [torch.where(finite.view(-1, *[1] * (g.dim() - 1)), g, 0.0) for g in samples]
    return [torch.tensordot(factor.to(g.dtype), g, dims=1).float() for g in samples], norms


def refuse_unsupported(model: nn.Module) -> None:
    """Raise ConfigError where a layer mixes the scans of a batch (BatchNorm) or is unknown to Opacus."""
    errors = ModuleValidator.validate(model, strict=False)
    if errors:
        kinds = sorted({type(m).__name__ for m in model.modules() if "BatchNorm" in type(m).__name__})
        layer = kinds[0] if kinds else type(errors[0]).__name__
        raise ConfigError(f"the model holds a layer that DP-SGD cannot train ({layer}): use GroupNorm in its place")


def check_sampler(sampler: GradSampler, reference: nn.Module, batch: Batch, latent: Tensor) -> None:
    """Check an engine against plain autograd on made-up scans, before it sees a real one.

    An engine that is silently wrong for some layer breaks the guarantee, and nothing else shows it. reference: a
    copy of the model that no engine has touched. Each patient's sum must be the plain gradient of the mean loss,
    scaled; and the sum over all patients must be the sum of those. Raises ConfigError with the parameter's name.
    """
    names = [name for name, p in reference.named_parameters() if p.requires_grad]
    together, _ = sampler.clipped_sum(batch, latent)
    alone = [torch.zeros_like(t) for t in together]
    for patient in np.unique(batch.patient):
        rows = np.flatnonzero(batch.patient == patient)
        one = Batch(batch.x[rows], batch.condition[rows], batch.patient[rows])
        sums, stats = sampler.clipped_sum(one, latent[rows])
        plain, _ = PlainSampler(reference, max_scans=len(rows)).clipped_sum(one, latent[rows])
        norm = _norm(plain)
        scale = _norm(sums) / norm.clamp(min=1e-30)
        _compare(names, sums, [scale * g for g in plain], "is not the patient's own")
        if abs(float(stats.reveal().norms[0]) - float(norm)) > PROBE_TOLERANCE * float(norm):
            raise ConfigError("the norm of a gradient by patient is wrong: a layer of the model is not supported")
        alone = [a + s for a, s in zip(alone, sums, strict=True)]
    _compare(names, together, alone, "mixes patients")


def _compare(names: list[str], found: list[Tensor], expected: list[Tensor], fault: str) -> None:
    gaps = [float((f - e).norm()) for f, e in zip(found, expected, strict=True)]
    if max(gaps) > PROBE_TOLERANCE * float(_norm(expected)):
        name = names[gaps.index(max(gaps))]
        raise ConfigError(f"the gradient of parameter {name!r} {fault}: its layer is not supported by DP-SGD")


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.as_tensor(torch.linalg.vector_norm(torch.cat([t.flatten() for t in tensors])))


def step_stats(norms: Tensor, losses: Tensor, bound: float, scans: int) -> Private[StepStats]:
    """Return the statistics of a step from norms and losses a patient, each (patients,)."""
    clipped = float((norms > bound).float().mean()) if len(norms) else 0.0
    loss = float(losses.mean()) if len(losses) else float("nan")
    return Private(StepStats(norms=norms, clipped=clipped, loss=loss, scans=scans))
