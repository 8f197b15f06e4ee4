"""Options that take several numbers: `--shape 32 48 32`, `32,48,32` or `32x48x32`."""

from __future__ import annotations

from collections.abc import Sequence

import typer

NUMBER_LISTS = ("--shape", "--spacing-mm")


def numbers(text: str | None, flag: str = "--shape") -> tuple[float, ...] | None:
    """Read '32,48,32' or '32x48x32'."""
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if not all(_is_number(part) for part in parts):
        raise typer.BadParameter("give 2 or 3 numbers, such as 32 48 32 or 32x48x32", param_hint=repr(flag))
    return tuple(float(part) for part in parts)


def join_numbers(argv: Sequence[str]) -> list[str]:
    """Turn `--shape 32 48 32` into `--shape 32,48,32`: the parser below takes one value an option.

    >>> join_numbers(["ingest", "scans", "--shape", "32", "48", "32", "-o", "cohort"])
    ['ingest', 'scans', '--shape', '32,48,32', '-o', 'cohort']
    """
    joined: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        joined.append(token)
        numbers = []
        while token in NUMBER_LISTS and rest and _is_number(rest[0]):
            numbers.append(rest.pop(0))
        if numbers:
            joined.append(",".join(numbers))
    return joined


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
