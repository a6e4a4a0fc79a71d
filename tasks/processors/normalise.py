"""Normalise: customers, items, orders, order lines and current baskets as rows; each names the event that last set it.

Rows are written from the state as it stands at a commit, so writing them again changes nothing. A basket is what abandonment
takes for one: an event more than 30 days late does not touch it, and more than 30 days of silence empty it. Customers, items
and orders are what the log says of them, however late.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

import msgspec

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
# What an event carries of an item replaces what was known of it, the rest stays, as in a basket.
ITEM = (
    'INSERT INTO item ("key", "name", "price", "set_by") VALUES (:key, :name, :price, :set_by) '
    'ON CONFLICT (key) DO UPDATE SET "name" = CASE WHEN :named THEN excluded."name" ELSE item."name" END, '
    '"price" = CASE WHEN :priced THEN excluded."price" ELSE item."price" END, "set_by" = excluded."set_by"'
)
ORDER = _upsert("orders", ("id",), ("customer", "at", "value", "set_by"))
ORDER_LINE = _upsert("order_line", ("order_id", "position"), ("item", "name", "price", "count", "set_by"))
BASKET_LINE = _upsert("basket_line", ("customer", "item"), ("name", "price", "count", "set_by"))
NO_BASKET_LINE = "DELETE FROM basket_line WHERE customer = :customer AND item = :item"


class Current(msgspec.Struct, array_like=True, gc=False):
    """A customer's times and current basket."""

    first_at: int
    last_at: int
    items: dict[str, bytes] = {}

    def __post_init__(self) -> None:
        if self.items:
            self.items = basket.shared(self.items)


_Rows = Iterator[dict[str, Any]]
_Customers = dict[str, tuple[Current, int]]
_Carried = dict[bytes, tuple[str, int]]
"""What events carried of items, each once: the item's key, and the offset of the last event with these bytes."""
_Order = tuple[int, str, int, str | None, list[bytes]]
"""The offset of an order's event, its customer, time and value, and what was ordered."""


class Processor(contract.Processor[Current]):
    """Keeps the tables; only subjects of type CUSTOMER set rows."""

    name, reads = "normalise", "events"
    tables = ("customer", "item", "orders", "order_line", "basket_line")
    shared_tables = ("item",)
    state = Current
    code = ("tasks.processors.basket",)

    def __init__(self, settings: msgspec.Struct | None = None) -> None:
        super().__init__(settings)
        # As they stand, each with the offset of the event that last set it.
        self._customers: _Customers = {}
        self._items: _Carried = {}
        self._lines: dict[tuple[str, str], int] = {}  # of a customer's basket; what stands there is in their state
        self._orders: list[_Order] = []

    def keys(self, batch: Batch) -> Iterable[str]:
        """The customers of the batch."""
        return {event.key for event in batch.events if event.type == "CUSTOMER"}

    def process(self, batch: Batch, state: contract.States[Current], out: contract.Output) -> None:
        """Take what customers did; what the rows say of it is worked out once, in `flush`."""
        touched: dict[str, Current] = {}  # customers of this batch, as they stand
        known, noted, carried, lines = touched.get, self._customers, self._items, self._lines
        apply, forget = basket.apply, basket.FORGET
        ignored = 0
        for event in batch.events:
            if event.type != "CUSTOMER":
                ignored += 1
                continue
            key, at, item, verb = event.key, event.at, event.item, event.verb
            offset, oldest = event.offset, event.clock - forget
            current = known(key)
            if current is None:
                current = touched[key] = state.get(key) or Current(at, at)
            if current.last_at < oldest <= at:
                self._forget(key, offset, current)
            if at < current.first_at:
                current.first_at = at
            elif at > current.last_at:
                current.last_at = at
            if item is not None:
                carried[item.raw] = (item.key, offset)
                if at >= oldest:
                    apply(current.items, event)
                    lines[key, item.key] = offset
            elif verb == basket.ORDERED:
                self._order(event, current if at >= oldest else Current(at, at))
            elif verb == basket.REMOVED and at >= oldest:
                self._remove(event, current)
            noted[key] = (current, offset)
        state.put_all(touched)
        out.ignored += ignored

    def waiting(self) -> int:
        """Lines of baskets and orders; what was carried of items where that is more, as for one line changed over and over."""
        return max(len(self._lines), len(self._items)) + len(self._orders)

    def flush(self, out: contract.Output) -> None:
        """Give the statements that bring the rows up to what was taken since the last commit."""
        place, lines = f"{out.log}:{out.partition}:", sorted(self._lines)
        # In the tables' own order, so that neighbours share a page; each row is made when it is written, so that few are there.
        out.statements += [
            (CUSTOMER, _customer_rows(self._customers, place)),
            (ITEM, _item_rows(self._items, place)),
            (ORDER, _order_rows(self._orders, place)),
            (ORDER_LINE, _order_line_rows(self._orders, place)),
            (NO_BASKET_LINE, _no_basket_line_rows(lines, self._customers)),
            (BASKET_LINE, _basket_line_rows(lines, self._lines, self._customers, place)),
        ]
        self._customers, self._items, self._lines, self._orders = {}, {}, {}, []

    def _forget(self, key: str, offset: int, current: Current) -> None:
        for item in current.items:
            self._lines[key, item] = offset
        current.items.clear()

    def _remove(self, event: Event, current: Current) -> None:
        basket.apply(current.items, event)
        removed = basket.removed_key(event)
        if removed is not None:
            self._lines[event.key, removed] = event.offset

    def _order(self, event: Event, current: Current) -> None:
        value, items = basket.order_value(event, current.items), basket.order_items(event, current.items)
        self._orders.append((event.offset, event.key, event.at, _money(value), items))
        for key in current.items:
            self._lines[event.key, key] = event.offset
        basket.apply(current.items, event)


