"""Measures: the numbers that an event's fields give, decoded from its object and nothing more than is asked for."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Raw

from storage.event import Batch, Event
from tasks.processors import basket

ORDER_TOTAL = "order.total"

_WHITESPACE = string.whitespace.encode()
_DIGITS = string.digits.encode()
_SYMBOLS = string.punctuation.encode()


def _length(text: str) -> float:
    return len(text)


def _share(count: Callable[[str], int]) -> Callable[[str], float | None]:
    return lambda text: count(text) / len(text) if text else None


def _counter(ascii_bytes: bytes, is_one: Callable[[str], bool]) -> Callable[[str], int]:
    """How many characters of a text are of a kind; plain ASCII is counted by deleting them."""

    def count(text: str) -> int:
        if text.isascii():
            return len(text) - len(text.encode().translate(None, ascii_bytes))
        return sum(map(is_one, text))

    return count


def _top_word(text: str) -> float | None:
    words = text.casefold().split()
    return max(Counter(words).values()) / len(words) if words else None


def _is_symbol(char: str) -> bool:
    return not (char.isalnum() or char.isspace())


TEXT: dict[str, Callable[[str], float | None]] = {
    "length": _length,
    "whitespace": _share(_counter(_WHITESPACE, str.isspace)),
    "symbol": _share(_counter(_SYMBOLS, _is_symbol)),
    "digit": _share(_counter(_DIGITS, str.isdigit)),
    "top_word": _top_word,
}
"""What is measured of a text: characters, then shares of them, then of words."""


def _shape(literal: bytes) -> tuple[int, int]:
    """How many keys a JSON value has at all depths, and how deep it nests.

    Level by level, its leaves untouched: it may nest deeper than a stack, and hold numbers that no machine can.
    """
    keys = depth = 0
    level = [literal]
    while containers := [inner for inner in level if inner[:1] in (b"{", b"[")]:
        depth += 1
        level = []
        for container in containers:
            if container[:1] == b"{":
                fields = _decode_object(container)
                keys += len(fields)
                level += map(bytes, fields.values())
            else:
                level += map(bytes, _decode_array(container))
    return keys, depth


JSON: dict[str, Callable[[bytes], float]] = {
    "length": len,
    "keys": lambda literal: _shape(literal)[0],
    "depth": lambda literal: _shape(literal)[1],
}
"""What is measured of a value that is no text: its bytes, all its keys, how deep it nests."""

_has_short_escape = re.compile(rb'["\\/\x00-\x1f]').search
_MISSING = Raw(b"")
_decode_text = msgspec.json.Decoder(str).decode
_decode_object = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_array = msgspec.json.Decoder(list[Raw]).decode


class _Fields:
    """Reads the fields at given paths of a JSON object, level by level, and nothing else of it."""

    def __init__(self, paths: list[tuple[str, ...]]) -> None:
        leaves = {path[0] for path in paths if len(path) == 1}
        inner = {
            name: _Fields([path[1:] for path in paths if path[0] == name and len(path) > 1])
            for name in sorted({path[0] for path in paths if len(path) > 1})
        }
        names = sorted(leaves | set(inner))
        fields: list[Any] = [
            (f"f{index}", Raw, msgspec.field(default=_MISSING, name=name)) for index, name in enumerate(names)
        ]
        self.struct = msgspec.defstruct("Fields", fields, gc=False)
        self._decode = msgspec.json.Decoder(self.struct).decode
        self._plan = [(f"f{i}", name, name in leaves, inner.get(name)) for i, name in enumerate(names)]
        self.words = [f'"{name}"'.encode() for name in names]

    def read(self, raw: Raw | bytes, prefix: tuple[str, ...], found: list[tuple[tuple[str, ...], bytes]]) -> None:
        """Add each path that is there to `found`, with the bytes of its value."""
        try:
            fields = self._decode(raw)
        except msgspec.MsgspecError:
            return  # no object: it has no fields
        self.take(fields, prefix, found)

    def take(self, fields: Any, prefix: tuple[str, ...], found: list[tuple[tuple[str, ...], bytes]]) -> None:
        """`read` for what is decoded already."""
        for attribute, name, is_leaf, inner in self._plan:
            value = getattr(fields, attribute)
            if value is not _MISSING:
                literal = bytes(value)
                if is_leaf:
                    found.append(((*prefix, name), literal))
                if inner is not None and literal[:1] == b"{":
                    inner.read(literal, (*prefix, name), found)


class Measures:
    """The declared measures, and one decoder that reads their fields and no others.

    A name is a field's path from `object`, followed by what to measure of it where it is a text (`.length`,
    `.whitespace`, `.symbol`, `.digit`, `.top_word`) or another value (`.json.length`, `.json.keys`, `.json.depth`); a
    path alone is a number. `order.total` is the sum over an ORDERED event's own basket.

    Raises:
        ValueError: a name is of none of these forms.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._texts: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        self._jsons: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        self._numbers: dict[tuple[str, ...], str] = {}
        self._order_total = ORDER_TOTAL in names
        for name in names:
            if name != ORDER_TOTAL:
                self._declare(name)
        self._fields = _Fields(sorted({*self._texts, *self._jsons, *self._numbers}))
        self._words = self._fields.words
        # How a name may be written in escapes: most have no character that has a short one, like the `\/` of a slash.
        self._escape = b"\\" if any(_has_short_escape(word[1:-1]) for word in self._words) else b"\\u"
        line = [("object", self._fields.struct, msgspec.field(default_factory=self._fields.struct))]
        self._decode_line = msgspec.json.Decoder(msgspec.defstruct("Line", line, gc=False)).decode

    def of(self, event: Event) -> list[tuple[str, Any]]:
        """Each measure's name with its value in `event`: a number, or the boolean that stands where one was expected."""
        values: list[tuple[str, Any]] = []
        if self._order_total and event.verb == basket.ORDERED:
            total = basket.total(basket.order_items(event, {}))
            if total is not None:
                values.append((ORDER_TOTAL, float(total)))
        found: list[tuple[tuple[str, ...], bytes]] = []
        try:
            line: Any = self._decode_line(event.raw)
            self._fields.take(line.object, (), found)
        except msgspec.MsgspecError:
            self._fields.read(event.object, (), found)
        for path, literal in found:
            self._measure(path, literal, values)
        return values

    def among(self, batch: Batch) -> list[Event]:
        """Those in which any measure may be: a look at the bytes, much cheaper than decoding them."""
        # Most logs have no escapes at all, and one byte is found much quicker than two.
        words = [*self._words, self._escape] if b"\\" in batch.text else self._words
        found = batch.holding(words)
        if not self._order_total:
            return found
        ordered = batch.by_verb().get(basket.ORDERED, [])
        both = {event.offset: event for event in (*found, *ordered)}
        return [both[offset] for offset in sorted(both)]

    def _declare(self, name: str) -> None:
        head, *path = name.split(".")
        if head != "object" or not path or not all(path):
            raise ValueError(f"a measure is a path from `object`, or `{ORDER_TOTAL}`; found {name!r}")
        if len(path) > 2 and path[-2] == "json" and path[-1] in JSON:
            self._jsons.setdefault(tuple(path[:-2]), []).append((name, path[-1]))
        elif len(path) > 1 and path[-1] in TEXT:
            self._texts.setdefault(tuple(path[:-1]), []).append((name, path[-1]))
        else:
            self._numbers[tuple(path)] = name

    def _measure(self, path: tuple[str, ...], literal: bytes, values: list[tuple[str, Any]]) -> None:
        first = literal[:1]
        if first == b'"':
            if (kinds := self._texts.get(path)) is not None:
                text = _decode_text(literal)
                values += [(name, value) for name, kind in kinds if (value := TEXT[kind](text)) is not None]
        elif path in self._jsons and literal != b"null":
            values += [(name, JSON[kind](literal)) for name, kind in self._jsons[path]]
        if path in self._numbers and first in b"-0123456789tf":
            values.append((self._numbers[path], _number(literal)))


def _number(literal: bytes) -> float | bool:
    if literal in (b"true", b"false"):
        return literal == b"true"
    return float(literal)  # what is beyond a float's reach becomes infinite
