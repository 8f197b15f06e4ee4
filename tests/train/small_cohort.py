"""Small cohorts in the real store's format, and a recipe that trains in a second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medvae.config import TrainConfig, build
from medvae.synth.store import read_release
from medvae.types import Condition, ImageSpace, Intensity
from medvae.vault.store import SCHEMA, CohortWriter


def write_cohort(
    folder: Path, patients: int = 30, shape: tuple[int, ...] = (8, 8), most_scans: int = 3, holdout: int = 0
) -> Path:
    """Blobs of two classes: class b is brighter. Every patient has 1 .. most_scans scans; the last are held out."""
    rng = np.random.default_rng(patients)
    side = Condition("side", "class", ("a", "b"))
    space = ImageSpace(shape, (1.0,) * len(shape), "MR", Intensity("percentile", 1, 99), (side,))
    images = 0
    with CohortWriter(folder, shape, masks=False) as writer:
        for patient in range(patients):
            for _ in range(1 + patient % most_scans):
                image = np.clip(0.3 + 0.4 * (patient % 2) + 0.1 * rng.standard_normal(shape), 0, 1)
                writer.append(image.astype(np.float32), None, patient, side.encode("ab"[patient % 2]))
                images += 1
        info = {
            "schema": SCHEMA,
            "patients": patients,
            "images": images,
            "space": space.to_json(),
            "masks": False,
            "split": {
                "train": list(range(patients - holdout)),
                "holdout": list(range(patients - holdout, patients)),
            },
        }
        writer.finish(info, {p: "holdout" if p >= patients - holdout else "train" for p in range(patients)})
    return folder


def small_config(steps: int = 6, **changes: object) -> TrainConfig:
    """A recipe that trains in a second."""
    recipe = {
        "model": {"latent_dim": 2, "channels": (4,), "norm_groups": 2},
        "moments": {"basis_shape": (4, 4), "coarse_shape": (2, 2)},
        "dpsgd": {"enabled": True, "steps": steps, "sample_rate": 0.3, "checkpoint_every": 2, "learning_rate": 1e-3},
        "canaries": {"count": 20},
    }
    values = {"dp_epsilon": 8.0, "recipe": recipe, "noise_source": "seeded", "threads": 1, "device": "cpu"}
    config: TrainConfig = build(TrainConfig, **{**values, **changes})
    return config


def weights(run: Path) -> dict[str, np.ndarray]:
    return dict(read_release(run / "model").weights)


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


class Stop(Exception):
    """Raised to end a training midway."""
