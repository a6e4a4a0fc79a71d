"""The events of one subject, found in a log of gigabytes in seconds, each as the one judge gives it in its place.

Only lines that may be of the subject are judged: those with its id where an id may stand, and those that write it with
escapes. An event's clock is the greatest of all lines before it, which a bound for each block tells in nearly all cases;
where it does not, that block is judged. Large logs are read by several processes.
"""

from __future__ import annotations

import heapq
import json
import multiprocessing
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection

from storage.event import Block, Event, Rejected
from storage.judge import decode, judge
from storage.reader import PartitionReader
from storage.recorded import Ticks
from storage.stamps import NONE, bounds
from storage.store import Store

_BLOCK = 96 << 10  # buffers from 128 KiB on are mapped and unmapped by the allocator each time: 1.3 s a GB, measured
_SHORT = 3
_WORTH_A_PROCESS = 64 << 20


@dataclass
class _Found:
    """What a look at a stretch of a log gives: its blocks with the bounds of their stamps, and the lines to be judged."""

    blocks: list[tuple[int, int, int]] = field(default_factory=list)
    """(start, end, bound)"""
    lines: list[tuple[int, bytes, int]] = field(default_factory=list)
    """(offset, line, bound of those before it in its block)"""


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
        clocks = _Clocks(search, reader, ticks, found.blocks)
        events = [event for line in found.lines if (event := clocks.event(*line)) is not None]
    finally:
        reader.close()
        ticks.close()
    return [event for event in events if until is None or event.clock <= until]


class _Clocks:
    """Gives each line its clock; to be asked in log order."""

    def __init__(
        self, search: _Search, reader: PartitionReader, ticks: Ticks, blocks: list[tuple[int, int, int]]
    ) -> None:
        self._search, self._reader, self._ticks, self._blocks = search, reader, ticks, blocks
        self._next, self._known = 0, NONE
        self._open: list[tuple[int, int]] = []  # blocks behind us, the greatest bound first, of which no more is known

    def event(self, offset: int, line: bytes, bound: int) -> Event | None:
        """The event of a line in its place; None where it is bad, or of another subject."""
        try:
            event = judge(line, offset, 0)
            if event.key != self._search.key:
                return None
            before = max(self._ticks.before(offset), self._before_block(offset, event.clock))
            if bound > max(before, event.clock):
                start, end, _ = self._blocks[self._next]
                before = max(before, self._exact(start, min(offset, end)))
            return judge(line, offset, before) if before > event.clock else event
        except Rejected:
            return None

    def _before_block(self, offset: int, enough: int) -> int:
        """The greatest stamp of the blocks before that of `offset`, or anything up to `enough`."""
        while self._next < len(self._blocks) and self._blocks[self._next][1] <= offset:
            heapq.heappush(self._open, (-self._blocks[self._next][2], self._next))
            self._next += 1
        while self._open and -self._open[0][0] > max(enough, self._known):
            start, end, _ = self._blocks[heapq.heappop(self._open)[1]]
            self._known = max(self._known, self._exact(start, end))
        return self._known

    def _exact(self, start: int, end: int) -> int:
        search, greatest = self._search, NONE
        while block := self._reader.read(start, end, _BLOCK, search.store.settings.max_line):
            greatest = max(
                greatest, decode(block, search.log, search.partition, 0, search.store.settings.max_line).clock
            )
            start = block.end
        return greatest


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
        whole.blocks += part.blocks
        whole.lines += part.lines
    return whole


def _scan_into(pipe: Connection, search: _Search, start: int, end: int) -> None:
    pipe.send(_scan(search, start, end))
    pipe.close()


def _scan(search: _Search, start: int, end: int) -> _Found:
    """Look through a stretch of whole lines; ends early where a clock has passed `until`."""
    found, reader, candidates = _Found(), search.reader(), _candidates(search.key)
    settings = search.store.settings
    while block := reader.read(start, end, _BLOCK, settings.max_line):
        bound_of = bounds(block.lines, settings.max_line)
        bound = bound_of(len(block.lines))
        if search.until is not None and bound > search.until:
            bound = decode(block, search.log, search.partition, 0, settings.max_line).clock
        found.blocks.append((block.start, block.end, bound))
        found.lines += [
            (offset, block.lines[index], bound_of(index)) for index, offset in _places(block, candidates)
            if len(block.lines[index]) <= settings.max_line
        ]  # fmt: skip
        if search.until is not None and bound > search.until:
            break
        start = block.end
    reader.close()
    return found


def _places(block: Block, candidates: Callable[[bytes], list[int]]) -> list[tuple[int, int]]:
    """The lines of a block that may be of the subject: (index, offset)."""
    data = b"\n".join(block.lines)
    hits = candidates(data)
    if not hits or block.oversized:  # a line of which only the head was read is alone in its block, and bad
        return []
    starts, place = [], 0
    for line in block.lines:
        starts.append(place)
        place += len(line) + 1
    indexes = sorted({bisect_right(starts, hit) - 1 for hit in hits})
    return [(index, block.start + starts[index]) for index in indexes]


def _candidates(key: str) -> Callable[[bytes], list[int]]:
    """A function that gives places in lines that may be of the subject `key`: all such lines, and few others."""
    text = re.escape(json.dumps(key, ensure_ascii=False)[1:-1].encode("utf-8", "surrogatepass"))
    number = re.fullmatch(r"-?[0-9]+", key) is not None
    if len(key) > _SHORT:  # rare as it is: what stands around it is looked at only where it is found
        after, before = (rb'[",}\s]', rb'[":\s]') if number else (b'"', b'"')
        plain = re.compile(rb"%s(?=%s)(?<=%s%s)" % (text, after, before, text))
    else:
        forms = rb'"%s"|-?%s' % (text, text) if number else b'"%s"' % text
        plain = re.compile(rb'"id"\s*:\s*(?:%s)(?=[,}\s])' % forms)
    # What is plain ASCII is escaped by whoever wants to, never by a common writer; anything else may well be.
    common = key.isascii() and key.isprintable() and not set(key) & {'"', "\\", "/"}
    escaped = re.compile(rb"\\u00[2-7]" if common else rb"\\")

    def find(data: bytes) -> list[int]:
        hits = [match.start() for match in plain.finditer(data)]
        return hits + [match.start() for match in escaped.finditer(data)] if b"\\" in data else hits

    return find
