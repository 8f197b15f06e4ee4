"""From a card and arrays to a model and back. Architecture comes from JSON; no class name is loaded from data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medvae.config import MomentsConfig, Recipe, build
from medvae.errors import RunError
from medvae.nets.cvae import ConditionalVAE
from medvae.nets.linear import LinearPart
from medvae.nets.mixture import MixtureShapes
from medvae.types import ImageSpace, ModelRelease


def build_model(space: ImageSpace, recipe: Recipe) -> ConditionalVAE:
    """Build an untrained model of a resolved recipe, with an empty linear part where the moments stage is on."""
    linear = None
    moments: MomentsConfig = recipe.moments
    if moments.enabled and moments.basis_shape is not None and recipe.model.latent_dim is not None:
        linear = LinearPart(space, moments.basis_shape, recipe.model.latent_dim, mixture_shapes(recipe))
    return ConditionalVAE(space, recipe.model, linear)


def mixture_shapes(recipe: Recipe) -> MixtureShapes | None:
    """Return the shapes of a resolved recipe's mixture, or None where it has none."""
    chosen = recipe.mixture
    if not chosen.enabled or chosen.components is None or chosen.box is None:
        return None
    return MixtureShapes(chosen.components, chosen.box)


def state_arrays(model: ConditionalVAE) -> dict[str, npt.NDArray[Any]]:
    """Return parameters and buffers as numpy arrays."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}


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


def make_card(space: ImageSpace, recipe: Recipe) -> Mapping[str, Any]:
    """Return the JSON card of a release of a model with this space and resolved recipe."""
    return {"space": space.to_json(), "recipe": recipe.model_dump(mode="json")}
