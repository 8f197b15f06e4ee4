"""What leaves after the gate, as functions: releases sent to a PACS, and the generator itself.

Like those of medvae.api, each returns the object that `medvae COMMAND --json` prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medvae.config import ReleaseConfig
from medvae.errors import ConfigError
from medvae.types import Progress


def release(
    run: Path,
    out: Path,
    config: ReleaseConfig | None = None,
    *,
    report: Path | None = None,
    to: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Do what medvae.api.release does and send the DICOM objects to the PACS at `to`, where one is given.

    Where the sending breaks off, the folder is complete, and `send` goes on. Raises ConfigError, before any work is
    done, for an address that is none, or for a release that would hold no DICOM.
    """
    from medvae import api
    from medvae.pacs import parse

    config = config or ReleaseConfig()
    if to is not None:
        parse(to)
        if "dicom" not in config.formats:
            raise ConfigError("a PACS takes DICOM: add --format dicom")
    result = api.release(run, out, config, report=report, progress=progress)
    return result if to is None else {**result, "pacs": send(out, to)}


def send(release: Path, to: str, *, public_key: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Verify a release and send its DICOM objects to a PACS: dicomweb://HOST/PATH or dicom://AETITLE@HOST:PORT.

    Safe to call again: what a DICOMweb archive holds is skipped. Secrets come from the environment (medvae.pacs).
    Raises VerificationFailed for an altered release, and InputError where the PACS refuses or breaks off.
    """
    from medvae import tracking
    from medvae.gate.send import send as store

    with tracking.run("send", {}, private=False) as track:
        result = store(release, to, public_key=public_key, progress=progress)
        track.metric("sent", result["sent"])
    return result


def export(
    kind: str, run: Path, out: Path, config: ReleaseConfig | None = None, *, report: Path | None = None
) -> dict[str, Any]:
    """Pass the gate and write the released generator itself; without a report, the run's latest audit counts.

    kind: "bundle", a MONAI Bundle; "onnx", the decoder as a file; "page", an HTML file with sliders, for 2D models. It
    is post-processing of a differentially private model. Raises ConfigError for another kind, NotReleasable where a
    check of the gate fails, and MissingPart without the packages of the extra `onnx`.
    """
    from medvae import tracking
    from medvae.gate.bundle import export_bundle as write
    from medvae.gate.decoder import KINDS, export_decoder
    from medvae.gate.reports import latest
    from medvae.report.render import render_certificate, render_report, require_pdf

    if kind not in ("bundle", *KINDS):
        raise ConfigError(f"there is no export of the kind {kind[:40]!r}: give bundle, {' or '.join(KINDS)}")
    config = config or ReleaseConfig()
    if kind in KINDS:
        with tracking.run("export", config.model_dump(), private=False) as track:
            result = export_decoder(kind, run, out, config, report or latest(run))
            track.metric("max_abs_error", result["max_abs_error"])
        return result
    require_pdf()
    with tracking.run("export", config.model_dump(), private=False) as track:
        result = write(
            run,
            out,
            config,
            report=report or latest(run),
            render=render_certificate,
            render_audit=render_report,
        )
        track.artifact(out / "privacy")
        track.register(run / "model")
    return result
