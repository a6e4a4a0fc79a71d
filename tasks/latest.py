"""The latest of a log: its last lines, and how many lines each hour brought.

Everything is read from the end or found by halving, so the cost hangs on what is asked for, never on how long the log is.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from storage.event import MAX_DERIVED_DEPTH
from storage.judge import decode
from storage.manifest import place_before
from storage.reader import PartitionReader
from storage.store import Store

HOUR = 3_600_000
_STEP = 65_536  # bytes read at once on the way back
_REACH = 8 << 20  # and at most
_NEAR = 16_384  # bytes that are looked through rather than halved
_PROBE, _PROBES = 4_096, 8
_BACK = 16  # such probes back from a place that tells nothing
_PLACES = 256  # that a log is looked at before it is halved between two of them
_WHOLE = 1 << 20  # bytes of an hour that are counted one by one; of more than that, samples
_SAMPLES = 16


class _Verb(msgspec.Struct):
    type: str = ""


class _Line(msgspec.Struct):
    verb: str | _Verb = ""


_decode_line = msgspec.json.Decoder(_Line).decode


@dataclass(frozen=True)
class Hours:
    """How many lines of each verb a log took, hour by hour from `since` (ms) on; "" counts lines of any verb.

    `estimated` where an hour brought so much that only samples of it were counted.
    """

    since: int
    counts: list[Counter[str]]
    estimated: bool

    def of(self, verb: str) -> list[int]:
        """The count of one verb in each hour."""
        return [count[verb] for count in self.counts]


def latest_events(store: Store, log: str, count: int, *, derived: bool = True) -> list[dict[str, Any]]:
    """The last events of a log in all its partitions, newest first; a derived log ends at its committed end.

    Lines that are no JSON object are passed over, and no more than 8 MiB a partition are read.
    """
    found: list[dict[str, Any]] = []
    for partition in store.partitions(log):
        reader = store.reader(log, partition)
        try:
            end = store.committed_end(log, partition) if derived else reader.end()
            lines = (parse(line) for line in _backwards(reader, end))
            events = (event for event in lines if event is not None)
            found += [event for event, _ in zip(events, range(count), strict=False)]
        finally:
            reader.close()
    return sorted(found, key=_stamp, reverse=True)[:count]


def count_hours(store: Store, log: str, since: int, hours: int, *, derived: bool) -> Hours:
    """How many lines each hour from `since` on brought to a log, by the clocks that the lines carry.

    Raw stamps that run back are counted where they lie; a derived line counts under its verb too.
    """
    counts: list[Counter[str]] = [Counter() for _ in range(hours)]
    estimated = False
    for partition in store.partitions(log):
        reader = store.reader(log, partition)
        try:
            end = store.committed_end(log, partition) if derived else reader.end()
            seeker = _Seeker(reader, log, partition, end, store.settings.max_line if not derived else 1 << 40)
            start = seeker.seek(min(end, place_before(reader.directory, since)[0]), since)
            for hour, count in enumerate(counts):
                stop = seeker.seek(start, since + (hour + 1) * HOUR)
                estimated |= _count_span(reader, start, stop, derived, count)
                start = stop
        finally:
            reader.close()
    return Hours(since, counts, estimated)


def parse(line: bytes) -> dict[str, Any] | None:
    """A line as an object, whatever numbers it holds; None where it is none."""
    try:
        event = json.loads(line, parse_int=integer)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


class _Seeker:
    """Finds the line at which a log's clock reaches a time, by halving between places that were looked at in order.

    Stamps may run back for a while, as those of a client that was offline do, and bad lines have none: of either kind alone
    nothing follows, so the greatest clock of all places before counts.
    """

    def __init__(self, reader: PartitionReader, log: str, partition: int, end: int, max_line: int) -> None:
        self._reader, self._log, self._partition, self._end, self._max_line = reader, log, partition, end, max_line
        self._places: list[int] = []
        self._reached: list[int] = []  # the greatest clock up to each of the places

    def seek(self, low: int, millis: int) -> int:
        """The first line from `low` on whose clock reaches `millis`; the end where none does. To be asked in order."""
        if not self._places:
            self._look_over(low)
        after = bisect_left(self._reached, millis)
        high = self._places[after] if after < len(self._places) else self._end
        low, floor = max(low, self._places[after - 1] if after else 0), self._reached[after - 1] if after else 0
        while high - low > _NEAR:
            middle = self._reader.line_start((low + high) // 2)
            if middle <= low:
                break  # one line longer than all that is left
            clock = self._told(low, middle, floor)
            if clock is not None and clock >= millis:
                high = middle
            else:
                low = middle
        while low < high and (block := self._reader.read(low, high, _NEAR, self._max_line)):
            batch = decode(block, self._log, self._partition, 0, self._max_line, MAX_DERIVED_DEPTH)
            for event in batch.events:
                if event.clock >= millis:
                    return event.offset
            low = batch.end
        return max(low, high)

    def _look_over(self, start: int) -> None:
        """Look at places all over the log from `start` on."""
        count, greatest = min(_PLACES, (self._end - start) // _NEAR + 1), 0
        for index in range(count):
            place = max(start, self._reader.line_start(start + (self._end - start) * index // count))
            greatest = max(greatest, self._told(start, place, greatest) or 0)
            self._places.append(place)
            self._reached.append(greatest)

    def _told(self, low: int, place: int, floor: int) -> int | None:
        """The clock at a place, by what follows it, or else by what is before; `floor` was reached at `low` already."""
        clock = self._clock(place)
        return self._before(low, place, floor) if clock is None or clock < floor else clock

    def _before(self, low: int, place: int, floor: int) -> int | None:
        """The clock just before a place of which nothing follows, if there is a line near that does not run back."""
        for _ in range(_BACK):
            at = start = max(low, self._reader.line_start(max(0, place - _PROBE)))
            found = -1
            while at < place and (block := self._reader.read(at, place, _PROBE, self._max_line)):
                batch = decode(block, self._log, self._partition, 0, self._max_line, MAX_DERIVED_DEPTH)
                found, at = max(found, batch.clock if batch.events else -1), batch.end
            if found >= floor:
                return found
            if start <= low:
                return None
            place = start
        return None

    def _clock(self, offset: int) -> int | None:
        """The clock of the first good line from `offset` on, if one is near."""
        for _ in range(_PROBES):
            block = self._reader.read(offset, self._end, _PROBE, self._max_line)
            if block is None:
                return None
            batch = decode(block, self._log, self._partition, 0, self._max_line, MAX_DERIVED_DEPTH)
            if batch.events:
                return batch.events[0].clock
            offset = batch.end
        return None


def _count_span(reader: PartitionReader, start: int, stop: int, by_verb: bool, into: Counter[str]) -> bool:
    """Count the lines between two places; says whether only samples were."""
    if stop - start <= _WHOLE:
        into.update(_count(b"".join(reader.raw(start, stop)), by_verb))
        return False
    seen: Counter[str] = Counter()
    looked = 0
    for index in range(_SAMPLES):
        first = max(start, reader.line_start(start + (stop - start) * index // _SAMPLES))
        last = reader.line_start(min(stop, first + _WHOLE // _SAMPLES))
        looked += last - first
        seen += _count(b"".join(reader.raw(first, last)), by_verb)
    into.update({verb: round(count * (stop - start) / looked) for verb, count in seen.items()} if looked else {})
    return True


def _count(data: bytes, by_verb: bool) -> Counter[str]:
    counts = Counter({"": data.count(b"\n")})
    if by_verb:
        for line in data.split(b"\n"):
            try:
                verb = _decode_line(line).verb
            except (msgspec.DecodeError, RecursionError):
                continue
            counts[verb if isinstance(verb, str) else verb.type] += 1
    return counts


def _backwards(reader: PartitionReader, end: int) -> Iterator[bytes]:
    """The lines before `end`, the last one first."""
    floor = max(0, end - _REACH)
    while end > floor:
        start = reader.line_start(max(0, end - _STEP))
        yield from reversed(b"".join(reader.raw(start, end)).split(b"\n")[:-1])
        end = start


def _stamp(event: dict[str, Any]) -> int:
    stamp = event.get("event", {}).get("inserted_at") if isinstance(event.get("event"), dict) else None
    return stamp if isinstance(stamp, int) else 0


def integer(literal: str) -> int | float:
    """Python refuses to read an integer of thousands of digits, and cannot divide one of hundreds."""
    return int(literal) if len(literal) < 300 else float(literal)
