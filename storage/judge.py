"""The one judge: every line is good, or bad for one named reason.

This is its fast way: msgspec reads only what every processor needs and leaves the rest as it came. Whatever it stumbles over goes to `storage.slow_judge`, which looks at each field by itself and has the last word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

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


class _Context(msgspec.Struct, frozen=True, gc=False):
    at: int | float | str | UnsetType = UNSET


class _Stamp(msgspec.Struct, frozen=True, gc=False):
    inserted_at: int | float | str | UnsetType = UNSET
    id: Any = None


class _Object(msgspec.Struct, frozen=True, gc=False):
    item: Raw = Raw(b"")


class _Wire(msgspec.Struct, gc=False):
    subject: _Subject
    verb: str | _Verb
    object: _Object = _Object()  # what is no object goes the slow way
    context: _Context = _Context()  # a null is no usable time, and goes the slow way too
    event: _Stamp = _Stamp()


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
_REFUSALS = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
_decode_times = msgspec.json.Decoder(_RawTimes).decode
_decode_item = msgspec.json.Decoder(_Item).decode

_items: dict[bytes, Item] = {}
"""Items by their own bytes: a shop sells the same ones again and again, so most are read once and share their memory."""
_MOST_KEPT, _LONGEST_KEPT = 20_000, 500
_verbs: dict[str, str] = {}
"""The verbs seen first, each one object: its hash is known, and comparing it is comparing addresses."""
_MOST_VERBS = 500
_AT_ONCE = 64
"""How many lines are decoded before they are judged, so that what they say is still at hand."""


class _Limits(NamedTuple):
    """The longest line, in bytes, and how deep one may nest."""

    line: int
    depth: int

    @property
    def plain(self) -> int:
        """What is as short as this is not too long, and cannot nest too deeply, each bracket closed."""
        return min(self.line, 2 * self.depth)


def decode(block: Block, log: str, partition: int, clock: int, max_line: int, max_depth: int = MAX_DEPTH) -> Batch:
    """Judge every line of `block`; `clock` is the greatest clock or tick before it."""
    lines = block.lines
    lengths = list(map(len, lines))
    for index, length in block.oversized.items():
        lengths[index] = length
    limits = _Limits(max_line, max_depth)
    text = block.text or b"\n".join(lines)
    events, bad, clock = _judge_each(_decoded(lines, lengths, limits, text), block.start, clock, limits)
    return Batch(log, partition, block.start, block.end, len(lines), events, bad, clock, text)


def judge(line: bytes, offset: int, clock: int, max_depth: int = MAX_DEPTH) -> Event:
    """The event of one line.

    Raises:
        Rejected: the line is bad; the text is its reason.
    """
    limits = _Limits(len(line), max_depth)
    events, bad, _ = _judge_each([(line, len(line), _decode_one(line, len(line), limits))], offset, clock, limits)
    if bad:
        raise Rejected(bad[0].reason)
    return events[0]


def _decoded(
    lines: list[bytes], lengths: list[int], limits: _Limits, text: bytes
) -> Iterator[tuple[bytes, int, _Wire | None]]:
    """Each line of `text` with its full length and what it says, None where it needs a second look."""
    all_utf8 = text.isascii() or _is_utf8(text)
    for start in range(0, len(lines), _AT_ONCE):
        some, long = lines[start : start + _AT_ONCE], lengths[start : start + _AT_ONCE]
        yield from zip(some, long, _decode_some(some, long, limits, all_utf8=all_utf8), strict=True)


def _decode_some(lines: list[bytes], lengths: list[int], limits: _Limits, *, all_utf8: bool) -> list[_Wire | None]:
    """What each line says: without a look at each where none of them is unusual."""
    if all_utf8 and (
        max(lengths) <= limits.plain
        or not any(_is_beyond(line, length, limits) for line, length in zip(lines, lengths, strict=True))
    ):
        try:
            return [*map(_decode_wire, lines)]
        except _REFUSALS:
            pass
    return [_decode_one(line, length, limits) for line, length in zip(lines, lengths, strict=True)]


def _decode_one(line: bytes, length: int, limits: _Limits) -> _Wire | None:
    if _is_beyond(line, length, limits):
        return None
    try:
        return _decode_wire(line) if _is_utf8(line) else None
    except _REFUSALS:
        return None


def _is_beyond(line: bytes, length: int, limits: _Limits) -> bool:
    """Whether a line is too long, or may nest too deeply."""
    return length > limits.plain and (length > limits.line or line.count(b"[") + line.count(b"{") > limits.depth)


def _judge_each(
    each: Iterable[tuple[bytes, int, _Wire | None]], offset: int, clock: int, limits: _Limits
) -> tuple[list[Event], list[Bad], int]:
    """The good events and the bad lines among lines, each with its full length and what it says, and the clock after them."""
    events: list[Event] = []
    bad: list[Bad] = []
    add, known_verb, known_item, earliest, latest = events.append, _verbs.get, _items.get, SECONDS_BELOW, LATEST
    at: Any
    taken: Any
    for line, length, wire in each:
        try:
            item = None
            if wire is not None:
                verb: Any = wire.verb
                if verb.__class__ is not str:
                    verb = verb.type
                verb = known_verb(verb) or _keep_verb(verb)
                if verb in ITEM_VERBS:
                    raw = bytes(wire.object.item)
                    item = known_item(raw) or _read_item(raw)
                    if item is None:
                        wire = None
            if wire is None:
                add(_look_again(line, length, offset, clock, limits))
                clock = events[-1].clock
            else:
                at, stamp = wire.context.at, wire.event
                if at.__class__ is not int or not earliest <= at <= latest:
                    at = _time(at, line, "context.at")
                taken = stamp.inserted_at
                if taken.__class__ is not int or not earliest <= taken <= latest:
                    taken = _time(taken, line, "event.inserted_at")
                    if taken is None:
                        taken = _only(at)
                if taken > clock:
                    clock = taken
                if at is None or at > clock:
                    at = clock
                subject, event_id = wire.subject, stamp.id
                ident: Any = subject.id
                key = ident if ident.__class__ is str else str(ident)
                if event_id is not None and event_id.__class__ is not str:
                    event_id = None
                add(Event(offset, line, ident, key, subject.type, verb, at, clock, item, event_id))
        except Rejected as error:
            bad.append(Bad(offset, str(error), length, line[:HEAD], clock))
        offset += length + 1
    return events, bad, clock


def _look_again(line: bytes, length: int, offset: int, clock: int, limits: _Limits) -> Event:
    if length > limits.line:
        raise Rejected(f"too long: {length} bytes, at most {limits.line}")
    return judge_slowly(line, offset, clock, limits.depth)


def _only(at: int | None) -> int:
    """The one time of a line without `event.inserted_at`."""
    if at is None:
        raise Rejected("no time: neither context.at nor event.inserted_at")
    return at


def _keep_verb(verb: str) -> str:
    if len(_verbs) < _MOST_VERBS:
        _verbs[verb] = verb
    return verb


def _read_item(raw: bytes) -> Item | None:
    """The item of these bytes; None where they are none that the fast way knows."""
    try:
        found = _decode_item(raw)
    except _REFUSALS:
        return None
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


def _is_utf8(data: bytes) -> bool:
    """msgspec does not look at the text that it skips, so this does, for a whole block at once."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
