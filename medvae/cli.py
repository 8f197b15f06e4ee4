"""The command line: one thin function a command, no logic; every default lives in the config models or in the api."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from medvae import cli_export, cli_latent
from medvae.cli_numbers import numbers
from medvae.cli_options import (
    Advantage,
    Baseline,
    Delta,
    Epsilon,
    Json,
    Memory,
    Pipeline,
    PublicKey,
    Quiet,
    Resume,
    Risk,
    Seed,
)
from medvae.console import Console
from medvae.version import __version__


def _version(wanted: bool | None) -> None:
    if wanted:
        print(f"medvae {__version__}")
        raise typer.Exit()


app = typer.Typer(
    name="medvae",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Synthetic medical images under patient-level differential privacy, with a certificate anyone can check.",
    epilog="The whole way once, on an embedded cohort: `medvae demo`. Not affiliated with Stanford's MedVAE.",
)

Version = Annotated[bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")]

OPTIONS = "OPTIONS"  # in brackets before an optional argument, the documentation's builder takes it for a link


@app.callback()
def _root(version: Version = None) -> None:
    """Say so when a package of the same import name is installed: whichever came last would win."""
    from medvae.doctor import name_clash

    clash = name_clash()
    if clash:
        print(f"medvae: {clash}", file=sys.stderr)


@app.command()
def doctor(as_json: Json = None, quiet: Quiet = None) -> None:
    """Show versions, devices, optional parts found, name clashes and that telemetry is off.

    Example: `medvae doctor --json`
    """
    from medvae import api, words

    with Console(as_json, quiet) as out:
        result = api.doctor()
        out.result(result, words.doctor(result))


@app.command()
def ingest(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="DICOM, NIfTI, BIDS, .npz, PNG + CSV, ...; or dicomweb://HOST/PATH.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="COHORT", help="Folder of the cohort to write.")],
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Table with patient_id and conditions.")
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=LOW:HIGH|a|b|a<b]", help="A public condition; repeat for more. See Conditions."),
    ] = None,
    shape: Annotated[str | None, typer.Option(metavar="N N [N]", help="Voxels: 32 48 32, or 32x48x32.")] = None,
    spacing_mm: Annotated[str | None, typer.Option(metavar="MM MM [MM]", help="Voxel size in mm.")] = None,
    modality: Annotated[str | None, typer.Option(metavar="MR|CT|...", help="Where the files do not say.")] = None,
    intensity: Annotated[str | None, typer.Option(metavar="WAY", help="auto, window, percentile or display.")] = None,
    intensity_low: Annotated[
        float | None, typer.Option(metavar="VALUE", help="Lower end: raw units, or percentile.")
    ] = None,
    intensity_high: Annotated[float | None, typer.Option(metavar="VALUE", help="Upper end.")] = None,
    holdout: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of patients kept for the audit.")
    ] = None,
    split_seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of the split by patient.")] = None,
    max_scans_per_patient: Annotated[
        int | None, typer.Option(metavar="N", help="Cap on what one patient may add.")
    ] = None,
    slice_gap: Annotated[
        str | None, typer.Option(metavar="WAY", help="Gaps and gantry tilt: refuse, skip or resample.")
    ] = None,
    frames: Annotated[str | None, typer.Option(metavar="WAY", help="Cine, 4D: refuse, first, mean or all.")] = None,
    colour: Annotated[str | None, typer.Option(metavar="WAY", help="Colour: refuse or luminance.")] = None,
    burned_in: Annotated[
        str | None, typer.Option(metavar="WAY", help="Images that may show names: note, skip or refuse.")
    ] = None,
    identical: Annotated[
        str | None, typer.Option(metavar="WAY", help="One image under two patients: note, merge or refuse.")
    ] = None,
    missing: Annotated[
        str | None, typer.Option(metavar="WAY", help="Missing values: refuse, drop the scan, or a class of their own.")
    ] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Processes that decode.")] = None,
    cluster: Annotated[str | None, typer.Option(metavar="ADDRESS", help="A Ray cluster; 'local' starts one.")] = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Find scans, group them by patient, preprocess and store them; say by count what was skipped and why.

    Example: `medvae ingest scans/ -o cohort --labels table.csv --condition size_class --shape 32 48 32`

    Conditions: a name alone takes the classes of the table; 'age=20:90' gives a range, 'sex=F|M' names the classes,
    and 'grade=low<middle<high' puts them in order.
    All of these are public: take them from the study's protocol and never from its data.
    """
    from medvae import api, words
    from medvae.config import IngestConfig, build

    with Console(as_json, quiet) as out:
        config = build(
            IngestConfig,
            shape=numbers(shape),
            spacing_mm=numbers(spacing_mm, "--spacing-mm"),
            labels=labels,
            conditions=condition,
            modality=modality,
            intensity=intensity,
            intensity_low=intensity_low,
            intensity_high=intensity_high,
            holdout=holdout,
            split_seed=split_seed,
            max_scans_per_patient=max_scans_per_patient,
            slice_gap=slice_gap,
            frames=frames,
            colour=colour,
            burned_in=burned_in,
            identical=identical,
            missing=missing,
            workers=workers,
            cluster=cluster,
        )
        result = api.ingest(source, output, config, progress=out.stage("ingest"))
        out.result(result, words.ingest(result, output))


