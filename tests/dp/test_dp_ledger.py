"""The ledger: never less than was spent, never over the budget, whoever races, crashes or tampers."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import medvae.dp.ledger as ledger_module
from medvae.dp.accounting import gaussian_noise_for, pld_epsilon
from medvae.dp.ledger import Budget, Ledger, Receipt
from medvae.dp.ledger_place import ADDRESS, ledger_of_run, open_ledger
from medvae.errors import BudgetExceeded, ConfigError, PrivacyError, RunError
from medvae.types import Mechanism

DELTA = 1e-5
RUN = (Mechanism("moments", 4.0), Mechanism("dpsgd", 1.5, 0.1, 100))
NO_NOISE = (Mechanism("moments", 0.0), Mechanism("dpsgd", 0.0, 0.1, 100))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def gaussian(epsilon: float) -> tuple[Mechanism, ...]:
    return (Mechanism("moments", gaussian_noise_for(epsilon, DELTA)),)


# --- charging ---------------------------------------------------------------------------------------------------------


def test_a_run_is_charged_once_and_stays_charged(path: Path) -> None:
    receipt = Ledger(path).reserve("run-1", RUN, DELTA, note="first")
    assert Ledger(path).spent(DELTA) == pld_epsilon(RUN, DELTA)
    assert Ledger(path).reserve("run-1", RUN, DELTA) == receipt  # a resumed run
    assert Ledger(path).reserve("run-1", list(RUN), DELTA, note="again") == receipt
    Ledger(path).commit("run-1")
    assert Ledger(path).commit("run-1") == Ledger(path).commit("run-1")
    assert Ledger(path).reserve("run-1", RUN, DELTA) == receipt
    entries = Ledger(path).events()
    assert [e.kind for e in entries] == ["create", "reserve", "commit"]
    assert entries[1].mechanisms == RUN
    assert entries[1].note == "first"
    assert Ledger(path).spent(DELTA) == pld_epsilon(RUN, DELTA)


def test_runs_compose_by_pld_at_any_delta(path: Path) -> None:
    ledger = Ledger(path)
    ledger.reserve("a", RUN, DELTA)
    ledger.reserve("b", RUN, 1e-6)
    for delta in (1e-5, 1e-7):
        assert ledger.spent(delta) == pld_epsilon([*RUN, *RUN], delta)
    assert ledger.spent(DELTA) < 2 * pld_epsilon(RUN, DELTA)
    assert Ledger(path, name="another cohort").spent(DELTA) == 0.0


def test_the_same_run_under_another_plan_is_refused(path: Path) -> None:
    ledger = Ledger(path)
    ledger.reserve("run-1", RUN, DELTA)
    for mechanisms, delta in [(RUN[:1], DELTA), (RUN, 1e-6), (NO_NOISE, DELTA)]:
        with pytest.raises(RunError, match="another plan"):
            ledger.reserve("run-1", mechanisms, delta)
    with pytest.raises(RunError, match="never charged"):
        ledger.commit("run-2")
    assert len(ledger.events()) == 2


def test_bad_plans_leave_no_row(path: Path) -> None:
    ledger = Ledger(path)
    for run_id, mechanisms, delta in [
        ("", RUN, DELTA),
        ("r", (), DELTA),
        ("r", (Mechanism("m", -1.0),), DELTA),
        ("r", RUN, 0.0),
    ]:
        with pytest.raises(ConfigError):
            ledger.reserve(run_id, mechanisms, delta)
    for epsilon in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="budget"):
            ledger.set_budget(epsilon, DELTA)
    assert [e.kind for e in ledger.events()] == ["create"]


def test_runs_without_noise_are_recorded_but_not_added(path: Path) -> None:
    ledger = Ledger(path)
    ledger.set_budget(0.1, DELTA)
    receipt = ledger.reserve("comparison", NO_NOISE, DELTA, note="baseline")
    entry = ledger.events()[-1]
    assert (entry.private, entry.note, entry.receipt) == (False, "not private, never releasable; baseline", receipt)
    assert ledger.spent(DELTA) == 0.0
    assert ledger.remaining() == 0.1


# --- budget -----------------------------------------------------------------------------------------------------------


def test_the_budget_is_a_wall(path: Path) -> None:
    ledger = Ledger(path)
    assert ledger.budget() is None
    assert ledger.remaining() is None
    ledger.set_budget(4.0, DELTA)
    assert ledger.budget() == Budget(4.0, DELTA)
    ledger.reserve("a", gaussian(3.0), DELTA)
    assert ledger.remaining() == pytest.approx(1.0, abs=2e-3)
    with pytest.raises(BudgetExceeded, match=r"over the budget of 4 at delta 1e-05 \(unit patient, add-remove.*PLD"):
        ledger.reserve("b", gaussian(3.0), DELTA)
    assert [e.run_id for e in ledger.events() if e.kind == "reserve"] == ["a"]
    ledger.reserve("c", gaussian(1.0), DELTA)
    ledger.set_budget(1.0, DELTA, note="lowered")
    assert ledger.remaining() == 0.0
    assert ledger.reserve("a", gaussian(3.0), DELTA).run_id == "a"  # already charged: it may finish
    with pytest.raises(BudgetExceeded):
        ledger.reserve("d", gaussian(0.01), DELTA)
    ledger.set_budget(None, DELTA, note="lifted")
    ledger.reserve("d", gaussian(3.0), DELTA)


def test_the_budget_counts_at_its_own_delta(path: Path) -> None:
    ledger = Ledger(path)
    ledger.set_budget(3.1, 1e-7)
    with pytest.raises(BudgetExceeded, match="at delta 1e-07"):
        ledger.reserve("a", gaussian(3.0), DELTA)


def test_threads_racing_for_the_last_of_a_budget(path: Path) -> None:
    Ledger(path).set_budget(3.5, DELTA)

    def race(number: int) -> bool:
        try:
            Ledger(path).reserve(f"run-{number}", gaussian(3.0), DELTA)
        except BudgetExceeded:
            return False
        return True

    with ThreadPoolExecutor(12) as pool:
        won = list(pool.map(race, range(12)))
    assert sum(won) == 1
    assert Ledger(path).spent(DELTA) <= 3.5


PROCESS = """
import sys, time
from medvae.dp.ledger import Ledger
from medvae.errors import BudgetExceeded
from medvae.types import Mechanism
path, number, start = sys.argv[1], sys.argv[2], float(sys.argv[3])
time.sleep(max(0.0, start - time.time()))
try:
    Ledger(path).reserve(f"run-{number}", [Mechanism("moments", 1.5)], 1e-5)
    print("won")
