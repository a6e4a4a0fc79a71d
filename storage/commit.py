"""One commit: source durable, derived bytes durable, then one transaction with everything else.

The order is the guarantee. Whatever dies in between, the next run begins at the checkpoint and gives the same bytes again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import sqlalchemy as sa

from storage.database import Database
from storage.derived import DerivedWriter
from storage.errors import ConflictError
from storage.reader import PartitionReader
from storage.state import StateStore
from storage.statements import execute_many
from storage.steps import reached
from storage.tables import Checkpoint
from storage.times import now
from storage.written_by import Author, note

Statement = tuple[str, Iterable[Mapping[str, Any]]]
UNDECIDED = "?"
"""The version of a checkpoint that goes on with another one, which is not recorded yet."""

_CHECKPOINT: sa.Table = Checkpoint.__table__  # type: ignore[attr-defined]  # SQLModel hides it from the types
# Made once: SQLAlchemy takes longer to make a statement than SQLite to run it.
_MINE = (_CHECKPOINT.c.id == sa.bindparam("my_id"), _CHECKPOINT.c.generation == sa.bindparam("my_generation"))
_NUMBER = sa.select(_CHECKPOINT.c.commit).where(*_MINE)
_SWAP = sa.update(_CHECKPOINT).where(
    *_MINE, _CHECKPOINT.c.commit == sa.bindparam("my_commit"), _CHECKPOINT.c.live == sa.bindparam("my_live")
)
_SET_END = sa.text(
    'INSERT INTO committed_end (log, generation, partition, "end") VALUES (:log, :generation, :partition, :end) '
    'ON CONFLICT (log, generation, partition) DO UPDATE SET "end" = excluded."end"'
)


@dataclass
class Position:
    """Where a processor stands in one partition: what its checkpoint row says."""

    id: int
    processor: str
    generation: int
    log: str
    partition: int
    offset: int = 0
    clock: int = 0
    as_of: int = 0
    tick_offset: int = 0
    commit: int = 0
    version: str = ""
    changed_at: int = -1
    lines: int = 0
    processed: int = 0
    quarantined: int = 0
    ignored: int = 0
    derived: int = 0
    live: bool = True


POSITION = tuple(_CHECKPOINT.c[field.name] for field in fields(Position))
"""The columns of a position, in the order of its fields."""
_FIND = sa.select(*POSITION).where(
    *(_CHECKPOINT.c[name] == sa.bindparam(name) for name in ("processor", "generation", "log", "partition"))
)


@dataclass
class Target:
    """The partition of the derived log that a processor writes, and its committed end."""

    log: str
    writer: DerivedWriter
    end: int
    spilled: int = 0
    """How many bytes beyond `end` are written ahead of their commit."""
    author: Author | None = None
    """Who is to be noted with the next bytes that are committed; nobody once that is done."""


@dataclass
class Pending:
    """What was read and given since the last commit."""

    lines: list[bytes] = field(default_factory=list)
    statements: Sequence[Statement] = ()
    states: StateStore[Any] | None = None


def set_end(connection: sa.Connection, log: str, generation: int, partition: int, end: int) -> None:
    """Say how far readers of a derived log may go: everything before the byte offset `end` is durable."""
    place = {"log": log, "generation": generation, "partition": partition}
    connection.execute(_SET_END, [{**place, "end": end}])


def load_position(
    database: Database, processor: str, generation: int, log: str, partition: int, *, live: bool = True
) -> Position:
    """The position of a processor in a generation, its row made where it never ran.

    Raises:
        ConflictError: that generation is live where it should not be, or the other way round.
    """
    where = {"processor": processor, "generation": generation, "log": log, "partition": partition}
    with database.read() as connection:
        row = connection.execute(_FIND, where).first()
    if row is None:
        fresh = {**_never_ran(), **where, "live": live}
        with database.write() as connection:
            connection.execute(_insert_once(_CHECKPOINT.name, tuple(fresh)), [fresh])
            row = connection.execute(_FIND, where).one()
    position = Position(*row)
    if position.live != live:
        raise ConflictError(
            f"generation {generation} of {processor} is {'' if position.live else 'no longer '}live",
            where=f"processor {processor}, {log}/{partition}",
            do="Another run has promoted or rolled back meanwhile; this one has changed nothing",
        )
    return position


def commit(
    database: Database, source: PartitionReader, target: Target | None, position: Position, pending: Pending
) -> str:
    """Make `pending` and `position` durable, as one; says what was cut of an unconfirmed tail and why, if anything.

    `position.commit` is the number that was read; it is raised by one.

    Raises:
        ConflictError: another run committed meanwhile; nothing has changed.
        NondeterminismError: an unconfirmed tail holds other bytes than `pending`.
    """
    reached("commit-begun")
    source.sync(position.offset)
    reached("source-synced")
    cut = ""
    if target is not None and (pending.lines or target.spilled or position.changed_at == position.commit):
        cut = _write_ahead(database, target, position, pending.lines, durable=True)
    with database.write() as connection:
        _swap(connection, position, 1)
        if pending.states is not None:
            pending.states.write(connection)
        for sql, rows in pending.statements:
            execute_many(connection, sql, rows)
        if target is not None and target.spilled:
            set_end(connection, target.log, position.generation, position.partition, target.end + target.spilled)
            if target.author is not None:
                note(
                    connection, target.author, target.log, target.end, partition=position.partition,
                    generation=position.generation,
                )  # fmt: skip
        reached("transaction-ready")
    reached("committed")
    position.commit += 1
    if target is not None:
        target.author = None if target.spilled else target.author
        target.end, target.spilled = target.end + target.spilled, 0
    return cut


def spill(database: Database, source: PartitionReader, target: Target, position: Position, lines: list[bytes]) -> str:
    """Write derived bytes ahead of their commit, so that memory need not hold them; says what was cut of a tail, if anything.

    They lie beyond the committed end, where no reader of ours looks and where a crash leaves bytes too: what is given
    again is compared with them.

    Raises:
        ConflictError: another run committed meanwhile; nothing has changed.
        NondeterminismError: an unconfirmed tail holds other bytes.
    """
    source.sync(position.offset)  # first, as in a commit: what is derived must not outlive what it came from
    return _write_ahead(database, target, position, lines, durable=False)


def _write_ahead(database: Database, target: Target, position: Position, lines: list[bytes], *, durable: bool) -> str:
    _check_current(database, position)
    data, may_differ = b"".join(lines), position.changed_at == position.commit
    cut = target.writer.extend(target.end + target.spilled, data, may_differ=may_differ, durable=durable)
    target.spilled += len(data)
    return cut


def save_version(database: Database, position: Position, version: str) -> None:
    """Note, before it is used, that another version of settings and code goes on from here.

    From now until the next commit an unconfirmed tail may be the work of the version before.
    """
    if position.version:
        position.changed_at = position.commit
    position.version = version
    with database.write() as connection:
        _swap(connection, position, 0)


def let_differ(database: Database, position: Position) -> None:
    """Note that what comes in after `position` may be replaced: so may an unconfirmed tail of its processor, and what is recorded of it.

    The commit number goes up, so that one who is at work reads this.
    """
    number = _CHECKPOINT.c.commit + 1
    with database.write() as connection:
        connection.execute(
            sa.update(_CHECKPOINT).where(*_MINE).values(version=UNDECIDED, commit=number, changed_at=number),
            _mine(position),
        )


@functools.cache
def _never_ran() -> dict[str, Any]:
    """The row of a processor that never ran, but for whose it is."""
    return Checkpoint(processor="", generation=0, log="", partition=0).model_dump(exclude={"id"})


@functools.cache
def _insert_once(table: str, names: Sequence[str]) -> sa.TextClause:
    """An INSERT that another run may have been quicker with."""
    columns, values = ", ".join(f'"{name}"' for name in names), ", ".join(f":{name}" for name in names)
    return sa.text(f"INSERT INTO {table} ({columns}) VALUES ({values}) ON CONFLICT DO NOTHING")  # noqa: S608  # names of our own


def _swap(connection: sa.Connection, position: Position, raised: int) -> None:
    names = (
        "offset", "clock", "as_of", "tick_offset", "version", "changed_at",
        "lines", "processed", "quarantined", "ignored", "derived",
    )  # fmt: skip
    values = {name: getattr(position, name) for name in names}
    values |= {"commit": position.commit + raised, "committed_at": now()}
    mine = {"my_commit": position.commit, "my_live": position.live}
    if connection.execute(_SWAP, {**values, **_mine(position), **mine}).rowcount != 1:
        raise _conflict(position)


def _check_current(database: Database, position: Position) -> None:
    """See that the swap would succeed, before the derived log is touched: beyond its end may lie another run's bytes."""
    with database.read() as connection:
        if connection.scalar(_NUMBER, _mine(position)) != position.commit:
            raise _conflict(position)


def _mine(position: Position) -> dict[str, int]:
    return {"my_id": position.id, "my_generation": position.generation}


def _conflict(position: Position) -> ConflictError:
    return ConflictError(
        "another run has committed since this one read its checkpoint",
        where=f"processor {position.processor}, {position.log}/{position.partition}",
        expected=f"commit number {position.commit}",
        do="This run has changed nothing; the other one goes on",
    )
