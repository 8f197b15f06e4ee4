"""Reading and writing a released model: safetensors for the arrays, JSON for the card. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from medvae.errors import RunError
from medvae.types import ModelRelease

SCHEMA = "medvae.model/1"


def write_release(folder: Path, release: ModelRelease) -> dict[str, Any]:
    """Write weights.safetensors and model.json into `folder` and return the card with the weights' digest.

    Each file is whole or absent, even after a loss of power, and the card is written last: a folder with a card always
    has the weights it names.
    """
    from safetensors.numpy import save

    from medvae.synth.staging import write_durably

    folder.mkdir(parents=True, exist_ok=True)
    blob = save({name: np.ascontiguousarray(array) for name, array in release.weights.items()})
    card = {**release.card, "schema": SCHEMA, "weights_sha256": hashlib.sha256(blob).hexdigest()}
    write_durably(folder / "weights.safetensors", blob)
    write_durably(folder / "model.json", (json.dumps(card, indent=2, allow_nan=False) + "\n").encode())
    return card


def read_release(folder: Path) -> ModelRelease:
    """Read a released model from RUN/model.

    Raises RunError where the folder is not one of ours, is of another version, or was altered.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        blob = (folder / "weights.safetensors").read_bytes()
    except (OSError, ValueError):
        raise RunError("this run holds no finished model: let `medvae train` end, or give it --resume") from None
    if not isinstance(card, dict) or card.get("schema") != SCHEMA:
        raise RunError(f"the model is not of version {SCHEMA}: train again with this medvae")
    if hashlib.sha256(blob).hexdigest() != card.get("weights_sha256"):
        raise RunError("the weights do not match model.json: the run was altered or torn, train again")
    try:
        weights = load(blob)
    except SafetensorError:
        raise RunError("the weights are not a readable safetensors file: train again") from None
    return ModelRelease(weights=weights, card=card)
