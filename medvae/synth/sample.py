"""A synthetic cohort from a released model: everything here is post-processing of a private model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from medvae.nets.linear import SHELLS
from medvae.synth.texture import (
    ShapeLook,
    Texture,
    at_edges,
    common_level,
    draw_image,
    draw_labels,
    draw_shapes,
    explained_spectrum,
    make_texture,
)
from medvae.types import (
    ConditionValue,
    ImageSpace,
    ModelRelease,
    Progress,
    SyntheticCohort,
    encode_conditions,
)

if TYPE_CHECKING:
    from medvae.nets.cvae import ConditionalVAE

# Draws by which it is found how steep images are, and, fewer, at which level shapes are cut.
EDGE_DRAWS, LEVEL_DRAWS = 48, 12


def spread_conditions(space: ImageSpace, count: int, seed: int) -> list[dict[str, ConditionValue]]:
    """Return `count` rows of conditions: classes in equal numbers, covariates uniform over their public range.

    Nothing of the real cohort's composition enters, since that would be a private histogram.
    """
    rng = np.random.default_rng(seed)
    columns: dict[str, list[ConditionValue]] = {}
    for c in space.conditions:
        if c.kind == "class":
            names = [c.classes[i % len(c.classes)] for i in range(count)]
            columns[c.name] = [names[i] for i in rng.permutation(count)]
        else:
            low, high = c.range or (0.0, 1.0)
            columns[c.name] = [round(float(v), 3) for v in rng.uniform(low, high, count)]
    return [{name: values[i] for name, values in columns.items()} for i in range(count)]


def generate(
    release: ModelRelease,
    conditions: Sequence[Mapping[str, ConditionValue]],
    seed: int,
    progress: Progress | None = None,
    batch_size: int = 32,
) -> SyntheticCohort:
    """Generate one scan a row of conditions.

    Returns images (N, *spatial) float32 in [0, 1] and, where the model has mask channels, label maps (N, *spatial).
    Raises InputError where a row lacks a condition or names an unknown class.
    """
    import torch

    from medvae.nets.build import load_release
    from medvae.synth.taught import generate_taught, wanted
    from medvae.synth.warp import warp

    if wanted(release):
        return generate_taught(generate, release, conditions, seed, progress)
    space = release.space
    model = load_release(release)
    encoded = np.stack([encode_conditions(space.conditions, row) for row in conditions])
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    size = float(release.card["recipe"].get("sampling", {}).get("warp", 0.0))
    texture, shapes = _appearance(model)
    images = np.empty((len(encoded), *space.spatial_shape), dtype=np.float32)
    masks = np.zeros(images.shape, dtype=np.uint8) if space.mask_labels else None
    names = np.asarray((0, *space.mask_labels), dtype=np.uint8)
    for start in range(0, len(encoded), batch_size):
        condition = torch.from_numpy(encoded[start : start + batch_size])
        with torch.no_grad():
            decoded = warp(model.draw(condition, generator), size, generator).numpy()
        if shapes is not None:
            images[start : start + batch_size] = draw_shapes(decoded[:, 0], texture, shapes, rng)
        else:
            for index, x in enumerate(decoded, start=start):
                labels = draw_labels(x[1:], texture, rng) if masks is not None else np.zeros(x.shape[1:], np.uint8)
                images[index] = draw_image(x[0], x[1:], labels, texture, rng)
                if masks is not None:
                    masks[index] = names[labels]
        if progress is not None:
            progress(min(start + batch_size, len(encoded)), len(encoded))
    return SyntheticCohort(images, masks, tuple(dict(row) for row in conditions), space)


def _appearance(model: ConditionalVAE) -> tuple[Texture | None, ShapeLook | None]:
    """Return the texture of a model's samples, and how shapes look where it is one of shapes.

    What has to be read off draws is read off the same ones whatever is asked for: it is the model's.
    """
    import torch

    linear, space = model.linear, model.space
    if linear is None:
        return None, None
    explained = explained_spectrum(linear.patterns().numpy(), space.spatial_shape, SHELLS)
    texture = make_texture(linear.spectrum.numpy(), explained, linear.contrast.numpy(), space.spatial_shape)
    if space.mask_labels:
        return texture, None
    shapes = bool(linear.two_valued)
    if shapes and linear.mixture is not None:  # it tells how much of a shape there is; a few directions say too little
        return texture, ShapeLook(float(linear.border_width))
    count = LEVEL_DRAWS if shapes else EDGE_DRAWS
    rows = [encode_conditions(space.conditions, row) for row in spread_conditions(space, count, seed=0)]
    spread = torch.from_numpy(np.stack(rows))
    with torch.no_grad():
        draws = model.draw(spread, torch.Generator().manual_seed(0))[:, 0].numpy()
    if not shapes:
        return at_edges(texture, draws), None
    released = float(linear.expand(linear.mean_coefficients(spread))[:, 0].mean())
    level = common_level(draws, texture, released, np.random.default_rng(0))
    return texture, ShapeLook(float(linear.border_width), level)
