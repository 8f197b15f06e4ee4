"""Training by the product: a recipe, a cohort and an epsilon in, a model for evaluation out."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medvae.config import Recipe, TrainConfig, build
from medvae.nets.build import load_release
from medvae.nets.cvae import ConditionalVAE
from medvae.synth.store import read_release
from medvae.train.run import train
from medvae.types import Batch, FloatArray, ModelRelease

AT_ONCE = 500


@dataclass(frozen=True)
class Fitted:
    """A trained model, its release, and the processor seconds of training."""

    model: ConditionalVAE
    release: ModelRelease
    cpu_s: float


def fit(cohort: Path, recipe: dict[str, Any], epsilon: str, seed: int) -> Fitted:
    """Train a recipe at an epsilon, "none" for without privacy, with fresh noise."""
    chosen: Recipe = build(Recipe, **{"canaries": {"enabled": False}, **recipe})
    limit = math.inf if epsilon == "none" else float(epsilon)
    config: TrainConfig = build(TrainConfig, dp_epsilon=limit, recipe=chosen, seed=seed)
    begun = time.process_time()
    folder = Path(tempfile.mkdtemp(prefix="family-"))
    try:
        train(cohort, folder / "run", config)
        release = read_release(folder / "run" / "model")
    finally:
        shutil.rmtree(folder)
    return Fitted(load_release(release), release, time.process_time() - begun)


def means(model: ConditionalVAE, batch: Batch) -> FloatArray:
    """Return the codes (N, d) of scans: means of q(z | x, c)."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(batch.x), AT_ONCE):
            x, condition = (torch.from_numpy(a[start : start + AT_ONCE]) for a in (batch.x, batch.condition))
            parts.append(model.encode(x, condition)[0].numpy())
    return np.concatenate(parts)


def rebuilt(model: ConditionalVAE, batch: Batch) -> FloatArray:
    """Return the images (N, *spatial) that the codes of scans decode to."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(batch.x), AT_ONCE):
            x, condition = (torch.from_numpy(a[start : start + AT_ONCE]) for a in (batch.x, batch.condition))
            parts.append(model.decode(model.encode(x, condition)[0], condition)[:, 0].numpy())
    return np.concatenate(parts)


def network(epsilon: str, model: dict[str, Any], scans: int, times: int = 1, **more: Any) -> dict[str, Any]:
    """Return the pipeline of a network alone, without the closed form, for a cohort of `scans` scans.

    Without privacy 250 steps of 64 scans, or `times` as many; else 80 steps of an eighth of the scans.
    """
    steps = {"steps": 250 * times, "sample_rate": 64 / scans, "learning_rate": 5e-3, "average_decay": 0.9}
    if epsilon != "none":
        steps |= {"steps": 80, "sample_rate": 0.125, "learning_rate": 3e-3}
    base = {"channels": (16, 32), "residual_units": 0, "latent_dim": 16}
    return {"model": base | model, "moments": {"enabled": False}, "dpsgd": {"enabled": True, **steps}, **more}
