"""The example log: the same for the same arguments, in the log's order, and believable."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from importlib import resources
from typing import Any

import orjson
import pytest

from deployments.example import contacts, history, live
from storage.event import Rejected
from storage.judge import judge

NOW = 1_795_000_000_000  # 2026-11-18, 11:06 UTC
NIGHT = 1_795_060_000_000  # the next day, 03:46 UTC
MINUTE = 60_000
VERBS = {
    "STARTED_BROWSING", "VIEWED_ITEM", "ADDED_ITEM_TO_BASKET", "CHANGED_ITEM_COUNT_IN_BASKET",
    "REMOVED_ITEM_FROM_BASKET", "ORDERED", "ORDER_COMPLETED", "REVIEWED", "SUBMIT_TAX",
}  # fmt: skip
SEED_LINES = 15


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    return list(history(NOW))


@pytest.fixture(scope="module")
def good(lines: list[bytes]) -> list[dict[str, Any]]:
    """The good events after the seed's."""
    return [orjson.loads(line) for line in lines[SEED_LINES:] if _is_good(line)]


@pytest.fixture(scope="module")
def half_an_hour() -> list[tuple[int, dict[str, Any]]]:
    return list(itertools.takewhile(lambda timed: timed[0] < NOW + 30 * MINUTE, live(NOW)))


def _is_good(line: bytes) -> bool:
    try:
        judge(line, 0, 0)
    except Rejected:
        return False
    return True


def _verb(event: dict[str, Any]) -> str:
    verb = event["verb"]
    return verb if isinstance(verb, str) else verb["type"]


def _millis(event: dict[str, Any]) -> int:
    at = event["context"]["at"]
    return at if isinstance(at, int) else round(at * 1000)


class _Customer:
    """A naive reading of DESIGN.md 7: the basket, the last moment, and what the log shows by them."""

    def __init__(self) -> None:
        self.basket: dict[int, dict[str, Any]] = {}
        self.last = 0
        self.left: list[int] = []
        self.retracted = self.recovered = 0

    def see(self, event: dict[str, Any]) -> None:
        clock = event["event"]["inserted_at"]
        at = min(_millis(event), clock)
        self.look(clock)
        if self.left and self.left[-1] == self.last and self.last < at <= self.last + 30 * MINUTE:
            self.left.pop()
            self.retracted += 1
        verb, thing = _verb(event), event["object"]
        if verb == "ORDERED":
            assert thing["basket"] == list(self.basket.values())
            self.recovered += bool(self.left)
            self.basket.clear()
        elif verb in ("ADDED_ITEM_TO_BASKET", "CHANGED_ITEM_COUNT_IN_BASKET"):
            self.basket[thing["item"]["id"]] = thing["item"]
        elif verb == "REMOVED_ITEM_FROM_BASKET":
            del self.basket[thing["item"]["id"]]
        self.last = max(self.last, at)

    def look(self, clock: int) -> None:
        if self.basket and clock > self.last + 30 * MINUTE and self.last not in self.left[-1:]:
            self.left.append(self.last)


def _watch(good: list[dict[str, Any]], now: int) -> list[_Customer]:
    watched: dict[int, _Customer] = defaultdict(_Customer)
    for event in good:
        if event["subject"].get("type") == "CUSTOMER":
            watched[event["subject"]["id"]].see(event)
    for customer in watched.values():
        customer.look(now)
    return list(watched.values())


def test_the_same_arguments_give_the_same_bytes(lines: list[bytes]) -> None:
    assert list(history(NOW)) == lines
    assert list(history(NOW, seed=7, hours=3)) != list(history(NOW, seed=8, hours=3))


def test_it_begins_with_the_lines_of_the_original_text() -> None:
    text = resources.files("deployments").joinpath("seed.jsonl").read_bytes()
    assert b"".join(line + b"\n" for line in itertools.islice(history(NOW), SEED_LINES)) == text


def test_after_the_seed_the_lines_are_in_the_order_in_which_the_log_took_them(
    good: list[dict[str, Any]],
) -> None:
    taken = [event["event"]["inserted_at"] for event in good]
    assert taken == sorted(taken)
    assert taken[0] >= NOW - 48 * 60 * MINUTE


def test_nothing_happened_or_was_taken_after_now(good: list[dict[str, Any]]) -> None:
    assert max(max(event["event"]["inserted_at"], _millis(event)) for event in good) <= NOW


def test_it_has_a_plausible_size_and_no_line_break_within_a_line(lines: list[bytes]) -> None:
    assert 10_000 <= len(lines) <= 20_000
    assert not any(b"\n" in line for line in lines)


def test_every_verb_is_there_and_views_are_the_most(good: list[dict[str, Any]]) -> None:
    verbs = Counter(map(_verb, good))
    assert set(verbs) == VERBS
    assert verbs.most_common(1)[0][0] == "VIEWED_ITEM"
    assert verbs["SUBMIT_TAX"] >= 20
    assert verbs["ORDER_COMPLETED"] >= verbs["ORDERED"] - 2 > 200


def test_a_few_lines_are_bad_and_for_different_reasons(lines: list[bytes]) -> None:
    reasons = []
    for line in lines:
        try:
            judge(line, 0, 0)
        except Rejected as reason:
            reasons.append(str(reason).split(":")[0])
    assert 0.0015 <= len(reasons) / len(lines) <= 0.005
    assert len(set(reasons)) >= 4


