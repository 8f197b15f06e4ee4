"""The definition of a clipped sum of per-patient gradients: one backward a patient, in float64."""

from __future__ import annotations

import copy
import math
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from medvae.train.engine.module import BookkeepingModule
from medvae.train.engine.tuner import Tuner


def naive(
    model: nn.Module, inputs: tuple[Tensor, ...], counts: tuple[int, ...], bound: float
) -> tuple[list[Tensor], list[float]]:
    """Return the clipped sum, one float64 tensor a trainable parameter, and the norms a patient."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if hasattr(module, "layout"):
            # The same numbers, laid out plainly: torch's own GroupNorm can crash in backward on other layouts.
            module.layout = "dense"
    parameters = [p for p in exact.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    norms = []
    for start, stop in pairwise(accumulate(counts, initial=0)):
        part = [t[start:stop].double() if t.is_floating_point() else t[start:stop] for t in inputs]
        found = torch.autograd.grad(exact(*part).mean(), parameters, allow_unused=True)
        gradients = [torch.zeros_like(t) if g is None else g for g, t in zip(found, total, strict=True)]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        norms.append(norm)
        for t, g in zip(total, gradients, strict=True):
            t += g * min(1.0, bound / max(norm, 1e-30))
    return total, norms


def clipped_sum(
    model: nn.Module, inputs: tuple[Tensor, ...], counts: tuple[int, ...], bound: float, strategy: str | None = None
) -> tuple[list[Tensor], Tensor]:
    """Return the engine's clipped sum and norms, with one strategy, with timed ones, or with no room to keep any."""
    room = 0.0 if strategy == "recompute" else math.inf
    module = BookkeepingModule(copy.deepcopy(model), tuner=Tuner(fixed=strategy))
    weight = torch.tensor([1 / k for k in counts for _ in range(k)])
    sums, norms, _ = module.clipped_sum(inputs, weight, counts, bound, room)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [torch.zeros_like(p) if s is None else s for s, p in zip(sums, parameters, strict=True)], norms


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def check(
    model: nn.Module, inputs: tuple[Tensor, ...], counts: tuple[int, ...], bound: float, strategy: str | None = None
) -> None:
    """Compare engine and definition: norms to 1e-5, gradients to 1e-4."""
    expected, norms = naive(model, inputs, counts, bound)
    sums, found = clipped_sum(model, inputs, counts, bound, strategy)
    exact = torch.tensor(norms, dtype=torch.float64)
    assert float(((found - exact).abs() / exact.clamp(min=1e-6)).max()) < 1e-5
    gap = (flat(sums) - flat(expected)).norm() / flat(expected).norm().clamp(min=1e-6)
    assert float(gap) < 1e-4
    assert all(s.dtype == torch.float32 and not s.requires_grad for s in sums)
