"""Nothing half-written: a folder or file is filled under a hidden name beside its place, and renamed when complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medvae.errors import RunError


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends without an error, and vanishes otherwise.

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
        partial.replace(target)
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
