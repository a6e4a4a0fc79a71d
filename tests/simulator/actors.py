"""Who acts: writers, runs of all kinds, and people with a backup; the real code, each in a process of its own."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.append import LOCK
from storage.backup import make_backup
from storage.clock import Clock, Snapshot
from storage.door import _partition, append_events, append_lines, is_ahead
from storage.errors import AppendError, ConflictError
from storage.locks import RunLock, locked
from storage.restore import restore_database, restore_logs
from storage.segment import list_segments
from storage.store import Store
from tasks import process as work
from tasks.deliver import deliver_to_end
from tasks.follow import PartitionFollower
from tasks.run import Run
from tests.simulator.disk import Process
from tests.simulator.lines import Lines, tag_of
from tests.simulator.world import BrokenPromiseError, World

Confirmed = list[tuple[str, int, int, bytes]]
"""Log, partition, offset and line."""


@dataclass
class Living:
    """A process that lives from one step to the next, and what it holds."""

    process: Process
    store: Store | None = None
    run: Run | None = None
    followers: dict[str, list[PartitionFollower]] = field(default_factory=dict)
    locks: dict[str, RunLock] = field(default_factory=dict)
    saw: Snapshot | None = None


class Actors:
    """What can happen in a step. Each method is one thing that somebody does."""

    def __init__(self, world: World) -> None:
        self.world, self.random = world, world.random
        self.lines = Lines(world.random)
        self.confirmed: Confirmed = []
        self.writers: dict[str, Living] = {}
        self.shift: Living | None = None
        self.stray: Living | None = None
        self.backup: Path | None = None
        self._count = 0

    def forget_all(self) -> None:
        """Nobody is alive any more."""
        for living in (*self.writers.values(), self.shift, self.stray):
            if living is not None:
                self.world.seam.end(living.process)
        self.writers, self.shift, self.stray = {}, None, None

    def append(self) -> None:
        """A writer, one of two, appends events or raw lines."""
        name = self.random.choice(["writer 1", "writer 2"]) if self.world.disk.process is None else "writer 3"
        writer = self.writers.get(name)
        if writer is None or writer.process.dead:
            writer = self.writers[name] = Living(Process(name))
        count = self.random.choice([1, 1, 2, 5])
        if self.random.random() < 0.6:
            events = [self.lines.event(self.world.wall) for _ in range(count)]
            self.world.act(writer.process, lambda: self._append_events(writer, events), lives_on=True)
        else:
            raw = [self.lines.raw(self.world.wall) for _ in range(count)]
            self.world.act(writer.process, lambda: self._append_lines(writer, raw), lives_on=True)

    def _append_events(self, writer: Living, events: list[dict[str, Any]]) -> None:
        store = writer.store = writer.store or self.world.store()
        try:
            positions = append_events(store, "events", events)
        except AppendError as error:
            rest = [events[i] for i in self._named(error, [json.dumps(each).encode() for each in events])]
            append_events(store, "events", rest)
            return
        for (partition, offset), event in zip(positions, events, strict=True):
            line = self._confirm("events", partition, offset)
            if tag_of(line) != event["context"]["tag"]:
                raise BrokenPromiseError(f"at events/{partition}:{offset} lies {line!r}, confirmed was {event}")

    def _append_lines(self, writer: Living, raw: list[bytes]) -> None:
        store = writer.store = writer.store or self.world.store()
        try:
            done = append_lines(store, "events", raw)
        except AppendError as error:
            rest = [raw[i] for i in self._named(error, raw)]
            append_lines(store, "events", rest)
            return
        for position, line in zip(done.positions, raw, strict=True):
            if position is not None and self._confirm("events", *position) != line:
                raise BrokenPromiseError(f"at events/{position[0]}:{position[1]} does not lie {line!r}")

    def _named(self, error: AppendError, lines: list[bytes]) -> list[int]:
        """What the error names is in; a retry, of what is missing, finds a disk that works."""
        settings = self.world.settings
        there = [index for index in range(len(lines)) if index not in error.missing]
        # What is not durable is in, and the power may take it.
        for index, offset in zip(there, error.offsets, strict=True) if error.durable else ():
            # As the door has it: what is too far ahead is elsewhere.
            ahead = is_ahead(lines[index], self.world.wall + settings.ahead)
            line = self._confirm(
                "refused" if ahead else "events", 0 if ahead else _partition(lines[index], settings.partitions), offset
            )
            if line != lines[index] and (tag_of(line) is None or tag_of(line) != tag_of(lines[index])):
                raise BrokenPromiseError(f"at {offset} lies {line!r}, and an error says that {lines[index]!r} does")
        self.world.disk.fault = None
        return error.missing

    def _confirm(self, log: str, partition: int, offset: int) -> bytes:
        there = self.world.disk.log(log, partition, durable=False)
        line = there[offset:].partition(b"\n")[0]
        self.confirmed.append((log, partition, offset, line))
        if log == "events":
            self.world.begun = True
            theirs = _partition(line, self.world.settings.partitions)
            if partition != theirs:
                raise BrokenPromiseError(f"{line!r} lies in partition {partition}, others of its subject in {theirs}")
        return line

    def by_hand(self) -> None:
        """Somebody with a shell appends under the lock, perhaps half a line, and makes nothing durable."""
        directory = self.world.home / "logs" / "events" / "0"
        if directory.is_dir() and self.world.settings.partitions == 1:  # else it would be another subject's partition
            data = b"".join(self.lines.raw(self.world.wall) + b"\n" for _ in range(2))
            data = data[: -self.random.choice([0, 0, 1, 20]) or None]
            self.world.act(Process("hand"), lambda: _cat(directory, data))

    def tick(self) -> None:
        """A tick is written down."""
        as_of = self.world.wall - self.world.settings.settle

        def write() -> None:
            Clock(self.world.store(), self.world.topology.raw_logs()).tick(as_of)

        self.world.act(Process("ticker"), write)

    def process(self) -> None:
        """A run brings some processors to the end, or all, with a tick at its end or none."""
        names = self.random.sample([*self.world.topology.processors], self.random.choice([1, 1, 2, 3]))
        final = work.FinalTick(self.random.choice(["now", "log-end"])) if self.random.random() < 0.4 else None
        self._count += 1
        self.world.act(Process(f"run {self._count}"), lambda: self._to_end(names, final))

    def _to_end(self, names: list[str], final: work.FinalTick | None) -> None:
        run = self.world.run("run")
        for name in names:
            work.process_to_end(run, name, None if name == "remind" else final)

    def finish(self) -> None:
        """A tick, and a run that brings everything to its end."""
        self.tick()
        names = [*self.world.topology.on_raw_logs(), *self.world.topology.on_derived_logs()]
        self.world.act(Process("last run"), lambda: self._to_end(names, None))

    def follow(self) -> None:
        """A shift follows: it begins, takes what is there, or ends."""
        shift = self.shift
        if shift is not None and not shift.process.dead and self.random.random() < 0.15:
            self.world.seam.end(shift.process)  # its locks go with it, as at the end of a process
            self.shift = None
            return
        if shift is None or shift.process.dead:
            self._count += 1
            shift = self.shift = Living(Process(f"shift {self._count}"))
        alone = self.world.disk.process is None
        self.world.act(shift.process, lambda: self._follow(shift, alone), lives_on=True)

    def _follow(self, shift: Living, alone: bool) -> None:
        if shift.run is None:
            shift.run = self.world.run("shift")
        for name in self.random.sample([*self.world.topology.processors], self.random.choice([1, 2, 3])):
            try:
                self._follow_one(shift, shift.run, name, alone)
            except Exception:  # as a shift does: thrown away, and made anew at the next try
                for follower in shift.followers.pop(name, []):
                    follower.close()
                if name in shift.locks:
                    shift.locks.pop(name).release()
                raise

    def _follow_one(self, shift: Living, run: Run, name: str, alone: bool) -> None:
        if name not in shift.locks:
            lock = run.lock(name)
            if not lock.try_acquire():
                if alone:
                    raise BrokenPromiseError(f"nobody is at work, and the lock of {name} is held")
                return
            shift.locks[name] = lock
        if name not in shift.followers:
            partitions = run.store.partitions(self.world.topology.reads(name))
            shift.followers[name] = [PartitionFollower(run, name, partition) for partition in partitions]
        run.stop.clear()
        while work._round(run, shift.followers[name]):
            pass

    def go_astray(self) -> None:
        """A run without a lock, as two machines on one disk would have it: it reads a checkpoint, and commits much later."""
        stray = self.stray
        if stray is not None and stray.process is self.world.disk.process:
            return
        if stray is None or stray.process.dead:
            name = self.random.choice([*self.world.topology.processors])
            self._count += 1
            stray = self.stray = Living(Process(f"stray {self._count} of {name}"))
            self.world.act(stray.process, lambda: self._read_checkpoint(stray, name))
            if stray.process.dead or self.random.random() < 0.3:
                return
            self.append()  # so that there is more to do, for one that is quicker
            self._count += 1
            self.world.doubled = True
            self.world.act(Process(f"run {self._count}"), lambda: self._to_end([name], None))
        if stray.process.dead or self.world.disk.lost:
            return
        self.world.doubled, self.stray = True, None
        self.world.act(stray.process, lambda: self._commit_late(stray))
        self.world.seam.end(stray.process)

    def _read_checkpoint(self, stray: Living, name: str) -> None:
        stray.run = self.world.run("stray")
        stray.followers[name] = [PartitionFollower(stray.run, name, 0)]
        stray.saw = stray.followers[name][0].snapshot()

    def _commit_late(self, stray: Living) -> None:
        assert stray.run is not None
        stray.run.stop.clear()
        [(follower,)] = stray.followers.values()
        log, disk = follower.processor.writes, self.world.disk
        before = disk.log(log, 0, durable=False) if log else b""
        try:
            follower.advance(stray.saw or follower.snapshot())
        except ConflictError:
            alone = not any("preempt" in what for what in disk.injected)
            if alone and log and disk.log(log, 0, durable=False) != before:
                raise BrokenPromiseError(f"a run that was behind has written to {log}") from None
            raise

    def deliver(self) -> None:
        """A run sends what is due."""
        self._count += 1

        def send() -> None:
            run = self.world.run("deliver")
            if self.random.random() < 0.5:
                work.process_to_end(run, "remind", None)
                run.stop.clear()
            deliver_to_end(run)

        self.world.act(Process(f"delivery {self._count}"), send)

    def back_up(self) -> None:
        """A person makes a backup."""
        if not {f"{self.world.home}/logs", f"{self.world.home}/locks"} <= self.world.disk.folders.keys():
            return  # there is nothing yet
        self._count += 1
        self.backup = self.world.home.parent / f"backup-{self._count}"
        with self.world.aside() as store:
            make_backup(store, self.world.topology.derived_logs(), self.backup)

    def restore(self) -> None:
        """The database is lost; a person puts an old backup back, whatever ran is ended."""
        if self.backup is None:
            return
        self.forget_all()
        with self.world.aside() as store:
            restore_logs(store, self.backup)
            restore_database(store, self.backup, self.world.topology.derived_logs())
        self.world.reopen()


def _cat(directory: Path, data: bytes) -> None:
    with locked(directory / LOCK):
        segments = list_segments(directory)
        if not segments:
            return
        handle = os.open(segments[-1].path, os.O_WRONLY | os.O_APPEND)
        os.write(handle, data)
        os.close(handle)
