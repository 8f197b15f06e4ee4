"""The privacy ledger: one a cohort, append-only, hash-chained, and charged before the first batch is drawn.

A run is charged by `reserve`, in one transaction that no other run can interleave with, and marked by `commit` when
it ends; a run that crashed stays charged. Each row carries the SHA-256 of itself and of the row before, and a head
holds the last digest, so an altered, inserted or removed row is seen. That finds accidents and clumsy tampering;
whoever may rewrite the database can rewrite the chain too, which is why every run keeps its receipt and `verify_chain`
takes receipts. Order is the sequence number: times are information only, and a clock set back changes nothing.

A run without noise ("inf", for comparison) is recorded and marked, but not added to what was spent: no run without
noise is ever released, so it adds nothing to what an outsider can learn. `Entry.private` tells them apart.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from medvae.dp.accounting import canonical, check_delta_range, pld_epsilon
from medvae.errors import BudgetExceeded, ConfigError, PrivacyError, RunError
from medvae.types import Mechanism

if TYPE_CHECKING:
    from medvae.dp.ledger_store import Transaction

Kind = Literal["create", "budget", "reserve", "commit"]
NOT_PRIVATE = "not private, never releasable"
CLAIM_TERMS = "unit patient, add-remove neighbours, by PLD"


@dataclass(frozen=True)
class Receipt:
    """Proof that a run was charged. Public: it names no patient and no path."""

    run_id: str
    ledger_id: str
    sequence: int
    digest: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form used in privacy.json."""
        return {
            "run_id": self.run_id,
            "ledger_id": self.ledger_id,
            "sequence": self.sequence,
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Receipt:
        """Read what `to_json` wrote."""
        return cls(str(data["run_id"]), str(data["ledger_id"]), int(data["sequence"]), str(data["digest"]))


@dataclass(frozen=True)
class Budget:
    """The most that all runs together may spend: epsilon, at delta."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Entry:
    """One row of the ledger."""

    sequence: int
    utc: str
    run_id: str
    kind: Kind
    mechanisms: tuple[Mechanism, ...]
    delta: float | None
    budget: float | None
    note: str
    receipt: Receipt

    @property
    def private(self) -> bool:
        """Whether every mechanism adds noise; a run that is not private is never released, and not added up."""
        return all(m.noise_multiplier > 0 for m in self.mechanisms)


class Memory(Protocol):
    """What a cohort remembers of its ledger, outside of it."""

    def check(self, entries: Sequence[Entry]) -> None:
        """Raise PrivacyError where these rows are not all that the ledger had before."""

    def advance(self, receipt: Receipt) -> None:
        """Remember that the ledger has this row."""


class Ledger:
    """The ledger of one cohort; made where there is none yet.

    location: a path of an SQLite file, or a URL of SQLite or PostgreSQL; name: tells cohorts apart that share one
    database; mark: remembers the ledger from outside. Many threads, processes and (with PostgreSQL) machines may use
    one ledger at once. Raises RunError where the database cannot be used, PrivacyError where rows are missing.
    """

    def __init__(self, location: str | Path, *, name: str = "cohort", mark: Memory | None = None) -> None:
        from medvae.dp.ledger_store import Store

        self._name = name
        self._mark = mark
        self._store = Store(location)
        self._store.prepare(name)
        with self._store.reading(name) as rows:
            is_new = not rows.rows()
        if is_new:
            with self._store.writing(name) as rows:
                if not rows.rows():
                    _append(rows, "create", ledger_id=secrets.token_hex(16))
        self._seen(self.events()[-1].receipt)

    def __repr__(self) -> str:
        return f"Ledger({self._name!r})"  # the URL may hold a password

    def reserve(self, run_id: str, mechanisms: Sequence[Mechanism], delta: float, note: str = "") -> Receipt:
        """Charge a run with all its mechanisms, before it draws its first batch; returns the receipt.

        Guarantee: whoever else is charging, the PLD total of all charged runs never passes the budget. The same run
        with the same mechanisms and delta is charged once: a resumed run gets its first receipt again. Raises
        RunError for a known run with other mechanisms, BudgetExceeded where the budget would be passed.
        """
        planned = tuple(mechanisms)
        canonical(planned)
        check_delta_range(delta)
        if not run_id or not planned:
            raise ConfigError("a run is charged by name and by at least one mechanism: give both")
        private = all(m.noise_multiplier > 0 for m in planned)
        with self._store.writing(self._name) as rows:
            entries = self._verified(rows)
            known = _reservation(entries, run_id)
            if known is not None:
                if (known.mechanisms, known.delta) != (planned, delta):
                    raise RunError(
                        f"run {run_id!r} was charged for another plan: resume it with the same settings, or start anew"
                    )
                return known.receipt
            if private:
                _check_budget(entries, planned)
            else:
                note = f"{NOT_PRIVATE}; {note}" if note else NOT_PRIVATE
            receipt = _append(rows, "reserve", run_id=run_id, mechanisms=planned, delta=delta, note=note)
        return self._seen(receipt)

    def commit(self, run_id: str, note: str = "") -> Receipt:
        """Record that a charged run ended; a second call changes nothing. Raises RunError for a run never charged."""
        with self._store.writing(self._name) as rows:
            entries = self._verified(rows)
            if _reservation(entries, run_id) is None:
                raise RunError(f"run {run_id!r} was never charged: reserve its mechanisms before training")
            done = [e for e in entries if e.kind == "commit" and e.run_id == run_id]
            if done:
                return done[0].receipt
            receipt = _append(rows, "commit", run_id=run_id, note=note)
        return self._seen(receipt)

    def set_budget(self, epsilon: float | None, delta: float, note: str = "") -> Receipt:
        """Set the most that all runs together may spend, or lift the limit by None; the change is itself a row.

        A budget below what was spent is allowed, and then refuses every further run.
        """
        check_delta_range(delta)
        if epsilon is not None and not (math.isfinite(epsilon) and epsilon > 0):
            raise ConfigError(f"the budget is {epsilon}: give a finite epsilon above zero")
        with self._store.writing(self._name) as rows:
            self._verified(rows)
            receipt = _append(rows, "budget", delta=delta, budget=epsilon, note=note)
        return self._seen(receipt)

    def budget(self) -> Budget | None:
        """Return the budget in force, or None where no limit was set."""
        return _budget(self.events())

    def events(self) -> tuple[Entry, ...]:
        """Return all rows in order, after checking the chain."""
        return self.verify_chain()

    def spent(self, delta: float) -> float:
        """Return epsilon at `delta` of all charged runs together, ended or crashed, by PLD; without `inf` runs."""
        return pld_epsilon(_charged(self.events()), delta)

    def remaining(self) -> float | None:
        """Return budget minus spent, at least 0, or None without a budget.

        Cautious: runs compose to less than the sum of their epsilons, so a somewhat larger run may still be let in.
        """
        entries = self.events()
        budget = _budget(entries)
        if budget is None:
            return None
        return max(0.0, round(budget.epsilon - pld_epsilon(_charged(entries), budget.delta), 6))

    def verify_chain(self, receipts: Iterable[Receipt] = ()) -> tuple[Entry, ...]:
        """Check every digest, the head, and that each given receipt is here; returns all rows.

        Raises PrivacyError where a row was altered, inserted or removed, or a receipt is of another ledger.
        """
        with self._store.reading(self._name) as rows:
            entries = self._verified(rows)
        held = {e.receipt for e in entries if e.kind in ("reserve", "commit")}
        for receipt in receipts:
            if receipt not in held:
                raise PrivacyError(
                    f"the receipt of run {receipt.run_id!r} is not in this ledger: use the ledger it was charged to"
                )
        return entries

    def _verified(self, rows: Transaction) -> tuple[Entry, ...]:
        entries = _verified(rows)
        if self._mark is not None:
            self._mark.check(entries)
        return entries

    def _seen(self, receipt: Receipt) -> Receipt:
        """Remember a row once the database has it for good; a crash before that remembers an earlier one."""
        if self._mark is not None:
            self._mark.advance(receipt)
        return receipt


def _append(
    rows: Transaction,
    kind: Kind,
    *,
    ledger_id: str | None = None,
    run_id: str = "",
    mechanisms: tuple[Mechanism, ...] = (),
    delta: float | None = None,
    budget: float | None = None,
    note: str = "",
) -> Receipt:
    """Add one row at the end of the chain."""
    from medvae.dp.ledger_store import GENESIS

    sequence, previous = rows.head or (0, GENESIS)
    row: dict[str, Any] = {
        "sequence": sequence + 1,
        "ledger_id": ledger_id or rows.rows()[0]["ledger_id"],
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "run_id": run_id,
        "kind": kind,
        "mechanisms": json.dumps([m.to_json() for m in mechanisms]),
        "delta": None if delta is None else float(delta),
        "budget": None if budget is None else float(budget),
        "note": note,
        "previous": previous,
    }
    row["digest"] = _digest(row)
    rows.append(row)
    return Receipt(run_id, row["ledger_id"], row["sequence"], row["digest"])


def _digest(row: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a row without its digest, as canonical JSON."""
    content = {k: v for k, v in row.items() if k != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _verified(rows: Transaction) -> tuple[Entry, ...]:
    """Return all rows after walking the chain from its first row to its head."""
    from medvae.dp.ledger_store import GENESIS

    previous, count, ledger_id = GENESIS, 0, None
    entries: list[Entry] = []
    for row in rows.rows():
        count += 1
        ledger_id = ledger_id or row["ledger_id"]
        links = row["sequence"] == count and row["previous"] == previous and row["ledger_id"] == ledger_id
        if not links or row["digest"] != _digest(row):
            raise PrivacyError(
                f"row {count} of the privacy ledger was altered or removed: restore the ledger from a backup"
            )
        previous = row["digest"]
        entries.append(_entry(row))
    if rows.head != (count, previous) or count == 0:
        raise PrivacyError(
            f"rows after row {count} of the privacy ledger are missing: restore the ledger from a backup"
        )
    return tuple(entries)


def _entry(row: Mapping[str, Any]) -> Entry:
    return Entry(
        sequence=row["sequence"],
        utc=row["utc"],
        run_id=row["run_id"],
        kind=row["kind"],
        mechanisms=tuple(Mechanism.from_json(m) for m in json.loads(row["mechanisms"])),
        delta=row["delta"],
        budget=row["budget"],
        note=row["note"],
        receipt=Receipt(row["run_id"], row["ledger_id"], row["sequence"], row["digest"]),
    )


def _reservation(entries: Sequence[Entry], run_id: str) -> Entry | None:
    return next((e for e in entries if e.kind == "reserve" and e.run_id == run_id), None)


def _charged(entries: Sequence[Entry]) -> tuple[Mechanism, ...]:
    return tuple(m for e in entries if e.kind == "reserve" and e.private for m in e.mechanisms)


def _budget(entries: Sequence[Entry]) -> Budget | None:
    last = next((e for e in reversed(entries) if e.kind == "budget"), None)
    if last is None or last.budget is None or last.delta is None:
        return None
    return Budget(last.budget, last.delta)


def _check_budget(entries: Sequence[Entry], planned: tuple[Mechanism, ...]) -> None:
    budget = _budget(entries)
    if budget is None:
        return
    total = pld_epsilon((*_charged(entries), *planned), budget.delta)
    if total > budget.epsilon:
        raise BudgetExceeded(
            f"epsilon would be {total:.6g}, over the budget of {budget.epsilon:g} at delta {budget.delta:g} "
            f"({CLAIM_TERMS}): lower --dp-epsilon, or have the budget raised with `medvae ledger COHORT --budget`"
        )