except BudgetExceeded:
    print("lost")
"""


def test_processes_racing_for_the_last_of_a_budget_and_for_its_creation(path: Path, tmp_path: Path) -> None:
    import time

    ledger = Ledger(path)
    ledger.set_budget(1.1 * pld_epsilon([Mechanism("moments", 1.5)], DELTA), DELTA)
    fresh = tmp_path / "fresh.db"
    start = time.time() + 3.0
    racers = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(p), str(i), str(start)], stdout=subprocess.PIPE, text=True)
        for p in (path, fresh)
        for i in range(3)
    ]
    said = [r.communicate(timeout=100)[0].strip() for r in racers]
    assert sorted(said[:3]) == ["lost", "lost", "won"]
    assert said[3:] == ["won"] * 3  # no budget there: all charged, after one of them made the ledger
    assert [e.kind for e in Ledger(fresh).events()] == ["create"] + ["reserve"] * 3
    assert Ledger(path).spent(DELTA) == pld_epsilon([Mechanism("moments", 1.5)], DELTA)


# --- crashes and clocks -----------------------------------------------------------------------------------------------

CRASH = """
import os, signal, sys
from medvae.dp import ledger_store
from medvae.dp.ledger import Ledger
from medvae.types import Mechanism
ledger = Ledger(sys.argv[1])
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "inside":
    write = ledger_store.Transaction.append
    ledger_store.Transaction.append = lambda self, row: (write(self, row), kill())
