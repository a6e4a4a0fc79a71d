"""Generations: the replays that made them, which one is live, and the one transaction that moves from one to another."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from storage.backup import ARCHIVE_LOCK
from storage.commit import Position
from storage.database import Database
from storage.errors import AfterlogError, ConflictError, UsageError
from storage.locks import locked
from storage.manifest import archived_end
from storage.segment import fsync_directory
from storage.staged import Queued, Staged
from storage.steps import reached
from storage.store import Store
from storage.tables import Checkpoint, CommittedEnd, LiveGeneration, Replay, State, WrittenBy
from storage.times import now

RUNNING, READY, LIVE, DISCARDED = "RUNNING", "READY", "LIVE", "DISCARDED"
_CHECKPOINT: sa.Table = Checkpoint.__table__  # type: ignore[attr-defined]  # SQLModel hides it from the types
_REPLAY: sa.Table = Replay.__table__  # type: ignore[attr-defined]  # likewise
_LIVE: sa.Table = LiveGeneration.__table__  # type: ignore[attr-defined]  # likewise
_END: sa.Table = CommittedEnd.__table__  # type: ignore[attr-defined]  # likewise
_STATE: sa.Table = State.__table__  # type: ignore[attr-defined]  # likewise
_WRITTEN: sa.Table = WrittenBy.__table__  # type: ignore[attr-defined]  # likewise
_KEYS_AT_ONCE = 5_000


@dataclass(frozen=True)
class ReplayRow:
    """A replay as the database knows it; `plan` is JSON of what makes it."""

    generation: int
    name: str
    state: str
    plan: str
    created_at: int
    changed_at: int


def list_replays(database: Database) -> list[ReplayRow]:
    """Every replay that there ever was, oldest first."""
    with database.read() as connection:
        rows = connection.execute(sa.select(_REPLAY).order_by(_REPLAY.c.generation)).mappings().all()
    return [ReplayRow(**row) for row in rows]


def find_replay(database: Database, which: int | str) -> ReplayRow:
    """A replay by its generation's number, or by its name; the newest of that name that was not discarded.

    Raises:
        UsageError: there is none.
    """
    rows = list_replays(database)
    known = [row for row in rows if row.state != DISCARDED]
    for row in reversed([*[r for r in rows if r.state == DISCARDED], *known]):
        if row.name == str(which) or str(row.generation) == str(which):
            return row
    names = ", ".join(f"{row.generation} ({row.name})" for row in known)
    raise UsageError("no such replay", found=repr(which), expected=names or "none was made yet")


def create_replay(store: Store, name: str, plan: str) -> ReplayRow:
    """A new generation's row, RUNNING; its number is beyond every one that the database or a folder knows."""
    folders = [path.name.rpartition("@")[2] for path in (store.home / "logs").glob("*@*")]
    used = max((int(found) for found in folders if found.isdigit()), default=1)
    with store.database.write() as connection:
        newest = connection.scalar(sa.select(sa.func.max(_REPLAY.c.generation))) or 1
        generation, wall = max(used, newest) + 1, now()
        row = ReplayRow(generation, name or f"replay-{generation}", RUNNING, plan, wall, wall)
        connection.execute(sa.insert(_REPLAY), [vars(row)])
    return row


def set_state(database: Database, generation: int, state: str, plan: str | None = None) -> None:
    """Note how far a replay has come, and what else its plan knows by now."""
    values: dict[str, Any] = {"state": state, "changed_at": now()} | ({"plan": plan} if plan is not None else {})
    with database.write() as connection:
        connection.execute(sa.update(_REPLAY).where(_REPLAY.c.generation == generation).values(**values))


def read_ends(database: Database, logs: Mapping[str, int]) -> tuple[list[Position], dict[tuple[str, int], int]]:
    """The live checkpoints, and the committed ends of `logs` in their generations, as one transaction left them."""
    with database.moment() as connection:  # no commit comes in between
        live = sa.select(_CHECKPOINT).where(_CHECKPOINT.c.live.is_(True)).order_by(_CHECKPOINT.c.id)
        rows = connection.execute(live).mappings().all()
        ends = connection.execute(sa.select(_END.c.log, _END.c.generation, _END.c.partition, _END.c.end)).all()
    found = [Position(**{key: value for key, value in row.items() if key != "committed_at"}) for row in rows]
    return found, {(log, part): end for log, generation, part, end in ends if logs.get(log) == generation}


def discard(store: Store, generation: int) -> None:
    """Drop everything that a replay made, also in the archive. What a crash leaves of it is dropped when called again.

    Raises:
        ConflictError: the generation is live.
        AfterlogError: the archive refused.
    """
    database = store.database
    with database.write() as connection:
        if connection.scalar(sa.select(_LIVE.c.log).where(_LIVE.c.generation == generation).limit(1)) is not None:
            raise ConflictError(
                f"generation {generation} is live", do=f"Roll it back first: afterlog replays rollback {generation}"
            )
        connection.execute(
            sa.update(_REPLAY).where(_REPLAY.c.generation == generation).values(state=DISCARDED, changed_at=now())
        )
    reached("replay-discarded")
    mine = _CHECKPOINT.c.generation == generation
    with database.read() as connection:
        checkpoints = list(connection.scalars(sa.select(_CHECKPOINT.c.id).where(mine)))
    for checkpoint in checkpoints:
        _drop_state(database, checkpoint)
    with locked(store.lock_path(ARCHIVE_LOCK)):  # no segment comes into the archive meanwhile
        for path in (store.home / "logs").glob(f"*@{generation}"):
            for directory in filter(archived_end, path.glob("[0-9]*")):
                store.archive.remove(directory)
            shutil.rmtree(path)
        fsync_directory(store.home / "logs")
    with database.write() as connection:
        connection.execute(sa.delete(_END).where(_END.c.generation == generation))
        connection.execute(sa.delete(_WRITTEN).where(_WRITTEN.c.generation == generation))
        connection.execute(sa.delete(_CHECKPOINT).where(mine))


