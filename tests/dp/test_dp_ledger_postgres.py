"""The shared ledger in PostgreSQL: serialised, append-only, durable, and silent about its password."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from postgres_server import PASSWORD, Server

from medvae.dp import ledger_store
from medvae.dp.accounting import gaussian_noise_for
from medvae.dp.ledger import Ledger
from medvae.dp.ledger_place import ADDRESS, ledger_facts, ledger_name, ledger_of_run, open_ledger
from medvae.errors import BudgetExceeded, ConfigError, PrivacyError, RunError
from medvae.types import Mechanism

psycopg = pytest.importorskip("psycopg", reason="the PostgreSQL driver is not here")
DELTA = 1e-5
COSTLY = (Mechanism("moments", gaussian_noise_for(3.0, DELTA)),)


@pytest.fixture
def database(postgres: Server) -> str:
    return postgres.new_database()


@pytest.fixture
def url(postgres: Server, database: str) -> str:
    return postgres.url(database)


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    (tmp_path / "key").write_bytes(os.urandom(32))
    return tmp_path


def test_charges_as_on_disk(url: str) -> None:
    ledger = Ledger(url, name="a")
    ledger.set_budget(4.0, DELTA)
    receipt = ledger.reserve("run-1", COSTLY, DELTA, "first")
    assert Ledger(url, name="a").reserve("run-1", COSTLY, DELTA) == receipt
    with pytest.raises(BudgetExceeded):
        ledger.reserve("run-2", COSTLY, DELTA)
    ledger.commit("run-1")
    assert [e.kind for e in Ledger(url, name="a").verify_chain([receipt])] == ["create", "budget", "reserve", "commit"]
    assert ledger.spent(DELTA) == pytest.approx(3.0, abs=1e-2)
    assert Ledger(url, name="b").spent(DELTA) == 0.0


def test_threads_racing_for_the_last_of_a_budget_and_for_its_creation(url: str) -> None:
    def race(number: int) -> bool:
        ledger = Ledger(url, name="raced")
        if number == 0:
            ledger.set_budget(3.5, DELTA)
        barrier.wait()
        try:
            ledger.reserve(f"run-{number}", COSTLY, DELTA)
        except BudgetExceeded:
            return False
        return True

    barrier = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    assert sum(won) == 1
    ledger = Ledger(url, name="raced")
    assert ledger.spent(DELTA) <= 3.5
    assert [e.kind for e in ledger.events()] == ["create", "budget", "reserve"]


def test_reading_while_others_write_sees_whole_states(url: str) -> None:
    """Rows and head of different moments would look like a ledger that was altered."""
    cheap = [Mechanism("moments", 1e4)]
    Ledger(url)

    def write(number: int) -> None:
        for i in range(12):
            Ledger(url).reserve(f"{number}-{i}", cheap, DELTA)

    with ThreadPoolExecutor(2) as pool:
        writing = [pool.submit(write, n) for n in range(2)]
        reader, seen = Ledger(url), 0
        while not all(w.done() for w in writing):
            now = len(reader.events())
            assert now >= seen
            seen = now
        assert all(w.exception() is None for w in writing)
    assert len(reader.events()) == 25


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE medvae_ledger SET note = 'x' WHERE sequence = 2",
        "DELETE FROM medvae_ledger WHERE sequence = 2",
        "TRUNCATE medvae_ledger",
        "DELETE FROM medvae_ledger_head",
        "TRUNCATE medvae_ledger_head",
        "UPDATE medvae_ledger_head SET sequence = 1",
        "UPDATE medvae_ledger_head SET sequence = sequence + 2",
        "INSERT INTO medvae_ledger SELECT * FROM medvae_ledger ON CONFLICT (name, sequence) DO UPDATE SET note = 'x'",
    ],
)
def test_the_database_itself_forbids_changes(postgres: Server, url: str, database: str, statement: str) -> None:
    Ledger(url).reserve("a", COSTLY, DELTA)
    with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
        postgres.execute(statement, database)
    assert len(Ledger(url).events()) == 2


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE medvae_ledger SET mechanisms = '[]' WHERE sequence = 2",
        "DELETE FROM medvae_ledger WHERE sequence = 2",
        "UPDATE medvae_ledger_head SET sequence = 1",
    ],
)
def test_an_owner_who_drops_the_triggers_is_seen(postgres: Server, url: str, database: str, statement: str) -> None:
    Ledger(url).reserve("a", COSTLY, DELTA)
    postgres.execute(f"SET session_replication_role = replica; {statement}", database)
    with pytest.raises(PrivacyError, match="restore the ledger"):
        Ledger(url)


def test_a_user_with_few_rights_can_charge_and_not_change(postgres: Server, url: str, database: str) -> None:
    Ledger(url, name="first")  # the owner makes the tables
    user = f"trainer_{database}"
    postgres.execute(
        f"CREATE ROLE {user} LOGIN PASSWORD '{PASSWORD}'; GRANT SELECT, INSERT ON medvae_ledger TO {user}; "
        f"GRANT SELECT, INSERT, UPDATE ON medvae_ledger_head TO {user}",
        database,
    )
    ledger = Ledger(postgres.url(database, user), name="second")
    ledger.reserve("a", COSTLY, DELTA)
    ledger.commit("a")
    assert len(ledger.events()) == 3
    with (
        psycopg.connect(postgres.url(database, user)) as raw,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        raw.execute("UPDATE medvae_ledger SET note = 'x'")
    stranger = f"stranger_{database}"
    postgres.execute(f"CREATE ROLE {stranger} LOGIN PASSWORD '{PASSWORD}'")
    with pytest.raises(RunError, match="rights"):
        Ledger(postgres.url(database, stranger))


# --- crashes and lost connections -------------------------------------------------------------------------------------

CRASH = """
import os, signal, sys
from medvae.dp import ledger_store
from medvae.dp.ledger import Ledger
from medvae.types import Mechanism
ledger = Ledger(os.environ["URL"])
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "inside":
    write = ledger_store.Transaction.append
    ledger_store.Transaction.append = lambda self, row: (write(self, row), kill())
