"""Checkpoints are whole or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from medvae.errors import RunError
from medvae.train.checkpoint import load_checkpoint, save_checkpoint, write_atomic, write_json

TENSORS = {"weights/a": torch.arange(6.0).view(2, 3), "average/a": torch.ones(2), "optimizer/0/step": torch.tensor(3.0)}
FACTS = {"step": 3, "noise_multiplier": 1.25}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, "checkpoint") is None
    save_checkpoint(tmp_path, "checkpoint", TENSORS, {"step": 1})
    save_checkpoint(tmp_path, "checkpoint", TENSORS, FACTS)
    found = load_checkpoint(tmp_path, "checkpoint")
    assert found is not None
    assert found[0].keys() == TENSORS.keys()
    assert all(torch.equal(found[0][k], TENSORS[k]) for k in TENSORS)
    assert {k: found[1][k] for k in FACTS} == FACTS
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def test_any_flipped_bit_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "checkpoint", TENSORS, FACTS)
    for path in list(tmp_path.iterdir()):
        whole = path.read_bytes()
        for position in range(0, len(whole) - 1, 7):
            _flip(path, position)
            if path.suffix == ".json" and _same_json(path, whole):
                path.write_bytes(whole)
                continue
            with pytest.raises(RunError, match="torn or was altered"):
                load_checkpoint(tmp_path, "checkpoint")
            path.write_bytes(whole)
    assert load_checkpoint(tmp_path, "checkpoint") is not None


def _same_json(path: Path, whole: bytes) -> bool:
    """A flip between kinds of white space changes nothing."""
    try:
        return bool(json.loads(path.read_bytes()) == json.loads(whole))
    except ValueError:
        return False


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "checkpoint", TENSORS, FACTS)
    for path in list(tmp_path.iterdir()):
        whole = path.read_bytes()
        for size in (0, 1, len(whole) // 2, len(whole) - 3):
            path.write_bytes(whole[:size])
            with pytest.raises(RunError, match="torn or was altered"):
                load_checkpoint(tmp_path, "checkpoint")
        path.write_bytes(whole)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(RunError, match="torn or was altered"):
        load_checkpoint(tmp_path, "checkpoint")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, "checkpoint", TENSORS, FACTS)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medvae.train.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, "checkpoint", {"weights/a": torch.zeros(9)}, {"step": 4})
    found = load_checkpoint(tmp_path, "checkpoint")
    assert found is not None
    assert found[1]["step"] == 3
    assert not list(tmp_path.glob(".*.part"))


def test_json_holds_no_infinity(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"epsilon": float("inf")})
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old")
    write_atomic(tmp_path / "a", b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"new"]
