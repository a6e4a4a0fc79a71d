"""What the log `clock` has written down, looked up: which tick counted at an offset, and which settings and code were in force.

For those who look back. They neither tick nor follow, so they need no lock: what they ask of is in the past.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple

import orjson

from storage.store import CLOCK, Store

_BLOCK = 1 << 20
_MAX_LINE = 1 << 20


class Recorded(NamedTuple):
    """A tick, and where it stands in the log `clock`."""

    as_of: int
    end: int
    offset: int


class Version(NamedTuple):
    """Settings and code (SHA-256) of a processor, in force from an offset of its log on; noted at wall time `at`."""

    start: int
    settings: dict[str, Any]
    code: str
    at: int
    offset: int


class Ticks:
    """The ticks as one partition saw them, found by bisection: a clock of gigabytes is not read for one of them.

    What is archived of it is fetched only where the bisection looks.
    """

    def __init__(self, store: Store, log: str, partition: int) -> None:
        self._reader, self._name = store.reader(CLOCK, 0), f"{log}/{partition}"
        self._end = self._reader.end()
        self._blocks = -(-self._end // _BLOCK)
        self._starts: dict[int, int] = {0: 0}
        self._read: dict[int, list[Recorded]] = {}

    def close(self) -> None:
        """Close the file that is open."""
        self._reader.close()

    def before(self, offset: int) -> int:
        """The greatest time that had been ticked when the line at `offset` was taken; -1 where none had."""
        block = self._last_block(lambda tick: tick.end <= offset)
        ticks = self._ticks(block)
        count = bisect_right(ticks, offset, key=lambda tick: tick.end)
        return ticks[count - 1].as_of if count else -1

    def at(self, as_of: int, beyond: int = -1) -> Recorded | None:
        """The first tick of exactly this time that took what lies at the offset `beyond`; None where there is none.

        Where a log grows and the time does not (a wall clock that went back, a log's own end), several have one time.
        """
        for index in range(self._last_block(lambda tick: tick.as_of < as_of), self._blocks):
            for tick in self._ticks(index):
                if tick.as_of > as_of:
                    return None
                if tick.as_of == as_of and tick.end > beyond:
                    return tick
        return None

    def _last_block(self, is_before: Callable[[Recorded], bool]) -> int:
        """The last block whose first tick passes; 0 where none does. Neither times nor ends ever go back."""
        low, high = 0, self._blocks
        while low < high:
            middle = (low + high) // 2
            first = next((ticks[0] for i in range(middle, self._blocks) if (ticks := self._ticks(i))), None)
            if first is not None and is_before(first):
                low = middle + 1
            else:
                high = middle
        return max(0, low - 1)

    def _ticks(self, index: int) -> list[Recorded]:
        """The ticks of a block of the clock; one that does not name the partition is not of it."""
        if index >= self._blocks:
            return []
        if index not in self._read:
            place, end = self._start(index), self._start(index + 1)
            ticks = self._read[index] = []
            while block := self._reader.read(place, end, _BLOCK, _MAX_LINE):
                for line in block.lines:
                    tick = parse_tick(line)
                    if tick is not None and self._name in tick["ends"]:
                        ticks.append(Recorded(tick["as_of"], tick["ends"][self._name], place))
                    place += len(line) + 1
                place = block.end
        return self._read[index]

    def _start(self, index: int) -> int:
        """Where a block begins: with the line that lies across its border. It may be empty, where a line is as long as that."""
        if index >= self._blocks:
            return self._end
        if index not in self._starts:
            self._starts[index] = self._reader.line_start(index * _BLOCK)
        return self._starts[index]


def versions(store: Store, processor: str, log: str, partition: int, generation: int) -> list[Version]:
    """The settings and code of a generation of a processor in one partition, oldest first."""
    reader, name, found = store.reader(CLOCK, 0), f"{log}/{partition}", []
    place, end = 0, reader.end()
    while block := reader.read(place, end, _BLOCK, _MAX_LINE):
        if b'"VERSION"' in b"\n".join(block.lines):
            for line in block.lines:
                obj = parse_version(line)
                if obj is not None and (obj["processor"], obj["generation"]) == (processor, generation):
                    start = obj["from"].get(name)
                    if start is not None:
                        found.append(Version(start, obj["settings"], obj["code"], obj["at"], place))
                place += len(line) + 1
        place = block.end
    reader.close()
    return found


def in_force(known: list[Version], offset: int, run_since: int | None = None) -> Version | None:
    """The version under which the line at `offset` was taken; None where none was written down by then.

    Where a processor has stood still at `offset`, several may begin there. A run has one, noted before it first writes:
    `run_since`, wall time, is when the run first wrote that gave what is asked about.
    """
    noted = (v for v in reversed(known) if v.start <= offset and (run_since is None or v.at <= run_since))
    return next(noted, None)


def parse_tick(line: bytes) -> dict[str, Any] | None:
    """What a line of the clock says of a tick; None for any other line, and for one that a crash tore."""
    return _parse(line, "TICK")


def parse_version(line: bytes) -> dict[str, Any] | None:
    """The same of settings and code."""
    return _parse(line, "VERSION")


def _parse(line: bytes, verb: str) -> dict[str, Any] | None:
    try:
        event = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return event["object"] if event["verb"] == verb else None
