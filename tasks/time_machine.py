"""The time machine: a customer's basket as it was, by when things happened or by when they were known.

The rules are those of `tasks.processors.abandonment`, which knows the present only; what an event does to a basket is that of
`tasks.processors.basket`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from storage.event import Event
from storage.look import Look
from storage.reader import lost_log
from storage.recorded import Version, in_force, versions
from storage.store import Store
from storage.subject import subject_events
from storage.times import show
from tasks.evidence import check_text, parse_json
from tasks.processors import abandonment, basket
from tasks.topology import Topology

PROCESSOR = "abandonment"
_TAKEN = 'SELECT partition, MAX("offset") AS taken FROM checkpoint WHERE log = :log GROUP BY partition'


@dataclass(frozen=True)
class Interaction:
    """An event of a customer that counts: where it lies, and whether it touched the basket."""

    log: str
    partition: int
    event: Event

    @property
    def place(self) -> str:
        """`log:partition:offset`."""
        return f"{self.log}:{self.partition}:{self.event.offset}"


@dataclass(frozen=True)
class Made:
    """One event that made a basket what it is. Times in milliseconds; `item` and `count` are None for an order, `count` where no double
    holds it too."""

    place: str
    verb: str
    item: str | None
    count: float | None
    at: int
    known_at: int


@dataclass(frozen=True)
class Basket:
    """A basket at a moment: `items` in the order in which they came in, read by `parse_json`, and the events behind it.

    `made_by` begins where the basket was last empty, and ends with what emptied it where it is empty now. `last` is when
    the customer was last there (-1: never); `value` is the sum of price times count, None where it is not known or no double
    holds it.
    """

    customer: str
    at: int | None
    known_at: int | None
    items: list[dict[str, Any]]
    value: float | None
    last: int
    made_by: list[Made]
    notes: list[str]


def read_interactions(
    store: Store, topology: Topology, customer: str, *, known_at: int | None = None, processes: int = 1
) -> list[Interaction]:
    """What a customer did, as far as it counts and was known by `known_at`, in log order.

    Raises:
        LostDataError: the log has lost some of what was read from it: the answer would be a wrong one.
    """
    check_text(customer)
    log = topology.reads(PROCESSOR)
    found: list[Interaction] = []
    default = abandonment.Settings(store.settings.timeout, tuple(sorted(store.settings.excluded_verbs)))
    generation = _look_around(store, topology, log)
    for partition in store.partitions(log):
        known = versions(store, PROCESSOR, log, partition, generation)
        events = subject_events(store, log, partition, customer, until=known_at, processes=processes)
        mine = (event for event in events if counts(event, settings_at(known, event.offset, default)))
        found += [Interaction(log, partition, event) for event in mine]
    return sorted(found, key=lambda each: each.event.clock)  # in one partition they are in this order


def _look_around(store: Store, topology: Topology, log: str) -> int:
    """See that `log` is whole; gives the generation of abandonment that is live: each has settings of its own."""
    writes, look = topology.writes(PROCESSOR), Look(store)
    try:
        for row in look.rows(_TAKEN, log=log):
            with store.reader(log, row["partition"]) as reader:
                if reader.end() < row["taken"]:
                    raise lost_log(reader.name, reader.end(), row["taken"])
        return look.live_generation(writes) if writes else 1
    finally:
        look.close()


def settings_at(known: list[Version], offset: int, default: abandonment.Settings) -> abandonment.Settings:
    """The settings of abandonment in force at an offset, by what was written down; `default` where nothing was."""
    version = in_force(known, offset)
    return default if version is None else msgspec.convert(version.settings, abandonment.Settings)


def counts(event: Event, settings: abandonment.Settings) -> bool:
    """Whether an event is an interaction: of a customer, of no excluded verb, and not too late to count."""
    late = event.clock - event.at > abandonment.FORGET
    return event.type == "CUSTOMER" and not late and event.verb not in settings.excluded


def basket_at(
    store: Store,
    topology: Topology,
    customer: str,
    *,
    at: int | None = None,
    known_at: int | None = None,
    processes: int = 1,
) -> Basket:
    """The basket of a customer.

    Args:
        at: as of what had happened by then (milliseconds), in the order in which it happened.
        known_at: as of what the log had taken by then, in the order in which it took it where `at` is not given.
        processes: see `subject_events`.
    """
    interactions = read_interactions(store, topology, customer, known_at=known_at, processes=processes)
    return fold(customer, interactions, at, known_at)


def fold(customer: str, interactions: Sequence[Interaction], at: int | None, known_at: int | None) -> Basket:
    """The basket that `interactions`, in log order, make; see `basket_at`."""
    ordered = [each for each in interactions if known_at is None or each.event.clock <= known_at]
    if at is not None:
        ordered = sorted((each for each in ordered if each.event.at <= at), key=lambda each: each.event.at)
    items: dict[str, bytes] = {}
    made: list[Made] = []
    notes: list[str] = []
    last = -1
    for each in ordered:
        event = each.event
        if last >= 0 and (event.clock if at is None else event.at) > last + abandonment.FORGET:
            if items:
                notes = [f"what was in it before {each.place} was forgotten: nothing had been heard for 30 days"]
                made = []
            items, last = {}, -1
        if event.verb in basket.VERBS:
            before = bool(items)
            basket.apply(items, event)
            if before or items:
                made = [*made, _made(each)] if before else [_made(each)]
        last = max(last, event.at)
    moment = at if at is not None else known_at
    if items and moment is not None and moment > last + abandonment.FORGET:
        notes.append(f"last there at {show(last)}, more than 30 days before: the next event would find it forgotten")
    total = basket.total([basket.stands(chain) for chain in items.values()])
    shown: list[dict[str, Any]] = parse_json(basket.basket_json(items))
    value = None if total is None or not math.isfinite(float(total)) else float(total)
    return Basket(customer, at, known_at, shown, value, last, made, notes)


def _made(each: Interaction) -> Made:
    event = each.event
    if event.item is not None:
        count = None if event.item.count in (math.inf, -math.inf) else event.item.count
        return Made(each.place, event.verb, event.item.key, count, event.at, event.clock)
    removed = basket.removed_key(event) if event.verb == basket.REMOVED else None
    return Made(each.place, event.verb, removed, None if removed is None else 0, event.at, event.clock)
