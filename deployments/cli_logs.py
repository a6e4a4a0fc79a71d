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
from deployments.reading import Reading
from storage.door import append_lines
from storage.errors import AfterlogError, AppendError, UsageError
from storage.look import Look
from storage.segment import check_log_name
from storage.settings import load_settings
from storage.store import DELIVERIES, Store
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
    reading = Reading(store, log, derived, generation)
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


def _follow(reading: Reading, positions: dict[int, int], to: str | None, *, every_partition: bool, live: bool) -> None:
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
        # A log that begins may have more partitions than were to be seen.
        for part in reading.partitions() if every_partition else ():
            if part not in positions:
                positions[part] = 0
                pulse.watch(reading.directory(part))
    raise KeyboardInterrupt


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
