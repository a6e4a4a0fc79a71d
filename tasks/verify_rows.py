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
_AT_ONCE = 2_000
_SHOWN = 300
"""Characters of a row in a sentence."""


@dataclass
class VerifiedRows:
    """One table of one processor; `difference` is the first row that is another, as a sentence, or empty."""

    processor: str
    table: str
    rows: int
    difference: str = ""
    gone: list[str] = field(default_factory=list)
    """Events that other code took than there is now, each stretch as a sentence."""

    def told(self) -> list[str]:
        """What was found, a sentence each."""
        return [*self.gone, self.difference or f"{self.table}: {self.rows} rows follow from the log"]


def verify_rows(run: Run, name: str, live: Database) -> list[VerifiedRows]:
    """Compare the tables of a processor in `live` with what the log gives, up to what was committed when they were copied.

    The run's own database is SQLite, and filled with both. A row that several partitions set (an item's) is right if one of
    them gives it.
    """
    made, scratch = run.topology.make(name), run.store.database
    tables = [_Table(_CHECKPOINT.metadata.tables[table]) for table in made.tables]
    goals = _copy_live(live, scratch, (name, made.reads), tables)
    gone: list[str] = []
    for partition, goal in goals.items():
        gone += _follow(run, name, partition, goal)
        with scratch.write() as connection:
            for table in tables:
                names = [column.name for column in table.made.columns]
                connection.execute(sa.insert(table.replayed).from_select(names, sa.select(table.made)))
                connection.execute(sa.delete(table.made))
    with scratch.read() as connection:
        found = [_compare(connection, name, table) for table in tables]
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
    """A table, and two more of its kind: the rows that are live, and those of all partitions that were made anew."""

    def __init__(self, made: sa.Table) -> None:
        self.made = made
        self.live, self.replayed = (self._copy(f"{kind}_{made.name}") for kind in ("live", "replayed"))
        for copy in (self.live, self.replayed):
            sa.Index(f"{copy.name}_key", *self.key(copy))

    def _copy(self, name: str) -> sa.Table:
        columns = (sa.Column(column.name, _type(column)) for column in self.made.columns)
        return sa.Table(name, sa.MetaData(), *columns)

    def key(self, table: sa.FromClause) -> list[sa.ColumnElement[Any]]:
        """The key of a row, in one of the three."""
        return [table.c[column.name] for column in self.made.primary_key]

    def is_one_row(self) -> sa.ColumnElement[bool]:
        """Whether a live row and one that was made anew have one key."""
        return sa.and_(*(a == b for a, b in zip(self.key(self.live), self.key(self.replayed), strict=True)))


def _type(column: sa.Column[Any]) -> sa.types.TypeEngine[Any]:
    return _AsItIs() if isinstance(column.type, sa.Numeric) and not isinstance(column.type, sa.Float) else column.type


def _copy_live(live: Database, scratch: Database, whose: tuple[str, str], tables: Sequence[_Table]) -> dict[int, Place]:
    """Copy the tables as they are at one moment; gives how far each partition was taken then."""
    name, log = whose
    places = sa.select(_CHECKPOINT.c.partition, _CHECKPOINT.c.offset, _CHECKPOINT.c.tick_offset).where(
        _CHECKPOINT.c.processor == name, _CHECKPOINT.c.log == log, _CHECKPOINT.c.live.is_(True)
    )
    with live.snapshot() as theirs, scratch.write() as ours:
        found = theirs.execute(places.order_by(_CHECKPOINT.c.partition)).all()
        for table in tables:
            columns = (sa.type_coerce(column, _type(column)).label(column.name) for column in table.made.columns)
            rows = theirs.execute(sa.select(*columns), execution_options={"yield_per": _AT_ONCE}).mappings()
            for copy in (table.live, table.replayed):
                copy.create(ours)
            for some in rows.partitions():
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
    live, replayed = table.live, table.replayed
    count = connection.scalar(sa.select(sa.func.count()).select_from(live)) or 0
    found = VerifiedRows(name, table.made.name, count)
    other = sa.select(live).except_(sa.select(replayed)).subquery()
    wrong = connection.execute(sa.select(other).order_by(*table.key(other)).limit(1)).mappings().first()
    lost = sa.select(replayed).where(~sa.exists().where(table.is_one_row())).order_by(*table.key(replayed)).limit(1)
    if wrong is not None:
        mine = [column == wrong[column.name] for column in table.key(replayed)]
        given = connection.execute(sa.select(replayed).where(*mine)).mappings().first()
        found.difference = _difference(table, wrong, given)
    elif (missing := connection.execute(lost).mappings().first()) is not None:
        found.difference = _difference(table, None, missing)
    return found


def _difference(table: _Table, live: sa.RowMapping | None, replayed: sa.RowMapping | None) -> str:
    def shown(row: sa.RowMapping | None) -> str:
        return "no such row" if row is None else repr(dict(row))[:_SHOWN]

    return (
        f"{table.made.name}: the first row that differs: found live {shown(live)}, expected replayed {shown(replayed)}"
    )
