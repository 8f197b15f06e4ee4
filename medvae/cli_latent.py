"""Commands that use a trained model's codes: thin, like those of cli.py, and added to them there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medvae.cli_options import Json, Quiet, Seed
from medvae.console import Console

commands = typer.Typer()

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")]
Cohort = Annotated[Path, typer.Argument(metavar="COHORT", help="A cohort ingested as the one it was trained on.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder to write.")]
SplitName = Annotated[str | None, typer.Option("--split", metavar="SPLIT", help="train, holdout or all.")]
Patients = Annotated[int | None, typer.Option(metavar="N", help="So many patients at most.")]
Steps = Annotated[int | None, typer.Option(metavar="N", help="Pictures on each path.")]
Paths = Annotated[int | None, typer.Option(metavar="N", help="How many paths.")]
Start = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Conditions; repeat for more.")]
AtHome = Annotated[
    bool | None, typer.Option("--private", help="Skip the checks of a release; the folder is marked private.")
]


@commands.command()
def encode(
    run: Run,
    cohort: Cohort,
    output: Output,
    split: SplitName = None,
    table: Annotated[str | None, typer.Option("--format", metavar="FORMAT", help="parquet, csv or npz.")] = None,
    clusters: Annotated[int | None, typer.Option(metavar="N", help="Clusters to look for.")] = None,
    seed: Seed = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Write the codes of real scans as a table, with clusters and a view in two dimensions. Private.

    Example: `medvae encode run cohort -o codes`
    """
    from medvae import api_latent, words_latent
    from medvae.config import build
    from medvae.config_latent import EncodeConfig

    with Console(as_json, quiet) as out:
        config = build(EncodeConfig, split=split, format=table, clusters=clusters, seed=seed)
        result = api_latent.encode(run, cohort, output, config, progress=out.stage("encode"))
        out.result(result, words_latent.encode(result, output))


