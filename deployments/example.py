"""A small shop that never was: its log up to now, what goes on there next, and whom its mail would reach.

Only the arguments and `random.Random` decide, so the same arguments always give the same bytes. Customers 1
and 15 shop in the original text's lines alone; everybody else has an id from 101 on.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import orjson

from deployments.example_data import (
    HOUR,
    ITEM_IDS,
    SPOILT,
    Shopper,
    make_shoppers,
    spoil,
    visit_starts,
    wire_item,
    write_email,
    write_review,
    write_tax_return,
)

Event = dict[str, Any]
Timed = tuple[int, Event]

SECOND = 1_000
MINUTE = 60 * SECOND

CLIENTS = (901, 902, 903, 904)
PACE = 2.8  # live visitors' events a second, all of them together
VISITORS = 36  # live visits at a time
STEP = 11.2  # mean seconds between two steps of a visit
BAD_SHARE = 0.003
OFFLINE_VISITS = 0.05  # of the visits with the mobile app
COMEBACKS = 0.35  # of the visits that leave a basket behind


@dataclass(frozen=True)
class Mood:
    """What one visit is about: how much is looked at, put into the basket and bought, and how fast."""

    views: int
    adds: float
    buys: float
    haste: float = 1.0


def history(now_ms: int, seed: int = 1, customers: int = 400, hours: int = 48) -> Iterator[bytes]:
    """Yield the log's raw lines without their newlines, in the order in which the log took them.

    The original text's lines come first. Nothing happened or was taken later than `now_ms`.
    """
    rng = random.Random(seed)
    begin = now_ms - hours * HOUR
    shoppers = make_shoppers(customers)
    leaving = _last_hour(rng, _leavers(shoppers), now_ms)
    timed = _taxes_taken(rng, begin, now_ms)
    for shopper in shoppers:
        if shopper.id in leaving:
            timed += _life(rng, shopper, begin, leaving[shopper.id] - 2 * HOUR)
            timed += _left(rng, shopper, leaving[shopper.id])
        else:
            timed += _life(rng, shopper, begin, now_ms)
    timed = [(taken, event) for taken, event in timed if max(taken, event["context"]["at"]) <= now_ms]
    timed.sort(key=lambda each: each[0])
    yield from resources.files("deployments").joinpath("seed.jsonl").read_bytes().splitlines()
    yield from _with_bad_lines(rng, (event for _, event in timed))


def live(start_ms: int, seed: int = 2, customers: int = 400) -> Iterator[Timed]:
    """Yield events without end as (when it happens, event), never earlier than the one before.

    An event lacks `event.inserted_at`, and its `context.at` is its time: milliseconds, or seconds for
    SUBMIT_TAX. Who left a basket in the last 50 minutes of `history` stays away for about half an hour, so
    that it is abandoned.
    """
    rng = random.Random(seed)
    shoppers = make_shoppers(customers)
    away = _leavers(shoppers)
    away = away[len(away) // 6 :]  # the others' baskets are abandoned already: let some of them recover soon
    first = [shopper for shopper in shoppers if shopper not in away]
    rng.shuffle(first)
    queue = deque([*first, *away])
    visitors = min(VISITORS, max(1, customers // 3))
    haste = PACE * STEP / visitors
    streams = [_visitor(rng, queue, start_ms + rng.randint(0, 10 * SECOND), haste) for _ in range(visitors)]
    return heapq.merge(*streams, _taxes(rng, start_ms, 2 * MINUTE), key=lambda timed: timed[0])


def contacts(customers: int = 400) -> Iterator[tuple[str, str, str, bool]]:
    """Yield (type, id, email, unsubscribed), each id once; a few customers have no contact at all."""
    rng = random.Random("contacts")
    for id in (1, 15, *(shopper.id for shopper in make_shoppers(customers))):
        email = write_email(rng, id)
        missing, unsubscribed = rng.random() < 0.02, rng.random() < 0.03
        if id < 101 or not missing:
            yield "CUSTOMER", str(id), email, unsubscribed and id >= 101
    for id in CLIENTS:
        yield "CLIENT", str(id), f"tax.office.{id}@example.org", False


def _leavers(shoppers: list[Shopper]) -> list[Shopper]:
    """Who leaves a basket in the last hour of `history`: one in ten, more where there are few."""
    return shoppers[:: max(1, min(10, len(shoppers) // 12))]


def _last_hour(rng: random.Random, leavers: list[Shopper], now: int) -> dict[int, int]:
    """When each of them is last seen: a third 60-30 minutes ago, a third 30-20, a third 20-1."""
    seen: dict[int, int] = {}
    for index, shopper in enumerate(leavers):
        third, into = divmod(3 * (index + rng.random()) / len(leavers), 1)
        early, late = ((60, 30), (30, 20), (20, 1))[int(third)]
        seen[shopper.id] = now - int((early + (late - early) * into) * MINUTE)
    return seen


def _life(rng: random.Random, shopper: Shopper, begin: int, end: int) -> Iterator[Timed]:
    """All visits that the customer begins in that time, as the log took them."""
    starts = [(start, False) for start in visit_starts(rng, shopper, begin, end)]
    free = begin
    while starts and starts[0][0] < end:
        start, comes_back = heapq.heappop(starts)
        if start < free:
            continue
        mood = Mood(rng.randint(0, 3), 0.2, 0.9) if comes_back else _mood(rng, shopper)
        taken = _taken(rng, shopper, start, _visit(rng, shopper, mood))
        yield from taken
        free = taken[-1][0] + 5 * MINUTE
        if shopper.basket and rng.random() < COMEBACKS:
            heapq.heappush(starts, (free + rng.randint(40 * MINUTE, 20 * HOUR), True))


def _mood(rng: random.Random, shopper: Shopper, haste: float = 1.0) -> Mood:
    just_looking = rng.random() < 0.25
    return Mood(rng.randint(8, 22), 0.0 if just_looking else 0.35, shopper.buys, haste)


def _left(rng: random.Random, shopper: Shopper, last: int) -> list[Timed]:
    """A visit that puts things into the basket and ends, without an order, at `last`."""
    visit = _visit(rng, shopper, Mood(rng.randint(3, 8), 1.0, 0.0))
    start = last - visit[-1][0]
    return [_stamped(start + elapsed, start + elapsed + _lag(rng), event) for elapsed, event in visit]


def _taken(rng: random.Random, shopper: Shopper, start: int, visit: list[Timed]) -> list[Timed]:
    """The visit as the log took it, with the device's clock and the times when it was offline."""
    offline, online = _offline(rng, shopper, visit)
    taken: list[Timed] = []
    for index, (elapsed, event) in enumerate(visit):
        at = start + elapsed
        if event["subject"]["type"] != "CUSTOMER":  # the shop's own machine, once the order is in
            at = max(at, taken[-1][0] + 2)
            taken.append(_stamped(at, at, event))
        elif index < offline:
            taken.append(_stamped(at + shopper.skew, at + _lag(rng), event))
        else:
            arrived = max(start + online, taken[-1][0])
            taken.append(_stamped(at + shopper.skew, arrived + rng.randint(1, 20), event))
    return taken


