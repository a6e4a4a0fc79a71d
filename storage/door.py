"""The front door: what producers append to raw logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import msgspec
import orjson
from msgspec import UNSET, UnsetType

from storage.errors import AfterlogError, AppendError, UsageError
from storage.event import Rejected
from storage.judge import judge
from storage.partition import partition_of
from storage.stamps import alike
from storage.store import Store
from storage.times import SECONDS_BELOW, now, parse_time

REFUSED = "refused"


class _Stamp(msgspec.Struct, frozen=True, gc=False):
    inserted_at: int | float | str | UnsetType = UNSET


class _Stamped(msgspec.Struct, gc=False):
    event: _Stamp = _Stamp()


class _Context(msgspec.Struct, frozen=True, gc=False):
    at: int | float | str | UnsetType = UNSET


class _Happened(msgspec.Struct, gc=False):
    context: _Context = _Context()


class _Subject(msgspec.Struct):
    id: int | str


class _Subjected(msgspec.Struct):
    subject: _Subject


_decode_stamp = msgspec.json.Decoder(_Stamped).decode
_decode_happened = msgspec.json.Decoder(_Happened).decode
_decode_subject = msgspec.json.Decoder(_Subjected).decode
_REFUSALS = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


@dataclass
class Appended:
    """Where lines went: `positions` are (partition, offset) in the order given, None for one that was refused."""

    positions: list[tuple[int, int] | None] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)


def append_lines(store: Store, log: str, lines: Sequence[bytes]) -> Appended:
    """Append raw lines, without their newlines, exactly as they are; nothing is stamped.

    A line whose clock (`event.inserted_at`, or `context.at` where that is missing) lies ahead of the wall clock by more than the
    setting goes to the log `refused`: what came after it would be as late as that.

    Raises:
        UsageError: a line has a newline inside.
        AppendError: a write or an fsync failed half way; it names the offsets that are in, in the order of the lines given,
            and the indexes of those that are missing, which alone are to be appended again.
        AfterlogError: it failed after all of them were in.
    """
    latest = now() + store.settings.ahead
    if b"\n" in b"".join(lines):  # far sooner than a look at each
        broken = next(index for index, line in enumerate(lines) if b"\n" in line)
        raise UsageError(f"line {broken + 1} has a newline inside", do="Pass one event a line")
    result = Appended([None] * len(lines), _ahead(lines, latest))
    refused = set(result.refused)
    kept = [i for i in range(len(lines)) if i not in refused] if refused else range(len(lines))
    groups = _by_partition(lines, kept, _partitions(store, log, len(lines)) if kept else 1)
    destinations: list[tuple[str, int, Sequence[int]]] = [(REFUSED, 0, result.refused)] if refused else []
    destinations += [(log, partition, indexes) for partition, indexes in groups.items()]
    done: list[tuple[Sequence[int], list[int]]] = []
    for name, partition, indexes in destinations:
        whole = len(indexes) == len(lines)  # nearly always; handed on as they are they take less time
        chosen = lines if whole else [lines[i] for i in indexes]
        try:
            offsets = _appended(store, name, partition, chosen, len(indexes))
        except AppendError as error:
            raise _of_all(error, indexes, done, len(lines)) from error
        done.append((indexes, offsets))
        if name == log and whole:
            result.positions = list(zip(repeat(partition), offsets))
        elif name == log:
            for index, position in zip(indexes, zip(repeat(partition), offsets), strict=True):
                result.positions[index] = position
    return result


def _appended(
    store: Store, log: str, partition: int, lines: Sequence[bytes] | Callable[[int], Sequence[bytes]], count: int
) -> list[int]:
    try:
        return store.writer(log, partition).append(lines, count)
    except OSError as error:  # before there was anything to write to
        raise _unwritten(error, store.directory(log, partition), count) from error


def _partitions(store: Store, log: str, count: int) -> int:
    try:
        return store.begin(log)
    except OSError as error:
        raise _unwritten(error, store.directory(log, 0), count) from error


def _unwritten(error: OSError, where: Path, count: int) -> AppendError:
    return AppendError(f"cannot write: {error.strerror}", where=str(where), offsets=[], missing=list(range(count)))


def _of_all(
    error: AppendError, indexes: Sequence[int], done: Sequence[tuple[Sequence[int], list[int]]], count: int
) -> AfterlogError:
    """The error of one partition's append, told of all `count` lines that were to be appended.

    `done` are the indexes and offsets of what went to other partitions before.
    """
    failed = set(error.missing)
    whole = [index for at, index in enumerate(indexes) if at not in failed]
    places = {i: at for pair in [*done, (whole, error.offsets)] for i, at in zip(*pair, strict=True)}
    missing = [index for index in range(count) if index not in places]
    if not missing:
        return AfterlogError(error.what, where=error.where, do=f"All {count} lines are in: append none of them again")
    offsets = [places[i] for i in sorted(places)]
    return AppendError(error.what, where=error.where, offsets=offsets, missing=missing, durable=error.durable)


def append_events(
    store: Store, log: str, events: Sequence[Mapping[str, Any]], *, inserted_by: str | None = None
) -> list[tuple[int, int]]:
    """Append events, each stamped with `event.inserted_at` (and `inserted_by`, where given); gives their positions.

    Raises:
        UsageError: an event is none: the judge's reason says why. Nothing was appended.
        AppendError: a write or an fsync failed half way; it names the offsets that are in, in the order of the lines given,
            and the indexes of those that are missing, which alone are to be appended again.
        AfterlogError: it failed after all of them were in.
    """
    lines: list[bytes] = []
    for index, event in enumerate(events):
        lines.append(_dump(event, now(), inserted_by, index))
        _check(lines[-1], index, store.settings.max_line)
    groups = _by_partition(lines, range(len(lines)), _partitions(store, log, len(lines)) if lines else 1)
    positions: list[tuple[int, int]] = [(0, 0)] * len(events)
    done: list[tuple[Sequence[int], list[int]]] = []
    for partition, indexes in groups.items():
        chosen = [(i, events[i]) for i in indexes]
        try:
            offsets = _appended(
                store, log, partition,
                lambda stamp, chosen=chosen: [_dump(event, stamp, inserted_by, i) for i, event in chosen],  # type: ignore[misc]  # a default binds this turn's lines
                len(chosen),
            )  # fmt: skip
        except AppendError as error:
            raise _of_all(error, indexes, done, len(events)) from error
        done.append((indexes, offsets))
        for index, offset in zip(indexes, offsets, strict=True):
            positions[index] = (partition, offset)
    return positions


def _dump(event: Mapping[str, Any], stamp: int, inserted_by: str | None, index: int) -> bytes:
    meta = event.get("event")
    stamped = {**(meta if isinstance(meta, Mapping) else {}), "inserted_at": stamp}
    if inserted_by is not None:
        stamped["inserted_by"] = inserted_by
    try:
        return orjson.dumps({**event, "event": stamped})
    except TypeError as error:
        raise UsageError(f"event {index + 1} is no JSON: {error}", do="Nothing was appended; correct it") from error


def _check(line: bytes, index: int, max_line: int) -> None:
    if len(line) > max_line:
        raise UsageError(f"event {index + 1} is too long", found=f"{len(line)} bytes", expected=f"at most {max_line}")
    try:
        judge(line, 0, 0)
    except Rejected as error:
        raise UsageError(f"event {index + 1} is none: {error}", do="Nothing was appended; correct it") from error


def _by_partition(lines: Sequence[bytes], indexes: Sequence[int], partitions: int) -> Mapping[int, Sequence[int]]:
    if partitions == 1:
        return {0: indexes} if indexes else {}
    groups: dict[int, list[int]] = {}
    for index in indexes:
        groups.setdefault(_partition(lines[index], partitions), []).append(index)
    return groups


def _ahead(lines: Sequence[bytes], latest: int) -> list[int]:
    """The indexes of the lines that are ahead. Nearly always there are none, which all stamps together tell sooner than each."""
    if (bounds := alike(lines)) and int(max(bounds)) <= latest:
        return []
    try:
        clocks: list[Any] = [clock for line in lines if (clock := _clock(line)) is not UNSET]
        if {*map(type, clocks)} <= {int} and (not clocks or SECONDS_BELOW <= min(clocks) <= max(clocks) <= latest):
            return []
    except _REFUSALS:
        pass  # one of them is unusual, so each is looked at by itself
    return [index for index, line in enumerate(lines) if is_ahead(line, latest)]


def is_ahead(line: bytes, latest: int) -> bool:
    """Whether the clock of a line lies after `latest`; False where it has none that can be used."""
    try:
        value = _clock(line)
    except _REFUSALS:
        return False  # the judge will say what is wrong with it
    if isinstance(value, float):
        return (value * 1000 if value < SECONDS_BELOW else value) > latest
    millis = None if value is UNSET else parse_time(value)
    return millis is not None and millis > latest


def _clock(line: bytes) -> int | float | str | UnsetType:
    taken = _decode_stamp(line).event.inserted_at
    return _decode_happened(line).context.at if taken is UNSET else taken


def _partition(line: bytes, partitions: int) -> int:
    if partitions == 1:
        return 0
    try:
        return partition_of(str(_decode_subject(line).subject.id), partitions)
    except _REFUSALS:
        return 0  # a line without a usable subject is bad wherever it lies
