"""Zip and tar archives, unpacked by members: nothing lands outside the folder, and nothing grows beyond its bound.

An archive may be made to harm, so no size it declares is believed: bytes are counted as they come out. Links, devices,
names that lead elsewhere, and archives within archives are left packed and counted.
"""

from __future__ import annotations

import bz2
import errno
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from medvae.errors import CohortError
from medvae.vault.scan import Skipped, below

PACKED = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
FOREIGN = (".7z", ".rar")
MAX_MEMBERS = 5_000_000
MAX_RATIO = 200  # unpacked over packed bytes; real scans stay below 20
RATIO_FROM = 2**28  # bytes below which a ratio says nothing
CHUNK = 2**20
LARGEST_READ = 2**24  # what a tar header may make us read at once
XZ_MEMORY = 2**28
UNSAFE, NESTED, BROKEN = "unsafe name or link in an archive", "archive within an archive", "unreadable archive"


def is_packed(path: Path) -> bool:
    """Whether the name is that of an archive that can be unpacked."""
    return path.name.lower().endswith(PACKED)


def unpack(archive: Path, into: Path, max_bytes: int, skipped: Skipped, name: str) -> int:
    """Unpack the regular files of an archive below `into`; return the bytes written.

    Members that are left are counted in `skipped`, an archive that is torn, encrypted or foreign under its `name`; what
    was unpacked before the tear stays. Raises CohortError where more comes out than `max_bytes`, or than an honest
    archive of its size could hold.
    """
    into.mkdir(parents=True, exist_ok=True)
    budget = _Budget(max_bytes, archive.stat().st_size)
    members = _zip_members if archive.name.lower().endswith(".zip") else _tar_members
    try:
        with members(archive) as found:
            for count, (member, regular, stream) in enumerate(found):
                if count >= MAX_MEMBERS:
                    raise CohortError(f"an archive holds more than {MAX_MEMBERS:,} files: split it")
                target = _target(into, member)
                if target is None or not regular:
                    skipped.leave(UNSAFE, name)
                elif target.name.lower().endswith((*PACKED, *FOREIGN)):
                    skipped.leave(NESTED, name)
                elif not any(part.startswith((".", "__MACOSX")) for part in target.relative_to(into).parts):
                    _write(target, stream, budget, skipped, name)
    except CohortError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        skipped.leave(BROKEN, name)
    except Exception:  # zipfile, tarfile and the decompressors raise many kinds on foreign bytes
        skipped.leave(BROKEN, name)
    return budget.written


class _Budget:
    """Counts the bytes that come out of one archive."""

    def __init__(self, max_bytes: int, packed: int) -> None:
        self._most, self._packed, self.written = max_bytes, packed, 0

    def spend(self, count: int) -> None:
        self.written += count
        if self.written > self._most:
            raise CohortError("the archives hold more than max_unpacked_gib: unpack them by hand, or raise it")
        if self.written > RATIO_FROM and self.written > MAX_RATIO * self._packed:
            raise CohortError(
                f"an archive unpacks to more than {MAX_RATIO} times its size, as scans do not: unpack it by hand"
            )


def _target(into: Path, member: str) -> Path | None:
    """Return where a member goes, or None for a name that is empty, absolute, or leads elsewhere."""
    pure = PurePosixPath(member.replace("\\", "/"))
    parts = [p for p in pure.parts if p != "."]
    if not parts or pure.is_absolute() or ".." in parts or "\0" in member or ":" in parts[0] or len(parts) > 64:
        return None
    return into.joinpath(*parts)


