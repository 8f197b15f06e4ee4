"""Where the ledger's rows lie: two tables behind SQLAlchemy, written in one locked transaction at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from medvae.errors import ConfigError, InputError, MissingPart, RunError

GENESIS = "0" * 64
LOCK_TIMEOUT_S = 120

_metadata = sa.MetaData()
_rows = sa.Table(
    "medvae_ledger",
    _metadata,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("ledger_id", sa.String(64), nullable=False),
    sa.Column("utc", sa.String(40), nullable=False),
    sa.Column("run_id", sa.String(200), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("mechanisms", sa.Text, nullable=False),
    sa.Column("delta", sa.Double),
    sa.Column("budget", sa.Double),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("previous", sa.String(64), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
)
_heads = sa.Table(
    "medvae_ledger_head",
    _metadata,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("sequence", sa.Integer, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
)
for _table, _verb in (("medvae_ledger", "UPDATE"), ("medvae_ledger", "DELETE"), ("medvae_ledger_head", "DELETE")):
    _trigger = sa.DDL(  # type: ignore[no-untyped-call]
        f"CREATE TRIGGER {_table}_no_{_verb.lower()} BEFORE {_verb} ON {_table} "
        "BEGIN SELECT RAISE(ABORT, 'the privacy ledger is append-only'); END"
    )
    sa.event.listen(_metadata.tables[_table], "after_create", _trigger.execute_if(dialect="sqlite"))


class Transaction:
    """The rows of one ledger within one database transaction."""

    def __init__(self, connection: sa.Connection, name: str, head: tuple[int, str] | None) -> None:
        self._connection = connection
        self._name = name
        self.head = head

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows in order, without the ledger's name."""
        query = sa.select(_rows).where(_rows.c.name == self._name).order_by(_rows.c.sequence)
        rows = [dict(r) for r in self._connection.execute(query).mappings()]
        return [{k: v for k, v in row.items() if k != "name"} for row in rows]

    def append(self, row: dict[str, Any]) -> None:
        """Add a row and move the head to it."""
        self._connection.execute(sa.insert(_rows).values(name=self._name, **row))
        moved = sa.update(_heads).where(_heads.c.name == self._name)
        self._connection.execute(moved.values(sequence=row["sequence"], digest=row["digest"]))
        self.head = (row["sequence"], row["digest"])


class Store:
    """One database. location: a path of an SQLite file, or an SQLAlchemy URL."""

    def __init__(self, location: str | Path) -> None:
        self._engine = _engine(location)

    def prepare(self, name: str) -> None:
        """Make the tables and this ledger's head where they are missing; safe against another doing the same."""
        with _one_sentence():
            with self._engine.connect() as connection, connection.begin():
                if sa.inspect(connection).has_table(_heads.name) and _head(connection, name) is not None:
                    return
            try:
                self._create(name)
            except (exc.IntegrityError, exc.ProgrammingError):
                self._create(name)  # another process was first; now the tables and perhaps the head are there

    def _create(self, name: str) -> None:
        with self._engine.connect().execution_options(begin="BEGIN IMMEDIATE") as connection, connection.begin():
            _metadata.create_all(connection)
            if _head(connection, name) is None:
                connection.execute(sa.insert(_heads).values(name=name, sequence=0, digest=GENESIS))

    @contextmanager
    def reading(self, name: str) -> Iterator[Transaction]:
        """Open a consistent view of one ledger."""
        with _one_sentence(), self._engine.connect() as connection, connection.begin():
            yield Transaction(connection, name, _head(connection, name))

    @contextmanager
    def writing(self, name: str) -> Iterator[Transaction]:
        """Open the only writing transaction of one ledger: others wait until it ends; an error undoes it all.

        SQLite: BEGIN IMMEDIATE takes the file's write lock. Others: the head's row is locked by SELECT FOR UPDATE.
        """
        with (
            _one_sentence(),
            self._engine.connect().execution_options(begin="BEGIN IMMEDIATE") as connection,
            connection.begin(),
        ):
            yield Transaction(connection, name, _head(connection, name, lock=True))


def _head(connection: sa.Connection, name: str, *, lock: bool = False) -> tuple[int, str] | None:
    query = sa.select(_heads.c.sequence, _heads.c.digest).where(_heads.c.name == name)
    row = connection.execute(query.with_for_update() if lock else query).first()
    return None if row is None else (int(row[0]), str(row[1]))


def _engine(location: str | Path) -> sa.Engine:
    text = str(location)
    try:
        url = sa.make_url(text) if "://" in text else sa.URL.create("sqlite", database=text)
        if url.get_backend_name() != "sqlite":
            return sa.create_engine(url, isolation_level="READ COMMITTED", poolclass=sa.NullPool)
        engine = sa.create_engine(url, connect_args={"timeout": LOCK_TIMEOUT_S}, poolclass=sa.NullPool)
    except exc.ArgumentError:
        raise ConfigError(
            "the ledger's address is no path and no database URL: give one like sqlite:///ledger.db"
        ) from None
    except ModuleNotFoundError as error:
        raise MissingPart(f"the ledger's database needs the driver {error.name!r}: install it with pip") from None

    # The driver would begin late and without the write lock, so transactions are begun by hand.
    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous=FULL")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn the database's errors into ours, without the path or URL."""
    try:
        yield
    except exc.SQLAlchemyError as error:
        text = str(getattr(error, "orig", error)).lower()
        if "locked" in text:
            raise RunError("the ledger is held by another run for too long: try again") from None
        if "full" in text:
            raise InputError("the disk is full, and the ledger was left as it was: free some space") from None
        if "readonly" in text or "unable to open" in text:
            raise RunError(
                "the ledger cannot be opened for writing: check that its folder is there and yours"
            ) from None
        raise RunError("the ledger's database cannot be used: check that the file or URL is a medvae ledger") from None
