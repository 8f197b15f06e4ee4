"""The rule that fills what a recipe leaves open, from public numbers only: patients, image space, class count.

Nothing here looks at a scan. Its constants were set on phantoms, with hippocampus as a second look: docs/quality.md.
"""

from __future__ import annotations

import math

from medvae.config import DpSgdConfig, MixtureConfig, ModelConfig, MomentsConfig, Recipe
from medvae.errors import ConfigError
from medvae.nets.blocks import level_sizes
from medvae.nets.mixture import cell_count
from medvae.train.mixture import release_names
from medvae.train.moment_shapes import ALONE, CLIP_RELEASES
from medvae.train.norms import COARSE_EDGES, RMS_EDGES
from medvae.types import ImageSpace

# On few patients the noise is longer than any signal (planning.cohort_warnings); on some thousands the closed form does
# as well, at a hundredth of the time: docs/quality.md.
DPSGD_FROM = 10_000
# At SMALL patients the closed form gets nearly all of the budget; from LARGE on both get half.
SMALL, LARGE = 100, 10_000
SGD_SHARE_SMALL, SGD_SHARE_LARGE = 0.15, 0.5
# Shares of the closed form's budget: three cheap releases that only set clips and a centre, then the two that count.
CLIP_SHARE, CENTRE_SHARE = 0.03, 0.08
# Histograms whose noise is this share of their patients show nothing: clips are public constants then.
CLIP_NOISE = 0.5
# From this noise for each patient on, only an overall mean shows, and it gets the budget alone but for the clip.
ALONE_NOISE, ALONE_CLIP_SHARE = 0.015, 0.1
SECOND_SHARE_SMALL, SECOND_SHARE_LARGE = 0.2, 0.5
# Within the second moments: a hundred patients show spectra and contrasts, but hardly a direction.
SPECTRUM_WEIGHT_SMALL, SPECTRUM_WEIGHT_LARGE = 0.95, 0.4
# With a mixture: what the other releases keep of the closed form's budget, and the search for centres.
MIXTURE_SHARES = {"norms": 0.02, "centre": 0.03, "residual_norms": 0.02, "means": 0.1, "second": 0.05}
CLUSTER_SHARE = 0.12
# Eigenvalues of a component's covariance are seen down to this share of the squared clip: finer, and noise shows.
MIXTURE_EDGE = 0.016
# On smaller grids nothing is far from a border, and images are not asked whether they are shapes.
SHAPES_SIDE = 16
# Cosines an axis of a mixture, at least (fewer say less than what all classes share does); coefficients and components
# a cell, at most.
MIXTURE_SIDE, MIXTURE_MOST, COMPONENTS_MOST = 6, 144, 10


def _between(patients: int, small: float, large: float) -> float:
    """Interpolate in log(patients) between the values at SMALL and LARGE."""
    position = math.log(max(patients, 1) / SMALL) / math.log(LARGE / SMALL)
    return small + (large - small) * min(1.0, max(0.0, position))


def _model(config: ModelConfig, patients: int, space: ImageSpace) -> ModelConfig:
    latent = config.latent_dim or round(min(32, max(8, math.sqrt(patients) / 4)))
    wide = space.spatial_dims == 2 and patients >= 2_000
    levels = 2 if min(space.spatial_shape) < 32 else 3
    channels = config.channels or ((16, 32, 32)[:levels] if wide else (8, 16, 16)[:levels])
    if config.latent == "field":  # so many codes in each cell of the coarsest level
        latent = config.field.channels * math.prod(level_sizes(space.spatial_shape, len(channels))[-1])
    return config.model_copy(update={"latent_dim": latent, "channels": channels})


def _basis(config: MomentsConfig, space: ImageSpace) -> tuple[int, ...]:
    fraction, least, most = (0.45, 12, 32) if space.spatial_dims == 2 else (0.22, 2, 12)
    return config.basis_shape or tuple(min(n, most, max(least, math.ceil(n * fraction))) for n in space.spatial_shape)


def _moments(
    config: MomentsConfig, patients: int, space: ImageSpace, noise: float | None, *, sgd: bool, mixture: bool
) -> MomentsConfig:
    if not config.enabled:
        return config
    alone = config.mean_alone
    if alone is None:
        alone = noise is not None and not sgd and not mixture and noise > ALONE_NOISE * patients
    clips = config.public_clips
    if clips is None:
        # The noise over a whole histogram of norms against the patients in it.
        edges, part = (COARSE_EDGES, ALONE_CLIP_SHARE) if alone else (RMS_EDGES, CLIP_SHARE)
        clips = noise is not None and noise * math.sqrt((len(edges) + 1) / part) > CLIP_NOISE * patients
    share = config.share
    if share is None:
        share = 1 - _between(patients, SGD_SHARE_SMALL, SGD_SHARE_LARGE) if sgd else 1.0
    basis = _basis(config, space)
    size = min(256.0, max(12.0, 2 * math.sqrt(patients)))
    side = max(2, math.floor((size / space.channels) ** (1 / space.spatial_dims)))
    coarse = config.coarse_shape or tuple(min(side, k) for k in basis)
    weight = config.spectrum_weight or round(_between(patients, SPECTRUM_WEIGHT_SMALL, SPECTRUM_WEIGHT_LARGE), 3)
    _check_shape("moments.basis_shape", basis, space.spatial_shape, "image")
    _check_shape("moments.coarse_shape", coarse, basis, "basis")
    return config.model_copy(
        update={
            "share": share,
            "basis_shape": basis,
            "coarse_shape": coarse,
            "functions": config.functions or round(size),
            "spectrum_weight": weight,
            "public_clips": clips,
            "two_valued": config.two_valued if min(space.spatial_shape) >= SHAPES_SIDE else bool(config.two_valued),
            "mean_alone": alone,
        }
    )


