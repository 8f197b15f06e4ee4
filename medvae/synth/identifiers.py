"""Names of what never existed: fresh DICOM UIDs from OS entropy, and subject names by number."""

from __future__ import annotations

import uuid

ISSUER = "medvae"
_DIGITS = 4


def fresh_uid() -> str:
    """Return a DICOM UID below the UUID root (PS3.5 B.2), from OS entropy; it says nothing about the data."""
    return f"2.25.{uuid.uuid4().int}"


def subject(index: int, total: int) -> str:
    """Return the name of the synthetic subject of this index (from 0), such as SYN0001."""
    width = max(_DIGITS, len(str(total)))
    return f"SYN{index + 1:0{width}d}"
