"""Checkpoints: tensors as safetensors, facts as JSON with digests, written so that a crash never leaves half of one.

The tensors go first, into a file named by their digest; then the JSON that names it is renamed into place, which is
atomic; then older tensors are removed. Whenever the machine stops, the JSON points at whole tensors. Nothing is
unpickled, and nothing is ever stored that was not noised: weights, averages and optimizer moments, no gradients.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor

from medvae.errors import RunError

Facts = Mapping[str, Any]


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: temporary sibling, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, data: Facts) -> None:
    """Write JSON atomically; refuses infinity and not-a-number, which JSON does not have."""
    write_atomic(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def save_checkpoint(folder: Path, name: str, tensors: Mapping[str, Tensor], facts: Facts) -> None:
    """Replace the checkpoint called `name` in `folder` by these tensors and facts."""
    blob = serialise({k: t.detach().cpu().contiguous() for k, t in tensors.items()})
    digest = hashlib.sha256(blob).hexdigest()
    target = folder / f"{name}-{digest[:16]}.safetensors"
    write_atomic(target, blob)
    body = {**facts, "tensors": target.name, "tensors_sha256": digest}
    write_json(folder / f"{name}.json", {**body, "digest": _digest(body)})
    for stale in folder.glob(f"{name}-*.safetensors"):
        if stale != target:
            stale.unlink(missing_ok=True)


def load_checkpoint(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return tensors and facts of the checkpoint called `name`, or None where there is none yet.

    Raises RunError where it is torn or was altered.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    broken = RunError(
        f"the {name} of this run is torn or was altered: start a new run (what this one reserved stays charged)"
    )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        digest = facts.pop("digest")
        blob = (folder / str(facts["tensors"])).read_bytes()
        whole = digest == _digest(facts) and hashlib.sha256(blob).hexdigest() == facts["tensors_sha256"]
        tensors = parse(blob) if whole else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        raise broken from None
    if not whole:
        raise broken
    return tensors, facts


def _digest(facts: Facts) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()