def _customer_rows(customers: _Customers, place: str) -> _Rows:
    for key in sorted(customers):
        now, by = customers[key]
        yield {"key": key, "first_at": now.first_at, "last_at": now.last_at, "set_by": f"{place}{by}"}


def _item_rows(items: _Carried, place: str) -> _Rows:
    rows: dict[str, dict[str, Any]] = {}
    for raw, (key, by) in sorted(items.items(), key=lambda carried: carried[1][1]):
        facts = _facts(raw)
        row = rows.setdefault(key, {"key": key, "name": None, "named": False, "price": None, "priced": False})
        if facts.named:
            row |= {"name": facts.name, "named": True}
        if facts.priced:
            row |= {"price": facts.price, "priced": True}
        row["set_by"] = f"{place}{by}"
    for key in sorted(rows):
        yield rows[key]


def _order_rows(orders: list[_Order], place: str) -> _Rows:
    for offset, customer, at, value, _ in orders:
        id = f"{place}{offset}"
        yield {"id": id, "customer": customer, "at": at, "value": value, "set_by": id}


def _order_line_rows(orders: list[_Order], place: str) -> _Rows:
    for offset, _, _, _, items in orders:
        id = f"{place}{offset}"
        known = [facts for item in items if (facts := _facts(item)).key is not None]
        for position, facts in enumerate(known, 1):
            yield {"order_id": id, "position": position, **_line(facts, id)}


def _no_basket_line_rows(lines: list[tuple[str, str]], customers: _Customers) -> _Rows:
    for customer, item in lines:
        if item not in customers[customer][0].items:
            yield {"customer": customer, "item": item}


def _basket_line_rows(
    lines: list[tuple[str, str]], set_by: dict[tuple[str, str], int], customers: _Customers, place: str
) -> _Rows:
    for customer, item in lines:
        stands = customers[customer][0].items.get(item)
        if stands is not None:
            by = f"{place}{set_by[customer, item]}"
            yield {"customer": customer, **_line(_facts(basket.stands(stands)), by)}


class _Facts(msgspec.Struct, frozen=True):
    """What the columns say of an item, and whether it carries them at all."""

    key: str | None
    name: str | None
    price: str | None
    count: float
    named: bool
    priced: bool


@basket.kept
def _facts(item: bytes) -> _Facts:
    fields = basket.fields(item)
    name = bytes(fields.get("name", b"null"))
    count = basket.number(fields.get("count"))
    return _Facts(
        basket.item_key(fields),
        msgspec.json.decode(name, type=str) if name[:1] == b'"' else None,
        _money(basket.number(fields.get("price"))),
        1.0 if count is None else float(count),
        "name" in fields,
        "price" in fields,
    )


def _line(item: _Facts, set_by: str) -> dict[str, Any]:
    return {"item": item.key, "name": item.name, "price": item.price, "count": item.count, "set_by": set_by}


def _money(value: Decimal | None) -> str | None:
    """A number as text, which every database turns into its own exact or nearest one."""
    if value is None or not value.is_finite() or value.copy_abs() >= _LARGEST:
        return None
    return str(value.quantize(_MICRO))
