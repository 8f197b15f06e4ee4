"""A small cohort of gratings and a run trained on it, once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medvae.config import TrainConfig, build
from medvae.train.run import train
from medvae.types import Condition, ImageSpace, Intensity
from medvae.vault.store import SCHEMA, CohortWriter

SHAPE = (16, 16)
CONDITIONS = (
    Condition("side", "class", ("a", "b", "c")),
    Condition("age", "continuous", range=(20.0, 80.0)),
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVAE_TRACKING", "off")
    torch.set_num_threads(1)


def write_cohort(folder: Path, patients: int, seed: int = 0) -> Path:
    """Class sets the direction of a grating, age its contrast; classes in shares 6 : 3 : 1. A third is held out."""
    rng = np.random.default_rng(seed)
    space = ImageSpace(SHAPE, (1.0, 1.0), "MR", Intensity("percentile", 1, 99), CONDITIONS)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] / SHAPE[0]
    waves = (np.cos(2 * np.pi * x), np.cos(2 * np.pi * y), np.cos(2 * np.pi * (x + y)))
    sides = {}
    with CohortWriter(folder, SHAPE, masks=False) as writer:
        for patient in range(patients):
            side = 0 if patient % 10 < 6 else 1 if patient % 10 < 9 else 2
            age = float(rng.uniform(20, 80))
            image = 0.5 + (0.1 + 0.3 * (age - 20) / 60) * waves[side] + 0.05 * rng.standard_normal(SHAPE)
            encoded = np.concatenate([CONDITIONS[0].encode("abc"[side]), CONDITIONS[1].encode(age)])
            writer.append(image.clip(0, 1).astype(np.float32), None, patient, encoded)
            sides[patient] = "holdout" if patient % 3 == 0 else "train"
        split = {s: [p for p in sides if sides[p] == s] for s in ("train", "holdout")}
        info = {"schema": SCHEMA, "patients": patients, "images": patients, "space": space.to_json()}
        writer.finish({**info, "masks": False, "split": split}, sides)
    return folder


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("latent") / "cohort", 150)


@pytest.fixture(scope="session")
def run(cohort: Path) -> Path:
    recipe = {
        "model": {"latent_dim": 4, "channels": (4,), "norm_groups": 2},
        "moments": {"basis_shape": (6, 6), "coarse_shape": (2, 2)},
        "mixture": {"enabled": False},
        "dpsgd": {"enabled": False},
        "canaries": {"enabled": False},
    }
    # Much more than a release would spend: a hundred patients show no direction of variation at 8.
    config = build(TrainConfig, dp_epsilon=500.0, recipe=recipe, noise_source="seeded", threads=1, device="cpu")
    out = cohort.parent / "run"
    train(cohort, out, config)
    return out
