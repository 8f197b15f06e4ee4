"""Paths through a released model's codes: from one made-up scan to another, along one code, along a covariate.

Everything is decoded from the released model, so it is post-processing: as private as the model, and shareable where
that is. The uncertainty of a picture is the standard deviation of the decoded image when its code moves as far as the
encoder cannot tell apart: z ~ q(z | x, c) at the picture x itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from medvae.config_latent import WalkConfig
from medvae.errors import ConfigError
from medvae.nets.cvae import ConditionalVAE
from medvae.types import ConditionValue, FloatArray, ImageSpace, encode_conditions

UNCERTAINTY_DRAWS = 16


@dataclass(frozen=True)
class Walk:
    """images and uncertainty: (paths, steps, *spatial); names: one a path; at: (steps,) where each step stands."""

    images: FloatArray
    uncertainty: FloatArray
    names: tuple[str, ...]
    at: FloatArray
    axis: str


def interpolate(model: ConditionalVAE, config: WalkConfig) -> Walk:
    """Return `paths` ways from one draw of the prior to another, conditions moving from `start` to `end`.

    Codes go along a great arc around the prior mean (White 2016), so that every step is as likely as its ends are.
    Raises ConfigError for an unknown condition.
    """
    start, end = (_encoded(model.space, given) for given in (config.start, config.end))
    at = np.linspace(0, 1, config.steps, dtype=np.float32)
    generator = torch.Generator().manual_seed(config.seed)
    ends = torch.randn(2, config.paths, model.latent_dim, generator=generator)
    paths = []
    for a, b in zip(*ends, strict=True):
        noise = torch.stack([arc(a, b, float(t)) for t in at])
        condition = torch.stack([(1 - float(t)) * start + float(t) * end for t in at])
        paths.append((noise, condition))
    return _decode(model, paths, tuple(f"path {i + 1}" for i in range(config.paths)), at, "share of the way")


def traverse(model: ConditionalVAE, config: WalkConfig) -> Walk:
    """Return a path along each of the `paths` codes that change the image most, from -reach to reach.

    With `config.along`, instead, `paths` draws of the prior each at every value of that covariate's public range.
    Raises ConfigError for a condition that is unknown or no number.
    """
    here = _encoded(model.space, config.start)
    generator = torch.Generator().manual_seed(config.seed)
    if config.along is not None:
        at, conditions = _range(model.space, config.along, here, config.steps)
        draws = torch.randn(config.paths, model.latent_dim, generator=generator)
        paths = [(z.expand(config.steps, -1), conditions) for z in draws]
        return _decode(model, paths, tuple(f"draw {i + 1}" for i in range(config.paths)), at, config.along)
    at = np.linspace(-config.reach, config.reach, config.steps, dtype=np.float32)
    order = strongest_codes(model, here)[: config.paths]
    paths = []
    for code in order:
        noise = torch.zeros(config.steps, model.latent_dim)
        noise[:, code] = torch.from_numpy(at)
        paths.append((noise, here.expand(config.steps, -1)))
    return _decode(model, paths, tuple(f"code {code}" for code in order), at, "standard deviations of the prior")


def strongest_codes(model: ConditionalVAE, condition: torch.Tensor) -> list[int]:
    """Return all codes, those first whose move by one standard deviation changes the decoded image most."""
    moves = torch.cat([torch.zeros(1, model.latent_dim), torch.eye(model.latent_dim)])
    with torch.inference_mode():
        found = [_at(model, row[None], condition[None]) for row in moves]
    change = [float((image - found[0]).square().mean()) for image in found[1:]]
    return [int(i) for i in np.argsort(change)[::-1]]


def arc(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Return the point at `t` in [0, 1] on the great arc from a to b, (d,) each; lengths change evenly."""
    lengths = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)
    cosine = (a @ b / (lengths[0] * lengths[1])).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if float(torch.sin(angle)) < 1e-4:
        return (1 - t) * a + t * b
    unit = (torch.sin((1 - t) * angle) * a / lengths[0] + torch.sin(t * angle) * b / lengths[1]) / torch.sin(angle)
    return torch.as_tensor(unit * ((1 - t) * lengths[0] + t * lengths[1]))


def _at(model: ConditionalVAE, noise: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    return model.decode(model.prior_sample(condition, noise), condition)[:, 0]


def _decode(
    model: ConditionalVAE,
    paths: list[tuple[torch.Tensor, torch.Tensor]],
    names: tuple[str, ...],
    at: FloatArray,
    axis: str,
) -> Walk:
    images, uncertainty = [], []
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for noise, condition in paths:
            full = model.decode(model.prior_sample(condition, noise), condition)
            mean, log_variance = model.encode(full, condition)
            spread = torch.exp(0.5 * log_variance)
            draws = torch.stack(
                [
                    model.decode(mean + spread * torch.randn(mean.shape, generator=generator), condition)[:, 0]
                    for _ in range(UNCERTAINTY_DRAWS)
                ]
            )
            images.append(full[:, 0].numpy())
            uncertainty.append(draws.std(0).numpy())
    return Walk(np.stack(images), np.stack(uncertainty), names, at, axis)


def _encoded(space: ImageSpace, given: tuple[str, ...]) -> torch.Tensor:
    """Return encoded conditions (K,) of NAME=VALUE texts; what is not given is the first class or the middle."""
    row: dict[str, ConditionValue] = {}
    for condition in space.conditions:
        low, high = condition.range or (0.0, 1.0)
        row[condition.name] = condition.classes[0] if condition.kind == "class" else (low + high) / 2
    for text in given:
        name, found, value = text.partition("=")
        if not found or name not in row:
            known = ", ".join(row) or "none"
            raise ConfigError(f"{text!r} is no condition of the model: give NAME=VALUE with one of {known}")
        row[name] = value
    _require_values(space, row)
    return torch.from_numpy(encode_conditions(space.conditions, row))


def _require_values(space: ImageSpace, row: Mapping[str, ConditionValue]) -> None:
    """Raise ConfigError for a number outside of the public range, where a model knows nothing."""
    for condition in space.conditions:
        value = row[condition.name]
        if condition.kind == "continuous" and condition.range is not None:
            low, high = condition.range
            try:
                inside = low <= float(value) <= high
            except ValueError:
                inside = False
            if not inside:
                raise ConfigError(
                    f"{condition.name!r} is a number from {low:g} to {high:g} (given: {str(value)[:40]!r})"
                )


def _range(space: ImageSpace, name: str, here: torch.Tensor, steps: int) -> tuple[FloatArray, torch.Tensor]:
    """Return the values (steps,) of a covariate over its range, and encoded conditions (steps, K) with them."""
    start = 0
    for condition in space.conditions:
        if condition.name == name and condition.kind == "continuous" and condition.range is not None:
            conditions = here.repeat(steps, 1)
            conditions[:, start] = torch.linspace(-1, 1, steps)
            return np.linspace(*condition.range, steps, dtype=np.float32), conditions
        start += condition.width
    known = ", ".join(c.name for c in space.conditions if c.kind == "continuous") or "none"
    raise ConfigError(f"there is no covariate {name!r} to walk along: the model knows {known}")