def _write(target: Path, stream: Callable[[], IO[bytes]], budget: _Budget, skipped: Skipped, name: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        out = target.open("xb")
    except (FileExistsError, NotADirectoryError):  # the same name twice, or a file where a folder should be
        skipped.leave(UNSAFE, name)
        return
    with out, stream() as data:
        while chunk := data.read(CHUNK):
            budget.spend(len(chunk))
            out.write(chunk)


Members = Iterator[tuple[str, bool, Callable[[], IO[bytes]]]]


@contextmanager
def _zip_members(path: Path) -> Iterator[Members]:
    with zipfile.ZipFile(path) as archive:
        yield (
            (i.filename, not stat.S_ISLNK(i.external_attr >> 16), lambda i=i: archive.open(i))  # type: ignore[misc]
            for i in archive.infolist()
            if not i.is_dir()
        )


@contextmanager
def _tar_members(path: Path) -> Iterator[Members]:
    with path.open("rb") as file, tarfile.TarFile(fileobj=_Forward(file), mode="r") as archive:  # type: ignore[arg-type]
        yield _each(archive)


def _each(archive: tarfile.TarFile) -> Members:
    while (info := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # or the list of all of them stays in memory
        if not info.isdir():
            yield info.name, info.isreg() and not info.issparse(), lambda info=info: archive.extractfile(info)  # type: ignore


@dataclass
class _Plain:
    """Bytes as they are, in the form of a decompressor."""

    eof: bool = False
    needs_input: bool = True
    unused_data: bytes = b""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return data


class _Gzip:
    """zlib's inflater in the form of the other decompressors."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(31)
        self._left = b""

    eof = property(lambda self: self._inner.eof)
    needs_input = property(lambda self: not self._left)
    unused_data = property(lambda self: self._inner.unused_data)

    def decompress(self, data: bytes, max_length: int = 0) -> bytes:
        out = self._inner.decompress(self._left + data, max_length)
        self._left = self._inner.unconsumed_tail
        return out


def _decompressor(start: bytes) -> Any:
    if start.startswith(b"\x1f\x8b"):
        return _Gzip()
    if start.startswith(b"BZh"):
        return bz2.BZ2Decompressor()
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
    return _Plain()


class _Forward:
    """A (compressed) tar file for `tarfile`: read forward, a bounded number of bytes at once.

    tarfile reads whole extended headers, of the size that they claim, into memory: a compressed one could claim all.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._at = file, 0
        self._buffer = b""  # decompressed and not yet read
        self._tail = b""  # the last bytes read: tarfile steps back by one
        start = file.read(8)
        file.seek(0)
        self._inner = _decompressor(start)

    def read(self, size: int) -> bytes:
        if size > LARGEST_READ:
            raise tarfile.ReadError("a header of an absurd size")
        while len(self._buffer) < size:
            more = self._more()
            if not more:
                break
            self._buffer += more
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        self._at += len(data)
        self._tail = (self._tail + data)[-1:]
        return data

    def _more(self) -> bytes:
        while True:
            if self._inner.eof:
                rest = self._inner.unused_data or self._file.read(CHUNK)
                if not rest.strip(b"\0"):
                    return b""
                self._inner = _decompressor(rest)
                data = rest
            else:
                data = self._file.read(CHUNK) if self._inner.needs_input else b""
                if not data and self._inner.needs_input:
                    return b""
            out: bytes = self._inner.decompress(data, CHUNK)
            if out:
                return out

    def tell(self) -> int:
        return self._at

    def seek(self, position: int, whence: int = 0) -> int:
        if position == self._at - 1 and self._tail:
            self._buffer, self._at, self._tail = self._tail + self._buffer, self._at - 1, b""
        if whence or position < self._at:
            raise tarfile.ReadError("a tar file that leads back")
        while self._at < position and self.read(min(CHUNK, position - self._at)):
            pass
        return self._at

    def close(self) -> None:
        pass


def unpack_all(source: Path, archives: list[Path], into: Path, max_bytes: int, skipped: Skipped) -> None:
    """Unpack the archives of a tree, each into a folder of its own name below `into`; see `unpack`.

    A folder that is there already was unpacked whole by an earlier, interrupted run.
    """
    for archive in archives:
        name = archive.name if archive == source else below(archive, source)
        folder = into / name
        if folder.exists():
            max_bytes -= sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            continue
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        max_bytes -= unpack(archive, partial, max_bytes, skipped, name)
        partial.rename(folder)
