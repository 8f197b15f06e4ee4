"""SHA256SUMS: the digest of every file of a release, in the form `sha256sum -c` reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from medvae.errors import VerificationFailed

SUMS = "SHA256SUMS"
STATEMENT = "statement.dsse.json"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n\\]+)")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Return {relative path: digest} of all files below `folder` but the sums and the statement, sorted.

    Raises VerificationFailed at anything that is neither a plain file nor a folder: a link may point anywhere.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise VerificationFailed(f"files: {name!r} is a link or a device: a release holds plain files only")
        if path.is_file() and name not in (SUMS, STATEMENT):
            found[name] = digest(path)
    return found


def render(sums: Mapping[str, str]) -> bytes:
    """Return the only accepted form of SHA256SUMS for these digests."""
    return "".join(f"{value}  {name}\n" for name, value in sorted(sums.items())).encode()


def parse(data: bytes) -> dict[str, str]:
    """Read what `render` wrote; raises VerificationFailed for any other byte."""
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        raise VerificationFailed("files: SHA256SUMS is not text: it was altered") from None
    matches = [_LINE.fullmatch(line) for line in lines]
    sums = {m[2]: m[1] for m in matches if m is not None}
    if render(sums) != data:
        raise VerificationFailed("files: SHA256SUMS is not in its own form: it was altered")
    return sums


def compare(listed: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise VerificationFailed naming the first file that is missing, extra or altered."""
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            raise VerificationFailed(f"files: {name!r} is listed in SHA256SUMS and missing from the release")
        if name not in listed:
            raise VerificationFailed(f"files: {name!r} is in the folder and not listed in SHA256SUMS")
        if listed[name] != found[name]:
            raise VerificationFailed(f"files: {name!r} was altered: its SHA-256 is not the one listed")
