"""The one judge: every line is good, or bad for one named reason.

This is its fast way: msgspec reads only what every processor needs and leaves the rest as it came. Whatever it
stumbles over goes to `storage.slow_judge`, which looks at each field by itself and has the last word.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class _Object(msgspec.Struct, frozen=True, gc=False):
    item: Raw | UnsetType = UNSET


class _Wire(msgspec.Struct, gc=False):
    subject: _Subject
    verb: str | _Verb
    object: _Object = _Object()  # what is no object goes the slow way
    context: _Context = None  # type: ignore[assignment]  # where it is missing; a null is no usable time
    event: _Stamp = None  # type: ignore[assignment]  # likewise


class _RawContext(msgspec.Struct):
    at: Raw | UnsetType = UNSET


class _RawStamp(msgspec.Struct):
    inserted_at: Raw | UnsetType = UNSET


class _RawTimes(msgspec.Struct):
    context: _RawContext | UnsetType = UNSET
    event: _RawStamp | UnsetType = UNSET


class _Item(msgspec.Struct, gc=False):
    id: int | str
    count: int | float = 1


_decode_wire = msgspec.json.Decoder(_Wire).decode
_decode_times = msgspec.json.Decoder(_RawTimes).decode
_decode_item = msgspec.json.Decoder(_Item).decode

_items: dict[bytes, Item] = {}
"""Items by their own bytes: a shop sells the same ones again and again, so most are read once and share their memory."""
_MOST_KEPT, _LONGEST_KEPT = 20_000, 500
_verbs: dict[str, str] = {}
"""The verbs seen first, each one object: its hash is known, and comparing it is comparing addresses."""
_MOST_VERBS = 500


def decode(block: Block, log: str, partition: int, clock: int, max_line: int, max_depth: int = MAX_DEPTH) -> Batch:
    """Judge every line of `block`; `clock` is the greatest clock or tick before it."""
    events: list[Event] = []
    bad: list[Bad] = []
    offset = block.start
    # What is as short as this cannot nest too deeply, each bracket closed; other lines are looked at one by one.
    plain = min(max_line, 2 * max_depth) if _is_utf8(block.lines) and not block.oversized else -1
    add, fast = events.append, _judge_fast
    for index, line in enumerate(block.lines):
        length = len(line)
        try:
            if length <= plain:
                event = fast(line, offset, clock, max_depth)
            else:
                length = block.oversized.get(index, length)
                if length > max_line:
                    raise Rejected(f"too long: {length} bytes, at most {max_line}")
                event = judge(line, offset, clock, max_depth)
            clock = event.clock
            add(event)
        except Rejected as error:
            bad.append(Bad(offset, str(error), length, line[:HEAD], clock))
        offset += length + 1
    return Batch(log, partition, block.start, block.end, len(block.lines), events, bad, clock)


def judge(line: bytes, offset: int, clock: int, max_depth: int = MAX_DEPTH) -> Event:
    """The event of one line.

    Raises:
        Rejected: the line is bad; the text is its reason.
    """
    if line.count(b"[") + line.count(b"{") > max_depth or not _is_utf8([line]):
        return judge_slowly(line, offset, clock, max_depth)
    return _judge_fast(line, offset, clock, max_depth)


def _judge_fast(line: bytes, offset: int, clock: int, max_depth: int) -> Event:
    """`judge` for a line that is known to be UTF-8 and not too deep."""
    try:
        wire = _decode_wire(line)
        verb: Any = wire.verb
        if verb.__class__ is not str:
            verb = verb.type
        verb = _verbs.get(verb) or _keep_verb(verb)
        item = None
        if verb in ITEM_VERBS:
            raw = bytes(wire.object.item)  # type: ignore[arg-type]  # a TypeError where there is none
            item = _items.get(raw) or _read_item(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, TypeError):
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
        event_id = stamp.id
        if event_id is not None and event_id.__class__ is not str:
            event_id = None
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
    return Event(offset, line, ident, key, subject.type, verb, at, clock, item, event_id)


def _keep_verb(verb: str) -> str:
    if len(_verbs) < _MOST_VERBS:
        _verbs[verb] = verb
    return verb


def _read_item(raw: bytes) -> Item:
    found = _decode_item(raw)
    ident: Any = found.id
    item = Item(ident if ident.__class__ is str else str(ident), found.count, raw)
    if len(raw) <= _LONGEST_KEPT:
        if len(_items) >= _MOST_KEPT:
            _items.clear()
        _items[raw] = item
    return item


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
