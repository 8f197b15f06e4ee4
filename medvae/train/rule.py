"""The rule that fills what a recipe leaves open, from public numbers only: patients, image space, class count.

Nothing here looks at a scan. Its constants were set on phantoms, with hippocampus as a second look: docs/quality.md.
"""

from __future__ import annotations

import math

from medvae.config import DpSgdConfig, ModelConfig, MomentsConfig, Recipe
from medvae.errors import ConfigError
from medvae.types import ImageSpace

# On fewer patients the noise is longer than any signal (planning.cohort_warnings); docs/quality.md has one comparison.
DPSGD_FROM = 500
# At SMALL patients the closed form gets nearly all of the budget; from LARGE on both get half.
SMALL, LARGE = 100, 10_000
SGD_SHARE_SMALL, SGD_SHARE_LARGE = 0.15, 0.5
# Shares of the closed form's budget: three cheap releases that only set clips and a centre, then the two that count.
CLIP_SHARE, CENTRE_SHARE = 0.03, 0.08
SECOND_SHARE_SMALL, SECOND_SHARE_LARGE = 0.2, 0.5
# Within the second moments: a hundred patients show spectra and contrasts, but hardly a direction.
SPECTRUM_WEIGHT_SMALL, SPECTRUM_WEIGHT_LARGE = 0.95, 0.4


def _between(patients: int, small: float, large: float) -> float:
    """Interpolate in log(patients) between the values at SMALL and LARGE."""
    position = math.log(max(patients, 1) / SMALL) / math.log(LARGE / SMALL)
    return small + (large - small) * min(1.0, max(0.0, position))


def _model(config: ModelConfig, patients: int, space: ImageSpace) -> ModelConfig:
    latent = config.latent_dim or round(min(32, max(8, math.sqrt(patients) / 4)))
    wide = space.spatial_dims == 2 and patients >= 2_000
    levels = 2 if min(space.spatial_shape) < 32 else 3
    channels = config.channels or ((16, 32, 32)[:levels] if wide else (8, 16, 16)[:levels])
    return config.model_copy(update={"latent_dim": latent, "channels": channels})


def _moments(config: MomentsConfig, patients: int, space: ImageSpace, *, sgd: bool) -> MomentsConfig:
    if not config.enabled:
        return config
    share = config.share
    if share is None:
        share = 1 - _between(patients, SGD_SHARE_SMALL, SGD_SHARE_LARGE) if sgd else 1.0
    fraction, most = (0.45, 32) if space.spatial_dims == 2 else (0.22, 12)
    basis = config.basis_shape or tuple(min(n, most, max(2, math.ceil(n * fraction))) for n in space.spatial_shape)
    size = min(256.0, max(12.0, 2 * math.sqrt(patients))) / space.channels
    side = max(2, math.floor(size ** (1 / space.spatial_dims)))
    coarse = config.coarse_shape or tuple(min(side, k) for k in basis)
    weight = config.spectrum_weight or round(_between(patients, SPECTRUM_WEIGHT_SMALL, SPECTRUM_WEIGHT_LARGE), 3)
    _check_shapes(basis, coarse, space.spatial_shape)
    return config.model_copy(
        update={"share": share, "basis_shape": basis, "coarse_shape": coarse, "spectrum_weight": weight}
    )


def _check_shapes(basis: tuple[int, ...], coarse: tuple[int, ...], image: tuple[int, ...]) -> None:
    """Raise ConfigError for shapes that do not fit: it would show after the ledger was charged."""
    for name, shape, limit, of in (("basis_shape", basis, image, "image"), ("coarse_shape", coarse, basis, "basis")):
        if len(shape) != len(limit) or any(n > most for n, most in zip(shape, limit, strict=True)):
            words = " x ".join(map(str, limit))
            raise ConfigError(f"moments.{name} is {list(shape)}: give {len(limit)} numbers up to the {of}'s {words}")


def _dpsgd(config: DpSgdConfig, patients: int, space: ImageSpace, *, moments: bool) -> DpSgdConfig:
    enabled = (patients >= DPSGD_FROM or not moments) if config.enabled is None else config.enabled
    if not enabled:
        return config.model_copy(update={"enabled": False})
    expected = min(patients * 0.5, max(16.0, min(512.0, patients / 8)))
    steps = 120 if space.spatial_dims == 3 else 200
    return config.model_copy(
        update={
            "enabled": True,
            "sample_rate": config.sample_rate or round(min(1.0, expected / patients), 6),
            "steps": config.steps or steps,
            "learning_rate": config.learning_rate or 1e-3,
        }
    )


def resolve(recipe: Recipe, patients: int, space: ImageSpace) -> Recipe:
    """Return the recipe with nothing left open, chosen from the number of training patients and the image space."""
    dpsgd = _dpsgd(recipe.dpsgd, patients, space, moments=recipe.moments.enabled)
    return recipe.model_copy(
        update={
            "model": _model(recipe.model, patients, space),
            "moments": _moments(recipe.moments, patients, space, sgd=dpsgd.enabled is True),
            "dpsgd": dpsgd,
        }
    )


def moment_shares(recipe: Recipe, patients: int) -> list[tuple[str, float]]:
    """Return (release name, share of the whole budget) of the closed-form stage of a resolved recipe, or nothing."""
    if not recipe.moments.enabled or recipe.moments.share is None:
        return []
    second = _between(patients, SECOND_SHARE_SMALL, SECOND_SHARE_LARGE)
    fixed = {"norms": CLIP_SHARE, "centre": CENTRE_SHARE, "residual_norms": CLIP_SHARE}
    rest = 1 - sum(fixed.values())
    shares = {**fixed, "means": rest * (1 - second), "second": rest * second}
    return [(name, share * recipe.moments.share) for name, share in shares.items()]
