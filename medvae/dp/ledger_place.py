"""Which ledger a cohort has, and what the cohort remembers of it.

A cohort's ledger is `ledger.db` in its folder, or, where the environment variable MEDVAE_LEDGER holds the address of a
PostgreSQL database, lies there. The variable and not an option holds it, since others on a machine can read command
lines, and since an address may hold a password it is never written anywhere. In a shared database each cohort goes by
a name made from its random key, so that copies of a cohort folder charge the same ledger.

`ledger.id` beside the scans remembers the ledger's id and the last row it is known to have. A ledger that is gone, was
replaced, or was set back (an old backup, a standby that took over too early) does not hold that row, and is refused.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvae.dp.ledger import Entry, Ledger, Receipt
from medvae.errors import ConfigError, PrivacyError

ADDRESS = "MEDVAE_LEDGER"
SHARED = "shared"
LOCAL = "local"
RESTORE = "restore it from a backup that has all rows"


@dataclass(frozen=True)
class Mark:
    """The file that remembers a ledger: 'id sequence digest local|shared' (in older cohorts, the id alone)."""

    path: Path
    kind: str

    def known(self) -> tuple[str, int, str, str] | None:
        """Return id, sequence, digest and kind, or None where there is no file yet."""
        try:
            words = self.path.read_text(encoding="utf-8").split()
        except FileNotFoundError:
            return None
        if len(words) == 1:
            return words[0], 0, "", LOCAL
        if len(words) != 4 or not words[1].isdecimal():
            raise PrivacyError("ledger.id of this cohort is torn: restore it from a backup")
        return words[0], int(words[1]), words[2], words[3]

    def check(self, entries: Sequence[Entry]) -> None:
        """Raise PrivacyError unless these rows are of the known ledger and none that it had is missing."""
        known = self.known()
        if known is None:
            return
        ledger_id, sequence, digest, _ = known
        if entries[0].receipt.ledger_id != ledger_id:
            raise PrivacyError(
                "the cohort's privacy ledger is gone and another lies in its place, so what was spent is not known: "
                + RESTORE
            )
        if sequence and (len(entries) < sequence or entries[sequence - 1].receipt.digest != digest):
            raise PrivacyError(
                f"the cohort's privacy ledger was set back: it had row {sequence} before and has it no more, so what "
                f"was spent is not known: {RESTORE}"
            )

    def advance(self, receipt: Receipt) -> None:
        """Remember a row, where it is later than the one that is known."""
        known = self.known()
        if known is not None and known[1] >= receipt.sequence:
            return
        partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            partial.write_text(f"{receipt.ledger_id} {receipt.sequence} {receipt.digest} {self.kind}\n", "utf-8")
            partial.replace(self.path)
        except OSError as error:
            # Beside a shared ledger, the cohort may be read-only: its name there is tied to its key all the same.
            if self.kind != SHARED or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def open_ledger(cohort: Path) -> Ledger:
    """Open a cohort's ledger, made on first use.

    Raises PrivacyError where it is gone, is another than before or was set back, and where a cohort with one kind of
    ledger is opened with the other; RunError where its database cannot be reached.
    """
    path, address = cohort / "ledger.db", os.environ.get(ADDRESS)
    mark = Mark(cohort / "ledger.id", SHARED if address else LOCAL)
    known = mark.known()
    if address:
        if path.exists() or (known is not None and known[3] != SHARED):
            raise PrivacyError(
                f"this cohort has spent from a ledger of its own (ledger.db), of which a shared one knows nothing: "
                f"unset {ADDRESS}, or ingest the source anew for the shared ledger and count what was spent by hand"
            )
        return Ledger(_server(address), name=ledger_name(cohort), mark=mark)
    if known is not None and known[3] == SHARED:
        raise PrivacyError(f"this cohort's ledger is a shared one: set {ADDRESS} to its address, as before")
    if known is not None and not path.is_file():  # opening it would make an empty one
        raise PrivacyError(f"the cohort's privacy ledger is gone, so what was spent is not known: {RESTORE}")
    return Ledger(path, mark=mark)


def ledger_name(cohort: Path) -> str:
    """Return the name of a cohort in a shared ledger: keyed by its random key, so it tells nothing of the scans."""
    try:
        key = (cohort / "key").read_bytes()
    except OSError:
        raise ConfigError(
            "the cohort's key is missing, and with it its name in the shared ledger: restore it"
        ) from None
    return hmac.digest(key, b"medvae ledger name", "sha256").hex()


def ledger_facts(cohort: Path) -> dict[str, str]:
    """Return what a run notes of its ledger, to find it again: never an address."""
    if os.environ.get(ADDRESS):
        return {"ledger": SHARED, "ledger_name": ledger_name(cohort)}
    return {"ledger": str(cohort / "ledger.db")}


def ledger_of_run(facts: Mapping[str, Any]) -> Ledger:
    """Open the ledger that a run noted, checked against what the cohort remembers, where that is still there.

    Raises ConfigError for a shared one without its address, and as `Ledger`.
    """
    if facts.get("ledger") != SHARED:
        location = str(facts["ledger"])
        return Ledger(location, mark=_remembered(Path(location.removeprefix("sqlite:///")).parent, LOCAL))
    address = os.environ.get(ADDRESS)
    if not address:
        raise ConfigError(f"the run was charged to a shared ledger: set {ADDRESS} to its address")
    mark = _remembered(Path(str(facts.get("cohort", ""))), SHARED)
    return Ledger(_server(address), name=str(facts["ledger_name"]), mark=mark)


def _remembered(cohort: Path, kind: str) -> Mark | None:
    mark = Mark(cohort / "ledger.id", kind)
    return mark if mark.path.is_file() else None


def _server(address: str) -> str:
    if "://" not in address or address.startswith("sqlite"):
        raise ConfigError(f"{ADDRESS} holds no address of a server: give one like postgresql://user@host/database")
    return address
