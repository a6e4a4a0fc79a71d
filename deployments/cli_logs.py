"""`afterlog append` and `afterlog read`: raw lines in, raw lines out."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from deployments.cli_arguments import AnyBytes, Whole
from deployments.console import say
from storage.batches import BatchCache
from storage.door import append_lines
from storage.errors import AfterlogError, AppendError, UsageError
from storage.event import MAX_DEPTH, MAX_DERIVED_DEPTH
from storage.look import Look
from storage.manifest import place_before
from storage.reader import PartitionReader, lost_log
from storage.segment import check_log_name
from storage.settings import load_settings
from storage.store import DELIVERIES, Store
from storage.times import parse_time, typed_number
from tasks.pulse import Pulse
from tasks.topology import build_topology

_CHUNK = 1 << 20


def append(log: str, file: Annotated[str, AnyBytes, Parameter(allow_leading_hyphen=True)] = "-") -> None:
    """Append the lines of FILE to LOG, exactly as they are.

    The lines are durable when this ends. A line whose clock lies too far ahead of the wall clock goes to the
    log `refused` instead, and is told of.

    Args:
        log: the log to append to, `events` say; it is made at the first line.
        file: a file with one event a line; `-` is standard input.
    """
    settings = load_settings()
    if check_log_name(log) in build_topology(settings).reserved_logs():
        raise UsageError(f"{log} is written by Afterlog itself", do="Append to a raw log, such as events")
    store = Store(settings)
    count = tried = refused = 0
    with _open(file) as source:
        try:
            for lines in _chunks(source):
                tried = count + len(lines)
                result = _append(store, log, lines, count)
                before, count = count, tried
                refused += len(result)
                for index in result[:5]:
                    say(f"line {before + index + 1} is refused: its clock lies ahead of now; it is in the log refused")
        except KeyboardInterrupt:
            doubt = "" if tried == count else f"; lines {count + 1} to {tried} may be, which the log's end tells"
            say(f"interrupted: {count} lines are in{doubt}")
            raise
    say(f"{count - refused} lines appended to {log}" + (f", {refused} refused" if refused else ""))


def read(
    log: str,
    *,
    from_: Annotated[str, Parameter(name="--from")] = "0",
    to: str | None = None,
    follow: bool = False,
    generation: Whole | None = None,
    partition: Whole | None = None,
) -> None:
    """Write the raw lines of LOG to standard output, and nothing else.

    A derived log ends at its committed end. A log that was never written is empty; of one that was, only a generation or partition
    that there ever was can be read.

    Args:
        log: the log to read.
        from_: an offset, or an RFC 3339 time: the first line at which the log's clock reaches it.
        to: an offset or a time, where to end.
        follow: go on with new lines as they come, until Ctrl-C.
        generation: which generation of a derived log; the one that is live where it is left out.
        partition: only this partition; all of them, one after another, where it is left out.
    """
    settings = load_settings()
    store, topology = Store(settings), build_topology(settings)
    derived = check_log_name(log) in topology.derived_logs() | {DELIVERIES}
    live = derived and generation is None
    if generation is None:
        generation = Look(store).live_generation(log) if derived else 1
    _check_place(store, log, derived, generation, partition)
    reading = _Reading(store, log, derived, generation)
    partitions = store.partitions(log, generation) if partition is None else [partition]
    positions = {part: reading.place(part, from_) for part in partitions}
    stops = {part: None if to is None else reading.place(part, to) for part in partitions}
    for part in partitions:
        positions[part] = reading.write(part, positions[part], stops[part])
    if follow:
        _follow(reading, positions, to, every_partition=partition is None, live=live)


def _check_place(store: Store, log: str, derived: bool, generation: int, partition: int | None) -> None:
    """Refuse what a person has misspelt; a log that was never written is empty, wherever one looks.

    Raises:
        UsageError: the log is there, and never had such a generation or partition.
    """
    if log not in store.logs():
        return
    if generation != 1:
        known = Look(store).generations() if derived else [1]
        if generation not in known:
            raise UsageError(
                "no such generation", where=log, found=generation, expected=" or ".join(map(str, known)),
                do="See: afterlog replays list",
            )  # fmt: skip
    if partition is not None:
        parts = sorted({*store.partitions(log, 1), *store.partitions(log, generation)})
        if partition not in parts:
            expected = str(parts[0]) if len(parts) == 1 else f"{parts[0]} to {parts[-1]}"
            raise UsageError("no such partition", where=log, found=partition, expected=expected)


def _follow(reading: _Reading, positions: dict[int, int], to: str | None, *, every_partition: bool, live: bool) -> None:
    """Write new lines as they come, until this process is told to end; it ends between two looks, not within one.

    Raises:
        AfterlogError: what is live was to be read, and by now that is another generation.
    """
    stop = threading.Event()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: stop.set())
    every = load_settings().poll / 1000
    pulse = Pulse([reading.directory(part) for part in positions], every, stop)
    pulse.start()
    looked = time.monotonic()
    while not stop.is_set():
        beat = pulse.beat
        for part, position in positions.items():
            # A time may be reached by what has come just now.
            positions[part] = reading.write(part, position, None if to is None else reading.place(part, to))
        pulse.wait(beat, every if reading.derived else 1.0)
        if time.monotonic() - looked < 1:
            continue
        looked = time.monotonic()
        if live:
            reading.check_live()
        for part in (
            reading.partitions() if every_partition else ()
        ):  # a log that begins may have more than were to be seen
            if part not in positions:
                positions[part] = 0
                pulse.watch(reading.directory(part))
    raise KeyboardInterrupt


class _Reading:
    """Reads a log's partitions up to where readers may look."""

    def __init__(self, store: Store, log: str, derived: bool, generation: int) -> None:
        self._store, self._log, self.derived, self._generation = store, log, derived, generation
        self._look = Look(store)
        self._reached: dict[tuple[int, int], tuple[int, int, bool]] = {}  # by partition and time: how far was looked

    def check_live(self) -> None:
        """Make sure that the generation that is read is live still.

        Raises:
            AfterlogError: a promotion or a rollback has made another one live; its offsets are others.
        """
        look = Look(self._store)  # a new one: a restore may have put another database in place
        try:
            live = look.live_generation(self._log)
        finally:
            look.close()
        if live != self._generation:
            raise AfterlogError(
                f"generation {live} is live now, and this was generation {self._generation}", where=self._log,
                do=f"Go on with it: afterlog read {self._log} --follow",
            )  # fmt: skip

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
                    if place > (
                        there := reader.end()
                    ):  # no word about what was asked: the files end before the log does
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