@app.command(options_metavar=OPTIONS)
def plan(
    epsilon: Epsilon = None,
    cohort: Annotated[Path | None, typer.Argument(metavar="COHORT", help="An ingested cohort.")] = None,
    patients: Annotated[
        int | None, typer.Option(metavar="N", help="Instead of a cohort: the number of training patients.")
    ] = None,
    shape: Annotated[str | None, typer.Option(metavar="N N [N]", help="With --patients: the voxels of a scan.")] = None,
    max_advantage: Advantage = None,
    max_reid_risk: Risk = None,
    baseline: Baseline = None,
    delta: Delta = None,
    pipeline: Pipeline = None,
    memory_gib: Memory = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Show what a run would cost and promise, before it reads a scan: noise, steps, warnings, bounds on attacks.

    Example: `medvae plan --patients 500 --dp-epsilon 8`

    Or from a risk to its epsilon: `medvae plan --patients 500 --max-reid-risk 0.09 --baseline 0.01`
    """
    from medvae import api, words
    from medvae.config import IngestConfig, TrainConfig, build

    with Console(as_json, quiet) as out:
        config = build(
            TrainConfig,
            dp_epsilon=epsilon,
            max_advantage=max_advantage,
            max_reid_risk=max_reid_risk,
            baseline=baseline,
            dp_delta=delta,
            recipe=_recipe(pipeline),
            memory_gib=memory_gib,
        )
        result = api.plan(cohort, config, patients=patients, shape=build(IngestConfig, shape=numbers(shape)).shape)
        out.result(result, words.plan(result))


@app.command(options_metavar=OPTIONS)
def train(
    epsilon: Epsilon = None,
    cohort: Annotated[
        Path | None, typer.Argument(metavar="COHORT", help="An ingested cohort; without one, embedded phantoms.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="RUN", help="Folder of the run.")] = None,
    max_advantage: Advantage = None,
    max_reid_risk: Risk = None,
    baseline: Baseline = None,
    delta: Delta = None,
    pipeline: Pipeline = None,
    public: Annotated[
        Path | None,
        typer.Option(metavar="COHORT", help="A second cohort that you declare public, to pretrain on: not protected."),
    ] = None,
    resume: Resume = None,
    budget: Annotated[
        float | None, typer.Option(metavar="EPSILON", help="Set the cohort's total epsilon over all runs.")
    ] = None,
    seed: Seed = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads.")] = None,
    memory_gib: Memory = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="auto, cpu or cuda.")] = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Train a generator of synthetic scans under patient-level differential privacy.

    Example: `medvae train cohort --dp-epsilon 8 -o run`

    Instead of epsilon, the risk that is acceptable: `medvae train cohort --max-advantage 0.2 -o run`
    """
    from medvae import api, words
    from medvae.config import TrainConfig, build

    with Console(as_json, quiet) as out:
        config = build(
            TrainConfig,
            dp_epsilon=epsilon,
            max_advantage=max_advantage,
            max_reid_risk=max_reid_risk,
            baseline=baseline,
            dp_delta=delta,
            recipe=_recipe(pipeline),
            seed=seed,
            threads=threads,
            memory_gib=memory_gib,
            device=device,
        )
        if cohort is None:
            out.note("medvae: no cohort given, so this trains on the embedded phantom cohort: no real scan is involved")
        result = api.train(cohort, output, config, resume=bool(resume), budget=budget, stage=out.stage, public=public)
        out.result(result, words.train(result))


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="REPORT", help="Folder of the report to write.")],
    tier: Annotated[str | None, typer.Option(metavar="TIER", help="quick, standard or full.")] = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Ray cluster of your own for shadow models; scans are sent to it."),
    ] = None,
    seed: Seed = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Measure fidelity, utility and privacy attacks; write an internal and a public report.

    Example: `medvae audit run -o report`
    """
    from medvae import api, words
    from medvae.config import AuditConfig, build

    with Console(as_json, quiet) as out:
        config = build(AuditConfig, tier=tier, cluster=cluster, seed=seed)
        result = api.audit(run, output, config, progress=out.stage("audit"), note=out.note)
        out.result(result, words.audit(result, output))


@app.command()
def verify(
    release: Annotated[Path, typer.Argument(metavar="RELEASE", help="A release folder.")],
    public_key: PublicKey = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Check a release as a third party: hashes, signature, and epsilon recomputed. No private data needed.

    Example: `medvae verify release`
    """
    from medvae import api, words

    with Console(as_json, quiet) as out:
        result = api.verify(release, public_key=public_key)
        out.result(result, words.verify(result))


@app.command()
def ledger(
    cohort: Annotated[Path, typer.Argument(metavar="COHORT", help="An ingested cohort.")],
    budget: Annotated[
        float | None, typer.Option(metavar="EPSILON", help="Set the total epsilon this cohort may spend.")
    ] = None,
    delta: Delta = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Show what was spent on a cohort, by which run, and what is left.

    Example: `medvae ledger cohort --budget 10`
    """
    from medvae import api, words

    with Console(as_json, quiet) as out:
        result = api.ledger(cohort, budget=budget, delta=delta)
        out.result(result, words.ledger(result))


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for all the demo makes.")
    ] = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Walk the whole way on embedded phantoms: DICOM in, train at epsilon 8, audit, release, verify.

    Example: `medvae demo -o demo`
    """
    from medvae import api, words

    with Console(as_json, quiet) as out:
        result = api.demo(output, stage=out.stage)
        out.result(result, words.demo(result))


app.add_typer(cli_export.commands)
app.add_typer(cli_latent.commands)


def _recipe(path: Path | None) -> Any:
    from medvae.config import load_recipe

    return None if path is None else load_recipe(path)