def test_some_events_come_late_and_some_clocks_are_ahead(good: list[dict[str, Any]]) -> None:
    lags = [event["event"]["inserted_at"] - _millis(event) for event in good]
    late = [lag for lag in lags if lag > 1000]
    assert 10 <= len(late) <= 200
    # a late device may have a clock that is ahead, too
    assert 5 * MINUTE - 4000 <= min(late) <= max(late) <= 51 * MINUTE
    assert 20 <= sum(lag < 0 for lag in lags) <= len(good) // 20
    assert min(lags) >= -4000


def test_an_order_is_completed_by_the_shop_a_moment_after_the_log_took_it(good: list[dict[str, Any]]) -> None:
    ordered: dict[int, int] = {}
    for event in good:
        if _verb(event) == "ORDERED":
            ordered[event["subject"]["id"]] = event["event"]["inserted_at"]
        elif _verb(event) == "ORDER_COMPLETED":
            assert event["subject"]["type"] == "INTERNAL_ORDER_EVENT"
            assert event["object"] == {"type": "NONE"}
            assert 2 <= event["event"]["inserted_at"] - ordered.pop(event["subject"]["id"]) <= 1500


def test_taxes_and_odd_reviews_are_as_the_anomalies_need_them(good: list[dict[str, Any]]) -> None:
    taxes = [event for event in good if _verb(event) == "SUBMIT_TAX"]
    assert all(event["verb"] == "SUBMIT_TAX" and isinstance(event["context"]["at"], float) for event in taxes)
    bodies = [event["object"]["body"] for event in good if _verb(event) == "REVIEWED"]
    odd = [
        body
        for body in bodies
        if body.isupper() or len(body) > 400 or len(set(body.split())) < 5 or sum(map(str.isdigit, body)) > 30
    ]
    assert len(bodies) >= 200
    assert 0.005 <= len(odd) / len(bodies) <= 0.08


@pytest.mark.parametrize("now", [NOW, NIGHT])
def test_baskets_are_abandoned_retracted_and_recovered(now: int) -> None:
    good = [orjson.loads(line) for line in itertools.islice(history(now), SEED_LINES, None) if _is_good(line)]
    customers = _watch(good, now)
    left = sum(len(customer.left) for customer in customers)
    orders = sum(_verb(event) == "ORDERED" for event in good)
    assert 0.25 <= left / (left + orders) <= 0.42
    assert sum(customer.retracted for customer in customers) >= 3
    assert sum(customer.recovered for customer in customers) >= 20


@pytest.mark.parametrize("now", [NOW, NIGHT])
def test_in_the_last_hour_baskets_are_left_and_others_are_about_to_be(now: int) -> None:
    good = [orjson.loads(line) for line in itertools.islice(history(now), SEED_LINES, None) if _is_good(line)]
    idle = [(now - customer.last) / MINUTE for customer in _watch(good, now) if customer.basket]
    assert sum(30 < minutes < 60 for minutes in idle) >= 8
    assert sum(25 < minutes <= 30 for minutes in idle) >= 3
    assert sum(minutes <= 25 for minutes in idle) >= 10


def test_live_is_monotone_paced_and_the_same_again(half_an_hour: list[tuple[int, dict[str, Any]]]) -> None:
    times = [at for at, _ in half_an_hour]
    assert times == sorted(times)
    assert times[0] >= NOW
    a_minute = Counter((at - NOW) // MINUTE for at in times)
    assert all(2 * 60 <= a_minute[minute] <= 5 * 60 for minute in range(30))
    assert list(itertools.islice(live(NOW), 500)) == half_an_hour[:500]


def test_live_events_carry_their_time_and_leave_the_stamp_to_the_log(
    half_an_hour: list[tuple[int, dict[str, Any]]],
) -> None:
    assert {_verb(event) for _, event in half_an_hour} == VERBS
    for at, event in half_an_hour:
        assert "event" not in event
        assert judge(orjson.dumps(event), 0, 0).at == at


def test_who_left_a_basket_in_the_last_hour_mostly_stays_away_until_it_is_abandoned(
    good: list[dict[str, Any]], half_an_hour: list[tuple[int, dict[str, Any]]]
) -> None:
    customers = [event for event in good if event["subject"].get("type") == "CUSTOMER"]
    last = {event["subject"]["id"]: _millis(event) for event in customers}
    waiting = {id for id, at in last.items() if NOW - 30 * MINUTE <= at <= NOW - MINUTE}
    back = {
        event["subject"]["id"]
        for at, event in half_an_hour
        if event["subject"]["id"] in waiting and at <= last[event["subject"]["id"]] + 30 * MINUTE
    }
    assert len(waiting) >= 20
    assert len(back) <= len(waiting) // 4


@pytest.mark.parametrize("customers", [1, 5, 30])
def test_a_smaller_shop_works_too(customers: int) -> None:
    assert len(list(history(NOW, customers=customers))) > SEED_LINES
    at = [at for at, _ in itertools.islice(live(NOW, customers=customers), 600)]
    assert 1 <= 600 / ((at[-1] - NOW) / 1000) <= 5


def test_contacts_are_unique_and_some_are_missing_or_unsubscribed() -> None:
    everybody = list(contacts())
    keys = {(type, id) for type, id, _, _ in everybody}
    assert len(keys) == len(everybody) == len({email for _, _, email, _ in everybody})
    assert {("CUSTOMER", "1"), ("CUSTOMER", "15"), ("CLIENT", "901")} <= keys
    assert 380 <= sum(type == "CUSTOMER" for type, _ in keys) < 402
    assert 3 <= sum(unsubscribed for *_, unsubscribed in everybody) <= 30
    hosts = {email.split("@")[1] for _, _, email, _ in everybody}
    assert hosts == {"example.com", "example.org", "example.net"}


def test_contacts_are_the_same_again() -> None:
    assert list(contacts(50)) == list(contacts(50))
