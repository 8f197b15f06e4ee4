"""The step: one clipped gradient a patient, noise once, divided by the expected number of patients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from medvae.dp.noise import NoiseSource
from medvae.errors import MedvaeError
from medvae.train.gradient import GradSampler, StepStats
from medvae.types import Batch, Private

BETAS = (0.9, 0.99)
WARMUP_SHARE = 0.05
FINAL_RATE = 0.1


class PatientDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus ships no types
    """Opacus's optimizer with the patient as the unit.

    Differences from the parent: gradients are clipped by patient and not by scan; the noise comes from our
    `NoiseSource` and not from torch; the divisor is the expected number of patients, a fixed public number, whatever
    was drawn; an empty draw is a step like any other, and gets its noise.

    Guarantee: with patients drawn by Poisson sampling at rate q, one `step` is a Poisson-sampled Gaussian mechanism
    with `noise_multiplier` under add/remove of one patient, whatever the scans, the losses and the weights are.

    Floating point: the noise is drawn in float64, added in float64 to the float32 sum, and the result rounded to
    float32. The released value has 29 bits less than the noise, so the low bits of a double that Mironov (2012, "On
    significance of the least significant bits for differential privacy") reads are gone; what is left of the attacks
    on rounding (Haney et al. 2022, "Precision-based attacks and interval refining"; Casacuberta et al. 2022 on
    the sensitivity of floating-point sums) is a relative error below 1e-5 in the clip bound, which the clip keeps
    as a margin.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        sampler: GradSampler,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_patients: float,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_patients,
        )
        self._sampler = sampler
        self._drawn: tuple[Batch, Tensor, NoiseSource] | None = None
        self.stats: Private[StepStats] | None = None
        if [id(p) for p in self.params] != [id(p) for p in sampler.parameters]:
            raise MedvaeError("optimizer and gradient sampler do not hold the same parameters")

    def step_on(self, batch: Batch, latent: Tensor, source: NoiseSource) -> Private[StepStats]:
        """Take one step on a drawn batch and return its private statistics. Each batch serves one step."""
        self._drawn = (batch, latent, source)
        self.zero_grad(set_to_none=True)
        self.step()
        if self.stats is None:
            raise MedvaeError("the step left no statistics")
        return self.stats

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Clip, add noise, scale: once each, in this order."""
        if self._drawn is None:
            raise MedvaeError("a step needs a freshly drawn batch: call step_on")
        self.clip_and_accumulate()
        self.add_noise()
        self.scale_grad()
        self._drawn = None
        return True

    def rehearse(self, batch: Batch, latent: Tensor, source: NoiseSource) -> tuple[list[Tensor], list[Tensor]]:
        """Clip, add noise and scale as a step does, and take none: return the sums before the noise, and the result.

        For made-up scans alone: the sums of patients' gradients are never to be seen.
        """
        self._drawn = (batch, latent, source)
        self.zero_grad(set_to_none=True)
        self.clip_and_accumulate()
        sums = [parameter.summed_grad.clone() for parameter in self.params]
        self.add_noise()
        self.scale_grad()
        self._drawn = None
        noised = [parameter.grad for parameter in self.params]
        self.zero_grad(set_to_none=True)
        return sums, noised

    def clip_and_accumulate(self) -> None:
        """Put the sum of clipped per-patient gradients into `summed_grad`; zeros for an empty draw."""
        batch, latent, _ = self._batch()
        sums, self.stats = self._sampler.clipped_sum(batch, latent)
        for parameter, value in zip(self.params, sums, strict=True):
            parameter.summed_grad = value

    def add_noise(self) -> None:
        """Add Gaussian noise of standard deviation `noise_multiplier * max_grad_norm` to each coordinate, once."""
        _, _, source = self._batch()
        std = self.noise_multiplier * self.max_grad_norm
        noise = torch.from_numpy(source.normal(sum(p.numel() for p in self.params))) if std > 0 else None
        start = 0
        for parameter in self.params:
            summed, parameter.summed_grad = parameter.summed_grad, None
            if noise is not None:
                part = noise[start : start + parameter.numel()].view_as(parameter).to(summed.device)
                summed = (summed.double() + std * part).float()
            start += parameter.numel()
            parameter.grad = summed.view_as(parameter)

    def scale_grad(self) -> None:
        """Divide by the expected number of patients, never by the number that was drawn."""
        for parameter in self.params:
            parameter.grad /= self.expected_batch_size

    def _batch(self) -> tuple[Batch, Tensor, NoiseSource]:
        if self._drawn is None:
            raise MedvaeError("a step needs a freshly drawn batch: call step_on")
        return self._drawn


def inner_optimizer(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Return Adam (Kingma & Ba 2015), which sees privatised gradients only, so it is post-processing."""
    return torch.optim.Adam(parameters, lr=learning_rate, betas=BETAS)


def rate_factor(step: int, steps: int) -> float:
    """Return the learning rate of a step over its peak: linear warm-up, then a cosine down to a tenth. Fixed."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def average_weights(average: Mapping[str, Tensor], model: nn.Module, step: int, decay: float) -> None:
    """Move the running average towards the weights, in place; the first steps count more, so no start-up bias."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in average:
                average[name].lerp_(parameter, weight)