def _append(store: Store, log: str, lines: list[bytes], before: int) -> list[int]:
    try:
        return append_lines(store, log, lines).refused
    except AppendError as error:
        first = error.missing[0]
        if error.missing == list(range(first, len(lines))):
            say(f"{before + first} lines are in; go on from line {before + first + 1}")
        else:
            numbers = ", ".join(str(before + index + 1) for index in error.missing)
            say(f"of the lines up to {before + len(lines)}, these are not in: {numbers}")
        raise
    except AfterlogError as error:
        if isinstance(error.__cause__, AppendError):  # it failed after all of these were in
            say(f"{before + len(lines)} lines are in; go on from line {before + len(lines) + 1}")
        elif before:
            say(f"{before} lines are in")
        raise


def _open(file: str) -> BufferedReader:
    if file == "-":
        if sys.stdin is None:  # closed by whoever started us
            raise UsageError("standard input is closed", do="Name a file, or give it lines")
        return open(sys.stdin.fileno(), "rb", closefd=False)
    if not file:  # it would be the working folder
        raise UsageError("no name of a file", found="''", expected="a file, or - for standard input")
    try:
        return Path(file).open("rb")  # the caller closes it
    except OSError as error:
        raise UsageError(f"cannot read the file: {error.strerror}", where=file) from error


def _chunks(source: BufferedReader) -> Iterator[list[bytes]]:
    """Whole lines as they come, without their newlines: what a pipe has so far is not kept waiting for more."""
    rest: list[bytes] = []
    while data := source.read1(_CHUNK):
        whole, newline, tail = data.rpartition(b"\n")
        if newline:
            yield b"".join([*rest, whole]).split(b"\n")
            rest = []
        rest.append(tail)
    if last := b"".join(rest):
        yield [last]
