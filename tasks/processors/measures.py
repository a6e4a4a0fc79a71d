"""Measures: the numbers that an event's fields give, decoded from its object and nothing more than is asked for."""

from __future__ import annotations

import re
import string
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
    counts: dict[str, int] = {}  # of a few words this is quicker than a Counter
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return max(counts.values()) / len(words) if words else None


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

Values = list[tuple[str, Any]]

_has_short_escape = re.compile(rb'["\\/\x00-\x1f]').search
_MISSING = Raw(b"")
_decode_text = msgspec.json.Decoder(str).decode
_decode_object = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_array = msgspec.json.Decoder(list[Raw]).decode


class _Field:
    """What to measure of one field: of a text, of another value, as a number, and of the fields within it."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, Callable[[str], float | None]]] = []
        self.jsons: list[tuple[str, Callable[[bytes], float]]] = []
        self.number: str | None = None
        self.inner: dict[str, _Field] = {}
        self.of_object = basket.kept(self._of_object)  # most objects are items

    def at(self, path: list[str]) -> _Field:
        """The field at `path` within this one, made where nothing was declared of it yet."""
        return self.inner.setdefault(path[0], _Field()).at(path[1:]) if path else self

    def words(self) -> list[bytes]:
        """The names of the fields within it, as they are mostly written."""
        return [f'"{name}"'.encode() for name in self.inner]

    def compile(self) -> type[msgspec.Struct]:
        """Make the decoder of the fields within it, all the way down; gives its struct."""
        self._plan = [(f"f{index}", self.inner[name]) for index, name in enumerate(sorted(self.inner))]
        fields: list[Any] = [
            (attribute, Raw, msgspec.field(default=_MISSING, name=name))
            for (attribute, _), name in zip(self._plan, sorted(self.inner), strict=True)
        ]
        struct = msgspec.defstruct("Fields", fields, gc=False)
        self._decode = msgspec.json.Decoder(struct).decode
        for _, field in self._plan:
            field.compile()
        return struct

    def of(self, literal: bytes) -> Values:
        """Each measure of this field, and then of those within it, where it has these bytes."""
        first = literal[:1]
        if first == b"{" and self.inner and not self.jsons:
            return self.of_object(literal)
        values: Values = []
        if first == b'"':
            if self.texts:
                text = _decode_text(literal)
                values = [(name, value) for name, measure in self.texts if (value := measure(text)) is not None]
        elif self.jsons and literal != b"null":
            values = [(name, measure(literal)) for name, measure in self.jsons]
        if self.number is not None and first in b"-0123456789tf":
            values.append((self.number, _number(literal)))
        return [*values, *self.of_object(literal)] if first == b"{" and self.inner else values

    def of_fields(self, fields: Any) -> Values:
        """Each measure of the fields within it, in their names' order, where they are decoded."""
        values: Values = []
        for attribute, field in self._plan:
            value = getattr(fields, attribute)
            if value is not _MISSING:
                found = field.of(bytes(value))
                values = [*values, *found] if values else found
        return values

    def _of_object(self, literal: bytes) -> Values:
        return self.of_fields(self._decode(literal))


class Measures:
    """The declared measures, and one decoder that reads their fields and no others.

    A name is a field's path from `object`, followed by what to measure of it where it is a text (`.length`,
    `.whitespace`, `.symbol`, `.digit`, `.top_word`) or another value (`.json.length`, `.json.keys`, `.json.depth`); a
    path alone is a number. `order.total` is the sum over an ORDERED event's own basket.

    Raises:
        ValueError: a name is of none of these forms.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._object = _Field()
        self._order_total = ORDER_TOTAL in names
        for name in names:
            if name != ORDER_TOTAL:
                self._declare(name)
        self._words = self._object.words()
        # How a name may be written in escapes: most have no character that has a short one, like the `\\/` of a slash.
        self._escape = b"\\" if any(_has_short_escape(word[1:-1]) for word in self._words) else b"\\u"
        struct = self._object.compile()
        line = [("object", struct, msgspec.field(default_factory=struct))]
        self._decode_line = msgspec.json.Decoder(msgspec.defstruct("Line", line, gc=False)).decode

    def of(self, event: Event) -> Values:
        """Each measure's name with its value in `event`: a number, or the boolean that stands where one was expected."""
        try:
            line: Any = self._decode_line(event.raw)
            values = self._object.of_fields(line.object)
        except msgspec.MsgspecError:  # `object` is no object, or one of several is none: the last counts
            values = self._object.of(bytes(event.object))
        if self._order_total and event.verb == basket.ORDERED:
            total = basket.total(basket.order_items(event, {}))
            if total is not None:
                return [(ORDER_TOTAL, float(total)), *values]
        return values

    def among(self, batch: Batch) -> list[Event]:
        """Those in which any measure may be: a look at the bytes, much cheaper than decoding them while few have one."""
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
            self._object.at(path[:-2]).jsons.append((name, JSON[path[-1]]))
        elif len(path) > 1 and path[-1] in TEXT:
            self._object.at(path[:-1]).texts.append((name, TEXT[path[-1]]))
        else:
            self._object.at(path).number = name


def _number(literal: bytes) -> float | bool:
    if literal in (b"true", b"false"):
        return literal == b"true"
    return float(literal)  # what is beyond a float's reach becomes infinite