def sweep(store: Store) -> list[str]:
    """Finish what a crash interrupted: drop what is left of replays that were discarded. Says of which it could not, and why.

    What could not be dropped stands in nobody's way, and is tried again the next time: an archive may be away for days.
    """
    left = sa.select(_CHECKPOINT.c.generation).union(sa.select(_END.c.generation))
    with store.database.read() as connection:
        generations = set(connection.scalars(left))
    folders = {path.name.rpartition("@")[2] for path in (store.home / "logs").glob("*@*")}
    notes = []
    for row in list_replays(store.database):
        if row.state == DISCARDED and (row.generation in generations or str(row.generation) in folders):
            try:
                discard(store, row.generation)
            except AfterlogError as error:
                notes.append(
                    f"what is left of generation {row.generation}, which was discarded, could not be dropped yet: {error}"
                )
    return notes


def _drop_state(database: Database, checkpoint: int) -> None:
    """A part at a time: a live run's commit must not wait for all of it."""
    while True:
        keys = sa.select(_STATE.c.key).where(_STATE.c.checkpoint == checkpoint).limit(_KEYS_AT_ONCE)
        with database.write() as connection:
            some = list(connection.scalars(keys))
            if some:
                mine = (_STATE.c.checkpoint == checkpoint, _STATE.c.key.in_(some))
                connection.execute(sa.delete(_STATE).where(*mine))
        if len(some) < _KEYS_AT_ONCE:
            return


@dataclass(frozen=True)
class Reader:
    """One who reads a log that moves, by place in the new generation: `offset` is that one's end."""

    processor: str
    log: str
    partition: int
    offset: int
    clock: int
    own_generations: bool
    """Whether its checkpoints are of the log's generations (`deliver`), or it has a single one."""


@dataclass
class Move:
    """Everything that one promotion or rollback changes."""

    generations: dict[str, int]
    """Where the pointer of each log goes."""
    processors: dict[str, tuple[int, int]]
    """By processor, from which generation to which."""
    readers: list[Reader] = field(default_factory=list)
    expected: list[Position] = field(default_factory=list)
    """The live positions as they were read; anything else by now means that somebody has committed since."""


def move(staged: Staged, what: Move, replay: int, state: str) -> Queued:
    """Make other generations live: pointer, state, checkpoints of all who read them, the mails that are staged, all in one transaction.

    Raises:
        ConflictError: a run has committed meanwhile; nothing has changed.
    """
    reached("promotion-begun")
    connection = staged.connection
    with connection.begin():
        for position in what.expected:
            _check_unchanged(connection, position)
        for log, generation in what.generations.items():
            connection.execute(sa.delete(_LIVE).where(_LIVE.c.log == log))
            connection.execute(sa.insert(_LIVE), [{"log": log, "generation": generation}])
        for processor, (old, new) in what.processors.items():
            _turn(connection, processor, old, live=False)
            _turn(connection, processor, new, live=True)
        for reader in what.readers:
            _set_reader(connection, reader, what.generations[reader.log])
        queued = staged.apply(now())
        connection.execute(
            sa.update(_REPLAY).where(_REPLAY.c.generation == replay).values(state=state, changed_at=now())
        )
        reached("promotion-ready")
    reached("promotion-committed")
    return queued


def _check_unchanged(connection: sa.Connection, position: Position) -> None:
    mine = sa.select(_CHECKPOINT.c.commit, _CHECKPOINT.c.live).filter_by(id=position.id)
    found = connection.execute(mine.with_for_update()).first()
    if found is None or tuple(found) != (position.commit, True):
        raise ConflictError(
            "a run has committed meanwhile",
            where=f"processor {position.processor}, {position.log}/{position.partition}",
            do="Nothing has changed; promote again",
        )


def _turn(connection: sa.Connection, processor: str, generation: int, *, live: bool) -> None:
    """The commit number goes up, so that a run that holds the old one is refused."""
    mine = (_CHECKPOINT.c.processor == processor, _CHECKPOINT.c.generation == generation)
    connection.execute(sa.update(_CHECKPOINT).where(*mine).values(live=live, commit=_CHECKPOINT.c.commit + 1))


def _set_reader(connection: sa.Connection, reader: Reader, generation: int) -> None:
    """Stand at the new generation's end: what lies before it was compared, not read."""
    mine = (_CHECKPOINT.c.processor == reader.processor, _CHECKPOINT.c.log == reader.log,
            _CHECKPOINT.c.partition == reader.partition)  # fmt: skip
    place = {"offset": reader.offset, "clock": reader.clock}
    own = generation if reader.own_generations else 1
    if reader.own_generations:
        connection.execute(sa.update(_CHECKPOINT).where(*mine).values(live=False, commit=_CHECKPOINT.c.commit + 1))
    done = connection.execute(
        sa.update(_CHECKPOINT)
        .where(*mine, _CHECKPOINT.c.generation == own)
        .values(**place, live=True, commit=_CHECKPOINT.c.commit + 1)
    )
    if not done.rowcount:
        names = {"processor": reader.processor, "log": reader.log, "partition": reader.partition}
        fresh = Checkpoint.model_validate(names | place | {"generation": own}).model_dump(exclude={"id"})
        connection.execute(sa.insert(_CHECKPOINT), [fresh])
