"""What the derived logs must say, by brute force: a reading of the contract that imports nothing of Afterlog.

One pass over a whole log in memory, one partition, no batches, no files. `run` gives the derived events as
parsed dicts (floats for numbers with a point or exponent); sections named here are those of DESIGN.md.

A reminder names the place and the bytes of its abandonment in the log baskets, which depend on how that line is spelt
(12.7 or 12.70): give `run` the baskets as they were written, else it takes them as orjson would write them.
"""

import argparse
import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import MAX_EMAX, MIN_EMIN, ROUND_HALF_EVEN, Context, Decimal
from pathlib import Path
from typing import Any

Json = dict[str, Any]

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
YEAR_2100_MS = 4_102_444_800_000
KEPT_BYTES = 64 * 1024  # of a bad line, and of a cause
DEEPEST = 500
EXACT = Context(prec=2_000_000, rounding=ROUND_HALF_EVEN, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])


@dataclass(frozen=True)
class Tick:
    """Wall time `as_of` (ms), applied after the line that ends at byte `end`, before the next one."""

    as_of: int
    end: int


@dataclass(frozen=True)
class Rules:
    """The settings that a result depends on, all times in ms, and the name and partition of the log."""

    timeout_ms: int = HOUR_MS // 2
    forget_ms: int = 30 * DAY_MS
    recovery_ms: int = 7 * DAY_MS
    not_after_ms: int = DAY_MS
    reminder_gap_ms: int = DAY_MS
    excluded_verbs: frozenset[str] = frozenset()
    max_line: int = 1024 * 1024
    log: str = "events"
    partition: int = 0


@dataclass(frozen=True)
class Good:
    """A usable event. Numbers with a point or exponent in `object` are Decimals of their literal text."""

    id: str | int
    key: str
    type: str | None
    verb: str
    object: Any
    at_ms: int | None
    inserted_ms: int | None


@dataclass(frozen=True)
class Bad:
    """An unusable line, and the name of the first reason for it."""

    reason: str


@dataclass
class Derived:
    """The derived logs in order, and what became of each line: read = processed + quarantined + ignored_*."""

    quarantine: list[Json]
    reactions: list[Json]
    baskets: list[Json]
    reminders: list[Json]
    counts: Counter[str]


# JSON, read strictly (2)


def parse(line: bytes) -> Any:
    """Read one JSON document, with Decimals for numbers that have a point or exponent.

    Raises:
        ValueError: anything that is no JSON, invalid UTF-8, lone surrogates, nesting deeper than 500.
    """
    text = line.decode("utf-8")
    if depth(text) > DEEPEST:
        raise ValueError("nested too deep")
    value = READER.decode(text)
    if has_lone_surrogate(text):
        raise ValueError("lone surrogate")
    return value


def whole(digits: str) -> int | Decimal:
    """Read an integer literal; one longer than int() takes becomes a Decimal, and so no id."""
    return int(digits) if len(digits) <= 4300 else EXACT.create_decimal(digits)


def refuse(literal: str) -> None:
    """Refuse NaN and the infinities, which Python would take."""
    raise ValueError(f"{literal} is no JSON")


READER = json.JSONDecoder(parse_float=EXACT.create_decimal, parse_int=whole, parse_constant=refuse)


def depth(text: str) -> int:
    """Count the deepest nesting of arrays and objects; exact only past the limit, and for what is JSON."""
    if text.count("{") + text.count("[") <= DEEPEST:
        return 0
    deepest = current = 0
    for mark in re.findall(r"[\[{}\]]", re.sub(r'"[^"\\]*(?:\\.[^"\\]*)*"', "", text, flags=re.DOTALL)):
        current += 1 if mark in "[{" else -1
        deepest = max(deepest, current)
    return deepest


def has_lone_surrogate(text: str) -> bool:
    """Say whether a JSON text holds a surrogate escape without its partner."""
    escapes = text.replace(r"\\", "..")
    unpaired = re.sub(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..", "..", escapes)
    return re.search(r"\\u[dD][89a-fA-F]", unpaired) is not None


def is_number(value: Any) -> bool:
    """Say whether a parsed value was a JSON number."""
    return isinstance(value, int | Decimal) and not isinstance(value, bool)


def is_id(value: Any) -> bool:
    """Say whether a parsed value is a string or an integer."""
    return isinstance(value, str | int) and not isinstance(value, bool)


# Times (2)

RFC_3339 = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]+)?"
    r"(?:[Zz]|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))"
)