ledger.reserve("crashed", [Mechanism("moments", 1.5)], 1e-5)
kill()
"""


@pytest.mark.parametrize(("moment", "charged"), [("after", True), ("inside", False)])
def test_sigkill_leaves_a_charge_or_nothing(path: Path, moment: str, charged: bool) -> None:
    died = subprocess.run([sys.executable, "-c", CRASH, str(path), moment], timeout=60, check=False)
    assert died.returncode == -signal.SIGKILL
    ledger = Ledger(path)
    plan = [Mechanism("moments", 1.5)]
    assert ledger.spent(DELTA) == (pld_epsilon(plan, DELTA) if charged else 0.0)
    ledger.reserve("crashed", plan, DELTA)  # the resumed run: charged once in the end
    assert ledger.spent(DELTA) == pld_epsilon(plan, DELTA)
    assert sum(e.kind == "reserve" for e in ledger.events()) == 1


def test_a_clock_set_back_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import UTC, datetime

    class Past(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime(1980, 1, 1, tzinfo=UTC)

    ledger = Ledger(path)
    ledger.set_budget(4.0, DELTA)
    ledger.reserve("a", gaussian(3.0), DELTA)
    monkeypatch.setattr(ledger_module, "datetime", Past)
    with pytest.raises(BudgetExceeded):
        ledger.reserve("b", gaussian(3.0), DELTA)
    ledger.reserve("c", gaussian(0.5), DELTA)
    assert [e.sequence for e in ledger.events()] == [1, 2, 3, 4]
    assert ledger.events()[-1].utc.startswith("1980")


# --- tampering --------------------------------------------------------------------------------------------------------


def drop_triggers(raw: sqlite3.Connection) -> None:
    for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        raw.execute(f"DROP TRIGGER {name}")


def _filled(path: Path) -> list[Receipt]:
    ledger = Ledger(path)
    ledger.set_budget(10.0, DELTA)
    receipts = [ledger.reserve(f"run-{i}", gaussian(1.0), DELTA) for i in range(3)]
    receipts.append(ledger.commit("run-0"))
    return receipts


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE medvae_ledger SET note = 'x' WHERE sequence = 2",
        "DELETE FROM medvae_ledger WHERE sequence = 6",
        "DELETE FROM medvae_ledger_head",
        "UPDATE medvae_ledger_head SET sequence = 5",
        "UPDATE medvae_ledger_head SET sequence = sequence + 1, name = 'other'",
        "REPLACE INTO medvae_ledger SELECT name, 3, ledger_id, utc, run_id, kind, '[]', delta, budget, note, previous, "
        "digest FROM medvae_ledger WHERE sequence = 3",
    ],
)
def test_the_database_itself_forbids_changes(path: Path, statement: str) -> None:
    _filled(path)
    with sqlite3.connect(path) as raw, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        raw.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE medvae_ledger SET budget = 99 WHERE kind = 'budget'",
        "UPDATE medvae_ledger SET mechanisms = '[]' WHERE sequence = 3",
        "UPDATE medvae_ledger SET mechanisms = replace(mechanisms, '3.7', '9.7') WHERE sequence = 3",
        "UPDATE medvae_ledger SET utc = '2020-01-01' WHERE sequence = 4",
        "UPDATE medvae_ledger SET run_id = 'other' WHERE sequence = 5",
        "UPDATE medvae_ledger SET sequence = 60 WHERE sequence = 6",
        "DELETE FROM medvae_ledger WHERE sequence = 4",
        "DELETE FROM medvae_ledger WHERE sequence = 6",
        "DELETE FROM medvae_ledger WHERE sequence = 1",
        "DELETE FROM medvae_ledger",
        "UPDATE medvae_ledger_head SET sequence = 5",
        "INSERT INTO medvae_ledger SELECT name, 7, ledger_id, utc, run_id, kind, mechanisms, delta, budget, note, "
        "previous, digest FROM medvae_ledger WHERE sequence = 3",
    ],
)
def test_an_altered_added_or_removed_row_is_seen(path: Path, statement: str) -> None:
    _filled(path)
    with sqlite3.connect(path) as raw:
        drop_triggers(raw)
        assert raw.execute(statement).rowcount > 0
    with pytest.raises(PrivacyError, match="restore the ledger"):
        Ledger(path).verify_chain()
    with pytest.raises(PrivacyError, match="restore the ledger"):
        Ledger(path).reserve("next", gaussian(0.1), DELTA)
    with pytest.raises(PrivacyError, match="restore the ledger"):
        Ledger(path).spent(DELTA)


def test_receipts_tie_runs_to_their_ledger(path: Path, tmp_path: Path) -> None:
    receipts = _filled(path)
    assert len(Ledger(path).verify_chain(receipts)) == 6
    assert Receipt.from_json(receipts[0].to_json()) == receipts[0]
    other = Ledger(tmp_path / "other.db")
    other.reserve("run-0", gaussian(1.0), DELTA)
    with pytest.raises(PrivacyError, match="receipt of run 'run-0'"):
        other.verify_chain(receipts[:1])  # as after restoring an old copy of the file
    changed = Receipt(receipts[0].run_id, receipts[0].ledger_id, receipts[0].sequence, "0" * 64)
    with pytest.raises(PrivacyError, match="receipt"):
        Ledger(path).verify_chain([changed])


# --- bad places -------------------------------------------------------------------------------------------------------


def test_bad_places_get_one_sentence_without_the_path(tmp_path: Path) -> None:
    junk = tmp_path / "secret-name.db"
    junk.write_bytes(b"this is no database" * 100)
    for location in (junk, tmp_path / "missing-folder" / "secret-name.db", tmp_path):
        with pytest.raises(RunError) as caught:
            Ledger(location)
        assert "\n" not in str(caught.value)
        assert "secret-name" not in str(caught.value)
    with pytest.raises(ConfigError, match="address"):
        Ledger("nonsense://")
    assert "secret" not in repr(Ledger(f"sqlite:///{tmp_path}/secret.db"))


def test_any_sqlalchemy_url_works(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/team.db"
    receipt = Ledger(url).reserve("a", RUN, DELTA)
    assert Ledger(tmp_path / "team.db").events()[-1].receipt == receipt


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_ledger_can_be_read_and_not_written(path: Path) -> None:
    _filled(path)
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        assert Ledger(path).spent(DELTA) > 0
        with pytest.raises(RunError, match="writing"):
            Ledger(path).reserve("next", gaussian(0.1), DELTA)
    finally:
        path.parent.chmod(0o755)


def test_a_lost_ledger_is_not_taken_for_one_that_spent_nothing(tmp_path: Path) -> None:
    first = open_ledger(tmp_path)
    first.reserve("a", [Mechanism("m", 1.0)], 1e-5)
    assert open_ledger(tmp_path).spent(1e-5) == first.spent(1e-5) > 0
    (tmp_path / "ledger.db").rename(tmp_path / "away.db")
    for _ in range(2):
        with pytest.raises(PrivacyError, match="gone"):
            open_ledger(tmp_path)
    assert not (tmp_path / "ledger.db").exists()
    Ledger(tmp_path / "ledger.db")
    with pytest.raises(PrivacyError, match="another"):
        open_ledger(tmp_path)


def test_a_ledger_set_back_to_an_older_copy_is_refused(tmp_path: Path) -> None:
    """The chain of yesterday's backup is whole: only what the cohort remembers shows that rows are missing."""
    ledger = open_ledger(tmp_path)
    ledger.reserve("a", gaussian(1.0), DELTA)
    backup = (tmp_path / "ledger.db").read_bytes()
    ledger.reserve("b", gaussian(1.0), DELTA)
    (tmp_path / "ledger.db").write_bytes(backup)
    assert len(Ledger(tmp_path / "ledger.db").events()) == 2
    gate = {"ledger": str(tmp_path / "ledger.db")}
    for use in (
        lambda: open_ledger(tmp_path),
        lambda: ledger.spent(DELTA),
        lambda: ledger.commit("a"),
        lambda: ledger_of_run(gate),
    ):
        with pytest.raises(PrivacyError, match="set back: it had row 3"):
            use()
    assert not list(tmp_path.glob(".ledger.id*"))


