"""The ledger's two tables, and the triggers by which the database itself keeps them append-only."""

from __future__ import annotations

import sqlalchemy as sa

METADATA = sa.MetaData()
ROWS = sa.Table(
    "medvae_ledger",
    METADATA,
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
HEADS = sa.Table(
    "medvae_ledger_head",
    METADATA,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("sequence", sa.Integer, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
)

MESSAGE = "the privacy ledger is append-only"
BACK = "NEW.sequence <> OLD.sequence + 1 OR NEW.name <> OLD.name"
THERE = "EXISTS (SELECT 1 FROM medvae_ledger r WHERE r.name = NEW.name AND r.sequence = NEW.sequence)"

# Trigger, table, event, and the condition under which it refuses. REPLACE deletes without a DELETE trigger in SQLite.
SQLITE = (
    ("medvae_ledger_no_update", "medvae_ledger", "UPDATE", "1"),
    ("medvae_ledger_no_delete", "medvae_ledger", "DELETE", "1"),
    ("medvae_ledger_no_replace", "medvae_ledger", "INSERT", THERE),
    ("medvae_ledger_head_no_delete", "medvae_ledger_head", "DELETE", "1"),
    ("medvae_ledger_head_no_back", "medvae_ledger_head", "UPDATE", BACK),
)
POSTGRESQL = (
    ("medvae_ledger_no_change", "medvae_ledger", "UPDATE OR DELETE", "ROW"),
    ("medvae_ledger_no_truncate", "medvae_ledger", "TRUNCATE", "STATEMENT"),
    ("medvae_ledger_head_no_delete", "medvae_ledger_head", "DELETE", "ROW"),
    ("medvae_ledger_head_no_truncate", "medvae_ledger_head", "TRUNCATE", "STATEMENT"),
    ("medvae_ledger_head_no_back", "medvae_ledger_head", "UPDATE", f"ROW WHEN ({BACK})"),
)
FUNCTION = (
    "CREATE OR REPLACE FUNCTION medvae_ledger_refuse() RETURNS trigger LANGUAGE plpgsql AS "
    f"$$ BEGIN RAISE EXCEPTION '{MESSAGE}'; END $$"
)


def _after_create(table: sa.Table, dialect: str, statement: str) -> None:
    ddl = sa.DDL(statement)  # type: ignore[no-untyped-call]
    sa.event.listen(table, "after_create", ddl.execute_if(dialect=dialect))


_after_create(ROWS, "postgresql", FUNCTION)
_after_create(HEADS, "postgresql", FUNCTION)
for _name, _table, _event, _when in SQLITE:
    _after_create(
        METADATA.tables[_table],
        "sqlite",
        f"CREATE TRIGGER {_name} BEFORE {_event} ON {_table} WHEN {_when} BEGIN SELECT RAISE(ABORT, '{MESSAGE}'); END",
    )
for _name, _table, _event, _each in POSTGRESQL:
    _after_create(
        METADATA.tables[_table],
        "postgresql",
        f"CREATE TRIGGER {_name} BEFORE {_event} ON {_table} FOR EACH {_each} EXECUTE FUNCTION medvae_ledger_refuse()",
    )
