"""The clock of single lines of a large log: the greatest stamp or tick before each, without judging all that is before it.

Bounds tell in nearly all cases: the chain has one for each sealed segment, the last bytes of lines give those of a block.
Only where they leave a doubt are lines judged.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from storage.event import Event
from storage.judge import decode, judge
from storage.reader import PartitionReader
from storage.recorded import Ticks
from storage.stamps import NONE, bounds

_BLOCK = 96 << 10  # buffers from 128 KiB on are mapped and unmapped by the allocator each time: 1.3 s a GB, measured


class Stretch(NamedTuple):
    """Whole lines of a log from `start` to `end`, none of which has a greater stamp than `bound` (milliseconds).

    The bound may be the stamp of a line before them. A `fine` one is short enough to judge all of its lines.
    """

    start: int
    end: int
    bound: int
    fine: bool = False


class Reach(NamedTuple):
    """How far the stamps of lines reach."""

    reader: PartitionReader
    max_line: int

    def fine(self, start: int, end: int, cuts: Sequence[int] = ()) -> Iterator[Stretch]:
        """The blocks from `start` to `end`, each with its bound; those with `cuts` in them, which are starts of lines, in parts."""
        while block := self.reader.read(start, end, _BLOCK, self.max_line):
            bound_of, begin = bounds(block.lines, self.max_line), block.start
            if inside := cuts[bisect_right(cuts, begin) : bisect_left(cuts, block.end)]:
                starts = list(accumulate((len(line) + 1 for line in block.lines), initial=begin))
                for cut in inside:
                    yield Stretch(begin, cut, bound_of(bisect_left(starts, cut)), True)
                    begin = cut
            yield Stretch(begin, block.end, bound_of(len(block.lines)), True)
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
    """Gives good lines their clocks; to be asked in log order, for lines at which stretches begin.

    The stretches are in log order and without a gap.
    """

    def __init__(self, reach: Reach, ticks: Ticks, stretches: Sequence[Stretch]) -> None:
        self._reach, self._ticks, self._stretches = reach, ticks, list(stretches)
        self._next, self._known = 0, NONE
        # Behind us, of which no more is known: the greatest bound first, then what is quickest to look at, then the earliest,
        # since the bound of a later one may be the stamp of one before it.
        self._behind: list[tuple[int, bool, int, Stretch]] = []

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
        return self._known

    def _push(self, stretch: Stretch) -> None:
        heapq.heappush(self._behind, (-stretch.bound, not stretch.fine, stretch.start, stretch))
