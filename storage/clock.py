"""The log `clock`: wall time, settings and code versions, written down before they are used.

One lock orders it against the logs: a tick's ends are read and the tick is made durable under the exclusive lock, and a
follower reads ends and ticks together under the shared one. So no follower can be past a tick that it has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import sqlalchemy as sa

from storage.errors import LostDataError
from storage.locks import locked
from storage.reader import PartitionReader, lost_log
from storage.recorded import parse_tick, parse_version
from storage.store import CLOCK, Store
from storage.times import now

_FURTHEST = sa.text('SELECT log, partition, MAX("offset"), MAX(tick_offset) FROM checkpoint GROUP BY log, partition')


@dataclass(frozen=True)
class Tick:
    """Wall time as of which everything before `ends` (by `log/partition`) was known; `next_offset` is the one after it."""

    as_of: int
    ends: dict[str, int]
    next_offset: int


@dataclass(frozen=True)
class Snapshot:
    """What is there to be followed: the end of a partition, and that of the clock, whose ticks before it are of that moment."""

    end: int
    clock_end: int = 0


class Clock:
    """Reads and writes the log `clock`, until it is closed; also by `with`. Not to be shared between threads."""

    def __init__(self, store: Store, logs: Sequence[str]) -> None:
        self.store, self.logs = store, tuple(logs)
        self._lock = store.lock_path(CLOCK)
        self._reader = store.reader(CLOCK, 0)
        self._readers: dict[tuple[str, int], PartitionReader] = {}
        self._durable = 0

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        for reader in (self._reader, *self._readers.values()):
            reader.close()

    def snapshot(self, log: str, partition: int, tick_offset: int) -> Snapshot:
        """The end of a partition, and that of the clock; the ticks before it, which `ticks` gives, are durable.

        Raises:
            LostDataError: `tick_offset` lies beyond the clock's end.
        """
        with locked(self._lock, shared=True):
            end = self._end(log, partition)
            clock_end = self._reader.end()
        if tick_offset > clock_end:
            raise _lost_clock(clock_end, tick_offset)
        if clock_end > self._durable:  # whoever wrote the last tick may have died before its fsync
            self._reader.sync(clock_end)
            self._durable = clock_end
        return Snapshot(end, clock_end)

    def tick(self, as_of: int) -> Tick | None:
        """Write down `as_of` with the ends of the logs as they are now, durably.

        It counts as the greatest so far. None where nothing has changed since the last tick.
        """
        with locked(self._lock):
            self._check_nothing_lost()
            last = self.last_tick()
            ends = {f"{log}/{part}": self._end(log, part) for log in self.logs for part in self.store.partitions(log)}
            if last is not None and as_of <= last.as_of:
                if ends == last.ends:
                    return None
                as_of = last.as_of
            for (log, part), reader in self._readers.items():
                if f"{log}/{part}" in ends:  # a producer may have begun another meanwhile
                    reader.sync(ends[f"{log}/{part}"])
            line = _line("TICK", {"type": "TICK", "as_of": as_of, "ends": ends}, as_of)
            offset = self.store.writer(CLOCK, 0).append([line])[0]
            return Tick(as_of, ends, offset + len(line) + 1)

    def record_version(self, processor: str, generation: int, version: dict[str, Any], ends: dict[str, int]) -> None:
        """Write down with which settings and code a processor goes on from `ends`, before it does."""
        obj = {"type": "VERSION", "processor": processor, "generation": generation, **version, "from": ends}
        self.store.writer(CLOCK, 0).append([_line("VERSION", obj, now())])

    def last_tick(self) -> Tick | None:
        """The newest tick, found from the clock's end."""
        end = stop = self._reader.end()
        while stop > 0:
            at = start = self._reader.line_start(max(0, stop - 65_536))
            last = None
            while at < end:
                ticks, at = self.ticks(at, end)
                last = ticks[-1] if ticks else last
            if last is not None:
                return last
            stop = start
        return None

    def ticks(self, start: int, end: int, size: int = 1 << 20) -> tuple[list[Tick], int]:
        """The ticks of about `size` bytes of the clock from `start` on, not beyond `end`, and where to go on."""
        ticks: list[Tick] = []
        block = self._reader.read(start, end, size, 1 << 20)
        for line in block.lines if block else []:
            start += len(line) + 1
            tick = parse_tick(line)
            if tick is not None:
                ticks.append(Tick(tick["as_of"], tick["ends"], start))
        return ticks, block.end if block else end

    def versions(self, start: int = 0) -> list[dict[str, Any]]:
        """The VERSION lines from `start` on: whose settings and code, and from where on they held; `at_clock` is its own place."""
        found, end = [], self._reader.end()
        while block := self._reader.read(start, end, 4 << 20, 1 << 20):
            start = block.start
            for line in block.lines:
                if b'"VERSION"' in line and (version := parse_version(line)) is not None:
                    found.append({**version, "at_clock": start})
                start += len(line) + 1
        return found

    def _check_nothing_lost(self) -> None:
        """A tick on a log that has lost its end would be wrong for ever, also once the log is restored."""
        with self.store.database.read() as connection:
            rows = connection.execute(_FURTHEST).all()
        for log, partition, offset, tick_offset in rows:
            if tick_offset > (clock_end := self._reader.end()):
                raise _lost_clock(clock_end, tick_offset)
            if log in self.logs and (end := self._end(log, partition)) < offset:
                raise lost_log(f"{log}/{partition}", end, offset)

    def _end(self, log: str, partition: int) -> int:
        reader = self._readers.get((log, partition))
        if reader is None:
            reader = self._readers[log, partition] = self.store.reader(log, partition)
        return reader.end()


def _line(verb: str, obj: dict[str, Any], at: int) -> bytes:
    return orjson.dumps(
        {
            "subject": {"id": "CLOCK"},
            "verb": verb,
            "object": obj,
            "context": {"at": at},
            "event": {"inserted_at": now()},
        }
    )


def _lost_clock(found: int, expected: int) -> LostDataError:
    return LostDataError(
        "the clock is shorter than what was read from it",
        where=f"{CLOCK}/0",
        found=found,
        expected=f"at least {expected}",
        do="Restore the newer copy of the log `clock`",
    )
