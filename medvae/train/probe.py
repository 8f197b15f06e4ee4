"""How long a planned run would take here: a step measured on made-up scans, with nothing private in it."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from medvae.nets.build import build_model
from medvae.train.loop import make_engine
from medvae.train.planning import TrainPlan
from medvae.types import Batch, ImageSpace

PROBE_SCANS = 32


@dataclass(frozen=True)
class Cost:
    """Measured on this machine. step_seconds: one step at the expected batch; memory_gb: peak of the process."""

    step_seconds: float
    total_seconds: float
    memory_gb: float


def step_cost(plan: TrainPlan, space: ImageSpace, scans_per_patient: float = 1.0) -> Cost | None:
    """Measure the gradient of some scans and scale it to the expected batch; None where nothing is trained.

    Loading, the closed-form stage and the noise are left out: they are the smaller part.
    """
    recipe, privacy = plan.recipe, plan.privacy
    if not recipe.dpsgd.enabled or recipe.model.latent_dim is None:
        return None
    engine = make_engine(build_model(space, recipe), privacy, recipe.model.latent_dim, space, recipe.dpsgd.grad_sampler)
    expected = max(1.0, privacy.sample_rate * privacy.patients * min(scans_per_patient, recipe.dpsgd.scans_per_patient))
    scans = round(min(PROBE_SCANS, expected))
    rng = np.random.default_rng(0)
    batch = Batch(
        rng.random((scans, space.channels, *space.spatial_shape), dtype=np.float32),
        np.zeros((scans, space.condition_width), dtype=np.float32),
        np.arange(scans, dtype=np.int64),
    )
    latent = torch.zeros(scans, recipe.model.latent_dim)
    engine.clipped_sum(batch, latent)  # the first call also pays for allocation
    began = time.perf_counter()
    engine.clipped_sum(batch, latent)
    step = (time.perf_counter() - began) / scans * expected
    return Cost(step, step * privacy.steps, _peak_gb())


def _peak_gb() -> float:
    """Peak memory of this process; the unit differs by system (getrusage(2))."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
