"""Abandonment: baskets that their customers left, those who turn out to have been there, and those who came back.

`last` is the greatest time at which a customer's interactions happened. A basket with items is abandoned at `last` once
the customer's next event, or a tick, shows that more than the timeout has passed since. For one event, in this order:
judge (storage), ignore, flag, forget, retract, recover, basket, `last`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import orjson

from storage.event import Batch, Event
from storage.judge import judge
from storage.times import DAY
from tasks.processors import basket, contract

FORGET = basket.FORGET
RECOVER = 7 * DAY
SYSTEM = "INTERNAL_ABDANDON_SYSTEM"  # spelt as on the wire of the system that this one stands in for


# As `out.write` would make it of a document: there are many of these.
_ABANDONED = (
    b'{"subject":{"id":%b,"type":"INTERNAL_ABDANDON_SYSTEM"},"verb":{"type":"ABANDONED_BASKET"},'
    b'"object":{"type":"BASKET","basket":%b},"context":{"at":%d,"started_at":%d,"caused_by":%b,"source":%b},'
    b'"event":{"id":%b,"inserted_at":%d}}\n'
)


class Settings(msgspec.Struct, frozen=True):
    """`timeout` in milliseconds; `excluded` verbs are no interaction."""

    timeout: int = 1_800_000
    excluded: tuple[str, ...] = ()


class Customer(msgspec.Struct, array_like=True, gc=False):
    """What is known of one customer. Times in milliseconds; `cause` is the offset of the line that raised `last`."""

    last: int = -1
    started: int = 0
    cause: int = 0
    flagged: bool = False  # whether `last` has an abandonment's value
    items: dict[str, bytes] = {}
    open: list[tuple[int, int]] = []  # (at, cause) of abandonments that stand and are not recovered

    def __post_init__(self) -> None:
        if self.items:
            self.items = basket.shared(self.items)


class _Subject(msgspec.Struct):
    id: int | str


class _Caused(msgspec.Struct):
    subject: _Subject


_decode_caused = msgspec.json.Decoder(_Caused).decode


def _subject_of(cause: bytes) -> int | str:
    try:
        return _decode_caused(cause).subject.id
    except msgspec.MsgspecError:
        return judge(cause, 0, 0).id  # a key that stands there twice, say: the last one counts


class Processor(contract.Processor[Customer]):
    """Gives ABANDONED_BASKET, ABANDONMENT_RETRACTED and RECOVERED_BASKET."""

    name, reads, writes, ticks = "abandonment", "events", "baskets", True
    state = Customer
    code = ("tasks.processors.basket",)
    settings: Settings

    def keys(self, batch: Batch) -> Iterable[str]:
        """The customers of the batch."""
        return {event.key for event in batch.events if event.type == "CUSTOMER"}

    def process(self, batch: Batch, state: contract.States[Customer], out: contract.Output) -> None:
        """Take the interactions of customers; leave out other subjects, excluded verbs, and what is too old to count."""
        timeout, excluded = self.settings.timeout, frozenset(self.settings.excluded)
        changes, apply = basket.VERBS, basket.apply
        customers: dict[str, Customer] = {}  # those of this batch, as they stand
        known = customers.get
        ignored = 0
        for event in batch.events:
            clock, at, verb = event.clock, event.at, event.verb
            if event.type != "CUSTOMER" or clock - at > FORGET or verb in excluded:
                ignored += 1
                continue
            key = event.key
            customer = known(key)
            if customer is None:
                customer = customers[key] = state.get(key) or Customer()
            last = customer.last
            if clock > last + timeout:
                customer = customers[key] = self._after_gap(event, customer, out)
                last = customer.last
            if customer.flagged and last < at <= last + timeout:
                self._retract(event, customer, out)
            if verb in changes:
                if verb == basket.ORDERED and customer.open:
                    self._recover(event, customer, out)
                apply(customer.items, event)
            if at > last:
                if last < 0 or at > last + timeout:
                    customer.started = at
                customer.last, customer.cause, customer.flagged = at, event.offset, False
        state.put_all(customers)
        out.ignored += ignored

    def due(self, as_of: int) -> int:
        """Baskets are due whose `last` is more than the timeout before the tick."""
        return as_of - self.settings.timeout

    def due_of(self, value: Customer) -> tuple[int, int]:
        """What an index finds: `last` while the basket may yet be abandoned, else the day on which to forget all.

        Days, not moments: a tick is written whenever something is due, and forgetting is worth few of them.
        """
        if self._waits(value):
            return value.last, value.cause
        return ((value.last + FORGET) // DAY + 1) * DAY - self.settings.timeout, 0

    def tick(
        self, as_of: int, due: list[tuple[str, Customer]], state: contract.States[Customer], out: contract.Output
    ) -> None:
        """Flag the baskets that are due, and let go of customers that the next event would forget anyway."""
        for _, customer in due:
            if self._waits(customer):
                self._flag(customer, as_of, out)
        state.put_all(dict(due))
        for key, customer in due:
            if as_of > customer.last + FORGET:
                state.drop(key)

    def _waits(self, customer: Customer) -> bool:
        return bool(customer.items) and not customer.flagged

    def _after_gap(self, event: Event, customer: Customer, out: contract.Output) -> Customer:
        """Flag what this event's clock shows to be abandoned, and forget what it shows to be too old."""
        if self._waits(customer):
            self._flag(customer, event.clock, out)
        return Customer() if event.clock > customer.last + FORGET else customer

    def _flag(self, customer: Customer, inserted_at: int, out: contract.Output) -> None:
        cause = out.line(customer.cause)
        subject = _subject_of(cause)
        customer.flagged = True
        # An order counts within 7 days of the abandonment, and 30 days late at most.
        oldest = inserted_at - RECOVER - FORGET
        customer.open = [pair for pair in (*customer.open, (customer.last, customer.cause)) if pair[0] >= oldest]
        out.write_line(
            _ABANDONED
            % (
                orjson.dumps(contract.json_id(subject)), basket.basket_json(customer.items), customer.last, customer.started,
                contract.verbatim_json(cause), orjson.dumps(out.source(customer.cause)),
                orjson.dumps(self._id(customer.cause, "abandoned", out)), inserted_at,
            )
        )  # fmt: skip

    def _retract(self, event: Event, customer: Customer, out: contract.Output) -> None:
        flagged = (customer.last, customer.cause)
        customer.open = [pair for pair in customer.open if pair != flagged]
        self._close("ABANDONMENT_RETRACTED", "retracted", {"type": "NONE"}, event, customer.cause, out)

    def _recover(self, event: Event, customer: Customer, out: contract.Output) -> None:
        """Count the order for the newest abandonment that stands, if it happened within 7 days after it."""
        found = [pair for pair in customer.open if pair[0] < event.at <= pair[0] + RECOVER]
        if not found:
            return
        newest = max(found)
        customer.open.remove(newest)
        value = basket.order_value(event, customer.items)
        obj = {"type": "ORDER", "value": None if value is None else orjson.Fragment(str(value))}
        self._close("RECOVERED_BASKET", "recovered", obj, event, newest[1], out)

    def _close(
        self, verb: str, name: str, obj: dict[str, Any], event: Event, cause_offset: int, out: contract.Output
    ) -> None:
        """What `event` showed of an abandonment: its id is that abandonment's, its times and source the event's."""
        out.write(
            {
                "subject": {"id": contract.json_id(event.id), "type": SYSTEM},
                "verb": {"type": verb},
                "object": obj,
                "context": {
                    "at": event.at,
                    "abandonment": self._id(cause_offset, "abandoned", out),
                    "caused_by": contract.verbatim(event.raw),
                    "source": out.source(event.offset),
                },
                "event": {"id": self._id(cause_offset, name, out), "inserted_at": event.clock},
            }
        )

    def _id(self, cause_offset: int, name: str, out: contract.Output) -> str:
        return f"{self.name}/{out.log}:{out.partition}:{cause_offset}/{name}"
