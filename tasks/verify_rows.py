"""Proof that rows follow from the log: a processor's tables made anew in a database of its own, and compared with the live ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from storage.database import Database
from storage.tables import Checkpoint
from tasks.replay_follow import QuietFollower, versions_of
from tasks.run import Run
from tasks.timeline import Place

_CHECKPOINT: sa.Table = Checkpoint.__table__  # type: ignore[attr-defined]  # SQLModel hides it from the types
_AT_ONCE = 10_000
_SHOWN = 300
"""Characters of a row in a sentence."""


@dataclass
class VerifiedRows:
    """One table of one processor; `difference` is the first row that is another, as a sentence, or empty."""

    processor: str
    table: str
    rows: int
    difference: str = ""
    shared: bool = False
    """Whether it was not compared, since several partitions set a row together."""
    gone: list[str] = field(default_factory=list)
    """Events that other code took than there is now, each stretch as a sentence."""

    def told(self) -> list[str]:
        """What was found, a sentence each."""
        if self.shared:
            return [
                *self.gone,
                f"{self.table}: not compared, since several partitions set its rows, in whatever order they ran",
            ]
        return [*self.gone, self.difference or f"{self.table}: {self.rows} rows follow from the log"]


def verify_rows(run: Run, name: str, live: Database) -> list[VerifiedRows]:
    """Compare the tables of a processor in `live` with what the log gives, up to what was committed when they were copied.

    The run's own database is SQLite, and filled with both.
    """
    made, scratch = run.topology.make(name), run.store.database
    tables = [_Table(_CHECKPOINT.metadata.tables[table]) for table in made.tables]
    goals = _copy_live(live, scratch, (name, made.reads), tables)
    gone = [sentence for partition, goal in goals.items() for sentence in _follow(run, name, partition, goal)]
    with scratch.read() as connection:
        found = [
            VerifiedRows(name, table.made.name, 0, shared=True)
            if table.made.name in made.shared_tables and len(goals) > 1
            else _compare(connection, name, table)
            for table in tables
        ]
    found[0].gone = gone
    return found


class _AsItIs(sa.types.UserDefinedType[Any]):
    """A number as the database has it; PostgreSQL's exact ones go into SQLite as the text that a processor gives."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "NUMERIC"

    def bind_processor(self, _dialect: sa.Dialect) -> Any:
        return lambda value: str(value) if isinstance(value, Decimal) else value


class _Table:
    """A table of the run's own database, which is made anew, and a copy of the live one beside it."""

    def __init__(self, made: sa.Table) -> None:
        self.made = made
        columns = (sa.Column(column.name, _type(column)) for column in made.columns)
        self.live = sa.Table(f"live_{made.name}", sa.MetaData(), *columns)
        sa.Index(f"{self.live.name}_key", *self.key(self.live))

    def key(self, table: sa.FromClause) -> list[sa.ColumnElement[Any]]:
        """The key of a row, in either."""
        return [table.c[column.name] for column in self.made.primary_key]

    def rows(self, table: sa.FromClause) -> sa.Select[Any]:
        """All of either, each number as it is there."""
        return sa.select(*(sa.type_coerce(table.c[c.name], _type(c)).label(c.name) for c in self.made.columns))

    def is_one_row(self) -> sa.ColumnElement[bool]:
        """Whether a live row and one that was made anew have one key."""
        return sa.and_(*(a == b for a, b in zip(self.key(self.live), self.key(self.made), strict=True)))


def _type(column: sa.Column[Any]) -> sa.types.TypeEngine[Any]:
    return _AsItIs() if isinstance(column.type, sa.Numeric) and not isinstance(column.type, sa.Float) else column.type


def _copy_live(live: Database, scratch: Database, whose: tuple[str, str], tables: Sequence[_Table]) -> dict[int, Place]:
    """Copy the tables as they are at one moment; gives how far each partition was taken then."""
    name, log = whose
    places = sa.select(_CHECKPOINT.c.partition, _CHECKPOINT.c.offset, _CHECKPOINT.c.tick_offset).where(
        _CHECKPOINT.c.processor == name, _CHECKPOINT.c.log == log, _CHECKPOINT.c.live.is_(True)
    )
    with live.snapshot() as theirs:
        found = theirs.execute(places.order_by(_CHECKPOINT.c.partition)).all()
        for table in tables:
            rows = theirs.execute(table.rows(table.made), execution_options={"yield_per": _AT_ONCE}).mappings()
            with scratch.write() as ours:
                table.live.create(ours)
            for some in rows.partitions():
                with scratch.write() as ours:  # not for all of them: other processors commit into it meanwhile
                    ours.execute(sa.insert(table.live), [dict(row) for row in some])
    return {partition: Place(offset, tick) for partition, offset, tick in found}


def _follow(run: Run, name: str, partition: int, goal: Place) -> list[str]:
    """Go over one partition again; says which events other code took then."""
    versions = versions_of(run, name, partition, {}, {})
    follower = QuietFollower(run, name, partition, versions)
    try:
        follower.run_to(goal)
    finally:
        follower.close()
    return [
        f"{follower.reader.name}: events from {start} to {end} were taken by code {code[:12]} of {name}, which is gone: their rows "
        "are compared with what the code of today gives"
        for code, start, end in follower.gone(goal.offset, derived=False)
    ]


def _compare(connection: sa.Connection, name: str, table: _Table) -> VerifiedRows:
    live, made = table.live, table.made
    found = VerifiedRows(name, made.name, connection.scalar(sa.select(sa.func.count()).select_from(live)) or 0)
    other = table.rows(live).except_(table.rows(made)).subquery()
    wrong = connection.execute(sa.select(other).order_by(*table.key(other)).limit(1)).mappings().first()
    lost = table.rows(made).where(~sa.exists().where(table.is_one_row())).order_by(*table.key(made)).limit(1)
    if wrong is not None:
        mine = [column == wrong[column.name] for column in table.key(made)]
        found.difference = _difference(
            table, wrong, connection.execute(table.rows(made).where(*mine)).mappings().first()
        )
    elif (missing := connection.execute(lost).mappings().first()) is not None:
        found.difference = _difference(table, None, missing)
    return found


def _difference(table: _Table, live: sa.RowMapping | None, replayed: sa.RowMapping | None) -> str:
    def shown(row: sa.RowMapping | None) -> str:
        return "no such row" if row is None else repr(dict(row))[:_SHOWN]

    return (
        f"{table.made.name}: the first row that differs: found live {shown(live)}, expected replayed {shown(replayed)}"
    )
