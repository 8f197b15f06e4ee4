"""Small worlds for the audit's tests: a phantom cohort in the real store, and a run folder around a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medvae.audit.case import Case, Effort
from medvae.audit.material import Scans
from medvae.config import AuditConfig, DpSgdConfig, ModelConfig, MomentsConfig, Recipe
from medvae.synth.phantom import make_phantom
from medvae.synth.store import write_release
from medvae.types import Condition, ImageSpace, Intensity, Mechanism, ModelRelease
from medvae.vault.store import CohortWriter, open_cohort

CONDITIONS = (
    Condition("lesion", "class", classes=("absent", "present")),
    Condition("age", "continuous", range=(20.0, 90.0)),
)
TINY = Effort(
    patients=64,
    scans=2,
    draws=4,
    replicates=20,
    pairs=8,
    classifier_steps=8,
    segmenter_steps=4,
    control_patients=12,
    control_steps=350,
    pool=64,
    judged=64,
    closed_shadows=8,
    deep_shadows=0,
    deep_minutes=None,
    generators=2,
    made=32,
    guesses=50,
)
MECHANISM = Mechanism("dpsgd", noise_multiplier=1.2, sample_rate=0.2, count=60)


def space_of(shape: tuple[int, ...], masks: bool = True) -> ImageSpace:
    spacing = (2.0,) * len(shape)
    return ImageSpace(shape, spacing, "MR", Intensity("percentile", 1, 99), CONDITIONS, (1, 2) if masks else ())


def make_cohort(
    folder: Path,
    dims: int = 2,
    patients: int = 40,
    seed: int = 0,
    size: int = 20,
    holdout: float = 0.4,
    shift: float = 0.0,
) -> Path:
    """Write a phantom cohort; `shift` is added to the images of held-out patients only."""
    p = make_phantom(dims, patients, seed, size=size, scans=(1, 2))
    space = space_of((size,) * dims)
    split = (np.arange(patients) % 10 >= 10 * (1 - holdout)).astype(np.uint8)
    info = {
        "schema": "medvae.cohort/1",
        "space": space.to_json(),
        "images": len(p),
        "patients": patients,
        "masks": True,
    }
    with CohortWriter(folder, space.spatial_shape, True) as writer:
        for image, mask, who in zip(p.images, p.masks, p.patients, strict=True):
            row = np.concatenate([np.eye(2)[p.lesion[who]], [2 * (p.age[who] - 20) / 70 - 1]]).astype(np.float32)
            writer.append(np.clip(image + shift * split[who], 0, 1).astype(np.float32), mask, int(who), row)
        writer.finish(info, {i: "holdout" if out else "train" for i, out in enumerate(split)})
    return folder


def recipe() -> Recipe:
    return Recipe(
        model=ModelConfig(latent_dim=4, channels=(8, 8)), moments=MomentsConfig(enabled=False), dpsgd=DpSgdConfig()
    )


def make_run(folder: Path, cohort: Path, seed: int = 0, **claim: Any) -> Path:
    """Write a run folder with an untrained model; `claim` overrides keys of privacy.json."""
    import torch

    from medvae.nets.build import build_model, make_card, state_arrays

    store = open_cohort(cohort).reveal()
    torch.manual_seed(seed)
    model = build_model(store.space, recipe())
    write_release(folder / "model", ModelRelease(state_arrays(model), make_card(store.space, recipe())))
    privacy = privacy_json(len(store.patients("train")), store.fingerprint(), **claim)
    (folder / "privacy.json").write_text(json.dumps(privacy))
    (folder / "private").mkdir()
    (folder / "private" / "run.json").write_text(json.dumps({"cohort": str(cohort)}))
    return folder


def privacy_json(patients: int, fingerprint: str, **claim: Any) -> dict[str, Any]:
    return {
        "schema": "medvae.privacy/1",
        "epsilon": 7.9,
        "delta": 1e-4,
        "unit": "patient",
        "neighboring": "add-remove",
        "accountant": "pld",
        "mechanisms": [MECHANISM.to_json()],
        "noise_source": "os_entropy:chacha20",
        "releasable": True,
        "patients": patients,
        "reasons": [],
        "receipt": {"run_id": "r", "ledger_id": "l", "sequence": 1, "digest": "ab" * 32},
        "crosscheck": {"accountant": "prv", "epsilon": 7.9},
        "fingerprint": fingerprint,
        "plain_words": ["words"],
    } | claim


def phantom_scans(dims: int, patients: int, seed: int, size: int = 16) -> Scans:
    """Phantoms straight as Scans, without a store."""
    p = make_phantom(dims, patients, seed, size=size, scans=(1, 2))
    x = np.stack([p.images, p.masks == 1, p.masks == 2], axis=1).astype(np.float32)
    lesion, age = p.lesion[p.patients], p.age[p.patients]
    condition = np.concatenate([np.eye(2)[lesion], (2 * (age[:, None] - 20) / 70 - 1)], axis=1).astype(np.float32)
    return Scans(x, condition, p.patients, space_of((size,) * dims))


def case_of(release: ModelRelease, claim: Mapping[str, Any], train: Scans, holdout: Scans, made: Scans) -> Case:
    """A case whose attacks and measurements see the same patients."""
    return Case(release, claim, AuditConfig(), train, holdout, made, "dp", train, holdout)


def by_name(report: Mapping[str, Any]) -> dict[str, Any]:
    return {f["name"]: f for f in report["findings"]}
