"""Pretraining of encoder and decoder on scans that are nobody's, or on a cohort that its holder declares public.

No private scan is read, so no epsilon is spent, and noise and clipping have no place here. The network is trained
without the closed form, which it gets afterwards: where that is there, the last layers go back to zero, so that DP-SGD
still starts at the closed form's solution, with features that have seen images.

A public cohort is not protected at all. A scan that is in both cohorts would lose its protection with it, so both are
compared scan by scan first, and a run that shares one is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medvae.config import PretrainingConfig, Recipe
from medvae.errors import ConfigError, PrivacyError, RunError
from medvae.nets.build import build_model
from medvae.nets.cvae import ConditionalVAE
from medvae.synth.procedural import draw_batch, draw_conditions
from medvae.train.checkpoint import load_checkpoint, save_checkpoint
from medvae.train.optimizer import rate_factor
from medvae.types import ImageSpace, Progress
from medvae.vault.store import CohortStore, open_cohort

PRETRAINING = "pretraining"
# Voxels of a batch, at most: volumes come a few at a time.
BATCH_VOXELS = 2**19
SMALLEST_BATCH = 4
# Parts of the network that carry the conditions: pretrained only where the public cohort has the same ones.
CONDITIONAL = ("prior.", "films.", "labels.")
UNTOUCHED = ("linear.", "code_prior.", "critic.")

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PublicCohort:
    """A cohort declared public, compared with the private one; `fingerprint` is keyed by its own key."""

    store: CohortStore
    fingerprint: str

    def facts(self) -> dict[str, Any]:
        """Return what privacy.json says of it: no name, no path."""
        return {
            "fingerprint": self.fingerprint,
            "scans": len(self.store),
            "patients": int(self.store.info["patients"]),
            "protected": False,
        }


def with_public(recipe: Recipe, public: Path | None) -> Recipe:
    """Return the recipe with the source of pretraining that goes with `--public`.

    Raises ConfigError where one names a public cohort and the other does not.
    """
    source = recipe.pretraining.source
    if public is None:
        if source == "public":
            raise ConfigError("pretraining.source is public but no cohort is given: add --public COHORT")
        return recipe
    if source == "procedural":
        raise ConfigError("pretraining.source is procedural and --public names a cohort: leave one of them out")
    if recipe.dpsgd.enabled is False:
        raise ConfigError("--public pretrains the network that DP-SGD trains: enable dpsgd, or leave it out")
    return recipe.model_copy(update={"pretraining": recipe.pretraining.model_copy(update={"source": "public"})})


def open_public(public: Path, private: CohortStore) -> PublicCohort:
    """Open a cohort that its holder declares public, and compare it with the private one.

    Raises PrivacyError where they are the same cohort or share a scan, whatever side of the split it is on; ConfigError
    where their images have another shape or other masks. One patient's other scans cannot be recognised: a cohort
    keeps no names.
    """
    store: CohortStore = open_cohort(public).reveal()
    fingerprint = store.fingerprint()
    if fingerprint == private.fingerprint():
        raise PrivacyError("the public cohort is the private one itself: give another cohort, or leave --public out")
    shared = len(store.scan_digests() & private.scan_digests())
    if shared:
        raise PrivacyError(
            f"the public cohort holds {shared} scans that the private one holds too, and what is public cannot be "
            "protected: take these patients out of one of the two"
        )
    ours, theirs = private.space, store.space
    if (ours.spatial_shape, ours.channels) != (theirs.spatial_shape, theirs.channels):
        raise ConfigError(
            f"the public cohort has {theirs.channels - 1} masks and scans of {_words(theirs)} voxels, the private one "
            f"{ours.channels - 1} and {_words(ours)}: ingest it with the same --shape and masks"
        )
    return PublicCohort(store, fingerprint)


def pretraining_stage(
    model: ConditionalVAE,
    recipe: Recipe,
    public: PublicCohort | None,
    seed: int,
    folder: Path,
    progress: Progress | None = None,
) -> None:
    """Pretrain `model` in place, or take up what a run that was stopped has pretrained already.

    folder: the run's private folder. The seed is no secret, and a run that starts this stage anew ends in the same
    weights.
    """
    done = load_checkpoint(folder, PRETRAINING)
    if done is None:
        state = pretrained_state(model.space, recipe, public, seed, progress)
        save_checkpoint(folder, PRETRAINING, state, {"source": recipe.pretraining.source})
    else:
        state = done[0]
    put_into(model, state)


def pretrained_state(
    space: ImageSpace, recipe: Recipe, public: PublicCohort | None, seed: int, progress: Progress | None = None
) -> Mapping[str, Tensor]:
    """Train encoder and decoder of a resolved recipe and return their state by name. Reads nothing private.

    The same arguments give the same state. With a public cohort of the same conditions, the parts that carry them are
    trained too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bare = recipe.model_copy(update={"moments": recipe.moments.model_copy(update={"enabled": False})})
        model = build_model(space, bare)
    model.critic = None
    conditional = public is not None and public.store.space.conditions == space.conditions
    draw = _procedural(space) if public is None else _from_cohort(public.store, space, conditional)
    _descend(model, draw, recipe.pretraining, seed, frozen=() if conditional else CONDITIONAL, progress=progress)
    kept = (*UNTOUCHED, *(() if conditional else CONDITIONAL))
    return {name: value.detach() for name, value in model.state_dict().items() if not _is(name, kept)}


def put_into(model: ConditionalVAE, state: Mapping[str, Tensor]) -> None:
    """Copy a pretrained state into a model; around a closed form, what starts at zero stays at zero.

    Raises RunError where the state is of another network.
    """
    own = model.state_dict()
    if set(state) - set(own):
        raise RunError("the pretrained network is not this recipe's: start a new run")
    zero: set[str] = set()
    if model.linear is not None:
        final = {id(p) for p in model.decoder.final_parameters()}
        zero = {n for n, p in model.named_parameters() if id(p) in final or _is(n, ("prior.", "posterior."))}
    model.load_state_dict({**own, **{n: v for n, v in state.items() if n not in zero}})


def _descend(
    model: ConditionalVAE,
    draw: Draw,
    config: PretrainingConfig,
    seed: int,
    *,
    frozen: tuple[str, ...],
    progress: Progress | None,
) -> None:
    voxels = model.space.channels * math.prod(model.space.spatial_shape)
    count = min(config.batch, max(SMALLEST_BATCH, BATCH_VOXELS // voxels))
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for n, p in model.named_parameters() if p.requires_grad and not _is(n, frozen)]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate_factor(step, config.steps)
        x, condition = draw(count, generator)
        noise = torch.randn(count, model.latent_dim, generator=generator)
        optimizer.zero_grad(set_to_none=True)
        model(x, condition, noise).mean().backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, config.steps)


def _procedural(space: ImageSpace) -> Draw:
    return lambda count, generator: (draw_batch(space, count, generator), draw_conditions(space, count, generator))


def _from_cohort(store: CohortStore, space: ImageSpace, conditional: bool) -> Draw:
    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        batch = store.load(torch.randint(len(store), (count,), generator=generator).numpy())
        condition = torch.from_numpy(batch.condition) if conditional else draw_conditions(space, count, generator)
        return torch.from_numpy(batch.x), condition

    return draw


def _is(name: str, parts: tuple[str, ...]) -> bool:
    """Return whether a parameter lies in one of the named parts of a network."""
    return any(name.startswith(part) or f".{part}" in name for part in parts)


def _words(space: ImageSpace) -> str:
    return " x ".join(map(str, space.spatial_shape))
