"""DICOM objects out of a DICOMweb answer, written to disk as they come: no object is ever held whole.

The answer is multipart/related (RFC 2387; delimiters as in RFC 2046, 5.1.1), or one bare object, as some archives send.
Nothing that it claims is believed: heads and objects are measured as they come in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from email.message import Message
from pathlib import Path

from medvae.errors import InputError

LARGEST_OBJECT = 2**33  # bytes; plain pixels cannot exceed 2**32 (PS3.5 7.1.1), and packed ones hardly do
LONGEST_HEAD = 2**16  # bytes before the first delimiter, and of a line of a part's head
MOST_LINES = 100  # of a part's head
LONGEST_BOUNDARY = 70  # RFC 2046, 5.1.1
_END = b"\r\n"
_FOREIGN = "the PACS's answer to a series {what}: check the path of its DICOMweb service, and its log"


def save_objects(kind: str, pieces: Iterable[bytes], folder: Path) -> int:
    """Write every DICOM object of an answer of the content type `kind` into `folder`; return how many there were.

    Files are named by a digest of their bytes: an identifier of the archive must not become a path. Memory is bounded
    by the largest of `pieces`. Raises InputError for an object beyond LARGEST_OBJECT, for one that is not DICOM (at its
    first bytes), and for an answer of another form or without its last delimiter.
    """
    header = Message()
    header["Content-Type"] = kind
    boundary = header.get_boundary()
    if boundary is None or header.get_content_type() == "application/dicom":
        _save(pieces, folder)
        return 1
    if header.get_content_type() != "multipart/related" or not 0 < len(boundary) <= LONGEST_BOUNDARY:
        raise InputError(_FOREIGN.format(what="is of another form"))
    delimiter = _END + b"--" + boundary.encode()
    body = _Body(pieces)
    body.short(delimiter)
    count = 0
    while (after := body.take(2)) != b"--":
        if after != _END:
            body.short(_END)  # padding behind the delimiter
        if all(body.short(_END) for _ in range(MOST_LINES)):
            raise InputError(_FOREIGN.format(what=f"has a part with more than {MOST_LINES} lines of head"))
        _save(body.until(delimiter), folder)
        count += 1
    return count


class _Body:
    """The bytes of an answer, read from mark to mark."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._ahead = bytearray(_END)  # the first delimiter need not begin a new line

    def _more(self) -> None:
        piece = next(self._pieces, None)
        if piece is None:
            raise InputError("the PACS breaks off before the last delimiter of its answer: run the command again")
        self._ahead += piece

    def until(self, mark: bytes) -> Iterator[bytes]:
        """Yield what comes before `mark`, and step over it; no more than a piece and a mark is held."""
        while (at := self._ahead.find(mark)) < 0:
            sure = len(self._ahead) - len(mark) + 1
            if sure > 0:
                yield bytes(self._ahead[:sure])
                del self._ahead[:sure]
            self._more()
        yield bytes(self._ahead[:at])
        del self._ahead[: at + len(mark)]

    def short(self, mark: bytes) -> bytes:
        """Return what comes before `mark`, and step over it."""
        found = b""
        for piece in self.until(mark):
            found += piece
            if len(found) > LONGEST_HEAD:
                raise InputError(
                    _FOREIGN.format(what=f"has no delimiter or end of line within {LONGEST_HEAD // 1024} kB")
                )
        return found

    def take(self, count: int) -> bytes:
        while len(self._ahead) < count:
            self._more()
        taken = bytes(self._ahead[:count])
        del self._ahead[:count]
        return taken


def _save(pieces: Iterable[bytes], folder: Path) -> None:
    """Write one object. DICOM says so in bytes 128 to 131 (PS3.10 7.1)."""
    partial = folder / "partial"
    digest, size, start = hashlib.sha256(), 0, b""
    with partial.open("wb") as stream:
        for piece in pieces:
            size += len(piece)
            if size > LARGEST_OBJECT:
                raise InputError(
                    f"the PACS sends an object of more than {LARGEST_OBJECT // 2**30} GiB, or one without an end: "
                    "fetch that series by other means and ingest its folder, or narrow the search"
                )
            start += piece[: 132 - len(start)]
            if len(start) == 132 and start[128:] != b"DICM":
                break
            digest.update(piece)
            stream.write(piece)
    if start[128:] != b"DICM":
        raise InputError(_FOREIGN.format(what="holds something else than DICOM objects"))
    partial.replace(folder / f"{digest.hexdigest()[:32]}.dcm")
