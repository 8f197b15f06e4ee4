"""What the processes that do not lead a run do: compute the clipped gradients of their share of each step.

They read the cohort, and nothing else: no ledger, no run folder, no randomness. What to train, the leader tells them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from medvae.config import Recipe, TrainConfig, build
from medvae.errors import RunError
from medvae.nets.build import build_model
from medvae.train.engine.tuner import Tuner
from medvae.train.joining import following
from medvae.train.loop import make_engine, progress_of
from medvae.train.patterns import joined, make_patterns
from medvae.train.planning import TrainPlan
from medvae.train.randomness import Randomness
from medvae.train.sampler import PatientSampler
from medvae.train.team import Team
from medvae.types import Mechanism, PrivacyPlan
from medvae.vault.store import open_cohort
from medvae.version import __version__


def make_job(
    plan: TrainPlan, facts: Mapping[str, Any], config: TrainConfig, device: str, randomness: Randomness
) -> dict[str, Any]:
    """Return as JSON what the others need to know of a run: of its randomness, only whether it can be repeated.

    facts: hold the absolute path of the cohort, the same for all processes, and its fingerprint.
    """
    privacy = asdict(plan.privacy) | {"mechanisms": [m.to_json() for m in plan.privacy.mechanisms]}
    return {
        "version": __version__,
        "cohort": facts["cohort"],
        "fingerprint": facts["fingerprint"],
        "recipe": plan.recipe.model_dump(mode="json"),
        "privacy": privacy,
        "threads": config.threads,
        "memory_gib": config.memory_gib,
        "device": device,
        "repeatable": not randomness.releasable,
    }


def follow(team: Team) -> dict[str, Any]:
    """Work for the leader until the run ends; return what privacy.json holds.

    Raises SystemExit where the run fails: silently where the leader can say why.
    """
    with following(team):
        name, said = team.await_word("job", "result")
        if name == "job":
            _serve(team, said)
            _, said = team.await_word("result")
        return dict(said)


def _serve(team: Team, job: Mapping[str, Any]) -> None:
    if job["version"] != __version__:
        raise RunError(f"it runs medvae {__version__} and the first one {job['version']}: install the same version")
    cohort = Path(job["cohort"])
    store = open_cohort(cohort).reveal()
    if store.fingerprint() != job["fingerprint"]:
        raise RunError("it finds another cohort under the same path: give all machines the same folder")
    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    recipe: Recipe = build(Recipe, **job["recipe"])
    values = dict(job["privacy"])
    values["mechanisms"] = tuple(Mechanism.from_json(m) for m in values["mechanisms"])
    plan, settings = PrivacyPlan(**values), recipe.dpsgd

    model = build_model(store.space, recipe).to(job["device"])
    tuner = Tuner(fixed="loop" if job["repeatable"] else None)
    engine = make_engine(model, plan, model.latent_dim, store.space, settings, tuner, job["memory_gib"])
    sampler = PatientSampler(store, store.patients("train"), plan.sample_rate, settings.scans_per_patient)
    if plan.private and recipe.canaries.enabled and recipe.canaries.patterns:  # their walks pass through here too
        made_up = make_patterns(store.space, recipe.canaries.patterns, settings.scans_per_patient)
        sampler = joined(sampler, made_up)
    team.share_weights([*model.state_dict().values(), *progress_of(model)])
    while (share := team.receive_share(model.latent_dim)) is not None:
        rows, latent = share
        sums, stats = engine.clipped_sum(sampler.load(rows), latent)
        team.add_up(sums)
        team.gather(stats)
        team.share_weights([*engine.parameters, *progress_of(model)])