def _check_shape(name: str, shape: tuple[int, ...], limit: tuple[int, ...], of: str) -> None:
    """Raise ConfigError for a shape that does not fit: it would show after the ledger was charged."""
    if len(shape) != len(limit) or any(n > most for n, most in zip(shape, limit, strict=True)):
        words = " x ".join(map(str, limit))
        raise ConfigError(f"{name} is {list(shape)}: give {len(limit)} numbers up to the {of}'s {words}")


def _mixture(
    config: MixtureConfig, patients: int, space: ImageSpace, basis: tuple[int, ...], noise: float
) -> MixtureConfig:
    """Choose the mixture, or none: an eigenvalue of a component must show above its noise, 2 sigma sqrt(D / 2) / n."""
    if config.enabled is False:
        return config
    mine = patients / cell_count(space.conditions)
    share = 1 - sum(MIXTURE_SHARES.values()) - CLUSTER_SHARE
    # How large sqrt(D) times the number of components may be.
    room = MIXTURE_EDGE * mine * math.sqrt(share / 2) / noise if noise > 0 else math.inf
    most = min(MIXTURE_MOST, room**2) / space.channels
    side = math.floor(most ** (1 / space.spatial_dims) + 1e-9)
    box = config.box or tuple(min(max(1, side), n) for n in basis)
    _check_shape("mixture.box", box, basis, "basis")
    if config.enabled is None and min(box) < MIXTURE_SIDE:
        return config.model_copy(update={"enabled": False})
    size = space.channels * math.prod(box)
    components = config.components or int(min(COMPONENTS_MOST, max(1, room / math.sqrt(size))))
    return config.model_copy(update={"enabled": True, "box": box, "components": components})


def _dpsgd(config: DpSgdConfig, patients: int, space: ImageSpace, *, moments: bool, mixture: bool) -> DpSgdConfig:
    by_rule = (patients >= DPSGD_FROM or not moments) and not mixture
    enabled = by_rule if config.enabled is None else config.enabled
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


def resolve(recipe: Recipe, patients: int, space: ImageSpace, noise: float | None = None) -> Recipe:
    """Return the recipe with nothing left open, chosen from the number of training patients and the image space.

    noise: the noise multiplier of the one Gaussian that would use up the whole budget; without it, and where DP-SGD is
    asked for, no mixture is chosen.
    """
    if recipe.deep:  # a stage around the network asks for the network
        recipe = recipe.model_copy(update={"dpsgd": recipe.dpsgd.model_copy(update={"enabled": True})})
    mixture = recipe.mixture
    open_to_choice = recipe.moments.enabled and noise is not None and recipe.dpsgd.enabled is not True
    if mixture.enabled or (mixture.enabled is None and open_to_choice):
        basis = _basis(recipe.moments, space)
        mixture = _mixture(mixture, patients, space, basis, 1.0 if noise is None else noise)
    else:
        mixture = mixture.model_copy(update={"enabled": False})
    dpsgd = _dpsgd(recipe.dpsgd, patients, space, moments=recipe.moments.enabled, mixture=mixture.enabled is True)
    moments = _moments(
        recipe.moments, patients, space, noise, sgd=dpsgd.enabled is True, mixture=mixture.enabled is True
    )
    if recipe.moments.share is None and moments.share is not None and dpsgd.enabled:
        # What prior and teacher cost is taken from the closed form and from DP-SGD alike.
        moments = moments.model_copy(update={"share": moments.share * (1 - recipe.extra_share)})
    return recipe.model_copy(
        update={"model": _model(recipe.model, patients, space), "moments": moments, "mixture": mixture, "dpsgd": dpsgd}
    )


def moment_shares(recipe: Recipe, patients: int) -> list[tuple[str, float]]:
    """Return (release name, share of the whole budget) of the closed-form stage of a resolved recipe, or nothing."""
    if not recipe.moments.enabled or recipe.moments.share is None:
        return []
    return [(name, share * recipe.moments.share) for name, share in _release_shares(recipe, patients).items()]


def _release_shares(recipe: Recipe, patients: int) -> dict[str, float]:
    without = CLIP_RELEASES if recipe.moments.public_clips else ()
    if recipe.mixture.enabled and recipe.mixture.components is not None:
        *clusters, last = release_names(recipe.mixture.components, recipe.mixture.lloyd_steps)
        shares = {**MIXTURE_SHARES, **{name: CLUSTER_SHARE / len(clusters) for name in clusters}}
        shares = {name: share for name, share in shares.items() if name not in without}
        return {**shares, last: 1 - sum(shares.values())}
    if recipe.moments.mean_alone:
        clip = {name: ALONE_CLIP_SHARE for name in ALONE[:-1] if name not in without}
        return {**clip, ALONE[-1]: 1 - sum(clip.values())}
    second = _between(patients, SECOND_SHARE_SMALL, SECOND_SHARE_LARGE)
    fixed = {"norms": CLIP_SHARE, "centre": CENTRE_SHARE, "residual_norms": CLIP_SHARE}
    fixed = {name: share for name, share in fixed.items() if name not in without}
    rest = 1 - sum(fixed.values())
    return {**fixed, "means": rest * (1 - second), "second": rest * second}
