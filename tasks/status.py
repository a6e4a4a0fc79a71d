"""How things stand: each processor's checkpoint against its log's end, who is at it, the mails, and what is wrong.

Imports neither Prefect nor SQLModel, and SQLAlchemy only where the database is no SQLite: it is asked in incidents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from storage.batches import BatchCache
from storage.errors import AfterlogError
from storage.event import MAX_DEPTH, MAX_DERIVED_DEPTH
from storage.locks import is_held, signed_by
from storage.look import Look, Row
from storage.mails import LONGEST_WAIT
from storage.reader import PartitionReader
from storage.segment import list_segments
from storage.settings import Settings
from storage.store import Store
from storage.times import now, show, show_duration
from tasks.topology import DELIVER, Topology

IDLE, WORKING, STUCK, DEAD, PAUSED = "idle", "working", "stuck", "dead", "paused"
_NEAR = 65_536  # bytes that are looked through for an event after bad lines


@dataclass(frozen=True)
class ProcessorStatus:
    """One processor in one partition.

    `lag_ms` is how long the first event that it has not taken has been in the log, or how long a tick has been due.
    `state`: idle (nothing to do), working, stuck (held or failing, and no commit), dead (work that nobody is at), paused.
    """

    processor: str
    log: str
    partition: int
    state: str
    held_by: str
    offset: int
    end: int
    lag_bytes: int
    lag_ms: int
    commit: int
    committed_at: int
    read: int
    processed: int
    quarantined: int
    ignored: int
    derived: int


@dataclass(frozen=True)
class MailStatus:
    """The queue of mails; `oldest_due_ms` is how long the one that has been due longest has waited."""

    states: dict[str, int]
    brake: str
    brake_reason: str
    brake_since: int
    due: int
    oldest_due_ms: int


@dataclass(frozen=True)
class Status:
    """Everything that `afterlog status` shows; `problems` has one sentence each, none where all is well."""

    home: str
    processors: list[ProcessorStatus]
    mails: dict[str, int]
    delivery: MailStatus
    problems: list[str] = field(default_factory=list)


def read_status(store: Store, topology: Topology) -> Status:
    """The status as it is committed now; a processor that never ran is shown at its log's beginning."""
    look = Look(store)
    try:
        return _Reading(store, topology, look).status()
    finally:
        look.close()


