"""Commands for what leaves: the release, the way into a PACS, the generator as a bundle. Thin, and added in cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medvae.cli_options import Json, PublicKey, Quiet, Seed
from medvae.console import Console

commands = typer.Typer()

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")]
Report = Annotated[
    Path | None, typer.Option(metavar="REPORT", help="The audit of this run; without it, its latest one.")
]
Title = Annotated[str | None, typer.Option(metavar="TEXT", help="Title of the data set.")]
LicenceName = Annotated[
    str | None, typer.Option(metavar="SPDX", help="CC-BY-4.0 (the default), CC0-1.0, ..., or a text file of your own.")
]
Override = Annotated[
    str | None,
    typer.Option(metavar="REASON", help="Release against a judgement of the audit; printed in the certificate."),
]
Key = Annotated[Path | None, typer.Option(metavar="FILE.pem", help="Ed25519 private key (PEM) to sign with.")]
ADDRESS = "dicomweb://HOST/PATH or dicom://AETITLE@HOST:PORT"


@commands.command()
def release(
    run: Run,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RELEASE", help="Folder of the release to write.")],
    count: Annotated[int | None, typer.Option(metavar="N", help="How many synthetic scans.")] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", metavar="FORMAT", help="nifti, dicom, png, npz, huggingface, viewer; repeat for more."
        ),
    ] = None,
    conditions: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Table of conditions to make, one row a scan.")
    ] = None,
    report: Report = None,
    title: Title = None,
    licence: LicenceName = None,
    body_part: Annotated[
        str | None, typer.Option(metavar="WORD", help="Body Part Examined of the DICOM objects, such as CHEST.")
    ] = None,
    override: Override = None,
    key: Key = None,
    to: Annotated[
        str | None, typer.Option(metavar="PACS", help=f"Send the DICOM objects there, too: {ADDRESS}.")
    ] = None,
    seed: Seed = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Pass the gate and write a synthetic cohort with certificate, checksums and signature.

    Example: `medvae release run -o release --count 200 --format nifti --report report`

    Into a PACS as well: `medvae release run -o release --format dicom --to dicomweb://pacs.example/dicom-web`
    """
    from medvae import api_export, words_export
    from medvae.config import ReleaseConfig, build

    with Console(as_json, quiet) as out:
        config = build(
            ReleaseConfig,
            count=count,
            formats=formats,
            conditions=conditions,
            title=title,
            licence=licence,
            body_part=body_part,
            key=key,
            seed=seed,
            override=override,
        )
        result = api_export.release(run, output, config, report=report, to=to, progress=out.stage("release"))
        out.result(result, words_export.release(result, output))


@commands.command()
def send(
    release: Annotated[Path, typer.Argument(metavar="RELEASE", help="A release folder with DICOM objects.")],
    to: Annotated[str, typer.Argument(metavar="PACS", help=f"{ADDRESS}.")],
    public_key: PublicKey = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Verify a release and send its DICOM objects to a PACS; an interrupted transfer goes on when sent again.

    Example: `medvae send release dicomweb://pacs.example/dicom-web`

    A token comes from MEDVAE_DICOMWEB_TOKEN, or a login from MEDVAE_DICOMWEB_USER and MEDVAE_DICOMWEB_PASSWORD.
    """
    from medvae import api_export, words_export

    with Console(as_json, quiet) as out:
        result = api_export.send(release, to, public_key=public_key, progress=out.stage("send"))
        out.result(result, words_export.send(result))


@commands.command()
def export(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND", help="bundle: a MONAI Bundle; onnx: the decoder; page: HTML with sliders, for 2D models."
        ),
    ],
    run: Run,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="PATH", help="Folder of the bundle, or the file, to write."),
    ],
    report: Report = None,
    title: Title = None,
    licence: LicenceName = None,
    override: Override = None,
    key: Key = None,
    as_json: Json = None,
    quiet: Quiet = None,
) -> None:
    """Pass the gate and write the released generator itself, for others to generate with.

    Example: `medvae export bundle run -o bundle`

    As one file: `medvae export onnx run -o model.onnx`, or `medvae export page run -o page.html`
    """
    from medvae import api_export, words_export
    from medvae.config import ReleaseConfig, build

    with Console(as_json, quiet) as out:
        config = build(ReleaseConfig, title=title, licence=licence, key=key, override=override)
        result = api_export.export(kind, run, output, config, report=report)
        out.result(result, words_export.export(result, output))
