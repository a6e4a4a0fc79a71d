"""The judge's second look: it names why a line is bad, or finds it good after all.

It reads a line field by field, each as its own bytes, so that neither a key that comes twice nor a number that no machine
can hold makes it say anything else than the fast way would.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw

from storage.event import ITEM_VERBS, MAX_DEPTH, Event, Item, Rejected
from storage.times import parse_time, parse_time_literal

Fields = dict[str, Raw]

_decode_raw = msgspec.json.Decoder(Raw).decode
_decode_fields = msgspec.json.Decoder(Fields).decode
_decode_text = msgspec.json.Decoder(str).decode
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_HEX = rb"[0-9a-fA-F]"
_SURROGATES = re.compile(
    rb"\\\\|\\u[dD][89abAB]%b{2}\\u[dD][c-fC-F]%b{2}|(\\u[dD][89a-fA-F]%b{2})" % (_HEX, _HEX, _HEX)
)
"""Escapes that could be half of a character; those in group 1 are."""
_INTEGER = re.compile(rb"-?\d{1,4300}")  # what Python turns into an integer, and msgspec too
_LONGEST_SHOWN = 100


def judge_slowly(line: bytes, offset: int, clock: int, max_depth: int = MAX_DEPTH) -> Event:
    """What `storage.judge.judge` gives, from a look at each field by itself.

    Raises:
        Rejected: the line is bad; the text is its reason.
    """
    document = parse(line, max_depth)
    subject = _inner(document.get("subject"))
    ident = _subject_id(subject)
    verb = _verb(document)
    at = _time(document, "context", "at")
    inserted_at = _time(document, "event", "inserted_at")
    taken = at if inserted_at is None else inserted_at
    if taken is None:
        raise Rejected("no time: neither context.at nor event.inserted_at")
    item = _item(document) if verb in ITEM_VERBS else None
    clock = max(clock, taken)
    happened = clock if at is None else min(at, clock)
    kind = _text(subject.get("type")) if subject else None
    event_id = _text((_inner(document.get("event")) or {}).get("id"))
    return Event(offset, line, ident, str(ident), kind, verb, happened, clock, item, event_id)


def parse(line: bytes, max_depth: int = MAX_DEPTH) -> Fields:
    """The fields of a line that is a JSON object.

    Raises:
        Rejected: no JSON, or JSON that is no object.
    """
    if not line.strip():
        raise Rejected("no JSON: an empty line")
    if depth(line, max_depth) > max_depth:
        raise Rejected(f"no JSON: nested deeper than {max_depth}")
    try:
        line.decode()
        _decode_raw(line)
    except UnicodeDecodeError as error:
        raise Rejected(f"no JSON: byte {error.start} is not UTF-8") from error
    except msgspec.DecodeError as error:
        raise Rejected(f"no JSON: {_malformed(line, error)}") from error
    if not line.lstrip().startswith(b"{"):
        raise Rejected(f"no JSON object: {_named(Raw(line))}")
    return _decode_fields(line)


def _malformed(line: bytes, error: msgspec.DecodeError) -> str:
    """What is wrong with a line: in words of our own where the decoder's would lead astray."""
    if line.startswith(b"\xef\xbb\xbf"):
        return "a byte order mark before it"
    halves = [found[1] for found in _SURROGATES.finditer(line) if found[1]]
    if halves:
        try:
            _decode_raw(_SURROGATES.sub(lambda found: b"?" if found[1] else found[0], line))
            return f"half of a surrogate pair, {halves[0].decode()}, is no character"
        except msgspec.DecodeError:
            pass  # something else is wrong besides, and the decoder names the first
    return str(error).removeprefix("JSON is malformed: ")


def depth(line: bytes, enough: int) -> int:
    """How deep a line nests, counted without parsing: brackets outside of strings; 0 where it cannot be over `enough`."""
    if line.count(b"[") + line.count(b"{") <= enough:
        return 0
    deepest = level = 0
    for byte in _STRINGS.sub(b"", line):
        if byte in b"[{":
            level += 1
            deepest = max(deepest, level)
        elif byte in b"]}":
            level -= 1
    return deepest


def _literal(raw: Raw | None) -> bytes:
    return b"" if raw is None else bytes(raw).strip()


def _inner(raw: Raw | None) -> Fields | None:
    """The fields of a value that is an object."""
    return _decode_fields(raw) if raw is not None and _literal(raw).startswith(b"{") else None


def _text(raw: Raw | None) -> str | None:
    """The text of a value that is a string."""
    return _decode_text(raw) if raw is not None and _literal(raw).startswith(b'"') else None


def _named(raw: Raw | None) -> str:
    literal = _literal(raw)
    if literal in (b"true", b"false", b"null"):
        return literal.decode()
    names = {b"": "missing", b"[": "an array", b"{": "an object", b'"': "a string"}
    return names.get(literal[:1], "a number")


def _id(raw: Raw | None, field: str, reason: str) -> int | str:
    literal = _literal(raw)
    if literal in (b"true", b"false"):
        raise Rejected(f"boolean id: {field}")
    if (text := _text(raw)) is not None:
        return text
    if _INTEGER.fullmatch(literal):
        return int(literal)
    raise Rejected(f"{reason}: {field} is {_named(raw)}, expected a string or an integer")


def _subject_id(subject: Fields | None) -> int | str:
    if subject is None:
        raise Rejected("no subject: expected an object with an id")
    return _id(subject.get("id"), "subject.id", "no subject")


def _verb(document: Fields) -> str:
    raw = document.get("verb")
    inner = _inner(raw)
    verb = _text(inner.get("type") if inner is not None else raw)
    if verb is None:
        raise Rejected("no verb: expected a string, or an object with a type")
    return verb


def _time(document: Fields, part: str, field: str) -> int | None:
    if part not in document:
        return None
    holder = _inner(document[part])
    if holder is None:
        raise Rejected(f"no time: {part} is {_named(document[part])}, expected an object")
    raw = holder.get(field)
    if raw is None:
        return None
    literal, text = _literal(raw), _text(raw)
    millis = None
    if text is not None:
        millis = parse_time(text)
    elif literal[:1] in b"-0123456789":
        millis = parse_time_literal(literal.decode())
    if millis is None:
        shown = text if text is not None else literal.decode()
        raise Rejected(f"no time: {part}.{field} is {shown[:_LONGEST_SHOWN]!r}")
    return millis


def _item(document: Fields) -> Item:
    obj = _inner(document.get("object"))
    raw = obj.get("item") if obj is not None else None
    item = _inner(raw)
    if raw is None or item is None:
        raise Rejected("no item: object.item is no object")
    ident = _id(item.get("id"), "object.item.id", "no item id")
    count = _literal(item.get("count", Raw(b"1")))
    if count[:1] not in b"-0123456789":
        raise Rejected(f"no count: object.item.count is {_named(item['count'])}")
    return Item(str(ident), int(count) if _INTEGER.fullmatch(count) else float(count), bytes(raw))
