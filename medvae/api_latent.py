"""The uses of a trained model as functions: on real scans, with private results, and on the released model alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvae.types import Progress

if TYPE_CHECKING:
    from medvae.config import Frozen
    from medvae.config_latent import (
        AugmentConfig,
        DenoiseConfig,
        EncodeConfig,
        ReconstructConfig,
        ScoreConfig,
        WalkConfig,
    )
    from medvae.nets.cvae import ConditionalVAE
    from medvae.synth.walk import Walk

Result = dict[str, Any]


def encode(
    run: Path, cohort: Path, out: Path, config: EncodeConfig | None = None, *, progress: Progress | None = None
) -> Result:
    """Write the codes of a cohort's scans as a table, with clusters and views; return a summary. Private."""
    from medvae.config_latent import EncodeConfig
    from medvae.latent.uses import encode_cohort

    return _private("encode", encode_cohort, run, cohort, out, config or EncodeConfig(), progress)


def reconstruct(
    run: Path, cohort: Path, out: Path, config: ReconstructConfig | None = None, *, progress: Progress | None = None
) -> Result:
    """Write what the model makes of scans, with errors; return a summary. Private."""
    from medvae.config_latent import ReconstructConfig
    from medvae.latent.uses import reconstruct_cohort

    return _private("reconstruct", reconstruct_cohort, run, cohort, out, config or ReconstructConfig(), progress)


def denoise(
    run: Path, cohort: Path, out: Path, config: DenoiseConfig | None = None, *, progress: Progress | None = None
) -> Result:
    """Restore scans, spoiled first so that the result can be compared; return a summary. Private."""
    from medvae.config_latent import DenoiseConfig
    from medvae.latent.uses import denoise_cohort

    return _private("denoise", denoise_cohort, run, cohort, out, config or DenoiseConfig(), progress)


def score(
    run: Path, cohort: Path, out: Path, config: ScoreConfig | None = None, *, progress: Progress | None = None
) -> Result:
    """Score scans for anomalies, with a calibrated false-alarm rate and error maps; return a summary. Private.

    Raises InputError where too few normal patients were held out for the rate.
    """
    from medvae.config_latent import ScoreConfig
    from medvae.latent.uses import score_cohort

    return _private("score", score_cohort, run, cohort, out, config or ScoreConfig(), progress)


def augment(
    run: Path, cohort: Path, out: Path, config: AugmentConfig | None = None, *, progress: Progress | None = None
) -> Result:
    """Make synthetic scans that even out a condition of the cohort; return a summary. Private: it tells true counts."""
    from medvae.config_latent import AugmentConfig
    from medvae.latent.augment import augment_cohort

    return _private("augment", augment_cohort, run, cohort, out, config or AugmentConfig(), progress)


def interpolate(run: Path, out: Path, config: WalkConfig | None = None, *, at_home: bool = False) -> Result:
    """Write a grid and a film of ways from one made-up scan to another; return a summary.

    Made from the released model alone. The checks of a release come first; with `at_home` they do not, and the folder
    is marked private. Raises NotReleasable where a check fails.
    """
    from medvae.synth.walk import interpolate as along

    return _walk("interpolate", along, run, out, config, at_home)


def traverse(run: Path, out: Path, config: WalkConfig | None = None, *, at_home: bool = False) -> Result:
    """Write a grid and a film along single codes, or along a covariate; return a summary. As `interpolate`."""
    from medvae.synth.walk import traverse as along

    return _walk("traverse", along, run, out, config, at_home)


def _private(
    name: str,
    use: Callable[[Path, Path, Path, Any, Progress | None], Result],
    run: Path,
    cohort: Path,
    out: Path,
    config: Frozen,
    progress: Progress | None,
) -> Result:
    from medvae import tracking

    with tracking.run(name, config.model_dump(), private=True):
        return use(run, cohort, out, config, progress)


def _walk(
    name: str,
    along: Callable[[ConditionalVAE, WalkConfig], Walk],
    run: Path,
    out: Path,
    config: WalkConfig | None,
    at_home: bool,
) -> Result:
    from medvae import tracking
    from medvae.config_latent import WalkConfig
    from medvae.gate.reports import latest
    from medvae.gate.shareable import require_shareable
    from medvae.latent.folder import private_folder
    from medvae.nets.build import load_release
    from medvae.report.film import film, grid
    from medvae.synth.staging import staged_folder
    from medvae.synth.store import read_release

    config = config or WalkConfig()
    claim = {} if at_home else require_shareable(run, latest(run))
    with tracking.run(name, config.model_dump(), private=at_home):
        walk = along(load_release(read_release(run / "model")), config)
        facts: Result = {
            "schema": f"medvae.{name}/1",
            "provenance": "private" if at_home else "dp",
            **claim,
            "paths": list(walk.names),
            "axis": walk.axis,
            "at": [round(float(v), 4) for v in walk.at],
            "files": ["grid.png", "film.gif"],
        }
        with (private_folder if at_home else staged_folder)(out) as folder:
            grid(walk, folder / "grid.png")
            film(walk, folder / "film.gif")
            text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return facts
