"""Normalise: customers, items, orders, order lines and current baskets as rows; each names the event that last set it.

Rows are written from the state as it stands at a commit, so writing them again changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import msgspec
from msgspec import Raw

from storage.event import Batch, Event
from tasks.processors import basket, contract

_LARGEST = Decimal(10) ** 14  # a NUMERIC(20, 6) holds no more
_MICRO = Decimal("0.000001")


def _upsert(table: str, key: tuple[str, ...], rest: tuple[str, ...]) -> str:
    names = [*key, *rest]
    columns, values = ", ".join(f'"{n}"' for n in names), ", ".join(f":{n}" for n in names)
    sets = ", ".join(f'"{n}" = excluded."{n}"' for n in rest)
    conflict = ", ".join(key)
    return f"INSERT INTO {table} ({columns}) VALUES ({values}) ON CONFLICT ({conflict}) DO UPDATE SET {sets}"  # noqa: S608  # names of this module


CUSTOMER = _upsert("customer", ("key",), ("first_at", "last_at", "set_by"))
ITEM = _upsert("item", ("key",), ("name", "price", "set_by"))
ORDER = _upsert("orders", ("id",), ("customer", "at", "value", "set_by"))
ORDER_LINE = _upsert("order_line", ("order_id", "position"), ("item", "name", "price", "count", "set_by"))
BASKET_LINE = _upsert("basket_line", ("customer", "item"), ("name", "price", "count", "set_by"))
NO_BASKET_LINE = "DELETE FROM basket_line WHERE customer = :customer AND item = :item"


class Current(msgspec.Struct, array_like=True, gc=False):
    """A customer's times and current basket."""

    first_at: int
    last_at: int
    items: dict[str, bytes] = {}


class Processor(contract.Processor[Current]):
    """Keeps the tables; only subjects of type CUSTOMER set rows."""

    name, reads = "normalise", "events"
    state = Current
    code = ("tasks.processors.basket",)

    def __init__(self, settings: msgspec.Struct | None = None) -> None:
        super().__init__(settings)
        self._customers: dict[str, tuple[Current, str]] = {}
        self._items: dict[str, dict[str, Any]] = {}
        self._lines: dict[tuple[str, str], tuple[bytes | None, str]] = {}
        self._orders: list[dict[str, Any]] = []
        self._order_lines: list[dict[str, Any]] = []

    def keys(self, batch: Batch) -> Iterable[str]:
        """The customers of the batch."""
        return {event.key for event in batch.events if event.type == "CUSTOMER"}

    def event(self, event: Event, state: contract.States[Current], out: contract.Output) -> None:
        """Take what a customer did."""
        if event.type != "CUSTOMER":
            out.ignored += 1
            return
        set_by = f"{out.log}:{out.partition}:{event.offset}"
        current = state.get(event.key) or Current(event.at, event.at)
        current.first_at, current.last_at = min(current.first_at, event.at), max(current.last_at, event.at)
        if event.verb == basket.ORDERED:
            self._order(event, current, set_by)
        before = list(current.items) if event.verb == basket.ORDERED else ()
        basket.apply(current.items, event)
        self._note(event, current, before, set_by)
        self._customers[event.key] = (current, set_by)
        state.put(event.key, current)

    def flush(self, out: contract.Output) -> None:
        """Give the statements that bring the rows up to what was taken since the last commit."""
        gone = [{"customer": c, "item": i} for (c, i), (stored, _) in self._lines.items() if stored is None]
        kept = [
            {"customer": customer, **_line(item, stored, set_by)}
            for (customer, item), (stored, set_by) in self._lines.items()
            if stored is not None
        ]
        customers = [
            {"key": key, "first_at": now.first_at, "last_at": now.last_at, "set_by": set_by}
            for key, (now, set_by) in self._customers.items()
        ]
        rows = (
            (CUSTOMER, customers),
            (ITEM, list(self._items.values())),
            (ORDER, self._orders),
            (ORDER_LINE, self._order_lines),
            (NO_BASKET_LINE, gone),
            (BASKET_LINE, kept),
        )
        out.statements += [(sql, values) for sql, values in rows if values]
        self._customers, self._items, self._lines = {}, {}, {}
        self._orders, self._order_lines = [], []

    def _note(self, event: Event, current: Current, before: Iterable[str], set_by: str) -> None:
        """Remember which lines of the basket, and which item, this event has set."""
        if event.item is not None:
            key = event.item.key
            stored = current.items.get(key)
            self._lines[event.key, key] = (stored, set_by)
            fields = basket.fields(event.item.raw)
            self._items[key] = {"key": key, "name": _name(fields), "price": _price(fields), "set_by": set_by}
        elif event.verb == basket.REMOVED:
            removed = basket.removed_key(event)
            if removed is not None:
                self._lines[event.key, removed] = (None, set_by)
        for key in before:
            self._lines[event.key, key] = (None, set_by)

    def _order(self, event: Event, current: Current, set_by: str) -> None:
        value = basket.order_value(event, current.items)
        self._orders.append(
            {"id": set_by, "customer": event.key, "at": event.at, "value": _money(value), "set_by": set_by}
        )
        lines = ((basket.item_key(fields), fields) for fields in basket.order_items(event, current.items))
        known = [(key, fields) for key, fields in lines if key is not None]
        self._order_lines += [
            {"order_id": set_by, "position": position, **_columns(key, fields, set_by)}
            for position, (key, fields) in enumerate(known, 1)
        ]


def _line(item: str, stored: bytes, set_by: str) -> dict[str, Any]:
    return _columns(item, basket.fields(basket.stands(stored)), set_by)


def _columns(item: str, fields: basket.Fields, set_by: str) -> dict[str, Any]:
    return {
        "item": item, "name": _name(fields), "price": _price(fields), "count": _count(fields.get("count")), "set_by": set_by,
    }  # fmt: skip


def _name(fields: basket.Fields) -> str | None:
    raw = bytes(fields.get("name", b"null"))
    return msgspec.json.decode(raw, type=str) if raw[:1] == b'"' else None


def _price(fields: basket.Fields) -> str | None:
    return _money(basket.number(fields.get("price")))


def _money(value: Decimal | None) -> str | None:
    """A number as text, which every database turns into its own exact or nearest one."""
    if value is None or not value.is_finite() or value.copy_abs() >= _LARGEST:
        return None
    return str(value.quantize(_MICRO))


def _count(raw: Raw | None) -> float:
    number = basket.number(raw)
    return 1.0 if number is None else float(number)
