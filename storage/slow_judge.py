"""The judge's second look: a full parse that names why a line is bad, or finds it good after all."""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

import msgspec
from msgspec import Raw

from storage.event import ITEM_VERBS, MAX_DEPTH, Event, Item, Rejected
from storage.times import parse_time


class _Object(msgspec.Struct):
    object: Raw = Raw(b"null")


class _Item(msgspec.Struct):
    item: Raw


class _ItemObject(msgspec.Struct):
    object: _Item


# An object and an item are handed on as their own bytes, never written anew.
_decode_object = msgspec.json.Decoder(_Object).decode
_decode_item = msgspec.json.Decoder(_ItemObject).decode
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def judge_slowly(line: bytes, offset: int, clock: int) -> Event:
    """What `storage.event.judge` gives, from a full parse.

    Raises:
        Rejected: the line is bad; the text is its reason.
    """
    document = parse(line)
    subject, ident = _subject(document)
    verb = _verb(document)
    at = _time(document, "context", "at")
    inserted_at = _time(document, "event", "inserted_at")
    taken = at if inserted_at is None else inserted_at
    if taken is None:
        raise Rejected("no time: neither context.at nor event.inserted_at")
    item = _item(document, line) if verb in ITEM_VERBS else None
    clock = max(clock, taken)
    happened = clock if at is None else min(at, clock)
    stamp = document.get("event")
    event_id = stamp.get("id") if isinstance(stamp, dict) else None
    obj = _decode_object(line).object
    return Event(
        offset, line, ident, str(ident), subject.get("type"), verb, obj, happened, clock, item,
        event_id if isinstance(event_id, str) else None,
    )  # fmt: skip


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object of a line, its fractions as exact decimals.

    Raises:
        Rejected: no JSON, or JSON that is no object.
    """
    if not line.strip():
        raise Rejected("no JSON: an empty line")
    if depth(line) > MAX_DEPTH:
        raise Rejected(f"no JSON: nested deeper than {MAX_DEPTH}")
    try:
        document = json.loads(line.decode(), parse_constant=_no_constant, parse_float=_decimal)
        json.dumps(document, ensure_ascii=False, default=str).encode()
    except UnicodeDecodeError as error:
        raise Rejected(f"no JSON: byte {error.start} is not UTF-8") from error
    except UnicodeEncodeError as error:
        raise Rejected("no JSON: half of a surrogate pair") from error
    except (ValueError, RecursionError) as error:
        raise Rejected(f"no JSON: {error}") from error
    if not isinstance(document, dict):
        raise Rejected(f"no JSON object: {_named(document)}")
    return document


def depth(line: bytes) -> int:
    """How deep a line nests, counted without parsing: brackets outside of strings."""
    if line.count(b"[") + line.count(b"{") <= MAX_DEPTH:
        return 0
    deepest = level = 0
    for byte in _STRINGS.sub(b"", line):
        if byte in b"[{":
            level += 1
            deepest = max(deepest, level)
        elif byte in b"]}":
            level -= 1
    return deepest


def is_number(value: object) -> bool:
    """Whether a parsed JSON value is a number; true and false are not."""
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _decimal(literal: str) -> Decimal | float:
    try:
        return Decimal(literal)
    except InvalidOperation:
        return float(literal)  # an exponent beyond Decimal's own: infinite or zero


def _named(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "an array"
    if isinstance(value, dict):
        return "an object"
    return "a string" if isinstance(value, str) else "a number"


def _subject(document: dict[str, Any]) -> tuple[dict[str, Any], int | str]:
    subject = document.get("subject")
    if not isinstance(subject, dict):
        raise Rejected("no subject: expected an object with an id")
    ident = subject.get("id")
    if isinstance(ident, bool):
        raise Rejected("boolean id: subject.id")
    if not isinstance(ident, (int, str)):
        raise Rejected(f"no subject: its id is {_named(ident)}, expected a string or an integer")
    return subject, ident


def _verb(document: dict[str, Any]) -> str:
    verb = document.get("verb")
    if isinstance(verb, dict):
        verb = verb.get("type")
    if not isinstance(verb, str):
        raise Rejected("no verb: expected a string, or an object with a type")
    return verb


def _time(document: dict[str, Any], part: str, field: str) -> int | None:
    if part not in document:
        return None
    holder = document[part]
    if not isinstance(holder, dict):
        raise Rejected(f"no time: {part} is {_named(holder)}, expected an object")
    if field not in holder:
        return None
    value = holder[field]
    millis = None
    if isinstance(value, (int, str, Decimal)) and not isinstance(value, bool):
        millis = parse_time(value)
    if millis is None:
        raise Rejected(f"no time: {part}.{field} is {str(value)[:100]!r}")
    return millis


def _item(document: dict[str, Any], line: bytes) -> Item:
    obj = document.get("object")
    item = obj.get("item") if isinstance(obj, dict) else None
    if not isinstance(item, dict):
        raise Rejected("no item: object.item is no object")
    ident = item.get("id")
    if isinstance(ident, bool):
        raise Rejected("boolean id: object.item.id")
    if not isinstance(ident, (int, str)):
        raise Rejected("no item id: object.item.id is no string or integer")
    count = item.get("count", 1)
    if not is_number(count):
        raise Rejected(f"no count: object.item.count is {_named(count)}")
    return Item(
        str(ident), float(count) if isinstance(count, Decimal) else count, bytes(_decode_item(line).object.item)
    )