class _Reading:
    """One reading of the status, at one moment."""

    def __init__(self, store: Store, topology: Topology, look: Look) -> None:
        self._store, self._topology, self._look = store, topology, look
        self._settings: Settings = store.settings
        self._wall = now()
        self._derived = topology.derived_logs()
        self._due = {p.name: p.due(0) for p in topology.all() if p.ticks}
        self._holders: dict[str, str] = {}
        self._failures = {row["processor"]: row for row in look.rows("SELECT * FROM failure")}
        self._problems: list[str] = []
        self._cut: dict[str, str] = {}
        self._unreadable: dict[str, str] = {}
        self._ahead: dict[str, int] = {}

    def status(self) -> Status:
        """Read everything; the problems last, as they were found."""
        mails = self._mails()
        rows = [self._row(place, mails) for place in self._places()]
        self._tell_logs()
        self._tell_processors(rows)
        self._tell_mails(mails)
        self._tell_shifts()
        return Status(str(self._store.home), rows, mails.states, mails, self._problems)

    def _places(self) -> Iterable[Row]:
        """A checkpoint for each processor and partition, made up where it never ran, those of `deliver` last."""
        found = self._look.rows("SELECT * FROM checkpoint WHERE live ORDER BY id")
        known = {(row["processor"], row["log"], row["partition"]): row for row in found}
        for processor in self._topology.all():
            there = self._store.partitions(processor.reads, self._look.live_generation(processor.reads))
            # One whose folder is lost was read from, all the same.
            read = {part for name, log, part in known if (name, log) == (processor.name, processor.reads)}
            for partition in sorted({*there, *read}):
                key = (processor.name, processor.reads, partition)
                yield known.get(key) or {"processor": key[0], "log": key[1], "partition": partition, "id": None}
        yield from (row for row in found if row["processor"] == DELIVER)

    def _row(self, place: Row, mails: MailStatus) -> ProcessorStatus:
        numbers = ("commit", "committed_at", "processed", "quarantined", "ignored", "derived")
        name, log, partition, offset = place["processor"], place["log"], place["partition"], place.get("offset", 0)
        lag_ms = self._overdue(place)
        try:
            end, waited = self._read(place)
            lag_ms = max(lag_ms, waited)
        except (AfterlogError, OSError) as error:  # one log that is broken hides nothing of the others
            self._unreadable[f"{log}/{partition}"] = str(error)
            end = offset
        if log not in self._derived and place.get("clock", 0) > self._wall + self._settings.ahead:
            self._ahead[f"{log}/{partition}"] = place["clock"]
        state = self._state(name, end - offset, lag_ms, place.get("committed_at", 0))
        if f"{log}/{partition}" in self._unreadable:
            state = STUCK
        if name == DELIVER and mails.brake != "RUNNING":
            state = PAUSED
        return ProcessorStatus(
            name, log, partition, state, self._holder(name), offset, end, max(0, end - offset), lag_ms,
            read=place.get("lines", 0), **{key: place.get(key, 0) for key in numbers},
        )  # fmt: skip

    def _read(self, place: Row) -> tuple[int, int]:
        """The end of a place's log, and how long (ms) something beyond the place has been there; 0 where nothing is."""
        log, partition, offset = place["log"], place["partition"], place.get("offset", 0)
        generation = self._look.live_generation(log)
        with self._store.reader(log, partition, generation) as reader:
            # Asked for first, since a log grows before that is committed.
            committed = self._look.committed_end(log, partition, generation) if log in self._derived else None
            there = reader.end()
            end = there if committed is None else committed
            if end > there:
                self._cut[f"{log}/{partition}"] = f"it ends at {there}, and up to {end} it was there"
            return end, max(1, self._waited(reader, place, end)) if min(end, there) > offset else 0

    def _waited(self, reader: PartitionReader, place: Row, end: int) -> int:
        """How long the first event not taken has been there.

        A bad line has no clock: the first event near it tells, or else when the log last grew. Where nothing but bad
        lines comes in that is always just now: of many, the last commit tells.
        """
        log, partition, offset, clock = place["log"], place["partition"], place.get("offset", 0), place.get("clock", 0)
        depth = MAX_DERIVED_DEPTH if log in self._derived else MAX_DEPTH
        for size in (1, _NEAR):
            batch = BatchCache(size, 1 << 30, depth, kept=1).get(reader, log, partition, offset, end, clock)
            if batch and batch.events:
                return self._wall - batch.events[0].clock
        newest = list_segments(reader.directory)[-1:]
        grown = max((each.path.stat().st_mtime_ns // 1_000_000 for each in newest), default=self._wall)
        return self._wall - (min(grown, place.get("committed_at") or grown) if end - offset > _NEAR else grown)

    def _overdue(self, place: Row) -> int:
        """How long something has been due at a tick that nobody has written down: time passes on a silent log too."""
        if place["processor"] not in self._due or place["id"] is None:
            return 0
        [row] = self._look.rows("SELECT MIN(due) AS due FROM state WHERE checkpoint = :id", id=place["id"])
        if row["due"] is None:
            return 0
        due_at = row["due"] - self._due[place["processor"]] + self._settings.settle + 2 * self._settings.tick_every
        return int(max(0, self._wall - due_at))

    def _state(self, name: str, lag_bytes: int, lag_ms: int, committed_at: int) -> str:
        if lag_bytes < 0:
            return STUCK
        if not lag_ms:
            return IDLE
        held = bool(self._holder(name))
        failure = self._failures.get(name)
        if failure and self._wall >= failure["at"] >= committed_at and (failure["times"] > 1 or not held):
            return STUCK
        # Either alone may be long ago, and nothing wrong; a commit of a clock that was ahead tells nothing.
        waits = lag_ms if committed_at > self._wall else min(lag_ms, self._wall - committed_at)
        if held:
            return STUCK if waits > self._settings.stuck_after else WORKING
        return DEAD if waits > self._settings.dead_after else WORKING

    def _holder(self, name: str) -> str:
        """Who holds the lock of `name` now; empty where nobody does."""
        if name not in self._holders:
            path = self._store.lock_path(f"{name}.lock")
            self._holders[name] = (signed_by(path) or "somebody") if is_held(path) else ""
        return self._holders[name]

    def _mails(self) -> MailStatus:
        states = self._look.rows("SELECT state, COUNT(*) AS mails FROM delivery GROUP BY state")
        brake = self._look.rows("SELECT state, reason, since FROM brake WHERE name = :name", name=DELIVER)
        # A mail is due from when it was queued, or from when its next try was to be.
        [due] = self._look.rows(
            "SELECT COUNT(*) AS mails, MIN(CASE WHEN next_at > 0 THEN next_at ELSE changed_at END) AS oldest "
            "FROM delivery WHERE state = 'WAITING' AND (next_at <= :wall OR next_at > :beyond)",
            wall=self._wall,
            beyond=self._wall + LONGEST_WAIT,
        )
        on = brake[0] if brake and brake[0]["state"] != "RUNNING" else {}
        return MailStatus(
            states={row["state"]: row["mails"] for row in states},
            brake=on.get("state", "RUNNING"),
            brake_reason=on.get("reason", ""),
            brake_since=on.get("since", 0),
            due=due["mails"],
            oldest_due_ms=max(0, self._wall - due["oldest"]) if due["mails"] else 0,
        )

    def _tell_logs(self) -> None:
        self._problems += [f"{log} was cut: {how}" for log, how in self._cut.items()]
        self._problems += [f"{log} cannot be read: {why}" for log, why in self._unreadable.items()]
        for log, clock in self._ahead.items():
            self._problems.append(
                f"the clock of {log} lies ahead, at {show(clock)}: one of its lines says so, or a tick of a wall clock that was "
                "ahead, and what comes in until then counts as late"
            )

    def _tell_processors(self, rows: list[ProcessorStatus]) -> None:
        for row in rows:
            where = f"{row.processor} ({row.log}/{row.partition})"
            lag = f"{row.lag_bytes} bytes" if row.lag_bytes else "a tick"
            waits = f"{lag} for {show_duration(row.lag_ms)}"
            failure = self._failures.get(row.processor)
            if f"{row.log}/{row.partition}" in self._unreadable:
                continue  # which is told of the log, once
            if row.lag_bytes == 0 and row.offset > row.end:
                self._problems.append(
                    f"{where} is stuck: its checkpoint {row.offset} lies beyond the log's end {row.end}"
                )
            elif row.state == STUCK and failure and self._wall >= failure["at"] >= row.committed_at:
                last = f"failed {failure['times']} times since its last commit, last at {show(failure['at'])}"
                self._problems.append(f"{where} is stuck: it {last}: {failure['reason']}")
            elif row.state == STUCK:
                quiet = show_duration(max(0, self._wall - row.committed_at)) if row.committed_at else "ever"
                self._problems.append(f"{where} is stuck: {waits} to do, no commit for {quiet}, held by {row.held_by}")
            elif row.state == DEAD:
                self._problems.append(f"{where} is dead: {waits} to do, and nobody is at it")

    def _tell_mails(self, mails: MailStatus) -> None:
        held, waited = self._holder(DELIVER), show_duration(mails.oldest_due_ms)
        if mails.brake != "RUNNING":
            by = "is paused" if mails.brake == "PAUSED" else "has stopped itself"
            self._problems.append(
                f"delivery {by} since {show(mails.brake_since)}: {mails.brake_reason}; {mails.due} mails are held"
            )
        elif held and mails.oldest_due_ms > self._settings.stuck_after:
            self._problems.append(
                f"delivery is stuck: {mails.due} mails are due, the oldest for {waited}, held by {held}"
            )
        elif not held and mails.oldest_due_ms > self._settings.dead_after:
            self._problems.append(
                f"delivery is dead: {mails.due} mails are due, the oldest for {waited}, and nobody is at it"
            )
        doubtful = mails.states.get("UNKNOWN", 0) + (0 if held else mails.states.get("CLAIMED", 0))
        if doubtful:
            self._problems.append(f"{doubtful} mails are in doubt: see `afterlog deliveries list --state UNKNOWN`")

    def _tell_shifts(self) -> None:
        """A runner that is gone shows on an idle log too: nobody holds what a shift had, and nobody has committed since."""
        for owner in self._look.rows("SELECT flow, since FROM flow_owner ORDER BY flow"):
            raw = owner["flow"] == "process"
            names = self._topology.on_raw_logs() if raw else [*self._topology.on_derived_logs(), DELIVER]
            gone = self._wall - owner["since"] > self._settings.shift_every + self._settings.dead_after
            if not gone or any(self._holder(name) for name in names):
                continue
            last = self._look.rows("SELECT processor, MAX(committed_at) AS at FROM checkpoint GROUP BY processor")
            latest = max((row["at"] for row in last if row["processor"] in names), default=0)
            if latest <= owner["since"] + self._settings.shift_longest:
                self._problems.append(
                    f"no shift of {owner['flow']} is at work; the last one took over at {show(owner['since'])}"
                )
