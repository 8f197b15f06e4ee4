"""What the commands that use codes say to a person, made from the same object that --json prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medvae.words import claim

Result = Mapping[str, Any]


def encode(result: Result, out: Path) -> list[str]:
    """Counts, clusters, agreement."""
    lines = [
        f"{result['scans']} scans of {result['patients']} patients encoded in {result['latent_dim']} numbers each: "
        f"{result['file']}"
    ]
    if result["active"] < result["latent_dim"]:
        lines.append(
            f"only {result['active']} of the {result['latent_dim']} numbers vary: the others' directions drowned in "
            "the noise of training, as they do with few patients or a small epsilon"
        )
    if result["silhouette"] is not None:
        lines.append(f"{result['clusters']} clusters, silhouette {result['silhouette']:.2f} (1 apart, 0 overlapping)")
    for name, of in result["agreement"].items():
        lines.append(f"clusters against {name}: NMI {of['nmi']:.2f}, ARI {of['ari']:.2f} (1 the same, 0 unrelated)")
    return [*lines, _where(out)]


def reconstruct(result: Result, out: Path) -> list[str]:
    """Median errors."""
    return [f"{result['scans']} scans: {_quality(result['median'])}", _where(out)]


def denoise(result: Result, out: Path) -> list[str]:
    """The comparison with classical filters."""
    if not result["median"]:
        return [f"{result['scans']} scans restored; with --corruption there is a truth to compare with", _where(out)]
    lines = [f"{result['scans']} scans with {result['corruption']}, severity {result['severity']:g}; medians:"]
    lines += [f"  {name:<16} {_quality(of)}" for name, of in result["median"].items()]
    return [*lines, _where(out)]


def score(result: Result, out: Path) -> list[str]:
    """How many were flagged, and at what error."""
    return [
        f"{result['flagged_patients']} of {result['patients']} patients flagged, at a false-alarm rate of at most "
        f"{result['false_alarm_rate']:g} (threshold {result['threshold']:.4g} from {result['normal_patients']} normal "
        "patients)",
        _where(out),
    ]


def augment(result: Result, out: Path) -> list[str]:
    """What was added to what."""
    lines = [f"{result['scans']} synthetic scans by {result['condition']}:"]
    for name, had, added in zip(result["bins"], result["had"], result["added"], strict=True):
        lines.append(f"  {name:<20} had {had:>6}, {added:>6} added")
    return [*lines, _where(out)]


def walk(result: Result, out: Path) -> list[str]:
    """What was drawn, and what covers it."""
    lines = [f"{len(result['paths'])} paths of {len(result['at'])} steps: {', '.join(result['files'])} in {out}"]
    if result["provenance"] == "private":
        return [*lines, "private: the gate was not asked"]
    return [*lines, f"computed from the released model alone: {claim(result)}"]


def _quality(of: Mapping[str, float]) -> str:
    return f"PSNR {of['psnr_db']:.2f} dB, SSIM {of['ssim']:.3f}, squared error {of['mse']:.2e}"


def _where(out: Path) -> str:
    return f"written to {out}; made from real scans, so private"
