"""Released models of every variant with random weights, small, for what decodes them outside of torch."""

from __future__ import annotations

from typing import Any

import torch

from medvae.config import Recipe, build
from medvae.nets.build import build_model, make_card, state_arrays
from medvae.train.rule import resolve
from medvae.types import MISSING_CLASS, Condition, ImageSpace, Intensity, ModelRelease

SIDE = Condition("side", "class", ("a", "b"))
AGE = Condition("age", "continuous", range=(20.0, 80.0))
DEEP = {"moments": {"enabled": False}, "mixture": {"enabled": False}, "dpsgd": {"enabled": True}}
CLOSED = {"moments": {"basis_shape": (4, 5), "coarse_shape": (2, 2)}, "dpsgd": {"enabled": False}}
MIXED = {"mixture": {"enabled": True, "components": 3, "box": (2, 3)}}
LABELLED = Condition("side", "class", ("a", "b", MISSING_CLASS))
ALL = {"attention": True, "class_decoders": True, "adversary": 0.1, "latent": "field"}

# Recipe, shape of the image, conditions, mask labels, and whether the network was trained.
VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[Condition, ...], tuple[int, ...], bool]] = {
    "closed form": (CLOSED | {"mixture": {"enabled": False}}, (8, 10), (SIDE, AGE), (1, 2), False),
    "closed form and network": (CLOSED | {"mixture": {"enabled": False}}, (8, 10), (AGE,), (), True),
    "mixture": (CLOSED | MIXED, (8, 10), (SIDE, AGE), (1,), False),
    "mixture and network": (CLOSED | MIXED, (8, 10), (SIDE,), (), True),
    "no condition": (DEEP, (8, 9), (), (), True),
    "attention": (DEEP | {"model": {"attention": True}}, (8, 10), (SIDE,), (1,), True),
    "class decoders": (DEEP | {"model": {"class_decoders": True}}, (8, 10), (AGE, SIDE), (), True),
    "bernoulli": (DEEP | {"model": {"likelihood": "bernoulli"}}, (8, 10), (AGE,), (), True),
    "all, 2D": (DEEP | {"model": {**ALL, "field": {"channels": 2, "learned": True}}}, (8, 10), (SIDE,), (1,), True),
    "all, 3D": (DEEP | {"model": {**ALL, "field": {"channels": 2}}}, (6, 8, 4), (SIDE, AGE), (1,), True),
    "M2": (DEEP | {"model": {"semi_supervised": True}}, (8, 10), (AGE, LABELLED), (1,), True),
    "M2, field": (
        DEEP | {"model": {**ALL, "field": {"channels": 2}, "class_decoders": False, "semi_supervised": True}},
        (6, 8, 4),
        (LABELLED,),
        (),
        True,
    ),
    "SRL": (DEEP | {"robust": {"enabled": True}}, (8, 10), (SIDE,), (), True),
    "SRL on the closed form": (
        CLOSED | {"mixture": {"enabled": False}, "robust": {"enabled": True}, "dpsgd": {"enabled": True}},
        (8, 10),
        (AGE,),
        (1,),
        True,
    ),
    "closed form, 3D": (
        {"moments": {"basis_shape": (3, 4, 2), "coarse_shape": (2, 2, 2)}, "mixture": {"enabled": False}},
        (6, 8, 4),
        (AGE,),
        (1,),
        True,
    ),
    "flow": (DEEP | {"prior": {"kind": "flow", "layers": 2, "hidden": 4}}, (8, 10), (SIDE,), (), True),
    "gaussian codes": (DEEP | {"prior": {"kind": "gaussian"}}, (8, 10), (AGE,), (), True),
    "mixture of codes": (DEEP | {"prior": {"kind": "mixture", "components": 3}}, (8, 10), (SIDE,), (), True),
}


def make_release(name: str) -> ModelRelease:
    """A release of this variant: weights at random, and for a trained network none of them zero."""
    recipe, shape, conditions, labels, trained = VARIANTS[name]
    space = ImageSpace(shape, (1.0, 2.0, 1.5)[: len(shape)], "MR", Intensity("percentile", 1, 99), conditions, labels)
    small = {"latent_dim": 3, "channels": (4, 4), "norm_groups": 2, **recipe.get("model", {})}
    resolved = resolve(build(Recipe, **{**recipe, "model": small}), 500, space)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build_model(space, resolved)
        if trained:
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        for key, value in model.state_dict().items():
            if key.startswith("linear.") and value.is_floating_point():
                value.copy_(torch.randn_like(value) * 0.3)
            if "mixture" in key:
                value.copy_(torch.rand_like(value) + 0.1 if key.endswith("weights") else torch.randn_like(value))
    return ModelRelease(state_arrays(model), {**make_card(space, resolved), "weights_sha256": "0" * 64})
