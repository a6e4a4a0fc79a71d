"""Baskets: what is in them, and what an order is worth. All of it on the items' own bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from functools import lru_cache
from sys import intern
from typing import TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from storage.event import ITEM_VERBS, Event
from storage.times import DAY, parse_number

REMOVED = "REMOVED_ITEM_FROM_BASKET"
ORDERED = "ORDERED"
VERBS = ITEM_VERBS | {REMOVED, ORDERED}  # what may change a basket
FORGET = 30 * DAY  # what happened longer before its clock touches no basket; silence longer than this empties one
# Prices and counts are added and multiplied as they are written; what is out of all reach becomes infinite.
_EXACT = Context(prec=400, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])
_MOST_KEPT, _LONGEST_KEPT = 20_000, 1_000

T = TypeVar("T")
Fields = dict[str, Raw]


def kept(read: Callable[[bytes], T]) -> Callable[[bytes], T]:
    """`read`, which remembers what it gave for items' bytes: a shop sells the same ones again and again."""
    remembered = lru_cache(_MOST_KEPT)(read)
    return lambda item: remembered(item) if len(item) <= _LONGEST_KEPT else read(item)


class _Order(msgspec.Struct):
    value: Raw | UnsetType = UNSET
    basket: Raw | UnsetType = UNSET


_decode_order = msgspec.json.Decoder(_Order).decode
_decode_id = msgspec.json.Decoder(int | str).decode
_decode_fields = msgspec.json.Decoder(Fields).decode
_decode_list = msgspec.json.Decoder(list[Raw]).decode
_encode = msgspec.json.Encoder().encode


def apply(items: dict[str, bytes], event: Event) -> None:
    """What `event` does to a basket: set a count, take an item out, or empty it."""
    item = event.item
    if item is not None:
        if item.count <= 0:
            items.pop(item.key, None)
        elif (before := items.get(item.key)) is not None:
            items[item.key] = _fold(before + b"\n" + item.raw)
        else:
            items[item.key] = item.raw
    elif event.verb == ORDERED:
        items.clear()
    elif event.verb == REMOVED:
        key = removed_key(event)
        if key is not None:
            items.pop(key, None)


def shared(items: dict[str, bytes]) -> dict[str, bytes]:
    """`items` as the same objects that other baskets hold: what comes from the database is new in memory each time."""
    return {intern(key): _one(item) for key, item in items.items()}


@kept
def _one(item: bytes) -> bytes:
    return item


def removed_key(event: Event) -> str | None:
    """Which item a REMOVED event takes out; None where it names none."""
    try:
        return item_key(_decode_fields(_decode_fields(event.object)["item"]))
    except (KeyError, msgspec.MsgspecError):
        return None


def stands(item: bytes) -> bytes:
    """An item as it stands; state of the first versions holds what several events carried of one, a line each."""
    return _fold(item) if b"\n" in item else item


@kept
def _fold(chain: bytes) -> bytes:
    """An item as it stands after what several events carried of it, a line each: fields of a later one replace the
    earlier ones, others stay.
    """
    first, *later = chain.split(b"\n")
    fields = _decode_fields(first)
    for raw in later:
        carried = _decode_fields(raw)
        if "count" in fields and "count" not in carried:
            fields["count"] = Raw(b"1")  # an absent count is 1
        fields.update(carried)
    return _encode(fields)


def basket_json(items: dict[str, bytes]) -> bytes:
    """The items as they stand, in the order in which they came in, as a JSON array."""
    text = b",".join(items.values())
    if text.find(b"\n") >= 0:  # `in` would be twice as slow, and this is asked for every basket
        text = b",".join([stands(item) for item in items.values()])
    return b"[%b]" % text


def order_items(event: Event, items: dict[str, bytes]) -> list[bytes]:
    """What was ordered: the basket that ORDERED carries, else the one that it empties."""
    return _ordered(_parse_order(event), items)


def order_value(event: Event, items: dict[str, bytes]) -> Decimal | None:
    """What an order is worth, as exact JSON: what it says itself, else the sum of its items; None where none is known."""
    order = _parse_order(event)
    value = number(order.value) if order.value is not UNSET else None
    if value is None:
        value = total(_ordered(order, items))
    return value if value is not None and math.isfinite(float(value)) else None  # JSON readers know no infinity


def fields(item: bytes) -> Fields:
    """An item's fields, each as its own bytes."""
    return _decode_fields(item)


def item_key(item: Fields) -> str | None:
    """An item's key: `3` and `"3"` are one; None where it has no usable id."""
    try:
        return str(_decode_id(item["id"]))
    except (KeyError, msgspec.MsgspecError):
        return None


def total(items: list[bytes]) -> Decimal | None:
    """The sum of price times count; None for no items, or where a price is missing or no number."""
    result = Decimal(0)
    for item in items:
        worth = _worth(item)
        if worth is None:
            return None
        result = _EXACT.add(result, worth)
    return result if items else None


@kept
def _worth(item: bytes) -> Decimal | None:
    fields = _decode_fields(item)
    price = number(fields.get("price"))
    count = number(fields["count"]) if "count" in fields else Decimal(1)
    return None if price is None or count is None else _EXACT.multiply(price, count)


def number(raw: Raw | None) -> Decimal | None:
    """The exact value of a JSON number; None for anything else."""
    literal = b"" if raw is None else bytes(raw).strip()
    return parse_number(literal.decode()) if literal[:1] in b"-0123456789" and literal else None


def _parse_order(event: Event) -> _Order:
    try:
        return _decode_order(event.object)
    except msgspec.MsgspecError:
        return _Order()


def _ordered(order: _Order, items: dict[str, bytes]) -> list[bytes]:
    return _carried(order) or list(map(stands, items.values()))


def _carried(order: _Order) -> list[bytes]:
    if order.basket is UNSET:
        return []
    try:
        items = list(map(bytes, _decode_list(order.basket)))
    except msgspec.MsgspecError:
        return []  # what is no list counts as absent
    # Where something in it is no item, its total is unknown.
    return items if all(item[:1] == b"{" for item in items) else [b"{}"]
