"""The one judge: every line is good, or bad for one named reason.

This is its fast way: msgspec reads only what every processor needs and leaves the rest as it came. Whatever it
stumbles over goes to `storage.slow_judge`, which looks at each field by itself and has the last word.
"""

from __future__ import annotations

from collections.abc import Sequence
from sys import intern
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from storage.event import HEAD, ITEM_VERBS, MAX_DEPTH, Bad, Batch, Block, Event, Item, Rejected
from storage.slow_judge import judge_slowly
from storage.times import LATEST, SECONDS_BELOW, parse_time, parse_time_literal


class _Subject(msgspec.Struct, gc=False):
    id: int | str
    type: Any = None


class _Verb(msgspec.Struct, gc=False):
    type: str


class _Context(msgspec.Struct, gc=False):
    at: int | float | str | UnsetType = UNSET


class _Stamp(msgspec.Struct, gc=False):
    inserted_at: int | float | str | UnsetType = UNSET
    id: Any = None


class _Wire(msgspec.Struct, gc=False):
    subject: _Subject
    verb: str | _Verb
    object: Raw = Raw(b"null")
    context: _Context = None  # type: ignore[assignment]  # where it is missing; a null is no usable time
    event: _Stamp = None  # type: ignore[assignment]  # likewise


class _RawContext(msgspec.Struct):
    at: Raw | UnsetType = UNSET


class _RawStamp(msgspec.Struct):
    inserted_at: Raw | UnsetType = UNSET


class _RawTimes(msgspec.Struct):
    context: _RawContext | UnsetType = UNSET
    event: _RawStamp | UnsetType = UNSET


class _ItemObject(msgspec.Struct, gc=False):
    item: Raw


class _Item(msgspec.Struct, gc=False):
    id: int | str
    count: int | float = 1


_decode_wire = msgspec.json.Decoder(_Wire).decode
_decode_times = msgspec.json.Decoder(_RawTimes).decode
_decode_item_object = msgspec.json.Decoder(_ItemObject).decode
_decode_item = msgspec.json.Decoder(_Item).decode


def read_item(obj: Raw) -> Item:
    """The item of an object that the judge has let pass."""
    raw = _decode_item_object(obj).item
    item = _decode_item(raw)
    return Item(intern(str(item.id)), item.count, bytes(raw))


def decode(block: Block, log: str, partition: int, clock: int, max_line: int, max_depth: int = MAX_DEPTH) -> Batch:
    """Judge every line of `block`; `clock` is the greatest clock or tick before it."""
    events: list[Event] = []
    bad: list[Bad] = []
    offset = block.start
    sound = _is_utf8(block.lines)
    for index, line in enumerate(block.lines):
        length = len(line)
        try:
            if length > max_line or (block.oversized and index in block.oversized):
                length = block.oversized.get(index, length)
                raise Rejected(f"too long: {length} bytes, at most {max_line}")
            event = judge(line, offset, clock, sound, max_depth)
            clock = event.clock
            events.append(event)
        except Rejected as error:
            bad.append(Bad(offset, str(error), length, line[:HEAD], clock))
        offset += length + 1
    return Batch(log, partition, block.start, block.end, len(block.lines), events, bad, clock)


def judge(line: bytes, offset: int, clock: int, sound: bool = False, max_depth: int = MAX_DEPTH) -> Event:
    """The event of one line; `sound` says that its UTF-8 was checked already.

    Raises:
        Rejected: the line is bad; the text is its reason.
    """
    if (len(line) > 2 * max_depth and line.count(b"[") + line.count(b"{") > max_depth) or not (
        sound or _is_utf8([line])
    ):
        return judge_slowly(line, offset, clock, max_depth)
    try:
        wire = _decode_wire(line)
        verb: Any = wire.verb
        if verb.__class__ is not str:
            verb = verb.type
        item = read_item(wire.object) if verb in ITEM_VERBS else None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return judge_slowly(line, offset, clock, max_depth)
    at: Any = wire.context
    if at is not None:
        at = at.at
        if at.__class__ is not int or not SECONDS_BELOW <= at <= LATEST:
            at = _time(at, line, "context.at")
    taken = at
    event_id: Any = None
    stamp = wire.event
    if stamp is not None:
        event_id = stamp.id if stamp.id.__class__ is str else None
        inserted_at: Any = stamp.inserted_at
        if inserted_at.__class__ is not int or not SECONDS_BELOW <= inserted_at <= LATEST:
            inserted_at = _time(inserted_at, line, "event.inserted_at")
        if inserted_at is not None:
            taken = inserted_at
    if taken is None:
        raise Rejected("no time: neither context.at nor event.inserted_at")
    if taken > clock:
        clock = taken
    if at is None or at > clock:
        at = clock
    subject = wire.subject
    ident = subject.id
    key = ident if ident.__class__ is str else str(ident)
    kind = subject.type
    if kind.__class__ is str:
        kind = intern(kind)  # few words, many events: one object each
    return Event(offset, line, ident, key, kind, intern(verb), wire.object, at, clock, item, event_id)


def _time(value: int | float | str | UnsetType | None, line: bytes, field: str) -> int | None:
    """A time that is not plain milliseconds; None where the line has none."""
    if value is None or value is UNSET:
        return None
    if isinstance(value, float):
        times: Any = _decode_times(line)
        literal = times.context.at if field == "context.at" else times.event.inserted_at
        millis = parse_time_literal(bytes(literal).decode())
    else:
        millis = parse_time(value)
    if millis is None:
        raise Rejected(f"no time: {field} is {str(value)[:100]!r}")
    return millis


def _is_utf8(lines: Sequence[bytes]) -> bool:
    """msgspec does not look at the text that it skips, so this does, for a whole block at once."""
    try:
        b"\n".join(lines).decode()
    except UnicodeDecodeError:
        return False
    return True
