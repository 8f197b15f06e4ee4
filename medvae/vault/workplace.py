"""The hidden folder beside a cohort in the making, and its journal: what an interrupted ingest leaves to go on with.

The journal has a line a scan, in the order in which scans are stored. A later run with the same source and settings
replays it as long as it tells the same story (same files, sizes and times), and decodes only what comes after.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from medvae.errors import CohortError


def check_free(out: Path) -> None:
    """Raise CohortError unless `out` is missing or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CohortError("the output folder is not empty: give a new folder, or empty it first")


class Workplace:
    """A folder `.NAME.partial` with mode 0700 that one process at a time may use.

    Left by Ctrl-C or a kill, it stays, for the next run of the same settings; left by any other error, it is removed.
    `story` names the settings: a folder of another story is emptied first. Without one it is always emptied.
    """

    def __init__(self, out: Path, story: str = "") -> None:
        check_free(out)
        self.out = out.resolve()
        self.folder = self.out.parent / f".{self.out.name}.partial"
        self._story = story
        self._lock: IO[str] | None = None
        self._journal: IO[bytes] | None = None

    def __enter__(self) -> Workplace:
        try:
            self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
            lock = (self.folder / "lock").open("a")
        except (FileExistsError, NotADirectoryError, PermissionError):
            raise CohortError("the output folder cannot be made here: give a path that may be written") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise CohortError("another ingest is writing this cohort: wait for it, or give another folder") from None
        self._lock = lock
        if not self._story or self._told() != self._story:
            for path in self.folder.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            (self.folder / "story").write_text(self._story, encoding="utf-8")
        return self

    def _told(self) -> str:
        try:
            return (self.folder / "story").read_text(encoding="utf-8")
        except OSError:
            return ""

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield the journal's whole lines from its beginning; a line that was cut off ends it."""
        path = self.folder / "journal"
        if not path.exists():
            return
        with path.open("rb") as stream:
            for line in stream:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    return
                if entry is None:
                    return
                yield entry

    def go_on(self, entries: int) -> None:
        """Keep that many lines of the journal, and write on after them."""
        path = self.folder / "journal"
        path.touch(mode=0o600)
        with path.open("rb") as stream:
            for _ in range(entries):
                stream.readline()
            at = stream.tell()
        os.truncate(path, at)
        self._journal = path.open("ab")

    def note(self, entry: dict[str, Any]) -> None:
        """Add one line; it is safe from a kill when this returns."""
        if self._journal is not None:
            self._journal.write(json.dumps(entry).encode() + b"\n")
            self._journal.flush()

    def deliver(self) -> None:
        """Clear away everything of the work itself and give the folder its name."""
        self._close()
        for name in ("lock", "story", "journal"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "unpacked", ignore_errors=True)
        os.replace(self.folder, self.out)

    def _close(self) -> None:
        for stream in (self._journal, self._lock):
            if stream is not None:
                stream.close()
        self._journal = self._lock = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        held = self._lock is not None
        self._close()
        interrupted = kind is not None and not issubclass(kind, Exception)
        if held and not interrupted:
            shutil.rmtree(self.folder, ignore_errors=True)
