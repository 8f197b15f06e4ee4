"""What the commands of cli_export say to people, from the objects they return."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medvae import words


def release(result: Mapping[str, Any], folder: Path) -> list[str]:
    """What was written, how others check it, and what went to a PACS."""
    lines = words.release(dict(result), folder)
    return [*lines, *send(result["pacs"])] if "pacs" in result else lines


def send(result: Mapping[str, Any]) -> list[str]:
    """How many objects went, and how many were there."""
    there = f", {result['already_there']} were there already" if result["already_there"] else ""
    return [f"sent {result['sent']} of {result['objects']} DICOM objects{there}"]


def export(result: Mapping[str, Any], out: Path) -> list[str]:
    """What was written, of which kind, and how to use it."""
    if result["formats"] == ["bundle"]:
        return bundle(result, out)
    said = words.release({**result, "override": None}, out)[:-2]
    if result["override"] is not None:
        said += [f"OVERRIDDEN: {line}" for line in result["override"]["overridden"]]
        said.append(f"reason, told in the file: {result['override']['reason']}")
    lines = [*said, f"{out}: {result['bytes'] / 1e6:.2f} MB, not signed"]
    if result["formats"] == ["onnx"]:
        return [*lines, f"onnxruntime decodes as torch does, to {result['max_abs_error']:.1e}"]
    return [*lines, "open it in a browser: nothing is loaded from outside"]


def bundle(result: Mapping[str, Any], folder: Path) -> list[str]:
    """What was written, and how to use and check it."""
    run = "python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json"
    return [*words.release(dict(result), folder), f"generate with it: cd {folder} && {run}"]
