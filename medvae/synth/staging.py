"""Nothing half-written: a folder or file is filled under a hidden name beside its place, and renamed when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medvae.errors import RunError


@contextmanager
def staged_folder(target: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends without an error, and vanishes otherwise.

    durable: the folder is whole even after a loss of power, not only after a crash of the program: everything is on
    disk before the name is (one sync for all files, which costs less than one each where there are thousands).
    Raises RunError where `target` already holds something.
    """
    target = target.resolve()  # "." has no name to put a sibling beside
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"the output folder {target.name!r} is not empty: choose a new one")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if durable:
            os.sync()
        partial.replace(target)
        if durable:
            sync_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a path that becomes the file `target` when the block ends without an error, and vanishes otherwise."""
    if target.exists():
        raise RunError(f"the output file {target.name!r} exists: choose a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".partial-{target.name}")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, even when power fails: a sibling, fsync, rename, fsync of the folder."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