def to_ms(value: Any) -> int | None:
    """Give a wire time as milliseconds since 1970, rounded half to even, or None for an unusable one."""
    if isinstance(value, str):
        exact = text_ms(value)
    elif is_number(value):
        number = Decimal(value)
        exact = EXACT.multiply(number, Decimal(1000)) if number < 10**11 else number
    else:
        exact = None
    if exact is None or not -1 <= exact <= YEAR_2100_MS + 1:
        return None
    rounded = int(exact.to_integral_value(ROUND_HALF_EVEN))
    return rounded if 0 <= rounded <= YEAR_2100_MS else None


def text_ms(text: str) -> Decimal | None:
    """Give an RFC 3339 time as exact milliseconds since 1970, or None."""
    found = RFC_3339.fullmatch(text)
    if found is None:
        return None
    try:
        days = date.fromisoformat(found[1]).toordinal() - date(1970, 1, 1).toordinal()
        clock = time.fromisoformat(found[2])
    except ValueError:
        return None
    seconds = days * 86_400 + clock.hour * 3600 + clock.minute * 60 + clock.second
    if found[4]:
        offset = int(found[5]) * 3600 + int(found[6]) * 60
        seconds -= offset if found[4] == "+" else -offset
    fraction = EXACT.create_decimal(found[3] or 0)
    return EXACT.multiply(EXACT.add(Decimal(seconds), fraction), Decimal(1000))


# The judge (2)


class _UnusableError(Exception):
    """A reason why a line is bad."""


def judge(line: bytes, max_line: int = Rules.max_line) -> Good | Bad:
    """Judge one line without its newline: size, JSON, subject, verb, times, item, in this order."""
    try:
        return judged(line, max_line)
    except _UnusableError as reason:
        return Bad(str(reason))


def judged(line: bytes, max_line: int) -> Good:
    """Give the usable event of a line.

    Raises:
        _UnusableError: with the reason's name.
    """
    need(len(line) <= max_line, "too long")
    try:
        event = parse(line)
    except ValueError:
        raise _UnusableError("no JSON") from None
    need(isinstance(event, dict), "no JSON object")
    subject = event.get("subject")
    need(isinstance(subject, dict), "no subject")
    usable_id(subject, "no subject")
    verb = usable_verb(event.get("verb"))
    at_ms = usable_time(event, "context", "at")
    inserted_ms = usable_time(event, "event", "inserted_at")
    need(at_ms is not None or inserted_ms is not None, "no time")
    if verb in ("ADDED_ITEM_TO_BASKET", "CHANGED_ITEM_COUNT_IN_BASKET"):
        need_item(event.get("object"))
    type = subject.get("type")
    type = type if isinstance(type, str) else None
    return Good(subject["id"], str(subject["id"]), type, verb, event.get("object"), at_ms, inserted_ms)


def need(condition: bool, reason: str) -> None:
    """Refuse the line for this reason unless the condition holds."""
    if not condition:
        raise _UnusableError(reason)


def usable_id(holder: Json, reason: str) -> None:
    """Refuse the line unless `holder` has a string or an integer as its id."""
    need(not isinstance(holder.get("id"), bool), "boolean id")
    need(is_id(holder.get("id")), reason)


def usable_verb(verb: Any) -> str:
    """Give the verb's name, which stands alone or as `type` of an object."""
    name = verb.get("type") if isinstance(verb, dict) else verb
    if not isinstance(name, str):
        raise _UnusableError("no verb")
    return name


def usable_time(event: Json, holder: str, name: str) -> int | None:
    """Give one of the two times, None where it is missing; one that is there must be usable."""
    if holder not in event:
        return None
    need(isinstance(event[holder], dict), "no time")
    if name not in event[holder]:
        return None
    ms = to_ms(event[holder][name])
    need(ms is not None, "no time")
    return ms


def need_item(object: Any) -> None:
    """Refuse an ADDED or CHANGED without an item, its id, or with a count that is no number."""
    item = object.get("item") if isinstance(object, dict) else None
    if not isinstance(item, dict):
        raise _UnusableError("no item")
    usable_id(item, "no item id")
    need(is_number(item.get("count", 1)), "no count")


