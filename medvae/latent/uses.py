"""The uses of a model on real scans, from run and cohort to a private folder of tables, images and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medvae.audit.material import Ints
from medvae.config_latent import DenoiseConfig, EncodeConfig, ReconstructConfig, ScoreConfig
from medvae.errors import CohortError
from medvae.latent import anomaly, pictures
from medvae.latent.case import Case, open_case
from medvae.latent.cluster import cluster, two_dimensions
from medvae.latent.codes import encode, table
from medvae.latent.corrupt import corrupt
from medvae.latent.folder import private_folder, write_summary, write_table
from medvae.latent.restore import BASELINES, psnr, reconstruct, ssim
from medvae.types import Condition, FloatArray, Progress

SHOWN = 8


def encode_cohort(
    run: Path, cohort: Path, out: Path, config: EncodeConfig, progress: Progress | None = None
) -> dict[str, Any]:
    """Write OUT/codes.*, views of the codes in two dimensions and encode.json with clusters; return the last.

    Private: codes of real scans.
    """
    case = open_case(run, cohort)
    codes = encode(case, case.rows(config.split), progress)
    columns = table(case, codes)
    classes = [c for c in case.store.space.conditions if c.kind == "class"]
    known: dict[str, Sequence[str]] = {c.name: columns[c.name] for c in classes}
    clusters = config.clusters or max([c.width for c in classes], default=2)
    found = cluster(codes.mean, min(clusters, len(codes.row)), known, config.seed)
    points = two_dimensions(codes.mean)
    with private_folder(out) as folder:
        columns |= {"cluster": found.label.tolist(), "view0": points[:, 0].tolist(), "view1": points[:, 1].tolist()}
        file = write_table(folder / "codes", columns, config.format)
        pictures.scatter(folder / "codes_by_cluster.png", points, found.label.tolist(), "codes by cluster")
        for name, values in known.items():
            pictures.scatter(folder / f"codes_by_{_plain(name)}.png", points, values, f"codes by {name}")
        facts = {
            "scans": len(codes.row),
            "patients": len(np.unique(codes.patient)),
            "split": config.split,
            "latent_dim": codes.mean.shape[1],
            "active": int((codes.mean.std(0) > 0).sum()),
            "file": file,
            **found.to_json(),
        }
        return write_summary(folder, "encode", facts)


def reconstruct_cohort(
    run: Path, cohort: Path, out: Path, config: ReconstructConfig, progress: Progress | None = None
) -> dict[str, Any]:
    """Write OUT/reconstructions.npz, a table of errors and a picture; return reconstruct.json. Private."""
    case = open_case(run, cohort)
    rows = case.rows(config.split, config.patients, config.seed)
    originals, restored, order = _through_model(case, rows, progress)
    quality = _quality(originals, restored)
    with private_folder(out) as folder:
        np.savez_compressed(folder / "reconstructions.npz", allow_pickle=False, scan=order, images=restored)
        columns = {"scan": order.tolist(), "patient": case.store.patient[order].tolist()}
        write_table(folder / "errors", columns | {k: v.tolist() for k, v in quality.items()}, "csv")
        show = np.linspace(0, len(originals) - 1, min(SHOWN, len(originals))).astype(int)
        error = np.abs(originals - restored)
        lines = [("scan", originals[show]), ("reconstruction", restored[show]), ("error", error[show])]
        pictures.rows_of_images(folder / "reconstructions.png", lines, maps=("error",))
        facts = {"scans": len(order), "split": config.split, "median": _medians(quality)}
        return write_summary(folder, "reconstruct", facts)


def denoise_cohort(
    run: Path, cohort: Path, out: Path, config: DenoiseConfig, progress: Progress | None = None
) -> dict[str, Any]:
    """Spoil scans, restore them by the model and by classical filters, compare; return denoise.json. Private.

    Without a corruption the scans are restored as they are, and there is nothing to compare with.
    """
    case = open_case(run, cohort)
    rows = case.rows(config.split, config.patients, config.seed)
    parts: list[tuple[FloatArray, ...]] = []
    for _, batch in case.batches(rows, progress):
        spoiled = batch.x[:, 0]
        if config.corruption is not None:
            spoiled = corrupt(batch.x[:, 0], config.corruption, config.severity, config.seed)
        x = np.concatenate([spoiled[:, None], batch.x[:, 1:]], axis=1)
        parts.append((batch.x[:, 0], spoiled, reconstruct(case.model, x, batch.condition)[:, 0]))
    clean, spoiled, restored = (np.concatenate(column) for column in zip(*parts, strict=True))
    ways = {"as it came": spoiled, "medvae": restored}
    if config.corruption is not None:
        ways |= {name: np.stack([filtered(i) for i in spoiled]) for name, filtered in BASELINES.items()}
    with private_folder(out) as folder:
        np.savez_compressed(folder / "denoised.npz", allow_pickle=False, scan=rows, images=restored)
        show = np.linspace(0, len(clean) - 1, min(SHOWN, len(clean))).astype(int)
        lines = [("scan", clean[show]), *((name, images[show]) for name, images in ways.items())]
        pictures.rows_of_images(folder / "denoised.png", lines if config.corruption else lines[1:])
        compared = {}
        if config.corruption is not None:
            compared = {name: _medians(_quality(clean, images)) for name, images in ways.items()}
        facts = {
            "scans": len(clean),
            "split": config.split,
            "corruption": config.corruption,
            "severity": config.severity,
            "median": compared,
        }
        return write_summary(folder, "denoise", facts)


def score_cohort(
    run: Path, cohort: Path, out: Path, config: ScoreConfig, progress: Progress | None = None
) -> dict[str, Any]:
    """Score the scans of a cohort, map their errors and flag patients above a calibrated threshold. Private.

    Normal patients for the threshold are those that `config.calibration` (a cohort folder; else this one) held out of
    training. Where no other cohort calibrates, half of the held-out patients set the threshold and the other half, with
    the rest, are scored against it, so that no patient judges itself.
    """
    case = open_case(run, cohort)
    rng = np.random.default_rng(config.seed)
    held = case.store.patients("holdout")
    if config.calibration is not None:
        reference = open_case(run, config.calibration)
        normal_rows, rows = reference.rows("holdout"), case.rows("all")
    else:
        if len(held) < 2:
            raise CohortError("no patients were held out of training: give --calibration COHORT with some")
        reference, chosen = case, np.sort(rng.permutation(held)[: (len(held) + 1) // 2])
        normal_rows = case.store.rows(chosen)
        rows = case.store.rows(np.setdiff1d(held, chosen))
    wanted = _conditions_of(config.normal, case.store.space.conditions)
    slope = _slope(reference, wanted, config)
    normal_scores, normal_patient, _ = _scores(reference, normal_rows, wanted, slope, None)
    _, normal = anomaly.by_patient(normal_scores, normal_patient)
    limit = anomaly.threshold(normal, config.false_alarm_rate)
    scores, patient, order = _scores(case, rows, None, slope, progress)
    patients, highest = anomaly.by_patient(scores, patient)
    flagged = highest > limit
    with private_folder(out) as folder:
        columns = {"scan": order, "patient": patient, "score": scores, "flagged": scores > limit}
        write_table(folder / "scores", {k: v.tolist() for k, v in columns.items()}, "csv")
        strangest = order[np.argsort(scores)[::-1][:SHOWN]]
        batch = case.store.load(strangest)
        maps = anomaly.error_map(batch.x, reconstruct(case.model, batch.x, batch.condition))
        np.savez_compressed(folder / "maps.npz", allow_pickle=False, patient=batch.patient, maps=maps)
        lines = [("strangest", batch.x[:, 0]), ("error map", maps)]
        pictures.rows_of_images(folder / "strangest.png", lines, maps=("error map",))
        label = "score (nats a channel element)" + (", detail taken away" if slope else "")
        pictures.histogram(folder / "scores.png", [("normal", normal), ("scored", highest)], limit, label)
        facts = {
            "scans": len(order),
            "patients": len(patients),
            "flagged_patients": int(flagged.sum()),
            "false_alarm_rate": config.false_alarm_rate,
            "threshold": limit,
            "adjust": config.adjust,
            "normal_patients": len(normal),
        }
        return write_summary(folder, "score", facts)


def _slope(case: Case, normal: tuple[int, int] | None, config: ScoreConfig) -> float:
    """Return nats a unit of detail that are taken away: from training patients, who judge no one."""
    if config.adjust == "nothing":
        return 0.0
    patients = np.random.default_rng(config.seed).permutation(case.store.patients("train"))
    rows = case.store.rows(np.sort(patients[: config.adjust_patients]))
    scores, _, order = _scores(case, rows, normal, 0.0, None)
    return anomaly.detail_slope(scores, np.concatenate([anomaly.detail(b.x) for _, b in case.batches(order)]))


def _scores(
    case: Case, rows: Ints, normal: tuple[int, int] | None, slope: float, progress: Progress | None
) -> tuple[anomaly.Floats, Ints, Ints]:
    """Return score, patient and row of each scan; `normal` keeps those whose condition column (first) is set."""
    parts = []
    for some, batch in case.batches(rows, progress):
        keep = np.ones(len(some), dtype=bool) if normal is None else batch.condition[:, normal[0]] > 0.5
        if keep.any():
            found = anomaly.score(case.model, batch.x[keep], batch.condition[keep])
            found = found - slope * anomaly.detail(batch.x[keep])
            parts.append((found, batch.patient[keep], some[keep]))
    if not parts:
        raise CohortError("no scan is left to calibrate with: see --normal and the cohort's held-out patients")
    scores, patient, order = (np.concatenate(column) for column in zip(*parts, strict=True))
    return scores, patient, order


def _conditions_of(normal: str | None, conditions: tuple[Condition, ...]) -> tuple[int, int] | None:
    """Return (column, class index) of NAME=CLASS. Raises CohortError where there is no such class."""
    if normal is None:
        return None
    name, _, value = normal.partition("=")
    start = 0
    for condition in conditions:
        if condition.name == name and value in condition.classes:
            index = condition.classes.index(value)
            return start + index, index
        start += condition.width
    raise CohortError(f"the cohort has no class {normal!r}: give NAME=CLASS of one of its conditions")


def _through_model(case: Case, rows: Ints, progress: Progress | None) -> tuple[FloatArray, FloatArray, Ints]:
    """Return images, reconstructed images, (N, *spatial) each, and their rows."""
    parts = []
    for some, batch in case.batches(rows, progress):
        parts.append((batch.x[:, 0], reconstruct(case.model, batch.x, batch.condition)[:, 0], some))
    originals, restored, order = (np.concatenate(column) for column in zip(*parts, strict=True))
    return originals, restored, order


def _quality(clean: FloatArray, found: FloatArray) -> dict[str, FloatArray]:
    error = np.square(clean - found).reshape(len(clean), -1).mean(1)
    return {"mse": np.asarray(error), "psnr_db": psnr(clean, found), "ssim": ssim(clean, found)}


def _medians(quality: Mapping[str, FloatArray]) -> dict[str, float]:
    return {name: float(np.median(values)) for name, values in quality.items()}


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
