"""Following a log with one processor: from its checkpoint, batch by batch and tick by tick, one commit after another."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

from storage.clock import Clock, Snapshot, Tick
from storage.commit import UNDECIDED, Pending, Position, Target, commit, load_position, save_version, spill
from storage.errors import AfterlogError, CorruptLogError, Stopped
from storage.event import Batch
from storage.reader import lost_log
from storage.state import StateStore
from storage.times import now, show
from tasks.processors.contract import Output
from tasks.processors.told import check_settled, told
from tasks.run import COLLECTOR, Run
from tasks.timeline import Place, Version, digest_of, going_on, lesser, make_processor, recorded_beyond

_DUE_AT_ONCE = 2_000
_DUE_IN_A_COMMIT = 20_000
"""A tick changes each state once, so that many commits write no more than one, and need less memory."""


class PartitionFollower:
    """One processor in one partition, under the processor's lock; whatever goes wrong, it is thrown away and made anew."""

    def __init__(self, run: Run, name: str, partition: int) -> None:
        self.run, self.partition = run, partition
        self.processor = run.topology.make(name)
        store, settings, log = run.store, run.store.settings, self.processor.reads
        self.derived_source = log in run.topology.derived_logs()
        self.max_line = 0 if self.derived_source else settings.max_line
        """The longest line of a raw log; it decides, as settings and code do."""
        self.generation = run.generation(self.processor.writes)
        self.source_generation = run.generation(log)
        self.position: Position = load_position(store.database, name, self.generation, log, partition, live=run.is_live)
        self.states: StateStore[Any] = StateStore(
            store.database, self.position.id, self.processor.state, settings.cache_keys,
            lambda value: self.processor.due_of(value),  # of whichever processor there is by then: a replay turns to others
        )  # fmt: skip
        self.reader = store.reader(log, partition, self.source_generation)
        self._earlier = store.reader(
            log, partition, self.source_generation
        )  # for single lines, so that the other stays where it reads
        self.clock = Clock(store, run.topology.raw_logs())
        self.target = self._make_target()
        self._out = self._new_output()
        self._pending_bytes, self._pending_since = 0, time.thread_time()
        self._committed = self._marks()
        self.versions = self._find_versions()
        """Those to go by, until what the clock has recorded is passed; none, as a rule, on a live log."""
        self._record_version()

    def close(self) -> None:
        """Close every file."""
        (self.run.derived_batches if self.derived_source else self.run.batches).leave(self.reader)
        self.reader.close()
        self._earlier.close()
        self.clock.close()

    def snapshot(self) -> Snapshot:
        """What is there to follow now."""
        log = self.processor.reads
        if self.derived_source:
            return Snapshot(self.run.store.committed_end(log, self.partition, self.source_generation))
        return self.clock.snapshot(log, self.partition, self.position.tick_offset)

    def advance(self, snapshot: Snapshot, *, hold: bool = False) -> bool:
        """Take everything that `snapshot` shows, and commit it; says whether there was anything.

        With `hold` the last of it waits for the commit of the next call, or for `confirm`.

        Raises:
            Stopped: the run is to stop; what was not committed will be done again.
            LostDataError: the log is shorter than the checkpoint says.
        """
        goal, before = Place(snapshot.end, snapshot.clock_end), self._committed
        if goal.offset < self.position.offset:
            raise lost_log(f"processor {self.processor.name}, {self.reader.name}", goal.offset, self.position.offset)
        with COLLECTOR.paused():
            for place in [v.place for v in self.versions if not v.place.is_reached(self.position)]:
                self._go(lesser(place, goal))
                if place.is_reached(self.position):
                    self.confirm()
                    self._record_version()
            self._go(goal)
        if not hold:
            self.confirm()
        return self._marks() != before

    def confirm(self) -> None:
        """Commit what `advance` held."""
        if self._marks() != self._committed:
            self._commit()

    def unconfirmed(self) -> bool:
        """Whether the derived log that is followed has bytes that its own processor has not committed yet."""
        return self.derived_source and self.reader.end() > self.position.offset

    def tick_wanted(self, as_of: int) -> bool:
        """Whether a tick of `as_of` would find something due."""
        earliest = self.states.earliest
        return self.processor.ticks and earliest is not None and earliest < self.processor.due(as_of)

    def _go(self, place: Place) -> None:
        """Take the ticks and lines before `place`, each tick where it was noted."""
        position = self.position
        while position.tick_offset < place.tick_offset:  # a part at a time: there may be ticks of years
            ticks, upto = self.clock.ticks(position.tick_offset, place.tick_offset)
            for tick in ticks:
                self._take_tick(tick)
            position.tick_offset = upto
            if self._is_enough():
                self._commit()  # so that it is known again what is due next
        self._lines_to(place.offset)

    def _lines_to(self, end: int) -> None:
        position = self.position
        if end < position.offset:
            raise CorruptLogError(
                "a tick lies before the checkpoint", where=f"processor {self.processor.name}, {self.reader.name}",
                found=end, expected=f"at least {position.offset}", do="Restore the log `clock` and the database together",
            )  # fmt: skip
        cache, log = self.run.derived_batches if self.derived_source else self.run.batches, self.processor.reads
        while position.offset < end:
            if self.run.stop.is_set():
                raise Stopped("stopped between two batches")
            catching_up = end - position.offset > self.run.store.settings.batch_bytes
            if catching_up:
                cache.keep_pace(self.reader, position.offset)
            with self.run.turn if catching_up else nullcontext():
                batch = cache.get(self.reader, log, self.partition, position.offset, end, position.clock, self.max_line)
                if batch is None:
                    break
                self._take(batch)
                self._spill()
                if self._is_enough():
                    self._commit()

    def _is_enough(self) -> bool:
        """Whether what is pending makes a commit: by its bytes, by the work in it, or by the memory that its state takes."""
        settings = self.run.store.settings
        return (
            self._pending_bytes >= settings.commit_bytes
            or self.states.dirty + self.processor.waiting() >= settings.cache_keys
            or time.thread_time() - self._pending_since >= settings.commit_every / 1000
        )

    def _take(self, batch: Batch) -> None:
        if not self._pending_bytes:
            self._pending_since = time.thread_time()  # work, not waiting: others share the processor
        out, position, ignored = self._out, self.position, self._out.ignored
        self._earlier.check_in_place()
        with told(self.processor, f"{self.reader.name}, from {batch.start} to {batch.end}"):
            if not self.states.complete:
                self.states.prefetch(self.processor.keys(batch))
            self.processor.process(batch, self.states, out)
        ignored = out.ignored - ignored
        if not 0 <= ignored <= len(batch.events) or len(batch.events) + len(batch.bad) != batch.lines:
            raise AfterlogError(
                f"processor {self.processor.name} does not account for every event",
                where=f"{self.reader.name}, from {batch.start} to {batch.end}",
                found=f"{ignored} ignored of {len(batch.events)} good and {len(batch.bad)} bad",
                expected=f"{batch.lines} in all",
            )
        position.lines += batch.lines
        position.quarantined += len(batch.bad)
        position.ignored += ignored
        position.processed += len(batch.events) - ignored
        position.offset, position.clock = batch.end, batch.clock
        self._pending_bytes += batch.end - batch.start

    def _take_tick(self, tick: Tick) -> None:
        """Take a tick of the clock in its place, if it is of this partition."""
        at = tick.ends.get(self.reader.name)
        if at is not None:
            self._lines_to(at)
            self._apply(tick)
        self.position.tick_offset = tick.next_offset

    def _apply(self, tick: Tick) -> None:
        """Take a tick: everything due by then, in order, a part at a time."""
        position = self.position
        as_of = max(position.as_of, tick.as_of)
        if self.tick_wanted(as_of):
            while not self._tick(as_of, self.processor.due(as_of)):
                pass
        position.as_of, position.clock = as_of, max(position.clock, as_of)

    def _tick(self, as_of: int, bound: int) -> bool:
        """Take what is due before `bound`, until it makes a commit; says whether that was all."""
        for due in self.states.due_before(bound, _DUE_AT_ONCE):
            if self.run.stop.is_set():
                raise Stopped("stopped within a tick")
            self._earlier.check_in_place()
            with told(self.processor, f"{self.reader.name}, a tick of {show(as_of)}"):
                self.processor.tick(as_of, due, self.states, self._out)
                check_settled(self.processor, (key for key, _ in due if self.states.is_still_due(key, bound)))
            self._spill()
            if self._is_enough() or self.states.dirty >= _DUE_IN_A_COMMIT:
                self._commit()
                return False
        return True

    def _spill(self) -> None:
        """Let go of derived lines that are many already, ahead of their commit."""
        out = self._out
        if self.target is not None and out.size >= self.run.store.settings.spill_bytes:
            self._note(spill(self.run.store.database, self.reader, self.target, self.position, out.lines))
            self.position.derived += len(out.lines)
            out.lines, out.size = [], 0

    def _commit(self) -> None:
        if self._marks() == self._committed and not self.states.dirty:
            return
        out = self._out
        with told(self.processor, f"{self.reader.name}, before a commit"):
            self.processor.flush(out)
        self.position.derived += len(out.lines)
        pending = Pending(out.lines, out.statements, self.states)
        cut = commit(self.run.store.database, self.reader, self.target, self.position, pending)
        self.states.committed()
        self._note(cut)
        self._out, self._pending_bytes, self._committed = self._new_output(), 0, self._marks()
        self._pending_since = time.thread_time()

    def _note(self, cut: str) -> None:
        if cut:
            self.run.notes.append(f"{self.processor.name}: {cut}")

    def _marks(self) -> tuple[int, ...]:
        position = self.position
        return position.offset, position.tick_offset, position.clock, position.as_of

    def _new_output(self) -> Output:
        made = self.processor
        return Output(made.reads, self.partition, self._earlier.line_here, self.derived_source, made.writes)

    def _make_target(self) -> Target | None:
        return self.run.target(self.processor.writes, self.partition)

    def _find_versions(self) -> list[Version]:
        """What the clock has recorded beyond the checkpoint: the database is an older one, or new."""
        position, tail = self.position, self.run.has_tail(self.processor.writes, self.partition)
        if position.version == UNDECIDED or (self.derived_source and not tail):
            return []  # who follows a derived log takes no ticks, and would read all of the clock
        try:
            versions = recorded_beyond(self.clock, self.run.topology, position)
        except AfterlogError as error:  # the archive is away, say: today's hold, and must give the bytes that are there
            self.run.notes.append(f"{position.processor}: what was recorded of its settings cannot be read: {error}")
            return []
        if versions and not tail:  # there is nothing to come to: today's hold, and what is recorded never came to be
            position.version = ""
        return versions if tail else []

    def _turn(self) -> None:
        """Have the processor that goes on from here: today's, or, where the clock has recorded more, as it was then.

        So whoever is behind comes to the bytes that are in the derived log already.
        """
        if not self.versions:
            return
        made = self.run.topology.make(self.processor.name).version()
        today = Version(Place(0), **made, max_line=self.max_line and self.run.store.settings.max_line)
        version, digest = going_on(self.versions, self.position, today)
        self.position.version = ""  # nothing has changed: the database is told what the clock knows
        save_version(self.run.store.database, self.position, digest)
        self.versions = [] if version is today else self.versions
        self._take_up(version)

    def _take_up(self, version: Version) -> None:
        """Have the processor with the settings of a version."""
        self.processor = make_processor(self.run.topology, self.processor.name, version.settings, {})
        self.max_line = self.max_line and (version.max_line or self.run.store.settings.max_line)
        self._out = self._new_output()

    def _record_version(self) -> None:
        """Write down settings and code, where they are other than at the last commit, before they are used."""
        self._turn()
        position, version = self.position, self.processor.version()
        digest = digest_of(**version, max_line=self.max_line)
        if digest == position.version:
            return
        if position.version == digest_of(**version, max_line=0):
            position.version = ""  # noted by an Afterlog that did not record the longest line: nothing has changed
        known = position.version
        if known:  # a crash in between must not leave a record in the clock of what was never used
            save_version(self.run.store.database, position, UNDECIDED)
            self.run.let_readers_differ(self.processor, self.partition)
        limit = {"max_line": self.max_line} if self.max_line else {}
        place = {"at": now(), "tick_offset": position.tick_offset, "clock": position.clock} | limit
        start = {self.reader.name: position.offset}
        self.clock.record_version(position.processor, self.generation, {**version, **place}, start)
        save_version(self.run.store.database, position, digest)
        if known:
            self.run.notes.append(
                f"{position.processor}: its code or settings changed; they hold from {self.reader.name}:{position.offset} on"
            )