# The log, its ticks and its clock (2, 5)


@dataclass(frozen=True)
class Event:
    """A good line at its place, with the clock that it got."""

    offset: int
    line: bytes
    good: Good
    clock: int

    @property
    def happened(self) -> int:
        """When it happened: never after the log took it."""
        return self.clock if self.good.at_ms is None else min(self.good.at_ms, self.clock)


@dataclass(frozen=True)
class Rejected:
    """A bad line at its place, with the clock before it."""

    offset: int
    line: bytes
    reason: str
    clock: int


@dataclass(frozen=True)
class Ticked:
    """A tick as it counts: with the greatest as_of so far."""

    clock: int


def lines(log: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and bytes of each terminated line, without its newline."""
    start = 0
    while (end := log.find(b"\n", start)) >= 0:
        yield start, log[start:end]
        start = end + 1


def marked(log: bytes, ticks: Sequence[Tick]) -> Iterator[tuple[int, bytes] | Tick]:
    """Yield lines and ticks in the order in which they apply; equal ends keep their order.

    Raises:
        ValueError: a tick whose end is no end of a line.
    """
    waiting = sorted(ticks, key=lambda tick: tick.end)[::-1]
    end = 0
    for offset, line in lines(log):
        while waiting and waiting[-1].end <= offset:
            yield exactly(waiting.pop(), offset)
        yield offset, line
        end = offset + len(line) + 1
    while waiting:
        yield exactly(waiting.pop(), end)


def exactly(tick: Tick, end: int) -> Tick:
    """Give the tick, which must stand at this end of a line."""
    if tick.end != end:
        raise ValueError(f"{tick} is at no end of a line; expected {end}")
    return tick


def history(log: bytes, ticks: Sequence[Tick], rules: Rules) -> Iterator[Event | Rejected | Ticked]:
    """Yield all that the processors see, in order, with the running greatest clock."""
    clock = greatest_as_of = 0
    for step in marked(log, ticks):
        if isinstance(step, Tick):
            greatest_as_of = max(greatest_as_of, step.as_of)
            clock = max(clock, greatest_as_of)
            yield Ticked(greatest_as_of)
            continue
        offset, line = step
        verdict = judge(line, rules.max_line)
        if isinstance(verdict, Bad):
            yield Rejected(offset, line, verdict.reason, clock)
            continue
        taken = verdict.at_ms if verdict.inserted_ms is None else verdict.inserted_ms
        clock = max(clock, taken or 0)
        yield Event(offset, line, verdict, clock)


def log_end(log: bytes, ticks: Sequence[Tick] = (), rules: Rules | None = None) -> int:
    """Give the greatest clock of the log, ticks included; 0 for an empty one."""
    return max((step.clock for step in history(log, ticks, rules or Rules())), default=0)


# Derived events (6)


@dataclass(frozen=True)
class Verbatim:
    """JSON that goes into a derived line byte for byte."""

    text: str


MARK = "\ud800"  # stands in for a part with its own spelling; the judge lets no lone surrogate in


def encode(event: Json) -> str:
    """Write a derived line as orjson does; a number too large for a float keeps its digits."""
    spelt: list[str] = []

    def spell(part: Verbatim | Decimal) -> str:
        spelt.append(part.text if isinstance(part, Verbatim) else encode_number(part))
        return MARK

    text = json.dumps(event, ensure_ascii=False, separators=(",", ":"), default=spell)
    around = text.split(f'"{MARK}"')
    return around[0] + "".join(part + rest for part, rest in zip(spelt, around[1:], strict=True))


def encode_number(number: Decimal) -> str:
    """Write the shortest digits that read back as the nearest float, small exponents as orjson has them."""
    if math.isinf(float(number)):
        return str(number)
    digits, minus, exponent = repr(float(number)).partition("e-")
    if not minus:
        return digits
    if int(exponent) > 5:
        return f"{digits}e-{int(exponent)}"
    sign = "-" if digits.startswith("-") else ""
    return f"{sign}0.0000{digits.lstrip('-').replace('.', '')}"


def parsed(event: Json) -> Json:
    """Give what a reader of the derived line gets, with floats."""
    read: Json = json.loads(encode(event), parse_int=plain_whole)
    return read


def plain_whole(digits: str) -> int | float:
    """Read an integer literal; one longer than int() takes becomes infinite."""
    number = whole(digits)
    return number if isinstance(number, int) else float(number)


def cause(line: bytes, source: tuple[str, int, int]) -> Json:
    """Give `caused_by` and `source` of a derived event; a cause over 64 KiB is named by its digest."""
    log, partition, offset = source
    digest = {"sha256": hashlib.sha256(line).hexdigest(), "length": len(line)}
    caused_by = digest if len(line) > KEPT_BYTES else Verbatim(line.decode())
    return {"caused_by": caused_by, "source": {"log": log, "partition": partition, "offset": offset}}


def email(object: Json, clock: int, because: Json, id: str, rules: Rules) -> Json:
    """Give an EMAIL, dated by the clock that brought it forth and good for `not_after_ms`."""
    return {
        "subject": {"id": "EMAIL_SYSTEM"},
        "verb": "EMAIL",
        "object": object,
        "context": {"at": clock, **because, "not_after": clock + rules.not_after_ms},
        "event": {"id": id, "inserted_at": clock},
    }


def rejection(step: Rejected, rules: Rules) -> Json:
    """Give the quarantine's event for a bad line."""
    kept = base64.b64encode(step.line[:KEPT_BYTES]).decode()
    source = {"log": rules.log, "partition": rules.partition, "offset": step.offset}
    return {
        "subject": {"id": rules.log, "type": "LOG"},
        "verb": "REJECTED",
        "object": {"type": "LINE", "reason": step.reason, "length": len(step.line), "bytes": kept},
        "context": {"at": step.clock, "source": source},
        "event": {
            "id": f"quarantine/{rules.log}:{rules.partition}:{step.offset}/rejected",
            "inserted_at": step.clock,
        },
    }


def reactions(event: Event, rules: Rules) -> Iterator[Json]:
    """Yield the EMAIL that derive's rules give for an event, if any; a client needs a usable id."""
    good = event.good
    client = good.object.get("id") if isinstance(good.object, dict) else None
    if good.verb == "ORDER_COMPLETED":
        object: Json = {"id": good.id, "type": "CUSTOMER", "template": "order-confirmed"}
    elif good.verb == "SUBMIT_TAX" and is_id(client):
        object = {"id": client, "type": "CLIENT", "template": "tax-received"}
    else:
        return
    because = cause(event.line, (rules.log, rules.partition, event.offset))
    id = f"derive/{rules.log}:{rules.partition}:{event.offset}/{object['template']}"
    yield email(object, event.clock, because, id, rules)


def reminders(baskets: bytes, rules: Rules) -> Iterator[Json]:
    """Yield an EMAIL for each abandonment of a baskets log, none within the gap after the customer's last one."""
    clock = 0
    reminded: dict[str, int] = {}
    for offset, line in lines(baskets):
        abandonment = READER.decode(line.decode())
        clock = max(clock, abandonment["event"]["inserted_at"])
        customer = abandonment["subject"]["id"]
        before = reminded.get(str(customer))
        far = before is None or clock - before >= rules.reminder_gap_ms
        if abandonment["verb"]["type"] == "ABANDONED_BASKET" and far:
            reminded[str(customer)] = clock
            object = {"id": customer, "type": "CUSTOMER", "template": "basket-reminder"}
            because = cause(line, ("baskets", rules.partition, offset))
            yield email(object, clock, because, f"remind/{abandonment['event']['id']}/basket-reminder", rules)


# Abandonment (7)


@dataclass(frozen=True)
class Open:
    """A standing abandonment, not yet recovered: the id of its event without the name, its id, its `at`."""

    stem: str
    id: str
    at: int


@dataclass
class Customer:
    """What is known of one customer; `current` is the abandonment at the present value of `last`."""

    last: int | None = None
    cause: Event | None = None
    started: int = 0
    current: Open | None = None
    open: list[Open] = field(default_factory=list)
    basket: dict[str, Json] = field(default_factory=dict)


class Abandonment:
    """Flags, retracts and recovers; gives its events in `out` and counts what it did and did not read."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.customers: dict[str, Customer] = {}
        self.out: list[Json] = []
        self.counts: Counter[str] = Counter()

    def tick(self, as_of: int) -> None:
        """Flag all that is due, in order of `last`, then of its cause's offset."""
        due = [customer for customer in self.customers.values() if self.is_due(customer, as_of)]
        for customer in sorted(due, key=lambda c: (c.last or 0, c.cause.offset if c.cause else 0)):
            self.flag(customer, as_of)

    def take(self, event: Event) -> None:
        """Take one event: ignore, flag, forget, retract, recover, basket, last, in this order."""
        ignored = self.why_ignored(event)
        self.counts[f"ignored_{ignored}" if ignored else "processed"] += 1
        if ignored:
            return
        key = event.good.key
        customer = self.customers.setdefault(key, Customer())
        if self.is_due(customer, event.clock):
            self.flag(customer, event.clock)
        if customer.last is not None and event.clock > customer.last + self.rules.forget_ms:
            customer = self.customers[key] = Customer()
        self.retract(customer, event)
        if event.good.verb == "ORDERED":
            self.recover(customer, event)
        change(customer.basket, event.good)
        self.advance(customer, event)

    def why_ignored(self, event: Event) -> str | None:
        """Name the rule that ignores an event, if one does."""
        if event.good.verb in self.rules.excluded_verbs:
            return "verb"
        if event.good.type != "CUSTOMER":
            return "type"
        return "age" if event.happened < event.clock - self.rules.forget_ms else None

    def is_due(self, customer: Customer, now: int) -> bool:
        """Say whether the customer left a basket behind and has not been flagged for it."""
        if customer.last is None or customer.current is not None or not customer.basket:
            return False
        return now - customer.last > self.rules.timeout_ms

    def flag(self, customer: Customer, now: int) -> None:
        """Give the ABANDONED_BASKET at the present value of `last`."""
        event, at = customer.cause, customer.last
        assert event is not None
        assert at is not None
        stem = f"abandonment/{self.rules.log}:{self.rules.partition}:{event.offset}"
        customer.current = Open(stem, f"{stem}/abandoned", at)
        customer.open.append(customer.current)
        object = {"type": "BASKET", "basket": list(customer.basket.values())}
        times = {"at": at, "started_at": customer.started}
        self.give("ABANDONED_BASKET", event, object, times, customer.current.id, now)

    def retract(self, customer: Customer, event: Event) -> None:
        """Retract the abandonment at `last` if the event shows that the customer was still there."""
        flagged = customer.current
        if flagged is None or not flagged.at < event.happened <= flagged.at + self.rules.timeout_ms:
            return
        customer.current = None
        customer.open = [other for other in customer.open if other != flagged]
        self.show("ABANDONMENT_RETRACTED", event, {"type": "NONE"}, flagged, "retracted")

    def recover(self, customer: Customer, order: Event) -> None:
        """Recover the newest open abandonment that the order follows within the recovery time."""
        span = self.rules.recovery_ms
        followed = [flagged for flagged in customer.open if flagged.at < order.happened <= flagged.at + span]
        if not followed:
            return
        newest = max(followed, key=lambda flagged: flagged.at)
        customer.open = [other for other in customer.open if other != newest]
        object = {"type": "ORDER", "value": order_value(order.good.object, customer.basket)}
        self.show("RECOVERED_BASKET", order, object, newest, "recovered")

    def advance(self, customer: Customer, event: Event) -> None:
        """Raise `last`; its cause is the first event that raised it to that value."""
        if customer.last is None or event.happened > customer.last + self.rules.timeout_ms:
            customer.started = event.happened
        if customer.last is None or event.happened > customer.last:
            customer.last, customer.cause, customer.current = event.happened, event, None

    def show(self, verb: str, event: Event, object: Json, flagged: Open, name: str) -> None:
        """Give what an event showed about an abandonment, under the abandonment's cause id."""
        times = {"at": event.happened, "abandonment": flagged.id}
        self.give(verb, event, object, times, f"{flagged.stem}/{name}", event.clock)

    def give(self, verb: str, event: Event, object: Json, context: Json, id: str, clock: int) -> None:
        """Give one derived event with `event` as its cause."""
        because = cause(event.line, (self.rules.log, self.rules.partition, event.offset))
        self.counts[verb] += 1
        self.out.append(
            {
                "subject": {"id": event.good.id, "type": "INTERNAL_ABDANDON_SYSTEM"},
                "verb": {"type": verb},
                "object": object,
                "context": {**context, **because},
                "event": {"id": id, "inserted_at": clock},
            }
        )


def change(basket: dict[str, Json], good: Good) -> None:
    """Change a basket as an event says; a count of 0 or less takes out.

    An absent count is 1: it is not written into an item that has none, but replaces one that is there.
    """
    if good.verb == "ORDERED":
        basket.clear()
    item = good.object.get("item") if isinstance(good.object, dict) else None
    if not isinstance(item, dict) or not is_id(item.get("id")):
        return
    key = str(item["id"])
    if good.verb == "REMOVED_ITEM_FROM_BASKET":
        basket.pop(key, None)
    if good.verb in ("ADDED_ITEM_TO_BASKET", "CHANGED_ITEM_COUNT_IN_BASKET"):
        known = basket.get(key, {})
        if item.get("count", 1) <= 0:
            basket.pop(key, None)
        else:
            basket[key] = {**known, **({"count": 1} if "count" in known else {}), **item}


def order_value(object: Any, emptied: dict[str, Json]) -> int | Decimal | None:
    """Give an order's value: its own, else that of its basket, else that of the one which it empties."""
    order = object if isinstance(object, dict) else {}
    if is_number(order.get("value")):
        return exact_sum([{"price": order["value"]}])
    listed = order.get("basket")
    return exact_sum(listed if isinstance(listed, list) and listed else list(emptied.values()))


def exact_sum(items: list[Any]) -> int | Decimal | None:
    """Sum price x count exactly: an int of ints, else a Decimal; None where one is no number."""
    total = Decimal(0)
    whole = True
    for item in items:
        fields: Json = item if isinstance(item, dict) else {}
        price: Any = fields.get("price")
        count: Any = fields.get("count", 1)
        if not is_number(price) or not is_number(count):
            return None
        total = EXACT.add(total, EXACT.multiply(Decimal(price), Decimal(count)))
        whole = whole and isinstance(price, int) and isinstance(count, int)
    if not items or not is_finite_number(total):
        return None
    return int(total) if whole else total


def is_finite_number(value: Any) -> bool:
    """Say whether a parsed value is a number within a float's range."""
    return is_number(value) and math.isfinite(float(Decimal(value)))


# The whole


def run(log: bytes, ticks: Sequence[Tick], rules: Rules | None = None, baskets: bytes | None = None) -> Derived:
    """Derive everything from a whole log with these ticks; reminders from `baskets` as they were written, if given."""
    rules = rules or Rules()
    abandonment = Abandonment(rules)
    rejected: list[Json] = []
    reacted: list[Json] = []
    for step in history(log, ticks, rules):
        match step:
            case Ticked(as_of):
                abandonment.tick(as_of)
            case Rejected():
                rejected.append(rejection(step, rules))
            case Event():
                reacted.extend(reactions(step, rules))
                abandonment.take(step)
    if baskets is None:
        baskets = "".join(f"{encode(event)}\n" for event in abandonment.out).encode()
    reminded = list(reminders(baskets, rules))
    counts = {"read": sum(1 for _ in lines(log)), "quarantined": len(rejected), **abandonment.counts}
    return Derived(
        quarantine=[parsed(event) for event in rejected],
        reactions=[parsed(event) for event in reacted],
        baskets=[parsed(event) for event in abandonment.out],
        reminders=[parsed(event) for event in reminded],
        counts=Counter(counts),
    )


def standing(baskets: list[Json]) -> set[tuple[str, int]]:
    """Give customer and time of each standing abandonment: flagged minus retracted."""
    retracted = {e["context"]["abandonment"] for e in baskets if e["verb"]["type"] == "ABANDONMENT_RETRACTED"}
    flagged = [e for e in baskets if e["verb"]["type"] == "ABANDONED_BASKET"]
    left = [e for e in flagged if e["event"]["id"] not in retracted]
    return {(str(e["subject"]["id"]), e["context"]["at"]) for e in left}


def main() -> None:
    """Print the derived baskets of a log, ticked once at its end where asked for."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("--as-of", help="milliseconds, or log-end: the greatest clock")
    options = parser.parse_args()
    log = options.log.read_bytes()
    ticks = []
    if options.as_of is not None:
        as_of = log_end(log) if options.as_of == "log-end" else int(options.as_of)
        ticks.append(Tick(as_of, log.rfind(b"\n") + 1))
    for event in run(log, ticks).baskets:
        print(json.dumps(event, ensure_ascii=False))


if __name__ == "__main__":
    main()
