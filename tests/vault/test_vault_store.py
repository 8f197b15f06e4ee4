"""The store: reads what was written, sorted by patient, by memory map; refuses foreign and torn folders."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medvae.errors import CohortError, PrivacyError
from medvae.types import ImageSpace, Intensity
from medvae.vault.store import SCHEMA, CohortWriter, open_cohort

SHAPE = (3, 4)


def write(out: Path, patients: list[int], labels: tuple[int, ...] = (2, 7)) -> tuple[np.ndarray, np.ndarray]:
    """Write a cohort of random scans for the given patient numbers; return images and masks in writing order."""
    rng = np.random.default_rng(0)
    images = rng.random((len(patients), *SHAPE), dtype=np.float32)
    masks = rng.choice(np.array([0, *labels], np.uint8), images.shape)
    space = ImageSpace(SHAPE, (1.0, 1.0), "OT", Intensity("window", 0, 1), (), labels)
    info = {
        "schema": SCHEMA, "images": len(patients), "patients": len(set(patients)), "masks": True,
        "space": space.to_json(),
    }  # fmt: skip
    with CohortWriter(out, SHAPE, True) as writer:
        for image, mask, patient in zip(images, masks, patients, strict=True):
            writer.append(image, mask, patient, np.zeros(0, np.float32))
        writer.finish(info, {p: "holdout" if p % 2 else "train" for p in patients})
    return images, masks


def test_round_trip(tmp_path: Path) -> None:
    images, masks = write(tmp_path / "c", [40, 11, 40, 30])  # numbers become 2, 0, 2, 1
    store = open_cohort(tmp_path / "c").reveal()
    batch = store.load([0, 1, 2, 3])
    assert batch.patient.tolist() == [0, 1, 2, 2]
    order = [1, 3, 0, 2]
    np.testing.assert_allclose(batch.x[:, 0], images[order], atol=1 / 65535)
    for channel, label in ((1, 2), (2, 7)):
        np.testing.assert_array_equal(batch.x[:, channel], masks[order] == label)
    np.testing.assert_array_equal(store.masks([3, 0]), masks[[3, 0]])
    assert store.patients("train").tolist() == [1, 2]
    assert store.patients("holdout").tolist() == [0]
    assert store.rows([2, 0]).tolist() == [0, 2, 1]
    assert store.rows([]).shape == (0,)
    assert store.load([]).x.shape == (0, 3, *SHAPE)


def test_arrays_stay_on_disk(tmp_path: Path) -> None:
    write(tmp_path / "c", [1, 2])
    store = open_cohort(tmp_path / "c").reveal()
    assert isinstance(store._images, np.memmap)
    assert isinstance(store._masks, np.memmap)


def test_header_holds_any_length(tmp_path: Path) -> None:
    """The rewritten header is as long as the first one, beyond a change of digits."""
    images, _ = write(tmp_path / "c", list(range(1234)))
    stored = np.load(tmp_path / "c" / "images.npy")
    np.testing.assert_allclose(stored / 65535, images, atol=1 / 65535)


def test_fingerprint_is_keyed_and_sees_every_byte(tmp_path: Path) -> None:
    write(tmp_path / "a", [1, 2, 2])
    write(tmp_path / "b", [1, 2, 2])
    one, other = (open_cohort(tmp_path / n).reveal() for n in "ab")
    assert one.fingerprint() == one.fingerprint()
    assert one.fingerprint() != other.fingerprint()  # same scans, another key
    assert (tmp_path / "a" / "key").stat().st_mode & 0o077 == 0
    shutil.copy(tmp_path / "a" / "key", tmp_path / "b" / "key")
    assert one.fingerprint() == other.fingerprint()
    for name in ("images.npy", "masks.npy", "index.npz"):
        before = other.fingerprint()
        data = bytearray((tmp_path / "b" / name).read_bytes())
        data[-1] ^= 1
        (tmp_path / "b" / name).write_bytes(data)
        assert other.fingerprint() != before


def test_store_stays_masked(tmp_path: Path) -> None:
    write(tmp_path / "c", [1, 2])
    wrapped = open_cohort(tmp_path / "c")
    assert repr(wrapped) == "Private(CohortStore)"
    assert repr(wrapped.reveal()) == "CohortStore()"
    with pytest.raises(PrivacyError):
        pickle.dumps(wrapped)


def change(folder: Path, **values: Any) -> None:
    path = folder / "cohort.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_foreign_and_torn_folders(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="no cohort folder"):
        open_cohort(tmp_path / "none")
    with pytest.raises(CohortError, match="not a cohort"):
        open_cohort(tmp_path)
    write(tmp_path / "c", [1, 2])
    change(tmp_path / "c", schema="medvae.cohort/99")
    with pytest.raises(CohortError, match="not of version"):
        open_cohort(tmp_path / "c")
    change(tmp_path / "c", schema=SCHEMA, images=3)
    with pytest.raises(CohortError, match="do not match"):
        open_cohort(tmp_path / "c")
    change(tmp_path / "c", images=2)
    open_cohort(tmp_path / "c")
    whole = (tmp_path / "c" / "images.npy").read_bytes()
    (tmp_path / "c" / "images.npy").write_bytes(whole[:-3])
    with pytest.raises(CohortError, match="torn"):
        open_cohort(tmp_path / "c")


def test_writer_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with CohortWriter(tmp_path / "c", SHAPE, False):
        assert any(tmp_path.iterdir())
    assert not any(tmp_path.iterdir())


def test_output_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CohortError, match="cannot be made"), CohortWriter(tmp_path / "file" / "c", SHAPE, False):
        pass
    assert (tmp_path / "file").read_text() == "x"


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    import errno

    from medvae.vault import store

    def full(self: Any, row: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store._Appender, "append", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "c", [1, 2])
    assert not any(tmp_path.iterdir())


def test_an_empty_folder_or_a_link_to_one_is_filled(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", [1, 2])
    assert len(open_cohort(tmp_path / "real").reveal()) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"real", "link"}