def test_a_row_that_was_swapped_for_another_is_refused(tmp_path: Path) -> None:
    """Two copies of a cohort that went different ways: the one's ledger is not the other's."""
    open_ledger(tmp_path).reserve("a", gaussian(1.0), DELTA)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("ledger.db", "ledger.id"):
        (copy / name).write_bytes((tmp_path / name).read_bytes())
    open_ledger(tmp_path).reserve("here", gaussian(1.0), DELTA)
    open_ledger(copy).reserve("there", gaussian(1.0), DELTA)
    (tmp_path / "ledger.db").write_bytes((copy / "ledger.db").read_bytes())
    with pytest.raises(PrivacyError, match="set back"):
        open_ledger(tmp_path)


def test_a_crash_before_the_cohort_remembers_is_no_reason_to_refuse(tmp_path: Path) -> None:
    open_ledger(tmp_path).reserve("a", gaussian(1.0), DELTA)
    Ledger(tmp_path / "ledger.db").reserve("b", gaussian(1.0), DELTA)  # charged, and then killed
    assert len(open_ledger(tmp_path).events()) == 3
    assert (tmp_path / "ledger.id").read_text().split()[1] == "3"


def test_what_older_cohorts_remember_is_understood_and_torn_marks_are_refused(tmp_path: Path) -> None:
    ledger_id = open_ledger(tmp_path).events()[0].receipt.ledger_id
    (tmp_path / "ledger.id").write_text(ledger_id + "\n")
    assert open_ledger(tmp_path).reserve("a", gaussian(1.0), DELTA).sequence == 2
    (tmp_path / "ledger.id").write_text(f"{ledger_id} 2\n")
    with pytest.raises(PrivacyError, match="torn"):
        open_ledger(tmp_path)


