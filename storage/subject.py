"""The events of one subject, found in a log of gigabytes in seconds, each as the one judge gives it in its place.

Only lines that may be of the subject are judged. Stamps are looked at where they may decide: the chain bounds those of a
whole sealed segment, so mostly only those of segments that have lines of the subject. Large logs are read by several processes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection

from storage.candidates import lines_of
from storage.clocks import Clocks, Reach, Stretch
from storage.event import Event
from storage.manifest import read_manifest
from storage.reader import PartitionReader
from storage.recorded import Ticks
from storage.store import Store
from storage.times import LATEST

_WORTH_A_PROCESS = 64 << 20
_LOOK = 4 << 20  # how much is looked through between two looks at whether the clock has passed


@dataclass
class _Found:
    """What a look through a part of a log gives: its stretches without a gap, and the subject's lines: (offset, line)."""

    stretches: list[Stretch] = field(default_factory=list)
    lines: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass(frozen=True)
class _Search:
    store: Store
    log: str
    partition: int
    key: str
    until: int | None

    def reader(self) -> PartitionReader:
        return self.store.reader(self.log, self.partition)


def subject_events(
    store: Store, log: str, partition: int, key: str, *, start: int = 0, until: int | None = None, processes: int = 1
) -> list[Event]:
    """The good events of a subject in one partition of a raw log from byte offset `start` on, in log order.

    Args:
        until: only those whose clock is not later than this (milliseconds).
        processes: at most so many at a time; more than one only where this process has no threads of its own. One, where
            what was read came from an archive elsewhere: its connections do not survive a fork.
    """
    search = _Search(store, log, partition, key, until)
    reader, ticks = search.reader(), Ticks(store, log, partition)
    try:
        found = _scan_all(search, reader, start, reader.end(), processes)
        before = _stretches(search, reader, 0, start)  # what was taken there counts for the clocks, too
        clocks = Clocks(Reach(reader, store.settings.max_line), ticks, [*before, *found.stretches])
        events = [clocks.event(offset, line) for offset, line in found.lines]
    finally:
        reader.close()
        ticks.close()
    return [event for event in events if until is None or event.clock <= until]


def _scan_all(search: _Search, reader: PartitionReader, start: int, end: int, processes: int) -> _Found:
    parts = min(processes, (end - start) // _WORTH_A_PROCESS)
    if parts <= 1:
        return _scan(search, start, end)
    cuts = [start, *(reader.line_start(start + (end - start) * i // parts) for i in range(1, parts)), end]
    if not search.store.may_fork:  # one of the cuts lies in what a bucket has
        return _scan(search, start, end)
    context = multiprocessing.get_context("fork")  # what the child needs is there, and nothing is imported again
    children = []
    for first, last in pairwise(cuts[1:]):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_scan_into, args=(theirs, search, first, last), daemon=True)
        child.start()
        theirs.close()
        children.append((child, ours, first, last))
    whole = _scan(search, cuts[0], cuts[1])
    for child, ours, first, last in children:
        try:
            part = ours.recv()
        except EOFError:  # it died, of memory say
            part = _scan(search, first, last)
        child.join()
        whole.stretches += part.stretches
        whole.lines += part.lines
    return whole


def _scan_into(pipe: Connection, search: _Search, start: int, end: int) -> None:
    pipe.send(_scan(search, start, end))
    pipe.close()


def _scan(search: _Search, start: int, end: int) -> _Found:
    """Look through a part of a log, whole lines; ends early where a clock has passed `until`."""
    found, reader, max_line = _Found(), search.reader(), search.store.settings.max_line
    reach = Reach(reader, max_line)
    for stretch in _stretches(search, reader, start, end):
        passed = search.until is not None and stretch.bound > search.until and reach.passes(stretch, search.until)
        stop = passed or stretch.end
        lines = list(lines_of(reader, search.key, stretch.start, stop, max_line))
        # Here and not when they are asked for, since here other processes do the same.
        starts = [offset for offset, _ in lines]
        last = starts[-1] if starts else stretch.start
        found.stretches += [*reach.fine(stretch.start, last, starts), Stretch(last, stop, stretch.bound)]
        found.lines += lines
        if passed:
            break
    reader.close()
    return found


def _stretches(search: _Search, reader: PartitionReader, start: int, end: int) -> Iterator[Stretch]:
    """A part of a log by its segments, each with what the chain says of its clocks; short ones where it may end early."""
    clocks = {entry.base: (entry.end, entry.last) for entry in read_manifest(reader.directory)}
    segments = reader.segments()
    for index, segment in enumerate(segments):
        whole = segments[index + 1].base if index + 1 < len(segments) else end
        place, stop = max(start, segment.base), min(end, whole)
        sealed, clock = clocks.get(segment.base, (0, 0))
        bound = clock if sealed == whole else LATEST
        while place < stop:
            cut = stop
            if search.until is not None and search.until < bound and place + _LOOK < stop:
                cut = reader.line_start(place + _LOOK)
            cut = cut if cut > place else stop  # a line that is longer than that
            yield Stretch(place, cut, bound)
            place = cut
