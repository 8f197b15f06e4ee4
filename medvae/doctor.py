"""What is installed and found on this machine. Nothing is imported to find out, but torch for its devices."""

from __future__ import annotations

import ctypes.util
import os
import platform
import shutil
from importlib import metadata
from typing import Any

PARTS = (
    "torch",
    "opacus",
    "monai",
    "numpy",
    "dp-accounting",
    "pydicom",
    "nibabel",
    "highdicom",
    "mlflow",
    "scikit-image",
    "scikit-learn",
    "weasyprint",
    "typer",
)
# Optional part: (what it is for, what installs it)
PACKAGES = {
    "pylibjpeg-libjpeg": ("decodes 12-bit extended JPEG (GPL)", "pip install 'medvae-dp[gpl]'"),
    "bids-validator-deno": ("checks a release's BIDS files", "pip install bids-validator-deno"),
    "mlcroissant": ("checks a release's croissant.json", "pip install mlcroissant"),
}
PROGRAMS = {
    "dciodvfy": ("checks a release's DICOM files", "Debian package dicom3tools"),
    "git": ("notes the code's commit in a run", "Debian package git"),
}
LIBRARIES = {
    "pango-1.0": ("renders PDF reports", "Debian package libpango-1.0-0"),
    "pangoft2-1.0": ("renders PDF reports", "Debian package libpangoft2-1.0-0"),
}


def name_clash() -> str | None:
    """Return what to do where Stanford's MedVAE, which has the same import name, is installed too; else None."""
    try:
        other = metadata.version("medvae")
    except metadata.PackageNotFoundError:
        return None
    return (
        f"another package named 'medvae' ({other}, Stanford's MedVAE) is installed beside medvae-dp and overwrites "
        "its files: give each its own virtual environment"
    )


def check() -> dict[str, Any]:
    """Return {"versions", "machine", "devices", "optional", "name_clash", "telemetry", "problems"}."""
    optional = {
        **{name: _part(_version(name) is not None, *about) for name, about in PACKAGES.items()},
        **{name: _part(shutil.which(name) is not None, *about) for name, about in PROGRAMS.items()},
        **{name: _part(ctypes.util.find_library(name) is not None, *about) for name, about in LIBRARIES.items()},
    }
    versions = {"medvae-dp": _version("medvae-dp"), "python": platform.python_version()}
    versions.update({name: _version(name) for name in PARTS})
    clash = name_clash()
    missing = [name for name, version in versions.items() if version is None]
    problems = [f"{name} is not installed: run `pip install -e . -c constraints.txt`" for name in missing]
    if not optional["pango-1.0"]["found"]:
        problems.append("the pango library is missing, so reports get no PDF: install libpango-1.0-0")
    if clash:
        problems.append(clash)
    return {
        "versions": versions,
        "machine": {"system": platform.platform(terse=True), "cores": os.cpu_count(), "memory_gb": _memory_gb()},
        "devices": _devices(),
        "optional": optional,
        "name_clash": clash,
        "telemetry": "off",
        "problems": problems,
    }


def _part(found: bool, use: str, get: str) -> dict[str, Any]:
    return {"found": found, "for": use, "install": get}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (OSError, ValueError):  # not a POSIX system
        return None


def _devices() -> list[str]:
    try:
        import torch
    except ImportError:
        return []
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ["cpu", *(f"cuda:{i} ({name})" for i, name in enumerate(names))]