@commands.command()
def reconstruct(
    run: Run,
    cohort: Cohort,
    output: Output,
    split: SplitName = None,
    patients: Patients = None,
    seed: Seed = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Pass real scans through the model's codes and show what is lost. Private.

    Example: `medvae reconstruct run cohort -o reconstructed`
    """
    from medvae import api_latent, words_latent
    from medvae.config import build
    from medvae.config_latent import ReconstructConfig

    with Console(as_json, quiet) as out:
        config = build(ReconstructConfig, split=split, patients=patients, seed=seed)
        result = api_latent.reconstruct(run, cohort, output, config, progress=out.stage("scans"))
        out.result(result, words_latent.reconstruct(result, output))


@commands.command()
def denoise(
    run: Run,
    cohort: Cohort,
    output: Output,
    corruption: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="noise, bias, motion, ghosting, missing_slices; none: restore as they are."),
    ] = None,
    severity: Annotated[float | None, typer.Option(metavar="S", help="Of the corruption; 1 is plain to see.")] = None,
    split: SplitName = None,
    patients: Patients = None,
    seed: Seed = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Restore spoiled scans with the model, beside non-local means and total variation. Private.

    Example: `medvae denoise run cohort -o denoised --corruption motion`
    """
    from medvae import api_latent, words_latent
    from medvae.config import build
    from medvae.config_latent import DenoiseConfig

    with Console(as_json, quiet) as out:
        config = build(
            DenoiseConfig,
            corruption=None if corruption == "none" else corruption,
            severity=severity,
            split=split,
            patients=patients,
            seed=seed,
        )
        if corruption == "none":
            config = config.model_copy(update={"corruption": None})
        result = api_latent.denoise(run, cohort, output, config, progress=out.stage("scans"))
        out.result(result, words_latent.denoise(result, output))


@commands.command()
def score(
    run: Run,
    cohort: Cohort,
    output: Output,
    false_alarm_rate: Annotated[
        float | None, typer.Option(metavar="RATE", help="Share of normal patients flagged, at most.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="COHORT", help="Cohort whose held-out patients are normal.")
    ] = None,
    normal: Annotated[
        str | None, typer.Option(metavar="NAME=CLASS", help="Which of those are normal; all without it.")
    ] = None,
    adjust: Annotated[
        str | None, typer.Option(metavar="WHAT", help="detail takes away what fine detail alone explains.")
    ] = None,
    seed: Seed = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Score real scans for anomalies, with error maps and a calibrated false-alarm rate. Private.

    Example: `medvae score run cohort -o scores --false-alarm-rate 0.05`
    """
    from medvae import api_latent, words_latent
    from medvae.config import build
    from medvae.config_latent import ScoreConfig

    with Console(as_json, quiet) as out:
        config = build(
            ScoreConfig,
            false_alarm_rate=false_alarm_rate,
            calibration=calibration,
            normal=normal,
            adjust=adjust,
            seed=seed,
        )
        result = api_latent.score(run, cohort, output, config, progress=out.stage("score"))
        out.result(result, words_latent.score(result, output))


@commands.command()
def augment(
    run: Run,
    cohort: Cohort,
    output: Output,
    condition: Annotated[str | None, typer.Option(metavar="NAME", help="The condition to even out.")] = None,
    bins: Annotated[int | None, typer.Option(metavar="N", help="Of a continuous condition.")] = None,
    most: Annotated[int | None, typer.Option(metavar="N", help="Synthetic scans at most.")] = None,
    each: Annotated[int | None, typer.Option(metavar="N", help="Make N of every class or bin instead.")] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", metavar="FORMAT", help="nifti, png or npz; repeat for more.")
    ] = None,
    seed: Seed = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Fill rare classes, or sparse stretches of a covariate, of your training split with synthetic scans. Private.

    Example: `medvae augment run cohort -o more --condition finding`
    """
    from medvae import api_latent, words_latent
    from medvae.config import build
    from medvae.config_latent import AugmentConfig

    with Console(as_json, quiet) as out:
        config = build(AugmentConfig, condition=condition, bins=bins, most=most, each=each, formats=formats, seed=seed)
        result = api_latent.augment(run, cohort, output, config, progress=out.stage("generate"))
        out.result(result, words_latent.augment(result, output))


@commands.command()
def interpolate(
    run: Run,
    output: Output,
    steps: Steps = None,
    paths: Paths = None,
    start: Start = None,
    end: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Conditions at the end.")] = None,
    at_home: AtHome = None,
    seed: Seed = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Draw ways from one made-up scan to another, with the decoder's uncertainty, and film them.

    Example: `medvae interpolate run -o ways --start finding=normal --end finding=pneumonia`
    """
    from medvae import api_latent, words_latent
    from medvae.config import build
    from medvae.config_latent import WalkConfig

    with Console(as_json, quiet) as out:
        config = build(WalkConfig, steps=steps, paths=paths, start=start, end=end, seed=seed)
        result = api_latent.interpolate(run, output, config, at_home=bool(at_home))
        out.result(result, words_latent.walk(result, output))


@commands.command()
def traverse(
    run: Run,
    output: Output,
    along: Annotated[
        str | None, typer.Option(metavar="NAME", help="A continuous condition; without it, the strongest codes.")
    ] = None,
    reach: Annotated[float | None, typer.Option(metavar="SD", help="How far along a code.")] = None,
    steps: Steps = None,
    paths: Paths = None,
    start: Start = None,
    at_home: AtHome = None,
    seed: Seed = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Draw what each code does, or what a covariate such as age does, with the decoder's uncertainty, and film it.

    Example: `medvae traverse run -o codes --along age`
    """
    from medvae import api_latent, words_latent
    from medvae.config import build
    from medvae.config_latent import WalkConfig

    with Console(as_json, quiet) as out:
        config = build(WalkConfig, along=along, reach=reach, steps=steps, paths=paths, start=start, seed=seed)
        result = api_latent.traverse(run, output, config, at_home=bool(at_home))
        out.result(result, words_latent.walk(result, output))
