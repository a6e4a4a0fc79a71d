"""The clock of single lines of a large log: the greatest stamp or tick before each, without judging all that is before it.

Bounds tell in nearly all cases: the chain has one for each sealed segment, the last bytes of lines give those of a block.
Only where they leave a doubt are lines judged.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from storage.event import Event
from storage.judge import decode, judge
from storage.reader import PartitionReader
from storage.recorded import Ticks
from storage.stamps import NONE, bounds

_BLOCK = 96 << 10  # buffers from 128 KiB on are mapped and unmapped by the allocator each time: 1.3 s a GB, measured


class Stretch(NamedTuple):
    """Whole lines of a log from `start` to `end`, none of which has a greater stamp than `bound` (milliseconds).

    Where it is `fine` it is a block, and the bound is that of its own lines; else it may be of lines before them too.
    """

    start: int
    end: int
    bound: int
    fine: bool = False


class Reach(NamedTuple):
    """How far the stamps of lines reach."""

    reader: PartitionReader
    max_line: int

    def fine(self, start: int, end: int) -> Iterator[Stretch]:
        """The blocks from `start` to `end`, each with its bound."""
        while block := self.reader.read(start, end, _BLOCK, self.max_line):
            yield Stretch(block.start, block.end, bounds(block.lines, self.max_line)(len(block.lines)), True)
            start = block.end

    def exact(self, start: int, end: int) -> int:
        """The greatest clock of the good lines from `start` to `end`, by themselves."""
        greatest = NONE
        while block := self.reader.read(start, end, _BLOCK, self.max_line):
            greatest = max(greatest, decode(block, "", 0, 0, self.max_line).clock)
            start = block.end
        return greatest

    def passes(self, stretch: Stretch, until: int) -> int:
        """The end of the first block of a stretch, if the clock passes `until` in it; else 0."""
        first = next(self.fine(stretch.start, stretch.end))
        return first.end if first.bound > until and self.exact(first.start, first.end) > until else 0


class Clocks:
    """Gives good lines their clocks; to be asked in log order. The stretches are without a gap, in log order too."""

    def __init__(self, reach: Reach, ticks: Ticks, stretches: Sequence[Stretch]) -> None:
        self._reach, self._ticks, self._stretches = reach, ticks, list(stretches)
        self._next, self._known = 0, NONE
        # Behind us, of which no more is known: the greatest bound first, then what is quickest to look at, then the earliest,
        # since what the chain says of a segment may be the stamp of one before it.
        self._behind: list[tuple[int, bool, int, Stretch]] = []
        self._near: tuple[int, list[int], Callable[[int], int]] = (-1, [], lambda _: NONE)

    def event(self, offset: int, line: bytes) -> Event:
        """The event of a good line in its place."""
        event = judge(line, offset, 0)
        before = max(self._ticks.before(offset), self._before(offset, event.clock))
        return judge(line, offset, before) if before > event.clock else event

    def _before(self, offset: int, enough: int) -> int:
        """The greatest stamp of good lines before `offset`, or anything up to `enough`."""
        while self._next < len(self._stretches) and self._stretches[self._next].end <= offset:
            self._push(self._stretches[self._next])
            self._next += 1
        while self._behind and self._behind[0][3].bound > max(enough, self._known):
            stretch = heapq.heappop(self._behind)[3]
            if stretch.fine:
                self._known = max(self._known, self._reach.exact(stretch.start, stretch.end))
            else:
                for block in self._reach.fine(stretch.start, stretch.end):
                    self._push(block)
        around = self._stretches[self._next]
        if around.start < offset and around.bound > max(enough, self._known):
            if not around.fine:
                self._stretches[self._next : self._next + 1] = self._reach.fine(around.start, around.end)
                return self._before(offset, enough)
            if self._bound_before(around, offset) > max(enough, self._known):
                self._known = max(self._known, self._reach.exact(around.start, offset))
        return self._known

    def _push(self, stretch: Stretch) -> None:
        heapq.heappush(self._behind, (-stretch.bound, not stretch.fine, stretch.start, stretch))

    def _bound_before(self, block: Stretch, offset: int) -> int:
        """A bound of the stamps in a block before `offset`."""
        if self._near[0] != block.start:
            starts, lines, place = [], [], block.start
            while place < block.end and (
                more := self._reach.reader.read(place, block.end, _BLOCK, self._reach.max_line)
            ):
                for line in more.lines:
                    starts.append(place)
                    lines.append(line)
                    place += len(line) + 1
                place = more.end
            self._near = (block.start, starts, bounds(lines, self._reach.max_line))
        _, starts, bound_of = self._near
        return bound_of(bisect_left(starts, offset))