ledger.reserve("crashed", [Mechanism("moments", 1.5)], 1e-5)
kill()
"""


@pytest.mark.parametrize(("moment", "charged"), [("after", 1), ("inside", 0)])
def test_sigkill_leaves_a_charge_or_nothing(url: str, moment: str, charged: int) -> None:
    died = subprocess.run(
        [sys.executable, "-c", CRASH, moment], timeout=60, check=False, env={**os.environ, "URL": url}
    )
    assert died.returncode == -signal.SIGKILL
    ledger = Ledger(url)
    assert sum(e.kind == "reserve" for e in ledger.events()) == charged
    ledger.reserve("crashed", [Mechanism("moments", 1.5)], DELTA)
    assert sum(e.kind == "reserve" for e in ledger.events()) == 1


@contextmanager
def cut_after(port: int, messages: int, *, deliver: bool) -> Iterator[int]:
    """Yield the port of a proxy that loses its connections at the given message of the client, all counted together.

    deliver: whether the server still gets that message; its answer is lost in any case.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    left = [messages]

    def pump(source: socket.socket, target: socket.socket, counts: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if counts:
                    left[0] -= 1
                    if left[0] == 0:
                        if deliver:
                            target.sendall(data)
                            time.sleep(0.05)
                        break
                if not counts and left[0] <= 0:
                    break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                for pair in ((client, server, True), (server, client, False)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


@pytest.mark.parametrize("deliver", [False, True])
def test_a_connection_lost_at_any_moment_never_hides_a_charge(
    postgres: Server, url: str, database: str, deliver: bool
) -> None:
    direct = Ledger(url)
    cheap = [Mechanism("moments", 200.0)]
    outcomes = []
    for messages in range(1, 200):
        run = f"run-{messages}"
        with cut_after(postgres.port, messages, deliver=deliver) as port:
            try:
                receipt = Ledger(postgres.url(database, port=port)).reserve(run, cheap, DELTA)
            except RunError:
                receipt = None
        charged = [e.receipt for e in direct.events() if e.kind == "reserve" and e.run_id == run]
        assert receipt is None or charged == [receipt]
        assert len(charged) <= 1
        outcomes.append((receipt is not None, bool(charged)))
        assert direct.reserve(run, cheap, DELTA) == (charged[0] if charged else direct.events()[-1].receipt)
        if receipt is not None:
            break
    assert outcomes[-1] == (True, True)
    assert len(outcomes) > 5
    # An answer to COMMIT that was lost: charged, though the run was refused. Never the other way round.
    assert ((False, True) in outcomes) is deliver


def test_a_ledger_that_goes_away_is_one_sentence(
    cohort: Path, postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Server(postgres.programs)
    try:
        monkeypatch.setenv(ADDRESS, own.url())
        ledger = open_ledger(cohort)
        ledger.reserve("a", COSTLY, DELTA)
        own.stop()
        for use in (lambda: open_ledger(cohort), lambda: ledger.commit("a"), lambda: ledger.spent(DELTA)):
            with pytest.raises(RunError, match="cannot be reached, or the connection was lost") as caught:
                use()
            assert PASSWORD not in str(caught.value)
        own.start()  # after its own crash recovery
        assert [e.kind for e in ledger.events()] == ["create", "reserve"]
        ledger.commit("a")
    finally:
        own.remove()


def test_a_standby_server_is_refused(postgres: Server) -> None:
    """It may lag behind the primary, and would show less than was spent."""
    own = Server(postgres.programs)
    try:
        Ledger(own.url()).reserve("a", COSTLY, DELTA)
        own.stop()
        own.make_standby()
        own.start()
        with pytest.raises(RunError, match="standby server: give the primary's"):
            Ledger(own.url())
    finally:
        own.remove()


def test_a_trainer_that_hangs_in_the_middle_holds_the_ledger_only_so_long(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(url)
    monkeypatch.setattr(ledger_store, "LOCK_TIMEOUT_S", 1)
    with ledger._store.writing("cohort"), pytest.raises(RunError, match="held by another run"):
        Ledger(url).reserve("a", COSTLY, DELTA)
    monkeypatch.setattr(ledger_store, "IDLE_TIMEOUT_S", 1)

    def hang() -> None:
        with ledger._store.writing("cohort") as rows:
            time.sleep(2)
            rows.rows()

    with pytest.raises(RunError, match="connection was lost"):
        hang()
    ledger.reserve("a", COSTLY, DELTA)


def test_a_commit_is_durable_whatever_the_server_prefers(postgres: Server, url: str, database: str) -> None:
    for setting, used in (("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")):
        postgres.execute(f"ALTER DATABASE {database} SET synchronous_commit = {setting}")
        with Ledger(url)._store.writing("cohort") as rows:
            found = rows._connection.exec_driver_sql("SHOW synchronous_commit").scalar()
        assert found == used


# --- cohorts ----------------------------------------------------------------------------------------------------------


def test_copies_of_a_cohort_charge_one_ledger(
    cohort: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESS, url)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "key").write_bytes((cohort / "key").read_bytes())
    open_ledger(cohort).set_budget(4.0, DELTA)
    open_ledger(cohort).reserve("a", COSTLY, DELTA)
    with pytest.raises(BudgetExceeded):
        open_ledger(copy).reserve("b", COSTLY, DELTA)
    other = tmp_path / "other"
    other.mkdir()
    (other / "key").write_bytes(os.urandom(32))
    assert open_ledger(other).spent(DELTA) == 0.0


def test_a_shared_ledger_is_never_taken_for_a_local_one(
    cohort: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESS, url)
    receipt = open_ledger(cohort).reserve("a", COSTLY, DELTA)
    facts = ledger_facts(cohort)
    assert facts == {"ledger": "shared", "ledger_name": ledger_name(cohort)}
    assert ledger_of_run(facts).verify_chain([receipt])
    monkeypatch.delenv(ADDRESS)
    with pytest.raises(PrivacyError, match="set MEDVAE_LEDGER"):
        open_ledger(cohort)
    with pytest.raises(ConfigError, match="set MEDVAE_LEDGER"):
        ledger_of_run(facts)
    assert not (cohort / "ledger.db").exists()


def test_a_server_set_back_or_another_one_is_refused(
    cohort: Path, postgres: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESS, url)
    open_ledger(cohort).reserve("a", COSTLY, DELTA)
    monkeypatch.setenv(ADDRESS, postgres.url(postgres.new_database()))
    with pytest.raises(PrivacyError, match="another lies in its place"):
        open_ledger(cohort)


def test_a_read_only_cohort_may_use_a_shared_ledger(cohort: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADDRESS, url)

    def refuse(_path: Path, _text: str, _encoding: str) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    open_ledger(cohort).reserve("a", COSTLY, DELTA)
    assert open_ledger(cohort).spent(DELTA) > 2.9


def test_a_wrong_password_is_one_sentence_without_it(postgres: Server) -> None:
    with pytest.raises(RunError, match="does not let this user in") as caught:
        Ledger(postgres.url().replace(PASSWORD, "another-secret"))
    assert "another-secret" not in str(caught.value)
    assert "another-secret" not in repr(Ledger(postgres.url(postgres.new_database())))
