"""The two ways to run a processor: to the end of what is there, or following until told to stop."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import sqlalchemy as sa

from storage.batches import BatchCache
from storage.clock import Clock, Tick
from storage.commit import POSITION, Position
from storage.errors import Stopped, UsageError
from storage.store import Store
from storage.tables import Checkpoint
from storage.times import now, show
from tasks.follow import PartitionFollower
from tasks.run import COLLECTOR, Growth, Run

AsOf = int | Literal["now", "log-end"]
IDLE_WAIT = 1.0
UNCONFIRMED_WAIT = 0.005
_CHECKPOINT: sa.Table = Checkpoint.__table__  # type: ignore[attr-defined]  # SQLModel hides it from the types
_POSITIONS = sa.select(*POSITION).order_by(_CHECKPOINT.c.id)
_LIVE_POSITIONS = _POSITIONS.where(_CHECKPOINT.c.live.is_(True))


@dataclass
class Summary:
    """What a processor did in a run, in all its partitions."""

    processor: str
    lines: int = 0
    processed: int = 0
    quarantined: int = 0
    ignored: int = 0
    derived: int = 0
    bytes: int = 0
    first: int | None = None
    last: int = 0

    def add(self, before: Position, after: Position) -> None:
        """Count what lies between two positions of a partition."""
        for name in ("lines", "processed", "quarantined", "ignored", "derived"):
            setattr(self, name, getattr(self, name) + getattr(after, name) - getattr(before, name))
        self.bytes += after.offset - before.offset
        self.first = before.offset if self.first is None else min(self.first, before.offset)
        self.last = max(self.last, after.offset)


class FinalTick:
    """The tick at the end of a finite run: the first follower to get there writes it, the others find it."""

    def __init__(self, as_of: AsOf) -> None:
        self._as_of, self._lock, self._written = as_of, threading.Lock(), False

    def write(self, run: Run, taken: Sequence[Position] = ()) -> None:
        """Write the tick, once for the run; `taken` says how far the logs have been read, committed or not.

        Raises:
            UsageError: its time lies ahead of the wall clock.
        """
        with self._lock:
            if not self._written:
                with Clock(run.store, run.topology.raw_logs()) as clock:
                    clock.tick(self._time(run, clock, taken))
                self._written = True

    def _time(self, run: Run, clock: Clock, taken: Sequence[Position]) -> int:
        if self._as_of == "now":
            return now() - run.store.settings.settle
        return greatest_clock(run, clock, taken) if self._as_of == "log-end" else self._as_of


def check_as_of(as_of: AsOf) -> AsOf:
    """`as_of`, if it is not later than now.

    Raises:
        UsageError: it is.
    """
    if isinstance(as_of, int) and as_of > (wall := now()):
        raise UsageError(
            "as-of lies ahead",
            found=show(as_of),
            expected=f"at most now, {show(wall)}",
            do="Give a time that has passed",
        )
    return as_of


def tick_now(run: Run) -> Tick | None:
    """A tick of wall time, less what writers may still be busy with: at a run's start, and at a shift's end."""
    with Clock(run.store, run.topology.raw_logs()) as clock:
        return clock.tick(now() - run.store.settings.settle)


def process_to_end(run: Run, name: str, final: FinalTick | None) -> Summary:
    """Bring a processor to the end of its log, then write the run's last tick, or find it, and apply that.

    Where another run holds the processor, this one does not compete: it waits until that one has got there.

    Raises:
        Stopped: the run is to stop.
        AfterlogError: the processor failed; what it committed stands.
    """
    summary, lock = Summary(name), run.lock(name)
    if lock.try_acquire():
        try:
            with COLLECTOR.paused():
                _bring_all(run, name, summary, final)
        finally:
            lock.release()
        return summary
    for last_round in (False, True) if final else (True,):
        if last_round and final is not None:
            final.write(run)
        for partition in run.store.partitions(run.topology.reads(name)):
            _bring(run, name, partition, summary)
    return summary


def follow(run: Run, name: str) -> Summary:
    """Follow a log with a processor until the run is to stop.

    It waits for the processor's lock first, so a successor may be started while its predecessor still works.
    """
    summary = Summary(name)
    lock = run.lock(name)
    try:
        run.stand_by(name)
        while not run.stop.is_set():
            run.take(lock)
            growth = Growth(run.store, [run.topology.reads(name)])
            with _followers(run, name, summary) as followers:
                while not (run.stop.is_set() or run.promoting() or growth.seen()):
                    beat = run.pulse.beat
                    if not _round(run, followers):
                        run.pulse.wait(beat, _patience(run, followers))
            lock.release()
    except Stopped:
        pass  # what was committed stands; the successor goes on from there
    finally:
        lock.release()
    return summary


def positions(store: Store, *, every: bool = False) -> list[Position]:
    """The checkpoints of what is live, as they are committed; of every generation where `every` says so."""
    with store.database.read() as connection:
        return [Position(*row) for row in connection.execute(_POSITIONS if every else _LIVE_POSITIONS)]


def greatest_clock(run: Run, clock: Clock, taken: Sequence[Position] = ()) -> int:
    """The greatest clock of the raw logs up to their ends, read on from the checkpoint, or place `taken`, nearest to each."""
    known = [*positions(run.store), *taken]
    greatest = 0
    for log in run.topology.raw_logs():
        for partition in run.store.partitions(log):
            nearest = max(
                (p for p in known if (p.log, p.partition) == (log, partition)), key=lambda p: p.offset, default=None
            )
            offset, stamp = (nearest.offset, nearest.clock) if nearest else (0, 0)
            cache = BatchCache(1 << 20, run.store.settings.max_line, kept=1)
            with run.store.reader(log, partition) as reader:
                while batch := cache.get(reader, log, partition, offset, reader.end(), stamp):
                    offset, stamp = batch.end, batch.clock
            greatest = max(greatest, stamp)
    last = clock.last_tick()
    return max(greatest, last.as_of if last else 0)


def _bring_all(run: Run, name: str, summary: Summary, final: FinalTick | None) -> None:
    """`process_to_end` of a processor whose lock is held: the last events and the tick after them are one commit.

    Unless there are several partitions: one that fails takes nothing of another's work with it.
    """
    with _followers(run, name, summary) as followers:
        if final is not None:
            for follower in followers:
                follower.advance(follower.snapshot(), hold=len(followers) == 1)
            try:
                final.write(run, [follower.position for follower in followers])
            except Exception:
                for follower in followers:
                    follower.confirm()
                raise
        while _round(run, followers, may_tick=False):
            pass


def _bring(run: Run, name: str, partition: int, summary: Summary) -> None:
    """Bring one partition to where its log is now, by own work or by waiting for the run that is at it."""
    lock = run.lock(name)
    log = run.topology.reads(name)
    if log in run.topology.derived_logs():
        end, tick_offset = run.store.committed_end(log, partition), 0
    else:
        with Clock(run.store, run.topology.raw_logs()) as clock, run.store.reader(log, partition) as reader:
            last = clock.last_tick()
            end = max(reader.end(), last.ends.get(f"{log}/{partition}", 0) if last else 0)
            tick_offset = last.next_offset if last else 0
    while not lock.try_acquire():
        at = next(
            (p for p in positions(run.store) if (p.processor, p.log, p.partition) == (name, log, partition)), None
        )
        if at is not None and at.offset >= end and at.tick_offset >= tick_offset:
            return
        if run.stop.wait(0.02):
            raise Stopped(f"stopped while waiting for {lock.held_by()}")
    try:
        with _followers(run, name, summary, partition) as followers:
            while _round(run, followers, may_tick=False):
                pass
    finally:
        lock.release()


@contextmanager
def _followers(
    run: Run, name: str, summary: Summary, partition: int | None = None
) -> Iterator[list[PartitionFollower]]:
    """The followers of a processor's partitions; what they did is counted when they end, however they end."""
    log = run.topology.reads(name)
    followers: list[PartitionFollower] = []
    before: list[Position] = []
    try:
        for part in run.store.partitions(log) if partition is None else [partition]:
            followers.append(PartitionFollower(run, name, part))
            if (target := followers[-1].target) is not None:
                target.author = run.author
            before.append(replace(followers[-1].position))
            run.pulse.watch(followers[-1].reader.directory)
        yield followers
    finally:
        for follower in followers:
            follower.close()
        after = {p.id: p for p in positions(run.store, every=True)} if before else {}
        for start in before:
            summary.add(start, after[start.id])


def _round(run: Run, followers: list[PartitionFollower], *, may_tick: bool = True) -> bool:
    """Let each follower take what is there; says whether there was anything."""
    busy = [follower.advance(follower.snapshot()) for follower in followers]
    if any(busy) or not may_tick:
        return any(busy)
    as_of = now() - run.store.settings.settle
    for follower in followers:
        if follower.tick_wanted(as_of) and as_of >= follower.position.as_of + run.store.settings.tick_every:
            return followers[0].clock.tick(as_of) is not None  # always the same: it opens every partition of every log
    return False


def _patience(run: Run, followers: list[PartitionFollower]) -> float:
    """How long a follower that found nothing may sleep if no log grows: until something falls due."""
    for follower in followers:
        if follower.unconfirmed():
            return UNCONFIRMED_WAIT
    settings, wall = run.store.settings, now()
    waits = [IDLE_WAIT]
    for follower in followers:
        if follower.processor.ticks and follower.states.earliest is not None:
            delay = follower.states.earliest - follower.processor.due(0) + settings.settle - wall
            waits.append(max(delay, settings.tick_every) / 1000)
    return min(waits)
