"""Where the ledger's rows lie: two tables in SQLite or PostgreSQL, written in one locked transaction at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from medvae.dp.ledger_tables import HEADS, METADATA, ROWS
from medvae.errors import ConfigError, InputError, MissingPart, RunError

GENESIS = "0" * 64
LOCK_TIMEOUT_S = 120
IDLE_TIMEOUT_S = 120
CONNECT_TIMEOUT_S = 10
# Any number, the same for all: whoever makes tables or a new ledger holds it, so that only one does.
CREATION_LOCK = 0x6D65647661


class Transaction:
    """The rows of one ledger within one database transaction."""

    def __init__(self, connection: sa.Connection, name: str, head: tuple[int, str] | None) -> None:
        self._connection = connection
        self._name = name
        self.head = head

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows in order, without the ledger's name."""
        query = sa.select(ROWS).where(ROWS.c.name == self._name).order_by(ROWS.c.sequence)
        rows = [dict(r) for r in self._connection.execute(query).mappings()]
        return [{k: v for k, v in row.items() if k != "name"} for row in rows]

    def append(self, row: dict[str, Any]) -> None:
        """Add a row and move the head to it."""
        self._connection.execute(sa.insert(ROWS).values(name=self._name, **row))
        moved = sa.update(HEADS).where(HEADS.c.name == self._name)
        self._connection.execute(moved.values(sequence=row["sequence"], digest=row["digest"]))
        self.head = (row["sequence"], row["digest"])


class Store:
    """One database. location: a path of an SQLite file, or an SQLAlchemy URL of SQLite or PostgreSQL."""

    def __init__(self, location: str | Path) -> None:
        self._engine = _engine(location)
        self._on_server = self._engine.dialect.name == "postgresql"

    def prepare(self, name: str) -> None:
        """Make the tables and this ledger's head where they are missing; safe against another doing the same."""
        with _one_sentence():
            with self._begin() as connection:
                if sa.inspect(connection).has_table(HEADS.name) and _head(connection, name) is not None:
                    return
            with self._begin(write=True) as connection:
                if self._on_server:
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(CREATION_LOCK)))
                METADATA.create_all(connection)
                if _head(connection, name) is None:
                    connection.execute(sa.insert(HEADS).values(name=name, sequence=0, digest=GENESIS))

    @contextmanager
    def reading(self, name: str) -> Iterator[Transaction]:
        """Open a consistent view of one ledger: rows and head of the same moment."""
        with _one_sentence(), self._begin() as connection:
            yield Transaction(connection, name, _head(connection, name))

    @contextmanager
    def writing(self, name: str) -> Iterator[Transaction]:
        """Open the only writing transaction of one ledger: others wait until it ends; an error undoes it all.

        SQLite: BEGIN IMMEDIATE takes the file's write lock. PostgreSQL: the head's row is locked by SELECT FOR UPDATE,
        and rows are read after that, so no row of another run can be missed.
        """
        with _one_sentence(), self._begin(write=True) as connection:
            yield Transaction(connection, name, _head(connection, name, lock=True))

    @contextmanager
    def _begin(self, *, write: bool = False) -> Iterator[sa.Connection]:
        options: dict[str, Any] = {"begin": "BEGIN IMMEDIATE" if write else "BEGIN"}
        if self._on_server:
            options = {"isolation_level": "READ COMMITTED" if write else "REPEATABLE READ"}
        with self._engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection


def _head(connection: sa.Connection, name: str, *, lock: bool = False) -> tuple[int, str] | None:
    query = sa.select(HEADS.c.sequence, HEADS.c.digest).where(HEADS.c.name == name)
    row = connection.execute(query.with_for_update() if lock else query).first()
    return None if row is None else (int(row[0]), str(row[1]))


def _engine(location: str | Path) -> sa.Engine:
    text = str(location)
    try:
        url = sa.make_url(text) if "://" in text else sa.URL.create("sqlite", database=text)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        if url.get_backend_name() == "postgresql":
            return _on_server(url)
        if url.get_backend_name() == "sqlite":
            return _on_disk(url)
    except (exc.ArgumentError, ValueError):
        raise ConfigError(
            "the ledger's address is no path and no database URL: give one like "
            "postgresql://user:password@host/database"
        ) from None
    except ModuleNotFoundError as error:
        raise MissingPart(
            f"the ledger's database needs the driver {error.name!r}: pip install 'medvae-dp[postgres]'"
        ) from None
    raise ConfigError("the ledger's address is of another kind of database: SQLite and PostgreSQL are known")


def _on_disk(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": LOCK_TIMEOUT_S}, poolclass=sa.NullPool)

    # The driver would begin late and without the write lock, so transactions are begun by hand.
    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous=FULL")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine


def _on_server(url: sa.URL) -> sa.Engine:
    """Return an engine whose every transaction is durable before it counts, and never waits for ever."""
    # A connection that is silently gone is noticed within about half a minute.
    patience = {"connect_timeout": CONNECT_TIMEOUT_S, "keepalives_idle": 10, "keepalives_interval": 5}
    patience |= {"keepalives_count": 3, "tcp_user_timeout": 30_000}
    engine = sa.create_engine(url, connect_args=patience, poolclass=sa.NullPool, hide_parameters=True)

    # For one transaction each, so that a connection pool in between changes nothing.
    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        standby = connection.exec_driver_sql(
            "SELECT pg_is_in_recovery(), "
            f"set_config('lock_timeout', '{LOCK_TIMEOUT_S}s', true), "
            f"set_config('idle_in_transaction_session_timeout', '{IDLE_TIMEOUT_S}s', true), "
            "set_config('synchronous_commit', CASE current_setting('synchronous_commit') "
            "WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true)"
        ).scalar()
        if standby:  # it may lag behind, and would show less than was spent
            raise RunError("the ledger's address is of a standby server: give the primary's")

    return engine


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn the database's errors into ours, without the path or URL."""
    try:
        yield
    except exc.SQLAlchemyError as error:
        raise _sentence(str(getattr(error, "orig", error)).lower()) from None


def _sentence(text: str) -> InputError:
    if "locked" in text or "lock timeout" in text:
        return RunError("the ledger is held by another run for too long: try again")
    if "is full" in text or "no space left" in text:
        return InputError("the disk is full, and the ledger was left as it was: free some space")
    if any(word in text for word in ("readonly", "read-only", "unable to open", "permission denied")):
        return RunError(
            "the ledger cannot be opened for writing: check that its folder is there and yours, or the rights of "
            "the database's user"
        )
    if any(word in text for word in ("authentication", 'role "', "no pg_hba", 'database "')):
        return RunError("the ledger's database does not let this user in: check user, password and database")
    if any(word in text for word in ("connect", "terminat", "timeout", "timed out", "server closed", "resolve", "ssl")):
        return RunError(
            "the ledger's database cannot be reached, or the connection was lost: nothing more is done without it; "
            "try again, with --resume for a run that has begun"
        )
    return RunError("the ledger's database cannot be used: check that the file or URL is a medvae ledger")
