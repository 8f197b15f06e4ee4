"""Training of several models of one architecture at once: their weights are stacked and every step is one vmap.

Each of the K models sees its own batch. With `max_grad_norm` the step is that of DP-SGD by patient: one clipped
gradient a patient, noise once, divided by the expected number of patients (as in train/optimizer.py, to which
tests/audit/test_audit_shadows.py compares it). Without, it is a plain sum.

These are attack material: nothing here is released, so noise comes from a statistical generator and no ledger is
charged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from medvae.train.optimizer import average_weights, inner_optimizer
from medvae.types import Progress

# Floats that per-patient gradients of all models may take at a time.
GRADIENT_FLOATS = 2**27


class Batches(NamedTuple):
    """What K models see in one step, padded to P patients of S scans each.

    x: (K, P, S, C, *spatial); condition: (K, P, S, W); latent: (K, P, S, d) standard normal;
    weight: (K, P, S), one over the number of scans drawn of the patient, zero where a place is padding.
    """

    x: Tensor
    condition: Tensor
    latent: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Schedule:
    """How a stack is trained. max_grad_norm None: nothing is clipped, and no noise is added."""

    steps: int
    rate: Callable[[int], float]
    divisor: float
    noise_multiplier: float = 0.0
    max_grad_norm: float | None = None
    average_decay: float | None = None


class Stack(nn.Module):
    """The stacked parameters (K, *shape) of K models of one architecture; its parameters' names have / for a dot."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        parameters, fixed = stack_module_state(list(models))
        # What is yes or no decides what is computed, for all models at once.
        flags = {name: value for name, value in fixed.items() if value.dtype == torch.bool}
        if any(bool((value != value[:1]).any()) for value in flags.values()):
            raise ValueError("models in a stack must agree in what is yes or no")
        self.fixed = {name: value for name, value in fixed.items() if name not in flags}
        self.names = list(parameters)
        for name, value in parameters.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(value.detach().clone()))
        self.base = [copy.deepcopy(models[0]).to("meta")]  # in a list: no submodule, its weights are never used
        for name, value in flags.items():
            owner, _, own = name.rpartition(".")
            self.base[0].get_submodule(owner).register_buffer(own, value[0].cpu())

    @property
    def stacked(self) -> dict[str, Tensor]:
        """Parameters by their own names."""
        return {name: self.get_parameter(name.replace(".", "/")) for name in self.names}

    def patient_loss(
        self,
        parameters: dict[str, Tensor],
        fixed: dict[str, Tensor],
        x: Tensor,
        condition: Tensor,
        latent: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """Return one model's weighted loss over some scans (S, ...)."""
        loss = functional_call(self.base[0], (parameters, fixed), (x, condition, latent))
        return torch.sum(loss * weight)

    def clipped_sums(self, batch: Batches, max_grad_norm: float) -> dict[str, Tensor]:
        """Return for each parameter the sums (K, *shape) of clipped per-patient gradients."""
        size = sum(p.numel() for p in self.stacked.values())
        at_once = max(1, GRADIENT_FLOATS // max(1, size))
        # Seen as a plain dict so that grad takes it as one argument.
        by_patient = vmap(grad(self.patient_loss), in_dims=(None, None, 0, 0, 0, 0))
        by_model = vmap(by_patient, in_dims=(0, 0, 0, 0, 0, 0))
        totals = {name: torch.zeros_like(p) for name, p in self.stacked.items()}
        parameters = {name: p.detach() for name, p in self.stacked.items()}
        for start in range(0, batch.x.shape[1], at_once):
            part = [t[:, start : start + at_once] for t in batch]
            gradients = by_model(parameters, self.fixed, *part)
            squares = [g.flatten(2).square().sum(2) for g in gradients.values()]
            norms = torch.stack(squares).sum(0).sqrt()
            factor = (max_grad_norm / norms.clamp(min=1e-30)).clamp(max=1.0)
            for name, gradient in gradients.items():
                totals[name] += torch.einsum("kp,kp...->k...", factor, gradient)
        return totals

    def plain_sums(self, batch: Batches) -> dict[str, Tensor]:
        """Return for each parameter the sums (K, *shape) of gradients."""
        merged = [t.flatten(1, 2) for t in batch]
        parameters = {name: p.detach() for name, p in self.stacked.items()}
        found: dict[str, Tensor] = vmap(grad(self.patient_loss))(parameters, self.fixed, *merged)
        return found

    def unstack(self, models: Sequence[nn.Module], values: dict[str, Tensor]) -> None:
        """Write stacked values (K, *shape) back into the K models."""
        with torch.no_grad():
            for k, model in enumerate(models):
                own = dict(model.named_parameters())
                for name, value in values.items():
                    own[name.replace("/", ".")].copy_(value[k])


def train_stacked(
    models: Sequence[nn.Module],
    draw: Callable[[int], Batches],
    schedule: Schedule,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> None:
    """Train K models in place, together; `draw` gives what each sees in a step."""
    stack = Stack(models)
    optimizer = inner_optimizer(stack.parameters(), schedule.rate(0))
    average = {name: p.detach().clone() for name, p in stack.named_parameters()}
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        take_step(stack, draw(step), schedule, generator)
        optimizer.step()
        if schedule.average_decay is not None:
            average_weights(average, stack, step, schedule.average_decay)
        if progress is not None:
            progress(step + 1, schedule.steps)
    averaged = schedule.average_decay is not None
    stack.unstack(models, average if averaged else {n: p.detach() for n, p in stack.named_parameters()})


def take_step(stack: Stack, batch: Batches, schedule: Schedule, generator: torch.Generator) -> None:
    """Leave each model's (noisy) mean gradient on the stacked parameters."""
    bound = schedule.max_grad_norm
    sums = stack.plain_sums(batch) if bound is None else stack.clipped_sums(batch, bound)
    sd = schedule.noise_multiplier * bound if bound is not None and math.isfinite(schedule.noise_multiplier) else 0.0
    for name, parameter in stack.stacked.items():
        total = sums[name]
        if sd > 0:
            total = total + sd * torch.randn(total.shape, generator=generator).to(total)
        parameter.grad = total / schedule.divisor
