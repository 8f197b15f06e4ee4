"""From a card and arrays to a model and back. Architecture comes from JSON; no class name is loaded from data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from medvae.config import MomentsConfig, Recipe, build
from medvae.errors import RunError
from medvae.nets.codes import make_code_prior
from medvae.nets.cvae import ConditionalVAE
from medvae.nets.linear import LinearPart
from medvae.nets.mixture import MixtureShapes
from medvae.nets.teacher import Teacher
from medvae.types import ImageSpace, ModelRelease

TEACHER_PREFIX = "teacher."


def build_model(space: ImageSpace, recipe: Recipe) -> ConditionalVAE:
    """Build an untrained model of a resolved recipe, with an empty linear part where the moments stage is on."""
    linear = None
    moments: MomentsConfig = recipe.moments
    if moments.enabled and moments.basis_shape is not None and recipe.model.latent_dim is not None:
        linear = LinearPart(space, moments.basis_shape, recipe.model.latent_dim, mixture_shapes(recipe))
    model = ConditionalVAE(space, recipe.model, linear)
    prior = make_code_prior(space, model.latent_dim, recipe.prior)
    model.code_prior = None if prior is None else prior.requires_grad_(False)
    return model


def build_teacher(space: ImageSpace, recipe: Recipe) -> Teacher | None:
    """Build the untrained teacher of a recipe, or None where it has none."""
    return Teacher(space, recipe.teacher) if recipe.teacher.enabled else None


def mixture_shapes(recipe: Recipe) -> MixtureShapes | None:
    """Return the shapes of a resolved recipe's mixture, or None where it has none."""
    chosen = recipe.mixture
    if not chosen.enabled or chosen.components is None or chosen.box is None:
        return None
    return MixtureShapes(chosen.components, chosen.box)


def state_arrays(model: nn.Module, prefix: str = "") -> dict[str, npt.NDArray[Any]]:
    """Return parameters and buffers as numpy arrays."""
    return {prefix + name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}


def load_release(release: ModelRelease) -> ConditionalVAE:
    """Build the model of a release, with its weights, for evaluation.

    Raises RunError where the arrays do not fit the architecture of the card.
    """
    recipe: Recipe = build(Recipe, **release.card["recipe"])
    model = build_model(release.space, recipe)
    names = model.state_dict().keys()
    state = {n: torch.from_numpy(np.array(a)) for n, a in release.weights.items() if n in names}
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise RunError("the weights do not fit the model of the card: train again with this medvae") from None
    return model.eval()


def load_teacher(release: ModelRelease) -> Teacher | None:
    """Build the teacher of a release, with its weights, for evaluation; None where it has none.

    Raises RunError where the arrays do not fit.
    """
    teacher = build_teacher(release.space, build(Recipe, **release.card["recipe"]))
    if teacher is None:
        return None
    own = {n: a for n, a in release.weights.items() if n.startswith(TEACHER_PREFIX)}
    try:
        teacher.load_state_dict({n.removeprefix(TEACHER_PREFIX): torch.from_numpy(np.array(a)) for n, a in own.items()})
    except RuntimeError:
        raise RunError("the weights do not fit the teacher of the card: train again with this medvae") from None
    return teacher.eval()


def make_card(space: ImageSpace, recipe: Recipe) -> Mapping[str, Any]:
    """Return the JSON card of a release of a model with this space and resolved recipe."""
    return {"space": space.to_json(), "recipe": recipe.model_dump(mode="json")}
