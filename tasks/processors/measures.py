"""Measures: the numbers that an event's fields give, decoded from its object and nothing more than is asked for."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import UNSET, Raw

from storage.event import Event
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


def _shape(value: Any) -> tuple[int, int]:
    """How many keys a JSON value has at all depths, and how deep it nests; in a loop, since it may nest very deep."""
    keys = depth = 0
    level = [value]
    while containers := [inner for inner in level if isinstance(inner, (dict, list))]:
        depth += 1
        level = []
        for container in containers:
            if isinstance(container, dict):
                keys += len(container)
                level.extend(container.values())
            else:
                level.extend(container)
    return keys, depth


JSON: dict[str, Callable[[bytes, Any], float]] = {
    "length": lambda raw, _: len(raw),
    "keys": lambda _, value: _shape(value)[0],
    "depth": lambda _, value: _shape(value)[1],
}
"""What is measured of a value that is no text: its bytes, all its keys, how deep it nests."""

_decode_document = msgspec.json.Decoder(float_hook=str).decode  # a number out of a float's reach has a shape too


class _Fields:
    """Reads the fields at given paths of a JSON object, level by level, and nothing else of it."""

    def __init__(self, paths: list[tuple[str, ...]]) -> None:
        self._leaves = {path[0] for path in paths if len(path) == 1}
        self._inner = {
            name: _Fields([path[1:] for path in paths if path[0] == name and len(path) > 1])
            for name in sorted({path[0] for path in paths if len(path) > 1})
        }
        self._names = sorted(self._leaves | set(self._inner))
        fields: list[Any] = [
            (f"f{index}", Raw | msgspec.UnsetType, msgspec.field(default=UNSET, name=name))
            for index, name in enumerate(self._names)
        ]
        self._decode = msgspec.json.Decoder(msgspec.defstruct("Fields", fields, gc=False)).decode

    def read(self, raw: Raw | bytes) -> Iterator[tuple[tuple[str, ...], bytes]]:
        """Each path that is there, with the bytes of its value."""
        try:
            found = self._decode(raw)
        except msgspec.MsgspecError:
            return  # no object: it has no fields
        for index, name in enumerate(self._names):
            value = getattr(found, f"f{index}")
            if value is UNSET:
                continue
            literal = bytes(value)
            if name in self._leaves:
                yield (name,), literal
            if name in self._inner and literal[:1] == b"{":
                for path, inner in self._inner[name].read(literal):
                    yield (name, *path), inner


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

    def of(self, event: Event) -> Iterator[tuple[str, Any]]:
        """Each measure's name with its value in `event`: a number, or the boolean that stands where one was expected."""
        if self._order_total and event.verb == basket.ORDERED:
            value = basket.total(basket.order_items(event, {}))
            if value is not None:
                yield ORDER_TOTAL, float(value)
        for path, literal in self._fields.read(event.object):
            yield from self._of_field(path, literal)

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

    def _of_field(self, path: tuple[str, ...], literal: bytes) -> Iterator[tuple[str, Any]]:
        if literal[:1] == b'"':
            text = msgspec.json.decode(literal, type=str)
            for name, kind in self._texts.get(path, ()):
                if (value := TEXT[kind](text)) is not None:
                    yield name, value
        elif path in self._jsons and literal != b"null":
            document = _decode_document(literal)
            for name, kind in self._jsons[path]:
                yield name, JSON[kind](literal, document)
        if path in self._numbers and literal[:1] in b"-0123456789tf":
            yield self._numbers[path], _number(literal)


def _number(literal: bytes) -> float | bool:
    if literal in (b"true", b"false"):
        return literal == b"true"
    return float(literal)  # what is beyond a float's reach becomes infinite
