"""Following a log again: one processor into a generation that is not live, with the recorded ticks and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from storage.clock import Clock, Snapshot, Tick
from storage.reader import PartitionReader
from storage.store import Store
from tasks.follow import PartitionFollower
from tasks.run import COLLECTOR, Run
from tasks.timeline import Place, Version, by_clock, in_force, recorded, without_ticks
from tasks.topology import Topology


class ReplayRun(Run):
    """A run whose logs are of the generations that it was told, where they are not live ones."""

    is_live = False

    def __init__(self, store: Store, topology: Topology, holder: str, generations: Mapping[str, int]) -> None:
        super().__init__(store, topology, holder)
        self._generations = dict(generations)

    def generation(self, log: str | None) -> int:
        """Which generation of a log this run reads and writes."""
        return self._generations[log] if log in self._generations else super().generation(log)


class ReplayFollower(PartitionFollower):
    """A follower that turns to the settings of then where they changed. Its maker holds the lock of its generation."""

    def __init__(self, run: Run, name: str, partition: int, versions: Sequence[Version]) -> None:
        self._given = list(versions)
        super().__init__(run, name, partition)

    def run_to(self, goal: Place) -> None:
        """Take everything up to `goal`, with the recorded ticks on the way.

        Raises:
            Stopped: the run is to stop; what was committed stands.
        """
        if not goal.is_reached(self.position):
            self.advance(Snapshot(goal.offset, goal.tick_offset))

    def tick_once(self, goal: Place, as_of: int) -> None:
        """Take one tick at the end, instead of the recorded ones; none where there are none."""
        if self.position.tick_offset >= goal.tick_offset:
            return
        tick = Tick(as_of, {self.reader.name: goal.offset}, goal.tick_offset)
        with COLLECTOR.paused():
            self._take_tick(tick)
        self.confirm()

    def _find_versions(self) -> list[Version]:
        return self._given

    def _turn(self) -> None:
        """Have the processor with the settings that are in force here."""
        self._take_up(in_force(self.versions, self.position))


class QuietFollower(ReplayFollower):
    """Goes over a log again, records nothing, and notes which code took what."""

    def __init__(self, run: Run, name: str, partition: int, versions: Sequence[Version]) -> None:
        self._codes: list[
            tuple[str, int, int]
        ] = []  # each with the offset, and the end of the derived log, where it begins
        super().__init__(run, name, partition, versions)

    def gone(self, end: int, *, derived: bool) -> list[tuple[str, int, int]]:
        """The stretches up to `end`, of the derived log or of the one that is read, of which the clock says that other code had them."""
        now = self.run.topology.make(self.processor.name).version()["code"]
        starts = [(code, made if derived else taken) for code, taken, made in self._codes]
        stretches = [(code, start, stop) for (code, start), (_, stop) in pairwise([*starts, ("", end)])]
        return [(code, start, stop) for code, start, stop in stretches if code != now and stop > start]

    def _record_version(self) -> None:
        self._turn()
        end = 0 if self.target is None else self.target.end
        self._codes.append((in_force(self.versions, self.position).code, self.position.offset, end))


def common(one: PartitionReader, other: PartitionReader, end: int) -> int:
    """Up to which offset before `end` two logs have the same bytes."""
    done = 0
    for piece in one.raw(0, end):
        there = b"".join(other.raw(done, done + len(piece)))
        if there != piece:
            return done + next(i for i, byte in enumerate(piece) if there[i : i + 1] != bytes([byte]))
        done += len(piece)
    return done


def versions_of(
    run: Run, name: str, partition: int, base: Mapping[str, int], changed: Mapping[str, object], *, ticks: bool = True
) -> list[Version]:
    """With which settings to go again over what the generation `base` of `name` went over, but for those `changed`.

    A processor that never ran takes those of now.
    """
    topology = run.topology
    log, writes = topology.reads(name), topology.writes(name)
    with Clock(run.store, topology.raw_logs()) as clock:
        found = recorded(clock.versions(), name, base.get(writes or "", 1), f"{log}/{partition}")
    if not found:
        version = topology.make(name).version()
        found = [Version(Place(0), version["settings"], version["code"])]
    if run.generation(log) != base.get(log, 1):
        reader = run.store.reader(log, partition, run.generation(log))
        try:
            end = run.store.committed_end(log, partition, run.generation(log))
            # Only where settings changed it matters: to compare both as a whole would take long, of the locks of a promotion too.
            upto = min(end, run.store.committed_end(log, partition, base.get(log, 1)), found[-1].place.offset)
            with run.store.reader(log, partition, base.get(log, 1)) as other:
                same = common(reader, other, upto)
            found = by_clock(found, reader, log, partition, end, same)
        finally:
            reader.close()
    if not ticks:
        found = without_ticks(found)
    return [replace(v, settings={**v.settings, **changed}) for v in found]