def test_a_full_disk_charges_and_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = open_ledger(tmp_path)

    def full(_path: Path, _text: str, _encoding: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        ledger.reserve("a", gaussian(1.0), DELTA)
    monkeypatch.undo()
    assert [e.run_id for e in ledger.events() if e.kind == "reserve"] == ["a"]
    ledger.reserve("a", gaussian(1.0), DELTA)
    assert sum(e.kind == "reserve" for e in open_ledger(tmp_path).events()) == 1


@pytest.mark.parametrize(
    "address",
    ["postgresql://u:secret@h:port/d", "postgresql+psycopg://u:secret@127.0.0.1:1/d", "mysql://u:secret@h/d", "secret"],
)
def test_a_bad_address_is_one_sentence_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    (tmp_path / "key").write_bytes(bytes(32))
    monkeypatch.setenv(ADDRESS, address)
    with pytest.raises((ConfigError, RunError)) as caught:
        open_ledger(tmp_path)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_kind_of_ledger_is_not_opened_as_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ledger(tmp_path).reserve("a", gaussian(1.0), DELTA)
    monkeypatch.setenv(ADDRESS, "postgresql://u@127.0.0.1:1/d")
    with pytest.raises(PrivacyError, match="a ledger of its own"):
        open_ledger(tmp_path)
    (tmp_path / "ledger.db").unlink()
    with pytest.raises(PrivacyError, match="a ledger of its own"):
        open_ledger(tmp_path)
    monkeypatch.delenv(ADDRESS)
    (tmp_path / "ledger.id").write_text(f"{'0' * 32} 1 {'0' * 64} shared\n")
    with pytest.raises(PrivacyError, match="a shared one: set MEDVAE_LEDGER"):
        open_ledger(tmp_path)