def _offline(rng: random.Random, shopper: Shopper, visit: list[Timed]) -> tuple[int, int]:
    """From which step on the visit was offline, and when it was back: 5-50 minutes after each such step."""
    step = rng.randint(len(visit) * 3 // 4, len(visit) - 1)
    earliest = visit[-1][0] + 5 * MINUTE
    latest = visit[step][0] + 50 * MINUTE
    if not shopper.mobile or step == 0 or earliest > latest or rng.random() > OFFLINE_VISITS:
        return len(visit), 0
    return step, rng.randint(earliest, latest)


def _lag(rng: random.Random) -> int:
    return int(min(max(rng.lognormvariate(3.2, 0.9), 4), 400))


def _stamped(at: int, taken: int, event: Event) -> Timed:
    return taken, {**_placed(at, event), "event": {"inserted_at": taken}}


def _placed(at: int, event: Event) -> Event:
    return {**event, "context": {"at": at, **event["context"]}}


def _visitor(rng: random.Random, queue: deque[Shopper], start: int, haste: float) -> Iterator[Timed]:
    """One live visit after the other, each by one of those who have been away for longest."""
    while True:
        queue.rotate(-(turn := rng.randrange(len(queue) // 5 + 1)))
        shopper = queue.popleft()
        queue.rotate(turn)
        visit = _visit(rng, shopper, _mood(rng, shopper, haste))
        for elapsed, event in visit:
            yield start + elapsed, _placed(start + elapsed, event)
        queue.append(shopper)
        start += visit[-1][0] + rng.randint(1, 10) * SECOND


def _visit(rng: random.Random, shopper: Shopper, mood: Mood) -> list[Timed]:
    """One visit's events, in milliseconds since its start, `context` still without `at`."""
    visit: list[Timed] = []
    elapsed = 0
    for event in _doings(rng, shopper, mood):
        if event["subject"]["type"] != "CUSTOMER":
            elapsed = visit[-1][0] + rng.randint(450, 1500)
        visit.append((elapsed, event))
        elapsed += int(min(max(rng.lognormvariate(2.1, 0.8), 1.2), 240) * SECOND / mood.haste)
    return visit


def _doings(rng: random.Random, shopper: Shopper, mood: Mood) -> Iterator[Event]:
    yield _event(shopper, "STARTED_BROWSING", {"type": "NONE"})
    if rng.random() < 0.4:
        item = rng.choice(shopper.favourites)
        yield _event(shopper, "REVIEWED", {"type": "TEXT", "id": item, "body": write_review(rng, item)})
    for _ in range(mood.views):
        item = rng.choice(shopper.favourites if rng.random() < 0.6 else ITEM_IDS)
        yield _event(shopper, "VIEWED_ITEM", {"type": "ITEM", "item": wire_item(item)})
        yield from _basket_moves(rng, shopper, item, mood.adds)
    if shopper.basket and rng.random() < mood.buys:
        basket = [wire_item(item, count) for item, count in shopper.basket.items()]
        shopper.basket.clear()
        yield _event(shopper, "ORDERED", {"type": "BASKET", "basket": basket})
        completed = _event(shopper, "ORDER_COMPLETED", {"type": "NONE"})
        yield {**completed, "subject": {"id": shopper.id, "type": "INTERNAL_ORDER_EVENT"}}


def _basket_moves(rng: random.Random, shopper: Shopper, item: int, adds: float) -> Iterator[Event]:
    """What happens to the basket while `item` is looked at; once it was added, something stays in."""
    basket = shopper.basket
    if rng.random() < adds:
        basket[item] = basket.get(item, 0) + 1
        yield _event(shopper, "ADDED_ITEM_TO_BASKET", {"type": "ITEM", "item": wire_item(item, basket[item])})
    if basket and rng.random() < 0.12:
        changed = rng.choice(list(basket))
        by = -1 if basket[changed] > 1 and rng.random() < 0.4 else rng.choice((1, 1, 1, 2, 3))
        basket[changed] += by
        thing = {"type": "ITEM", "item": wire_item(changed, basket[changed])}
        yield _event(shopper, "CHANGED_ITEM_COUNT_IN_BASKET", thing, by=by)
    others = [other for other in basket if other != item]
    if others and rng.random() < 0.06:
        removed = rng.choice(others)
        del basket[removed]
        yield _event(shopper, "REMOVED_ITEM_FROM_BASKET", {"type": "ITEM", "item": wire_item(removed)})


def _event(shopper: Shopper, verb: str, thing: Event, **context: int) -> Event:
    subject = {"id": shopper.id, "type": "CUSTOMER"}
    return {"subject": subject, "verb": {"type": verb}, "object": thing, "context": context}


def _taxes(rng: random.Random, start: int, every: int) -> Iterator[Timed]:
    """SUBMIT_TAX without end, `every` milliseconds on average: a string as verb, seconds as time."""
    at = start
    while True:
        at += rng.randint(every // 10, every * 19 // 10)
        event = {
            "subject": {"id": "UK"},
            "verb": "SUBMIT_TAX",
            "object": {"id": rng.choice((901, *CLIENTS)), "body": write_tax_return(rng)},
            "context": {"at": (at * 1000 + rng.randrange(400)) / 1e6},  # rounds to `at`
        }
        yield at, event


def _taxes_taken(rng: random.Random, begin: int, end: int) -> list[Timed]:
    taken: list[Timed] = []
    for at, event in itertools.takewhile(lambda timed: timed[0] < end, _taxes(rng, begin, 40 * MINUTE)):
        arrived = at + _lag(rng)
        taken.append((arrived, {**event, "event": {"inserted_at": arrived}}))
    return taken


def _with_bad_lines(rng: random.Random, events: Iterable[Event]) -> Iterator[bytes]:
    """The events' lines; before a few of them a spoilt one, as a sender leaves it that then tries again."""
    kinds = itertools.cycle(SPOILT)
    for event in events:
        if rng.random() < BAD_SHARE:
            yield spoil(rng, event, next(kinds))
        yield orjson.dumps(event)
