"""What stands between a customer and a mail: basket, timeout, abandonment, reminder, delivery and address, in this order."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from storage.mails import LONGEST_WAIT, NOT_ALLOWED, SENT, WAITING, is_allowed
from storage.times import now, show, show_duration
from tasks.evidence import Event, Evidence, Place, as_json, parse_event
from tasks.processors import basket
from tasks.time_machine import Basket, Interaction, fold, read_interactions
from tasks.topology import DELIVER
from tasks.why_sent import sending_of

_REMIND = "remind"
_NOT_YET = "not queued yet: `deliver` has not taken it in"


@dataclass(frozen=True)
class Check:
    """One thing that has to be right for a mail; `stands_in_the_way` where it is not. `place` is the event behind it."""

    what: str
    stands_in_the_way: bool
    detail: str
    place: str = ""


@dataclass(frozen=True)
class WhyNot:
    """The answer in a sentence, and everything that was looked at."""

    customer: str
    answer: str
    checks: list[Check]


def why_not(evidence: Evidence, customer: str, *, processes: int = 1) -> WhyNot:
    """Why a customer gets no mail about their basket, as things stand now; or when it was sent."""
    found = read_interactions(evidence.store, evidence.topology, customer, processes=processes)
    if not found:
        log = evidence.topology.reads("abandonment")
        return WhyNot(customer, f"the log {log} has no interaction of a customer {customer} that counts", [])
    checks = _Checks(evidence, customer, found).all()
    stands = next((check for check in checks if check.stands_in_the_way), None)
    if stands is not None:
        return WhyNot(customer, stands.detail, checks)
    return WhyNot(customer, f"nothing stands in the way: {checks[-1].detail}", checks)


class _Checks:
    def __init__(self, evidence: Evidence, customer: str, found: list[Interaction]) -> None:
        self._evidence, self._customer, self._found = evidence, customer, found
        self._settings, self._wall = evidence.store.settings, now()
        self._basket: Basket = fold(customer, found, None, None)
        self._left, self._closed = self._abandonment()

    def all(self) -> list[Check]:
        """Every check, in the order in which things happen."""
        checks = [self._in_it(), self._timeout()]
        if self._left is not None:
            place, event = self._left
            current = event["context"]["at"] == self._basket.last
            when = show(event["context"]["at"])
            word = f"abandoned at {when}" if current else f"the last one was abandoned at {when}, before they came back"
            checks += [
                Check("abandonment", False, f"{word}: {event['event']['id']}", str(place)),
                *self._outcomes(current),
            ]
            checks += self._mail(place, event, current)
        else:
            checks.append(self._address())
        return checks

    def _in_it(self) -> Check:
        made = self._basket.made_by[-1] if self._basket.made_by else None
        if self._basket.items:
            count = len(self._basket.items)
            return Check("basket", False, f"{count} item{'' if count == 1 else 's'} in it", made.place if made else "")
        if made is None:
            notes = self._basket.notes or ["nothing was ever put in it"]
            return Check("basket", True, f"the basket is empty: {notes[-1]}")
        did = "ordered" if made.verb == basket.ORDERED else "the last item was taken out"
        return Check("basket", True, f"the basket is empty: {did} at {show(made.at)}", made.place)

    def _timeout(self) -> Check:
        last, timeout = self._basket.last, self._settings.timeout
        place = next((each.place for each in self._found if each.event.at == last), "")
        seen, passed = f"last there at {show(last)}", self._wall - last - timeout
        if not self._basket.items:
            return Check("timeout", False, seen, place)
        if self._left is not None and self._left[1]["context"]["at"] == last:
            return Check("timeout", False, f"{seen}, {show_duration(self._wall - last)} ago", place)
        if passed <= 0:
            return Check(
                "timeout",
                True,
                f"{show_duration(-passed)} to go: {seen}, and abandoned {show_duration(timeout)} later",
                place,
            )
        due = f"{seen}, due for {show_duration(passed)}: `process` has not shown it by a tick yet"
        return Check("timeout", True, due, place)

    def _outcomes(self, current: bool) -> list[Check]:
        """Whether the abandonment was retracted, or its basket ordered."""
        words = {"ABANDONMENT_RETRACTED": "retracted by an interaction of", "RECOVERED_BASKET": "ordered at"}
        checks = []
        for place, event in self._closed:
            source = event["context"]["source"]
            cause = Place(source["log"], source["partition"], source["offset"])
            detail = f"{words[event['verb']['type']]} {show(event['context']['at'])} ({cause})"
            checks.append(Check("since then", current, detail, str(place)))
        return checks

    def _address(self) -> Check:
        rows = self._evidence.look.rows(
            "SELECT email, unsubscribed FROM contact WHERE type = 'CUSTOMER' AND id = :id", id=self._customer
        )
        if not rows:
            return Check("address", True, "no address: a mail to them is suppressed (`afterlog contacts`)")
        if rows[0]["unsubscribed"]:
            return Check("address", True, "unsubscribed: a mail to them is suppressed")
        allowed = is_allowed(rows[0]["email"], self._settings.mail_allow)
        return Check("address", not allowed, "known" if allowed else f"suppressed: {NOT_ALLOWED}")

    def _mail(self, place: Place, event: Event, current: bool) -> list[Check]:
        """The reminder of the abandonment, and how it stands."""
        evidence, log = self._evidence, self._evidence.log_of(_REMIND)
        needle = as_json(f"{_REMIND}/{event['event']['id']}/")
        mails = [(p, parse_event(line)) for p, line in evidence.lines_with(log, needle, place.partition)]
        if not mails:
            return [Check("reminder", current, self._no_reminder(place, event)), self._address()]
        at, mail = mails[-1]
        sending = sending_of(evidence, at, mail)
        outcome = sending.outcomes[-1] if sending.outcomes else None
        may_come = sending.state == WAITING or not (sending.state or sending.reason)
        detail = sending.state or ("not queued" if sending.reason else _NOT_YET)
        if outcome is not None and sending.state != WAITING:
            detail += f" at {show(outcome.at)}"
        if sending.state in ("", "SUPPRESSED", "FAILED", "UNKNOWN", WAITING) and sending.reason:
            detail += f" because {sending.reason}"
        if sending.state == WAITING:
            detail += self._waits(sending.next_at, sending.not_after)
        return [
            Check("reminder", False, mail["event"]["id"], str(at)),
            *([self._address()] if may_come else []),  # else it does not matter any more
            Check("delivery", current and sending.state != SENT, detail, outcome.place if outcome else ""),
        ]

    def _no_reminder(self, place: Place, event: Event) -> str:
        rows = self._evidence.look.rows(
            'SELECT MAX("offset") AS at FROM checkpoint WHERE processor = :name AND log = :log AND "partition" = :part AND live',
            name=_REMIND, log=place.log, part=place.partition,
        )  # fmt: skip
        if (rows[0]["at"] or 0) <= place.offset:
            return "no reminder yet: `deliver` has not read the abandonment"
        log, clock = self._evidence.log_of(_REMIND), event["event"]["inserted_at"]
        gap = self._gap(log, place)
        earlier = [
            e
            for e in map(parse_event, self._lines(log, b'"object":{"id":%s,"type":"CUSTOMER",'))
            if clock - gap < e["context"]["at"] < clock
        ]
        if not earlier:
            return "no reminder: `remind` gave none"
        before = earlier[-1]
        return (
            f"no reminder: one of {show(before['context']['at'])} is less than {show_duration(gap)} before "
            f"({before['event']['id']})"
        )

    def _gap(self, log: str, place: Place) -> int:
        """The gap between two reminders with which `remind` took the line at a place."""
        version = self._evidence.version(_REMIND, place, self._evidence.generation_of(log))
        return int(version.settings["gap"] if version else self._settings.reminder_gap)

    def _waits(self, next_at: int, not_after: int) -> str:
        brake = self._evidence.look.rows("SELECT state, reason FROM brake WHERE name = :name", name=DELIVER)
        if brake and brake[0]["state"] != "RUNNING":
            return f", held: delivery is {brake[0]['state']}, {brake[0]['reason']}"
        if self._wall > not_after:
            return f", and too old by now: it was worth sending until {show(not_after)}"
        waits = self._wall < next_at <= self._wall + LONGEST_WAIT
        return f", next try at {show(next_at)}" if waits else ", due: `deliver` sends it at its next turn"

    def _abandonment(self) -> tuple[tuple[Place, Event] | None, list[tuple[Place, Event]]]:
        """The customer's newest abandonment, and what was told of it since."""
        log = self._evidence.log_of("abandonment")
        newest: tuple[Place, Event] | None = None
        closed: list[tuple[Place, Event]] = []
        for place, line in self._places(log, b'{"subject":{"id":%s,"type":"INTERNAL_'):
            event = parse_event(line)
            if event["verb"]["type"] == "ABANDONED_BASKET":
                newest, closed = (place, event), []
            elif newest is not None and event["context"].get("abandonment") == newest[1]["event"]["id"]:
                closed.append((place, event))
        return newest, closed

    def _lines(self, log: str, shape: bytes) -> list[bytes]:
        return [line for _, line in self._places(log, shape)]

    def _places(self, log: str, shape: bytes) -> list[tuple[Place, bytes]]:
        """The lines of a derived log with the customer's id where `shape` has its mark; the id as text or as a number."""
        found: list[tuple[Place, bytes]] = []
        for ident in (orjson.dumps(self._customer), self._customer.encode("utf-8", "surrogatepass")):
            found += self._evidence.lines_with(log, shape % ident)
        return sorted(found, key=lambda pair: (pair[0].partition, pair[0].offset))
