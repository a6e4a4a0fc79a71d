"""Reading a log for people: places by offset or time, raw bytes out, and no further than readers may look."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from storage.batches import BatchCache
from storage.errors import AfterlogError, UsageError
from storage.event import MAX_DEPTH, MAX_DERIVED_DEPTH
from storage.look import Look
from storage.manifest import place_before
from storage.reader import PartitionReader, lost_log
from storage.store import Store
from storage.times import parse_time, typed_number


class Reading:
    """Reads a log's partitions up to where readers may look."""

    def __init__(self, store: Store, log: str, derived: bool, generation: int) -> None:
        self._store, self._log, self.derived, self._generation = store, log, derived, generation
        self._look = Look(store)
        self._file = self._database_file()
        self._reached: dict[tuple[int, int], tuple[int, int, bool]] = {}  # by partition and time: how far was looked

    def check_live(self) -> None:
        """Make sure that the generation that is read is live still. Where the database is away, nobody knows: ask again.

        Raises:
            AfterlogError: a promotion or a rollback has made another one live, whose offsets are others; or another database is there.
        """
        there = self._database_file()
        if there != self._file:
            # Moved away for a while: whoever opens it now makes an empty one, in the way of what comes back.
            if there is None:
                return
            raise AfterlogError("another database is in its place by now", where=self._log, do=self._begin_again())
        live = self._look.live_generation(self._log)
        if live != self._generation:
            raise AfterlogError(
                f"generation {live} is live now, and this was generation {self._generation}",
                where=self._log,
                do=self._begin_again(),
            )

    def _begin_again(self) -> str:
        return f"Go on with it: afterlog read {self._log} --follow"

    def _database_file(self) -> tuple[int, int] | None:
        """Which file the database is; None where there is none, or where it is no file."""
        kind, _, path = self._store.settings.resolved_database_url.partition(":///")
        if kind != "sqlite":
            return None
        with suppress(FileNotFoundError):
            found = Path(path).stat()
            return found.st_dev, found.st_ino
        return None

    def partitions(self) -> list[int]:
        """The partitions that there are by now."""
        return self._store.partitions(self._log, self._generation)

    def directory(self, partition: int) -> Path:
        """Where a partition's files lie."""
        return self._store.directory(self._log, partition, self._generation)

    def place(self, partition: int, text: str) -> int:
        """The offset that a person means by an offset or a time.

        Raises:
            UsageError: it is neither.
        """
        offset = typed_number(text)
        if offset is not None:
            return offset
        millis = parse_time(text)
        if millis is None:
            raise UsageError(
                "neither an offset nor a time",
                found=repr(text),
                expected="digits, or RFC 3339 such as 2026-01-31T12:00:00Z",
            )
        return self._place_of(partition, millis)

    def _place_of(self, partition: int, millis: int) -> int:
        """The first line at which the clock reaches a time; the end where none does, from which it goes on when asked again."""
        depth = MAX_DERIVED_DEPTH if self.derived else MAX_DEPTH
        with self._reader(partition) as reader:
            cache = BatchCache(1 << 20, 1 << 40, depth, kept=1)
            known = self._reached.get((partition, millis))
            offset, clock, found = known or (*place_before(reader.directory, millis), False)
            while not found and (batch := cache.get(reader, self._log, partition, offset, self._end(partition), clock)):
                reaching = next((event for event in batch.events if event.clock >= millis), None)
                found = reaching is not None
                offset, clock = (batch.end, batch.clock) if reaching is None else (reaching.offset, reaching.clock)
        self._reached[partition, millis] = offset, clock, found
        return offset

    def write(self, partition: int, start: int, stop: int | None) -> int:
        """Write the lines from `start` to standard output; gives where to go on."""
        end = self._end(partition)
        stop = end if stop is None else min(stop, end)
        with self._reader(partition) as reader:
            for place in (start, stop):
                if 0 < place <= end and reader.line_start(place) != place:
                    there = reader.end()
                    if place > there:  # no word about what was asked: the files end before the log does
                        raise lost_log(f"{self._log}/{partition} in {reader.directory}", there, end)
                    raise UsageError(
                        "not the start of a line",
                        where=f"{self._log}:{partition}:{place}",
                        do=f"The line there starts at {reader.line_start(place)}",
                    )
            while start < stop:
                for piece in reader.raw(start, stop):
                    sys.stdout.buffer.write(piece)
                    start += len(piece)
            sys.stdout.buffer.flush()
        return start

    def _end(self, partition: int) -> int:
        if self.derived:
            return self._look.committed_end(self._log, partition, self._generation)
        with self._reader(partition) as reader:
            return reader.end()

    def _reader(self, partition: int) -> PartitionReader:
        return self._store.reader(self._log, partition, self._generation)
