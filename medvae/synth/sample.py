"""A synthetic cohort from a released model: everything here is post-processing of a private model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from medvae.nets.linear import SHELLS
from medvae.synth.texture import draw_image, draw_labels, draw_shape, explained_spectrum, make_texture, shape_level
from medvae.types import (
    ConditionValue,
    ImageSpace,
    ModelRelease,
    Progress,
    SyntheticCohort,
    encode_conditions,
)

# Draws by which the level is found that shapes are cut at.
LEVEL_DRAWS = 12


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
    texture = None
    if model.linear is not None:
        explained = explained_spectrum(model.linear.patterns().numpy(), space.spatial_shape, SHELLS)
        texture = make_texture(
            model.linear.spectrum.numpy(), explained, model.linear.contrast.numpy(), space.spatial_shape
        )
    shapes, level = model.linear is not None and bool(model.linear.two_valued), 0.0
    if shapes and model.linear is not None:  # by draws of every class, whatever was asked for: the level is the model's
        rows = [encode_conditions(space.conditions, row) for row in spread_conditions(space, LEVEL_DRAWS, seed)]
        spread = torch.from_numpy(np.stack(rows))
        mean = float(model.linear.expand(model.linear.mean_coefficients(spread))[:, 0].mean())
        with torch.no_grad():
            level = shape_level(model.draw(spread, generator)[:, 0].numpy(), mean, texture, rng)
    images = np.empty((len(encoded), *space.spatial_shape), dtype=np.float32)
    masks = np.zeros(images.shape, dtype=np.uint8) if space.mask_labels else None
    names = np.asarray((0, *space.mask_labels), dtype=np.uint8)
    for start in range(0, len(encoded), batch_size):
        condition = torch.from_numpy(encoded[start : start + batch_size])
        with torch.no_grad():
            decoded = warp(model.draw(condition, generator), size, generator).numpy()
        for index, x in enumerate(decoded, start=start):
            labels = draw_labels(x[1:], texture, rng) if masks is not None else np.zeros(x.shape[1:], np.uint8)
            if shapes:
                images[index] = draw_shape(x[0], texture, level, rng)
            else:
                images[index] = draw_image(x[0], x[1:], labels, texture, rng)
            if masks is not None:
                masks[index] = names[labels]
        if progress is not None:
            progress(min(start + batch_size, len(encoded)), len(encoded))
    return SyntheticCohort(images, masks, tuple(dict(row) for row in conditions), space)
