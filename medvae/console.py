"""What a person or a script sees of a command: one JSON object or plain lines on stdout, all else on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Progress = Callable[[int, int], None]
SECONDS_BETWEEN_LINES = 10.0
DEFECT = 1


def speaks() -> bool:
    """Whether this process talks to the user: of several that torchrun started, the first one alone."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def debugging() -> bool:
    """Whether tracebacks, warnings and library logs are wanted; they may hold paths, so they are off by default."""
    return os.environ.get("MEDVAE_DEBUG", "") not in ("", "0")


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Silence library logs and warnings: they quote header values and paths, which belong to patients."""
    if debugging():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


class Console(contextlib.ExitStack):
    """Output of one command.

    with Console(json=False, quiet=False) as out:
        step = out.stage("train")   # a Progress callback
        step(1, 10)
        out.result({"ok": True}, ["all is well"])
    """

    def __init__(self, json: bool | None, quiet: bool | None) -> None:
        super().__init__()
        self.json = bool(json)
        self.quiet = bool(quiet) or not speaks()
        self._stdout = sys.stdout
        self._bars: Any = None
        self._bar: Any = None

    def __enter__(self) -> Console:
        super().__enter__()
        self.enter_context(hushed())
        # A library that prints must not spoil the one JSON object.
        self.enter_context(contextlib.redirect_stdout(sys.stderr))
        return self

    def note(self, line: str) -> None:
        """Say something by the way, on stderr."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def stage(self, title: str) -> Progress:
        """Begin a bar; the returned callback takes (done, total) as often as it likes."""
        if self.quiet:
            return lambda done, total: None
        return self._terminal(title) if sys.stderr.isatty() else self._lines(title)

    def result(self, data: Mapping[str, Any], lines: Sequence[str]) -> None:
        """Print the outcome: the object with --json, else the lines (also when quiet: it is what was asked for)."""
        if self._bars is not None:
            self._bars.stop()
        if not speaks():
            return
        text = json.dumps(data, indent=2, default=str, allow_nan=False) if self.json else "\n".join(lines)
        print(text, file=self._stdout, flush=True)

    def _terminal(self, title: str) -> Progress:
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        if self._bars is None:
            columns = (
                TextColumn("{task.description:<8}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bars = self.enter_context(Bars(*columns, console=Terminal(stderr=True), refresh_per_second=4))
        bars, bar = self._bars, self._bars.add_task(title, total=None)
        self._finish_bar()
        self._bar = bar
        return lambda done, total: bars.update(bar, completed=done, total=total)

    def _finish_bar(self) -> None:
        """Mark the bar before as done: some work knows its total only roughly."""
        if self._bar is not None:
            task = self._bars.tasks[self._bar]
            total = task.total or 1
            self._bars.update(self._bar, completed=total, total=total)

    def _lines(self, title: str) -> Progress:
        began = last = time.monotonic()
        first: tuple[float, int] | None = None  # when the first piece was done: what comes before it is preparation
        print(f"{title} ...", file=sys.stderr, flush=True)

        def step(done: int, total: int) -> None:
            nonlocal last, first
            now = time.monotonic()
            first = first or (now, done)
            if now - last < SECONDS_BETWEEN_LINES and done < total:
                return
            last = now
            pieces = done - first[1]
            if done >= total:
                print(f"{title}: {total} done in {now - began:.0f} s", file=sys.stderr, flush=True)
            elif pieces:
                left = (now - first[0]) / pieces * (total - done)
                print(f"{title}: {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True)
            else:
                print(f"{title}: {done} of {total}", file=sys.stderr, flush=True)

        return step


def fail(kind: str, message: str, code: int, as_json: bool) -> int:
    """Print one sentence on stderr (and, with --json, an error object on stdout); return the exit code."""
    if not speaks() and code != DEFECT:
        return code  # the first process says the same
    print(f"medvae: {message}", file=sys.stderr, flush=True)
    if as_json:
        error = {"kind": kind, "message": message, "exit_code": code}
        print(json.dumps({"error": error}, indent=2), flush=True)
    return code
