"""What each processor gives for which events, rule by rule."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from storage.clock import Clock
from storage.door import append_lines
from storage.errors import UsageError
from storage.settings import load_settings
from storage.store import Store
from tasks.local import side_by_side
from tasks.process import FinalTick, positions, process_to_end
from tasks.processors import abandonment, derive, normalise
from tasks.run import Run
from tasks.status import read_status
from tasks.topology import build_topology
from tests.conftest import SHARED, log_bytes, needs_shared
from tests.helpers import open_store

T0 = 1_700_000_000_000
M, D = 60_000, 86_400_000
LEMON = '{"id": 3, "name": "Lemon", "price": 5, "count": 1}'
Story = Callable[..., list[tuple[Any, ...]]]
Fresh = Callable[..., Store]


@pytest.fixture
def fresh(tmp_path: Path) -> Fresh:
    """Make a store on an empty HOME."""

    def make(**settings: object) -> Store:
        return open_store(tmp_path / f"home{len(list(tmp_path.iterdir()))}", **settings)

    return make


def did(
    verb: str, at: int, clock: int | None = None, customer: str = "15", kind: str = "CUSTOMER", obj: str = "{}"
) -> bytes:
    """What a customer did `at` milliseconds after T0, taken by the log at `clock`."""
    stamp = T0 + (at if clock is None else clock)
    return (
        f'{{"subject": {{"id": {customer}, "type": "{kind}"}}, "verb": {{"type": "{verb}"}}, "object": {obj}, '
        f'"context": {{"at": {T0 + at}}}, "event": {{"inserted_at": {stamp}}}}}'
    ).encode()


def add(at: int, clock: int | None = None, customer: str = "15", item: str = LEMON, **more: Any) -> bytes:
    return did("ADDED_ITEM_TO_BASKET", at, clock, customer, obj=f'{{"item": {item}}}', **more)


def change(at: int, item: str) -> bytes:
    return did("CHANGED_ITEM_COUNT_IN_BASKET", at, obj=f'{{"item": {item}}}')


def remove(at: int, obj: str) -> bytes:
    return did("REMOVED_ITEM_FROM_BASKET", at, obj=obj)


def browse(at: int, clock: int | None = None, customer: str = "15", **more: Any) -> bytes:
    return did("BROWSED", at, clock, customer, **more)


def order(at: int, clock: int | None = None, customer: str = "15", obj: str = "{}") -> bytes:
    return did("ORDERED", at, clock, customer, obj=obj)


def tick(as_of: int) -> int:
    """A step of a story: somebody looked at the clock, this long after T0."""
    return as_of


def run_of(store: Store) -> Run:
    return Run(store, build_topology(store.settings), "a test")


def given(store: Store, name: str, *steps: bytes | int) -> list[dict[str, Any]]:
    """Append the lines and note the ticks in their order, then let one processor take them; gives its log."""
    clock = Clock(store, ["events"])
    for step in steps:
        if isinstance(step, int):
            clock.tick(T0 + step)
        else:
            append_lines(store, "events", [step])
    run = run_of(store)
    process_to_end(run, name, None)
    log = run.topology.make(name).writes
    assert log is not None
    return [json.loads(line, parse_float=exact) for line in log_bytes(store.home, log).splitlines()]


def exact(literal: str) -> Decimal:
    """A number as it is written; one that is out of even Decimal's reach is infinite."""
    try:
        return Decimal(literal)
    except InvalidOperation:
        return Decimal("Infinity")


SHORT = {"ABANDONED_BASKET": "left", "ABANDONMENT_RETRACTED": "was there", "RECOVERED_BASKET": "ordered"}


def told(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Each event as (what, who, when it happened, when that was known), and for later ones which abandonment it is of."""
    left = {e["event"]["id"]: e["context"]["at"] - T0 for e in events}
    found = []
    for event in events:
        context = event["context"]
        what = SHORT[event["verb"]["type"]]
        one = (what, event["subject"]["id"], context["at"] - T0, event["event"]["inserted_at"] - T0)
        found.append(one if what == "left" else (*one, left[context["abandonment"]]))
    return found


@pytest.fixture
def story(fresh: Fresh) -> Story:
    """What abandonment makes of some steps."""
    return lambda *steps, **settings: told(given(fresh(**settings), "abandonment", *steps))


LEFT = ("left", 15, 0, 31 * M)


class TestWhenABasketIsAbandoned:
    def test_at_exactly_the_timeout_it_is_not_and_a_millisecond_later_it_is(self, story: Story) -> None:
        assert story(add(0), tick(30 * M)) == []
        assert story(add(0), browse(30 * M)) == []
        assert story(add(0), tick(30 * M + 1)) == [("left", 15, 0, 30 * M + 1)]
        assert story(add(0), browse(30 * M + 1)) == [("left", 15, 0, 30 * M + 1)]

    def test_the_timeout_is_a_setting(self, story: Story) -> None:
        assert story(add(0), tick(45 * M), timeout="45m") == []
        assert story(add(0), tick(45 * M + 1), timeout="45m") == [("left", 15, 0, 45 * M + 1)]

    @pytest.mark.parametrize(
        "subject",
        [
            '"subject": 5, "subject": {"id": 15, "type": "CUSTOMER"}',
            '"subject": {"id": null, "id": 15, "type": "CUSTOMER"}',
            '"subject": {"id": 1, "id": 15, "type": "CUSTOMER"}',
        ],
    )
    def test_of_a_key_that_a_cause_has_twice_the_last_one_counts(self, story: Story, subject: str) -> None:
        line = add(0).replace(b'"subject": {"id": 15, "type": "CUSTOMER"}', subject.encode())
        assert line != add(0)
        assert story(line, add(5, customer="16"), tick(30 * M + 1)) == [("left", 15, 0, 30 * M + 1)]

    def test_any_interaction_puts_it_off(self, story: Story) -> None:
        assert story(add(0), browse(20 * M), tick(50 * M)) == []
        assert story(add(0), browse(20 * M), tick(50 * M + 1)) == [("left", 15, 20 * M, 50 * M + 1)]

    def test_an_empty_basket_is_not_abandoned(self, story: Story) -> None:
        assert story(browse(0), tick(60 * M)) == []
        assert story(add(0), order(1), tick(60 * M)) == []

    def test_it_is_abandoned_once_however_often_anyone_looks(self, story: Story) -> None:
        assert story(add(0), tick(31 * M), tick(40 * M), browse(100 * M), tick(110 * M)) == [LEFT]

    def test_who_comes_back_and_leaves_again_abandons_again(self, story: Story) -> None:
        assert story(add(0), tick(31 * M), browse(100 * M), tick(131 * M)) == [LEFT, ("left", 15, 100 * M, 131 * M)]

    @pytest.mark.parametrize("kind", ["INTERNAL_ORDER_EVENT", "customer", "", "ANY"])
    def test_only_customers_interact(self, story: Story, kind: str) -> None:
        assert story(add(0, kind=kind), tick(60 * M)) == []
        assert story(add(0), browse(20 * M, kind=kind), browse(40 * M, kind=kind)) == []
        assert story(add(0), browse(20 * M, kind=kind), tick(31 * M)) == [LEFT]

    def test_excluded_verbs_are_no_interaction(self, story: Story) -> None:
        assert story(add(0), browse(20 * M), browse(40 * M), excluded_verbs=["BROWSED"]) == []
        assert story(add(0), browse(20 * M), tick(31 * M), excluded_verbs=["BROWSED"]) == [LEFT]

    def test_the_log_s_clock_decides_and_not_when_it_happened(self, story: Story) -> None:
        assert story(add(0, 10 * M), tick(31 * M)) == [LEFT]
        assert story(add(0), browse(-5 * M, 31 * M)) == [LEFT]

    def test_an_event_stamped_ahead_happened_no_later_than_its_clock(self, story: Story) -> None:
        assert story(add(90 * M, 0), tick(31 * M)) == [LEFT]

    def test_last_is_the_greatest_time_and_its_cause_the_first_event_that_raised_it(self, fresh: Fresh) -> None:
        first, second, late = add(5 * M), browse(5 * M), browse(1 * M, 6 * M)
        [event] = given(fresh(), "abandonment", add(0), first, second, late, tick(36 * M))
        assert event["context"]["at"] == T0 + 5 * M
        assert event["context"]["source"] == {"log": "events", "partition": 0, "offset": len(add(0)) + 1}
        assert event["context"]["caused_by"]["verb"] == {"type": "ADDED_ITEM_TO_BASKET"}

    def test_started_at_is_the_first_interaction_since_a_gap_over_the_timeout(self, fresh: Fresh) -> None:
        steps = [add(0), browse(30 * M), browse(70 * M), browse(80 * M), tick(111 * M)]
        events = given(fresh(), "abandonment", *steps)
        assert [(e["context"]["started_at"] - T0, e["context"]["at"] - T0) for e in events] == [
            (0, 30 * M), (70 * M, 80 * M),
        ]  # fmt: skip

    def test_at_one_tick_they_come_in_order_of_last_and_then_of_the_cause(self, story: Story) -> None:
        steps = [add(5 * M, 10 * M, "9"), add(10 * M, None, "1"), add(5 * M, 10 * M, "2"), add(5 * M, 10 * M, '"a"')]
        assert story(*steps, tick(60 * M)) == [
            ("left", who, at, 60 * M) for who, at in [(9, 5 * M), (2, 5 * M), ("a", 5 * M), (1, 10 * M)]
        ]

    @pytest.mark.parametrize("ident", ["15", '"15"', f"{2**70}", f"-{2**63 + 1}", '""', '"\\u00e9/:"'])
    def test_the_id_is_written_as_the_cause_has_it(self, story: Story, ident: str) -> None:
        assert story(add(0, None, ident), tick(31 * M)) == [("left", json.loads(ident), 0, 31 * M)]

    def test_the_same_id_as_a_string_and_as_an_integer_is_one_customer(self, story: Story) -> None:
        assert story(add(0), browse(20 * M, None, '"15"'), tick(51 * M)) == [("left", "15", 20 * M, 51 * M)]


class TestOldEvents:
    def test_what_happened_more_than_30_days_before_its_clock_is_ignored(self, story: Story) -> None:
        assert story(add(0, 30 * D), tick(30 * D + 1)) == [("left", 15, 0, 30 * D + 1)]
        assert story(add(0, 30 * D + 1), tick(31 * D)) == []

    def test_an_ignored_event_neither_flags_nor_forgets(self, story: Story) -> None:
        assert story(add(0), browse(0, 30 * D + 1)) == []
        assert story(add(0), browse(0, 30 * D + 1), tick(30 * D + 2)) == [("left", 15, 0, 30 * D + 2)]

    def test_after_30_days_the_next_event_finds_no_basket(self, story: Story) -> None:
        kept = [LEFT, ("left", 15, 30 * D, 30 * D + 31 * M)]
        assert story(add(0), tick(31 * M), browse(30 * D), tick(30 * D + 31 * M)) == kept
        assert story(add(0), tick(31 * M), browse(30 * D + 1), tick(31 * D)) == [LEFT]

    def test_an_event_flags_first_and_forgets_then(self, story: Story) -> None:
        assert story(add(0), browse(31 * D), tick(32 * D)) == [("left", 15, 0, 31 * D)]

    def test_a_tick_that_drops_an_old_customer_changes_nothing_of_what_comes(self, story: Story) -> None:
        later = [("left", 15, 41 * D, 41 * D + 31 * M)]
        assert story(add(0), browse(40 * D), add(41 * D), tick(41 * D + 31 * M)) == [("left", 15, 0, 40 * D), *later]
        assert story(add(0), tick(31 * M), tick(39 * D), browse(40 * D), add(41 * D), tick(41 * D + 31 * M)) == [
            LEFT,
            *later,
        ]

    @pytest.mark.parametrize("at", [0, D - 1, D, 20 * D + 7 * M])
    def test_a_customer_is_due_again_only_once_all_is_to_be_forgotten(self, at: int) -> None:
        """Whoever is due at a tick and is not dropped there would bring forth ticks for ever."""
        processor = abandonment.Processor(abandonment.Settings(30 * M))
        due, rank = processor.due_of(abandonment.Customer(last=at, flagged=True, items={"3": LEMON.encode()}))
        assert processor.due(at + 30 * D) <= due < processor.due(at + 32 * D)
        assert (due, rank) == processor.due_of(abandonment.Customer(last=at))

    def test_a_dropped_customer_leaves_no_row_behind(self, fresh: Fresh) -> None:
        store = fresh()
        given(store, "abandonment", add(0), tick(31 * M), tick(32 * D))
        with store.database.read() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM state").scalar() == 0

    def test_open_abandonments_are_gone_with_the_rest(self, story: Story) -> None:
        ordered = ("ordered", 15, 6 * D, 30 * D, 0)
        assert story(add(0), tick(31 * M), order(6 * D, 30 * D)) == [LEFT, ordered]
        assert story(add(0), tick(31 * M), order(6 * D, 30 * D + 1)) == [LEFT]


class TestRetraction:
    def test_a_late_event_within_the_timeout_shows_that_the_customer_was_there(self, story: Story) -> None:
        assert story(add(0), tick(31 * M), browse(20 * M, 32 * M)) == [LEFT, ("was there", 15, 20 * M, 32 * M, 0)]

    def test_the_event_that_flags_may_itself_retract(self, story: Story) -> None:
        assert story(add(0), browse(20 * M, 40 * M)) == [
            ("left", 15, 0, 40 * M), ("was there", 15, 20 * M, 40 * M, 0),
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("at", "retracts"), [(-1, False), (0, False), (1, True), (30 * M, True), (30 * M + 1, False)]
    )
    def test_it_must_have_happened_after_last_and_within_the_timeout(
        self, story: Story, at: int, retracts: bool
    ) -> None:
        expected = [LEFT, ("was there", 15, at, 32 * M, 0)] if retracts else [LEFT]
        assert story(add(0), tick(31 * M), browse(at, 32 * M)) == expected

    def test_once_the_customer_is_back_nothing_is_retracted_any_more(self, story: Story) -> None:
        assert story(add(0), tick(31 * M), browse(32 * M), browse(20 * M, 33 * M)) == [LEFT]

    def test_an_abandonment_is_retracted_once_and_the_basket_may_be_left_at_the_later_time(self, story: Story) -> None:
        assert story(add(0), tick(31 * M), browse(10 * M, 32 * M), browse(20 * M, 33 * M), tick(51 * M)) == [
            LEFT, ("was there", 15, 10 * M, 32 * M, 0), ("left", 15, 20 * M, 51 * M),
        ]  # fmt: skip

    def test_an_order_that_retracts_does_not_recover_what_it_retracted(self, story: Story) -> None:
        assert story(add(0), tick(31 * M), order(20 * M, 32 * M)) == [LEFT, ("was there", 15, 20 * M, 32 * M, 0)]

    def test_nobody_but_the_customer_was_there(self, story: Story) -> None:
        assert story(add(0), tick(31 * M), browse(20 * M, 32 * M, "16"), browse(20 * M, 32 * M, kind="INTERNAL")) == [
            LEFT
        ]


class TestRecovery:
    @pytest.mark.parametrize(("at", "recovers"), [(31 * M, True), (7 * D, True), (7 * D + 1, False)])
    def test_an_order_within_7_days_recovers_the_basket(self, story: Story, at: int, recovers: bool) -> None:
        assert story(add(0), tick(31 * M), order(at)) == ([LEFT, ("ordered", 15, at, at, 0)] if recovers else [LEFT])

    def test_the_order_that_shows_the_abandonment_recovers_it(self, story: Story) -> None:
        assert story(add(0), order(60 * M)) == [("left", 15, 0, 60 * M), ("ordered", 15, 60 * M, 60 * M, 0)]

    def test_an_order_recovers_the_newest_and_each_only_once(self, story: Story) -> None:
        steps = [add(0), tick(31 * M), add(60 * M), tick(91 * M), order(100 * M), order(110 * M), order(120 * M)]
        assert story(*steps) == [
            LEFT,
            ("left", 15, 60 * M, 91 * M),
            ("ordered", 15, 100 * M, 100 * M, 60 * M),
            ("ordered", 15, 110 * M, 110 * M, 0),
        ]

    def test_a_late_order_recovers_the_newest_that_came_before_it(self, story: Story) -> None:
        steps = [add(0), tick(31 * M), add(60 * M), tick(91 * M), order(50 * M, 92 * M)]
        assert story(*steps) == [LEFT, ("left", 15, 60 * M, 91 * M), ("ordered", 15, 50 * M, 92 * M, 0)]

    def test_an_order_at_last_or_before_it_recovers_nothing(self, story: Story) -> None:
        assert story(add(0), tick(31 * M), order(0, 32 * M)) == [LEFT]

    def test_an_order_of_somebody_else_recovers_nothing(self, story: Story) -> None:
        assert story(add(0), tick(31 * M), order(40 * M, None, "16")) == [LEFT]

    @pytest.mark.parametrize(
        ("obj", "value"),
        [
            ('{"value": 12.72}', "12.72"),
            ('{"value": 0, "basket": [{"id": 1, "price": 9}]}', "0"),
            ('{"value": -3.5}', "-3.5"),
            ('{"value": 123456789012345678901234567890.123456789}', "123456789012345678901234567890.123456789"),
            ('{"value": 1e3}', "1000"),
            ('{"value": "12", "basket": [{"id": 1, "price": 9, "count": 2}]}', "18"),
            ('{"value": true, "basket": [{"id": 1, "price": 9}]}', "9"),
            ('{"value": null, "basket": [{"id": 1, "price": 0.1, "count": 3}, {"id": 2, "price": 1.22}]}', "1.52"),
            ('{"basket": []}', "5"),
            ('{"basket": {}}', "5"),
            ("{}", "5"),
            ("null", "5"),
            ('{"basket": [{"id": 1, "price": 9}, {"id": 2}]}', None),
            ('{"basket": [{"id": 1, "price": "9"}]}', None),
            ('{"basket": [{"id": 1, "price": 9, "count": null}]}', None),
            ('{"basket": [{"id": 1, "price": 9}, 7]}', None),
        ],
    )
    def test_its_value_is_the_order_s_own_else_its_basket_s_else_that_of_the_basket_it_empties(
        self, fresh: Fresh, obj: str, value: str | None
    ) -> None:
        event = given(fresh(), "abandonment", add(0), tick(31 * M), order(40 * M, obj=obj))[-1]
        found = event["object"].pop("value")
        assert (found if found is None else Decimal(found)) == (value if value is None else Decimal(value))
        assert event["object"] == {"type": "ORDER"}

    @pytest.mark.parametrize(
        ("items", "value"),
        [
            (['{"id": 1, "price": 0.1, "count": 3}', '{"id": 2, "price": 0.2}'], Decimal("0.5")),
            (['{"id": 1, "price": 2, "count": 1.5}'], Decimal(3)),
            (['{"id": 1}', '{"id": 2, "price": 4}'], None),
            (['{"id": 1, "price": null}'], None),
            (['{"id": 1, "price": true}'], None),
            (['{"id": 1, "price": -2}'], Decimal(-2)),
        ],
    )
    def test_a_basket_is_worth_the_exact_sum_of_its_items(
        self, fresh: Fresh, items: list[str], value: Decimal | None
    ) -> None:
        steps = [add(0, item=item) for item in items]
        event = given(fresh(), "abandonment", *steps, tick(31 * M), order(40 * M))[-1]
        found = event["object"]["value"]
        assert (found if found is None else Decimal(found)) == value

    @pytest.mark.parametrize("price", ["1e400", "1e999999", "1e9999999", "1e99999999999999999999", "-1e999999"])
    @pytest.mark.parametrize("where", ["basket", "order", "value"])
    def test_a_number_out_of_all_reach_is_no_value_and_stops_nobody(self, fresh: Fresh, price: str, where: str) -> None:
        store = fresh()
        item = f'{{"id": 3, "price": {price}, "count": 10}}'
        obj = {"basket": "{}", "order": f'{{"basket": [{item}]}}', "value": f'{{"value": {price}}}'}[where]
        for line in (add(0, item=item if where == "basket" else LEMON), browse(35 * M), order(40 * M, obj=obj)):
            append_lines(store, "events", [line])
        assert all_of(store) == {}
        event = json.loads(log_bytes(store.home, "baskets").splitlines()[-1])
        assert event["verb"] == {"type": "RECOVERED_BASKET"}
        assert event["object"] in [{"type": "ORDER", "value": None}] + [{"type": "ORDER", "value": 5}] * (
            where == "value"
        )


def all_of(store: Store) -> dict[str, str]:
    """Every processor on raw logs, to the end; gives what failed."""
    run, final = run_of(store), FinalTick("log-end")
    outcome = side_by_side(run, run.topology.on_raw_logs(), lambda r, name: process_to_end(r, name, final))
    return {name: f"{type(error).__name__}: {error}" for name, error in outcome.failures.items()}


class TestBasket:
    @pytest.mark.parametrize(
        ("steps", "basket"),
        [
            ([add(0), add(1, item='{"id": 3, "count": 4}')], '[{"id": 3, "name": "Lemon", "price": 5, "count": 4}]'),
            ([add(0), change(1, '{"id": "3", "count": 2}')], '[{"id": "3", "name": "Lemon", "price": 5, "count": 2}]'),
            ([add(0), change(1, '{"id": 3, "price": null, "new": [1]}')],
             '[{"id": 3, "name": "Lemon", "price": null, "count": 1, "new": [1]}]'),
            ([add(0, item='{"id": 3, "count": 4}'), add(1, item='{"id": 3}')], '[{"id": 3, "count": 1}]'),
            ([add(0), add(1, item='{"id": 1}'), change(2, '{"id": 3, "count": 2}')],
             '[{"id": 3, "name": "Lemon", "price": 5, "count": 2}, {"id": 1}]'),
            ([add(0), add(1, item='{"id": 1}'), remove(2, '{"item": {"id": "3"}}')], '[{"id": 1}]'),
            ([add(0), add(1, item='{"id": 1}'), change(2, '{"id": 3, "count": 0}')], '[{"id": 1}]'),
            ([add(0), add(1, item='{"id": 1}'), add(2, item='{"id": 3, "count": -0.5}')], '[{"id": 1}]'),
            ([add(0), add(1, item='{"id": 1}'), remove(2, '{"item": {"id": 3}}'), add(3)], f'[{{"id": 1}}, {LEMON}]'),
            ([add(0), add(1, item='{"id": 3, "count": 0}'), add(2, item='{"id": 3, "count": 2}')], '[{"id": 3, "count": 2}]'),
            ([add(0), remove(1, '{"item": 7, "item": {"id": null, "id": 3}}'), add(2, item='{"id": 1}')], '[{"id": 1}]'),
            ([add(0), remove(1, '{"item": {"id": 9}}'), remove(2, '{"item": {"id": true}}'), remove(3, "{}"), remove(4, "7")],
             f"[{LEMON}]"),
            ([add(0), order(1), add(2, item='{"id": 8}')], '[{"id": 8}]'),
            ([change(0, '{"id": 8, "count": 0.5}')], '[{"id": 8, "count": 0.5}]'),
            ([add(n, item=f'{{"id": 3, "count": {n}, "f{n}": {n}}}') for n in range(1, 21)],
             '[{"id": 3, "count": 20, ' + ", ".join(f'"f{n}": {n}' for n in range(1, 21)) + "}]"),
            ([add(0, item='{"id": 3, "note": "\\u00e9\\n", "big": 123456789012345678901234567890, "id": 4}')],
             '[{"id": 4, "note": "\\u00e9\\n", "big": 123456789012345678901234567890}]'),
        ],
    )  # fmt: skip
    def test_a_basket_stands_as_the_events_left_it(self, fresh: Fresh, steps: list[bytes], basket: str) -> None:
        event = given(fresh(), "abandonment", *steps, tick(60 * M))[-1]
        found = event["object"]["basket"]
        assert [sorted(item) for item in found] == [sorted(item) for item in json.loads(basket)]
        assert found == json.loads(basket, parse_float=Decimal)

    def test_an_event_that_came_late_still_sets_the_basket_as_the_log_has_it(self, fresh: Fresh) -> None:
        steps = [add(5 * M), add(1 * M, 6 * M, item='{"id": 3, "count": 7}')]
        assert given(fresh(), "abandonment", *steps, tick(60 * M))[0]["object"]["basket"][0]["count"] == 7


class TestBytes:
    def test_an_abandonment_is_compact_json_with_its_keys_in_order_and_the_cause_verbatim(self, fresh: Fresh) -> None:
        store, cause = fresh(), add(1).replace(b'"context"', b'"x": 1.50e+0, "x":  "\\u0041\\/",  "context"')
        given(store, "abandonment", add(0), cause, tick(31 * M))
        assert log_bytes(store.home, "baskets") == (
            b'{"subject":{"id":15,"type":"INTERNAL_ABDANDON_SYSTEM"},"verb":{"type":"ABANDONED_BASKET"},"object":{"type":'
            b'"BASKET","basket":[{"id":3,"name":"Lemon","price":5,"count":1}]},"context":{"at":1700000000001,"started_at":'
            b'1700000000000,"caused_by":' + cause + b',"source":{"log":"events","partition":0,"offset":'
            + b"%d" % (len(add(0)) + 1) + b'}},"event":{"id":"abandonment/events:0:%d/abandoned","inserted_at":1700001860000}}\n'
            % (len(add(0)) + 1)
        )  # fmt: skip

    def test_a_retraction_and_a_recovery_carry_the_id_of_their_abandonment_and_the_times_of_the_event(
        self, fresh: Fresh
    ) -> None:
        store, back, bought = fresh(), browse(20 * M, 32 * M), order(60 * M, obj='{"value": 12.720}')
        steps = [add(0), tick(31 * M), back, bought]
        offsets = [0, len(add(0)) + 1, len(add(0)) + len(back) + 2]
        given(store, "abandonment", *steps)
        _, retracted, _, recovered = log_bytes(store.home, "baskets").splitlines()
        assert retracted == (
            b'{"subject":{"id":15,"type":"INTERNAL_ABDANDON_SYSTEM"},"verb":{"type":"ABANDONMENT_RETRACTED"},"object":{"type":'
            b'"NONE"},"context":{"at":1700001200000,"abandonment":"abandonment/events:0:0/abandoned","caused_by":' + back
            + b',"source":{"log":"events","partition":0,"offset":%d}},"event":{"id":"abandonment/events:0:0/retracted",'
            b'"inserted_at":1700001920000}}' % offsets[1]
        )  # fmt: skip
        assert recovered == (
            b'{"subject":{"id":15,"type":"INTERNAL_ABDANDON_SYSTEM"},"verb":{"type":"RECOVERED_BASKET"},"object":{"type":'
            b'"ORDER","value":12.720},"context":{"at":1700003600000,"abandonment":"abandonment/events:0:%d/abandoned",'
            b'"caused_by":' % offsets[1] + bought + b',"source":{"log":"events","partition":0,"offset":%d}},"event":{"id":'
            b'"abandonment/events:0:%d/recovered","inserted_at":1700003600000}}' % (offsets[2], offsets[1])
        )  # fmt: skip

    def test_an_email_of_derive_has_its_keys_in_order(self, fresh: Fresh) -> None:
        store = fresh()
        cause = b'{"subject": {"id": "UK"}, "verb": "SUBMIT_TAX", "object": {"id": 901}, "context": {"at": 1650549837.1697195}}'
        given(store, "derive", cause)
        assert log_bytes(store.home, "reactions") == (
            b'{"subject":{"id":"EMAIL_SYSTEM"},"verb":"EMAIL","object":{"id":901,"type":"CLIENT","template":"tax-received"},'
            b'"context":{"at":1650549837170,"caused_by":'
            + cause
            + b',"source":{"log":"events","partition":0,"offset":0},'
            b'"not_after":1650636237170},"event":{"id":"derive/events:0:0/tax-received","inserted_at":1650549837170}}\n'
        )

    @pytest.mark.parametrize(("length", "whole"), [(65_536, True), (65_537, False)])
    def test_a_cause_over_64_kib_is_carried_as_its_digest(self, fresh: Fresh, length: int, whole: bool) -> None:
        store, room = fresh(), length - len(add(0, customer='"ann"', item='{"id": 1, "x": ""}'))
        cause = add(0, customer='"ann"', item=f'{{"id": 1, "x": "{"y" * room}"}}')
        room = length - len(did("SUBMIT_TAX", 0, customer="1", kind="OFFICE", obj='{"id": 5, "x": ""}'))
        tax = did("SUBMIT_TAX", 0, customer="1", kind="OFFICE", obj=f'{{"id": 5, "x": "{"y" * room}"}}')
        for name, line in (("abandonment", cause), ("derive", tax)):
            given(store, name, line, tick(31 * M))
        [left] = [json.loads(line) for line in log_bytes(store.home, "baskets").splitlines()]
        [mail] = [json.loads(line) for line in log_bytes(store.home, "reactions").splitlines()]
        for found, line in ((left, cause), (mail, tax)):
            digest = {"sha256": hashlib.sha256(line).hexdigest(), "length": length}
            assert found["context"]["caused_by"] == (json.loads(line) if whole else digest)
        assert left["subject"]["id"] == "ann"


class TestDerive:
    def test_a_tax_submission_gives_an_email_to_the_client_and_an_order_one_to_the_customer(self, fresh: Fresh) -> None:
        lines = [
            did("SUBMIT_TAX", 5, 9, '"UK"', kind="OFFICE", obj='{"id": "c-1"}'),
            did("ORDER_COMPLETED", 7, 10, "15", kind="INTERNAL_ORDER_EVENT"),
            b'{"subject": {"id": 2}, "verb": "SUBMIT_TAX", "object": {"id": 901}, "context": {"at": 1700000000011}}',
            browse(12),
        ]
        events = given(fresh(), "derive", *lines)
        assert [(e["object"], e["event"]["inserted_at"] - T0, e["context"]["at"] - T0) for e in events] == [
            ({"id": "c-1", "type": "CLIENT", "template": "tax-received"}, 9, 9),
            ({"id": 15, "type": "CUSTOMER", "template": "order-confirmed"}, 10, 10),
            ({"id": 901, "type": "CLIENT", "template": "tax-received"}, 11, 11),
        ]
        assert [e["context"]["not_after"] - T0 for e in events] == [9 + D, 10 + D, 11 + D]

    @pytest.mark.parametrize(
        "obj", ["{}", '{"id": null}', '{"id": true}', '{"id": 1.5}', '{"id": [1]}', "null", "7", "[1]"]
    )
    def test_a_tax_submission_for_nobody_gives_nothing_and_counts_as_ignored(self, fresh: Fresh, obj: str) -> None:
        store = fresh()
        assert given(store, "derive", did("SUBMIT_TAX", 0, obj=obj)) == []
        [row] = [r for r in read_status(store, build_topology(store.settings)).processors if r.processor == "derive"]
        assert (row.read, row.processed, row.ignored) == (1, 0, 1)

    @pytest.mark.parametrize("obj", ['{"id": null, "id": 901}', '{"id": 900, "id": 901}'])
    def test_of_an_id_that_stands_there_twice_the_last_one_counts(self, fresh: Fresh, obj: str) -> None:
        [event] = given(fresh(), "derive", did("SUBMIT_TAX", 0, obj=obj))
        assert event["object"]["id"] == 901

    def test_an_event_that_two_rules_name_gives_two_emails_and_counts_once(
        self, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        second = derive.Rule("ORDER_COMPLETED", "tax-received", derive.customer_of_subject)
        monkeypatch.setattr(derive, "RULES", (*derive.RULES, second))
        store = fresh()
        events = given(store, "derive", did("ORDER_COMPLETED", 7), browse(8))
        assert [e["object"]["template"] for e in events] == ["order-confirmed", "tax-received"]
        [row] = [r for r in read_status(store, build_topology(store.settings)).processors if r.processor == "derive"]
        assert (row.processed, row.ignored) == (1, 1)
        assert len(given(store, "derive", did("ORDER_COMPLETED", 9))) == 4

    def test_an_id_beyond_64_bits_goes_through(self, fresh: Fresh) -> None:
        [event] = given(fresh(), "derive", did("SUBMIT_TAX", 0, obj=f'{{"id": {2**70}}}'))
        assert event["object"]["id"] == 2**70

    def test_an_event_that_calls_itself_something_does_not_name_what_is_derived(self, fresh: Fresh) -> None:
        line = did("ORDER_COMPLETED", 0).replace(b'"event": {', b'"event": {"id": "derive/events:0:7/x", ')
        [event] = given(fresh(), "derive", line)
        assert event["event"]["id"] == "derive/events:0:0/order-confirmed"

    def test_a_derived_event_has_the_partition_number_of_its_cause(self, fresh: Fresh) -> None:
        store = fresh(partitions=3)
        for number in range(12):
            append_lines(store, "events", [did("ORDER_COMPLETED", number, customer=str(number))])
        process_to_end(run_of(store), "derive", None)
        for part in range(3):
            mails = [json.loads(line) for line in log_bytes(store.home, "reactions", part).splitlines()]
            causes = [json.loads(line) for line in log_bytes(store.home, "events", part).splitlines()]
            assert [mail["object"]["id"] for mail in mails] == [cause["subject"]["id"] for cause in causes]
            assert {mail["context"]["source"]["partition"] for mail in mails} == {part}
            assert all(mail["event"]["id"].startswith(f"derive/events:{part}:") for mail in mails)


def valued(at: int, value: object, verb: str = "PAID") -> bytes:
    return did(verb, at, obj=f'{{"value": {value}}}')


def thirty(verb: str = "PAID") -> list[bytes]:
    """Thirty samples with mean 1 and standard deviation 1."""
    return [valued(n, 2 * (n % 2), verb) for n in range(30)]


def seen(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (e["object"]["value"], *(float(e["object"][key]) for key in ("mean", "std")), e["object"]["samples"]) for e in events
    ]  # fmt: skip


NONE_EXPECTED = {"mean": -1000.0, "std": 1e-9}


class TestAnomalies:
    @pytest.mark.parametrize(
        ("value", "flagged"),
        [("3", False), ("-1", False), ("3.0000001", True), ("-1.0000001", True), ("1000", True), ("1", False)],
    )
    def test_more_than_two_deviations_from_the_mean_on_either_side_is_unexpected(
        self, fresh: Fresh, value: str, flagged: bool
    ) -> None:
        events = given(fresh(), "anomalies", *thirty(), valued(40, value))
        assert seen(events) == ([(Decimal(value), 1.0, 1.0, 30)] if flagged else [])

    def test_the_first_thirty_samples_are_not_judged(self, fresh: Fresh) -> None:
        assert given(fresh(), "anomalies", *thirty()[:29], valued(40, 1000)) == []
        few = fresh(anomalies={"samples": 5})
        assert [e["object"]["samples"] for e in given(few, "anomalies", *thirty()[:5], valued(40, 1000))] == [5]

    def test_a_value_is_scored_first_and_learnt_then(self, fresh: Fresh) -> None:
        events = given(fresh(), "anomalies", *thirty(), valued(40, 101), valued(41, 101))
        first, second = seen(events)
        assert first == (101, 1.0, 1.0, 30)
        assert second[1] == pytest.approx(131 / 31)
        assert second[3] == 31
        assert float(events[0]["object"]["score"]) == 100

    def test_how_many_deviations_is_a_setting(self, fresh: Fresh) -> None:
        store = fresh(anomalies={"deviations": 3.0})
        assert [
            e["object"]["value"] for e in given(store, "anomalies", *thirty(), valued(40, 4), valued(41, "9.5"))
        ] == [Decimal("9.5")]

    def test_each_verb_and_measure_has_its_own_mean(self, fresh: Fresh) -> None:
        other = [valued(100 + n, 500 + n % 2, "REFUNDED") for n in range(30)]
        events = given(fresh(), "anomalies", *thirty(), *other, valued(200, 500), valued(201, 1, "REFUNDED"))
        assert [(e["object"]["value"], float(e["object"]["mean"])) for e in events] == [(500, 1.0), (1, 500.5)]

    def test_values_that_never_vary_make_any_other_unexpected_without_a_score(self, fresh: Fresh) -> None:
        [event] = given(fresh(), "anomalies", *(valued(n, 7) for n in range(30)), valued(40, 8))
        assert (event["object"]["std"], event["object"]["score"]) == (0, None)

    def test_the_lone_body_of_26_characters_is_flagged_with_the_declared_mean_and_deviation(self, fresh: Fresh) -> None:
        store = fresh(anomalies={"expected": {"object.body.length": {"mean": 10, "std": 5}}})
        cause = did("SUBMIT_TAX", 0, kind="OFFICE", obj='{"id": 901, "body": "SCHEMALESS-SERIALIZED-DATA"}')
        given(store, "anomalies", cause)
        assert log_bytes(store.home, "anomalies") == (
            b'{"subject":{"id":"ANOMALY_SYSTEM"},"verb":"UNEXPECTED_DATA","object":{"type":"MEASURE","measure":'
            b'"object.body.length","value":26,"mean":10.0,"std":5.0,"score":3.2,"samples":0},"context":{"at":1700000000000,'
            b'"caused_by":' + cause + b',"source":{"log":"events","partition":0,"offset":0}},"event":{"id":'
            b'"anomalies/events:0:0/object.body.length","inserted_at":1700000000000}}\n'
        )

    def test_a_mean_may_be_declared_for_one_verb(self, fresh: Fresh) -> None:
        store = fresh(anomalies={"expected": {"PAID object.value": {"mean": 10, "std": 1}}})
        events = given(store, "anomalies", valued(0, 20), valued(1, 20, "REFUNDED"), valued(2, 12))
        assert [(e["object"]["value"], float(e["object"]["score"])) for e in events] == [(20, 10.0)]

    @pytest.mark.parametrize(
        ("literal", "shown"),
        [
            ("true", True),
            ("false", False),
            ("1e400", Decimal("1e400")),
            ("-1e400", Decimal("-1e400")),
            ("1e99999999999999999999", Decimal("1e400")),
            ("1000000000000001", Decimal("1000000000000001.0")),
            ("-1.1e15", Decimal("-1100000000000000.0")),
        ],
    )
    def test_booleans_infinities_and_what_is_beyond_1e15_are_flagged_and_never_learnt(
        self, fresh: Fresh, literal: str, shown: object
    ) -> None:
        events = given(
            fresh(), "anomalies", valued(0, literal), *thirty(), valued(40, literal), valued(41, 3), valued(42, 1000)
        )
        assert [e["object"]["value"] for e in events] == [shown, shown, 1000]
        assert [e["object"]["score"] for e in events[:2]] == [None, None]
        assert [e["object"]["samples"] for e in events] == [0, 30, 31]

    def test_exactly_1e15_is_learnt(self, fresh: Fresh) -> None:
        assert given(fresh(), "anomalies", valued(0, "1e15"), valued(1, "-1000000000000000")) == []

    @pytest.mark.parametrize(
        ("verb", "obj", "measures"),
        [
            ("X", '{"body": "ab 1! AB ab"}',
             {"length": 11, "whitespace": 3 / 11, "symbol": 1 / 11, "digit": 1 / 11, "top_word": 3 / 4}),
            ("X", '{"body": ""}', {"length": 0}),
            ("X", '{"body": "   "}', {"length": 3, "whitespace": 1, "symbol": 0, "digit": 0}),
            ("X", '{"body": "\\u00e9\\u3000\\u2022\\u0663"}',
             {"length": 4, "whitespace": 1 / 4, "symbol": 1 / 4, "digit": 1 / 4, "top_word": 1 / 2}),
            ("X", '{"body": {"a": 1, "b": {"c": [1, {"d": 2}]}}}',
             {"json.length": 35, "json.keys": 4, "json.depth": 4}),
            ("X", '{"body": [[], 7]}', {"json.length": 7, "json.keys": 0, "json.depth": 2}),
            ("X", '{"body": 12}', {"json.length": 2, "json.keys": 0, "json.depth": 0}),
            ("X", '{"body": false}', {"json.length": 5, "json.keys": 0, "json.depth": 0}),
            ("X", '{"body": null}', {}),
            ("X", '{"value": 1.5, "item": {"price": 2, "count": 3}}', {"object.value": 1.5, "object.item.price": 2, "object.item.count": 3}),
            ("X", '{"v\\u0061lue": 5}', {"object.value": 5}),
            ("X", '{"value": "5", "item": 7}', {}),
            ("X", '{"value": null, "item": {"price": null}}', {}),
            ("X", '[{"value": 5}]', {}),
            ("X", "7", {}),
            ("X", '7, "object": {"value": 5}', {"object.value": 5}),
            ("X", '{"value": 5}, "object": 7', {}),
            ("ORDERED", '{"basket": [{"id": 1, "price": 0.1, "count": 3}, {"id": 2, "price": 1}]}', {"order.total": 1.3}),
            ("ORDERED", '{"value": 5, "basket": [{"id": 1}]}', {"object.value": 5}),
            ("X", '{"basket": [{"id": 1, "price": 2}]}', {}),
            ("X", '{"value": 5, "basket": [{"id": 1, "price": 2}]}', {"object.value": 5}),
        ],
    )  # fmt: skip
    def test_what_is_measured_of_an_event(self, fresh: Fresh, verb: str, obj: str, measures: dict[str, float]) -> None:
        names = load_settings().anomalies.measures
        store = fresh(anomalies={"expected": dict.fromkeys(names, NONE_EXPECTED)})
        events = given(store, "anomalies", did(verb, 0, obj=obj))
        found = {e["object"]["measure"].removeprefix("object.body."): float(e["object"]["value"]) for e in events}
        assert found == pytest.approx(measures)
        [row] = [r for r in read_status(store, build_topology(store.settings)).processors if r.processor == "anomalies"]
        assert (row.processed, row.ignored) == ((1, 0) if measures else (0, 1))

    @pytest.mark.parametrize("written", ['"a/b"', '"a\\/b"', '"a\\u002fb"'])
    def test_a_name_is_known_however_it_is_written(self, fresh: Fresh, written: str) -> None:
        store = fresh(anomalies={"measures": ["object.a/b"], "expected": {"object.a/b": NONE_EXPECTED}})
        [event] = given(store, "anomalies", did("X", 0, obj=f"{{{written}: 5}}"))
        assert event["object"]["value"] == 5

    @pytest.mark.parametrize("body", ["1" * 5_000, f"[{'1' * 5_000}]", "-" + "9" * 400, "1e400", '"\\ud83d\\ude00"'])
    def test_a_body_of_any_shape_stops_nobody(self, fresh: Fresh, body: str) -> None:
        store = fresh()
        append_lines(store, "events", [did("X", 0, obj=f'{{"body": {body}}}')])
        assert all_of(store) == {}

    def test_measures_are_fields_declared_in_settings(self, fresh: Fresh) -> None:
        settings = {
            "measures": ["object.a.b", "object.a.c.length"],
            "expected": {"object.a.b": NONE_EXPECTED, "object.a.c.length": NONE_EXPECTED},
        }
        events = given(
            fresh(anomalies=settings), "anomalies", did("X", 0, obj='{"a": {"b": 4, "c": "xyz"}, "value": 9}')
        )
        assert [(e["object"]["measure"], e["object"]["value"]) for e in events] == [
            ("object.a.b", 4),
            ("object.a.c.length", 3),
        ]

    def test_a_field_may_be_measured_as_a_whole_and_by_the_fields_within_it(self, fresh: Fresh) -> None:
        names = ["object.a.b", "object.a.json.keys"]
        store = fresh(anomalies={"measures": names, "expected": dict.fromkeys(names, NONE_EXPECTED)})
        events = given(store, "anomalies", did("X", 0, obj='{"a": {"b": 4, "c": "xyz"}}'))
        found = [(e["object"]["measure"], e["object"]["value"]) for e in events]
        assert found == [("object.a.json.keys", 2), ("object.a.b", 4)]

    @pytest.mark.parametrize("name", ["body.length", "object", "object..x", "", "subject.id"])
    def test_a_measure_that_is_no_path_from_object_is_refused(self, fresh: Fresh, name: str) -> None:
        with pytest.raises(UsageError, match="setting AFTERLOG_ANOMALIES__MEASURES: a measure is a path from `object`"):
            build_topology(load_settings(anomalies={"measures": [name]}))


def rows(store: Store, table: str) -> list[tuple[Any, ...]]:
    with store.database.read() as connection:
        return sorted((tuple(row) for row in connection.execute(sa.text(f"SELECT * FROM {table}"))), key=repr)  # noqa: S608  # our own tables


TABLES = ("customer", "item", "orders", "order_line", "basket_line")


def normalised(store: Store, *lines: bytes) -> list[str]:
    """Let normalise take the lines; gives the places by which rows name them."""
    told = append_lines(store, "events", lines)
    process_to_end(run_of(store), "normalise", None)
    return [f"events:{place[0]}:{place[1]}" for place in told.positions if place]


class TestNormalise:
    def test_each_row_names_the_event_that_last_set_it(self, fresh: Fresh) -> None:
        store = fresh()
        a, b, c, d, e, f, g = normalised(
            store,
            add(0),
            add(5, item='{"id": "1", "name": "Orange", "price": 0.5, "count": 2}'),
            change(7, '{"id": 3, "price": 5.25}'),
            browse(3, 9),
            order(10, obj='{"value": 7}'),
            add(11, item='{"id": 3, "count": 2.5}'),
            browse(12, None, '"16"'),
        )
        assert rows(store, "customer") == [("15", T0, T0 + 11, f), ("16", T0 + 12, T0 + 12, g)]
        assert rows(store, "item") == [("1", "Orange", 0.5, b), ("3", "Lemon", 5.25, f)]
        assert rows(store, "orders") == [(e, "15", T0 + 10, 7, e)]
        assert rows(store, "order_line") == [
            (e, 1, "3", "Lemon", 5.25, 1.0, e), (e, 2, "1", "Orange", 0.5, 2.0, e),
        ]  # fmt: skip
        assert rows(store, "basket_line") == [("15", "3", None, None, 2.5, f)]
        assert (a, c, d) != (b, e, f)

    def test_an_order_with_a_basket_of_its_own_has_those_lines(self, fresh: Fresh) -> None:
        store = fresh()
        obj = '{"basket": [{"id": 8, "name": "Kiwi", "price": 0.1, "count": 3}, {"name": "nameless"}, {"id": "9"}]}'
        _, place = normalised(store, add(0), order(1, obj=obj))
        assert rows(store, "order_line") == [
            (place, 1, "8", "Kiwi", 0.1, 3.0, place), (place, 2, "9", None, None, 1.0, place),
        ]  # fmt: skip
        assert rows(store, "orders") == [(place, "15", T0 + 1, None, place)]
        assert rows(store, "basket_line") == []

    @pytest.mark.parametrize("apart", [False, True])
    def test_what_an_event_carries_of_an_item_replaces_what_was_known_and_the_rest_stays(
        self, fresh: Fresh, apart: bool
    ) -> None:
        store = fresh()
        lines = [
            add(0, item='{"id": 3, "name": "Lemon", "price": 5}'),
            change(1, '{"id": "3", "count": 2}'),
            add(2, item='{"id": 3, "price": 4}'),
            add(3, item='{"id": 4, "name": "Lime", "price": 1}'),
            add(4, item='{"id": 4, "name": null, "price": "?"}'),
            change(5, '{"id": "3", "count": 2}'),
        ]
        places = [normalised(store, line)[0] for line in lines] if apart else normalised(store, *lines)
        assert rows(store, "item") == [("3", "Lemon", 4, places[5]), ("4", None, None, places[4])]

    def test_one_line_that_is_changed_over_and_over_makes_commits_too(self, fresh: Fresh) -> None:
        store = fresh(batch_bytes=1, cache_keys=10)
        normalised(store, *(add(n, item=f'{{"id": 3, "price": {n}}}') for n in range(30)))
        assert [p.commit for p in positions(store) if p.processor == "normalise"] == [4]
        assert [row[:3] for row in rows(store, "item")] == [("3", None, 29)]

    def test_after_30_days_the_next_event_finds_no_basket_as_in_abandonment(self, fresh: Fresh) -> None:
        store, month = fresh(), 30 * D
        normalised(store, add(0), add(0, customer="16"), add(0, customer="17"))
        back = browse(month + 1)
        place = normalised(store, browse(month, customer="16"), back, order(month + 1, customer="17"))[2]
        assert [row[:2] for row in rows(store, "basket_line")] == [("16", "3")]
        assert rows(store, "orders") == [(place, "17", T0 + month + 1, None, place)]
        assert rows(store, "order_line") == []
        normalised(store, add(month + 2, item='{"id": 4}'))
        assert [row[:2] for row in rows(store, "basket_line")] == [("15", "4"), ("16", "3")]

    def test_what_is_more_than_30_days_late_touches_no_basket_but_is_an_order_all_the_same(self, fresh: Fresh) -> None:
        store, late = fresh(), 30 * D + 1
        obj = '{"basket": [{"id": 9, "price": 2}]}'
        *_, bare, full = normalised(
            store,
            add(late),
            did("REMOVED_ITEM_FROM_BASKET", 0, late, obj='{"item": {"id": 3}}'),
            add(0, late, item='{"id": 4, "name": "Lime"}'),
            order(0, late),
            order(0, late, obj=obj),
        )
        assert [row[:2] for row in rows(store, "basket_line")] == [("15", "3")]
        assert rows(store, "orders") == [(bare, "15", T0, None, bare), (full, "15", T0, 2, full)]
        assert rows(store, "order_line") == [(full, 1, "9", None, 2, 1.0, full)]
        assert [row[:2] for row in rows(store, "item")] == [("3", "Lemon"), ("4", "Lime")]
        assert rows(store, "customer") == [("15", T0, T0 + late, full)]

    def test_only_customers_set_rows(self, fresh: Fresh) -> None:
        store = fresh()
        normalised(store, add(0, kind="INTERNAL"), did("ORDERED", 1, kind="ROBOT"))
        assert [rows(store, table) for table in TABLES] == [[], [], [], [], []]

    def test_lines_that_are_taken_out_are_gone(self, fresh: Fresh) -> None:
        store = fresh()
        items = [add(n, item=f'{{"id": {n}}}') for n in range(4)]
        gone = [
            remove(5, '{"item": {"id": 0}}'),
            change(6, '{"id": "1", "count": 0}'),
            remove(7, '{"item": {"id": 77}}'),
        ]
        normalised(store, *items, *gone)
        assert [row[:2] for row in rows(store, "basket_line")] == [("15", "2"), ("15", "3")]

    @pytest.mark.parametrize("gone", [remove(5, '{"item": {"id": "0"}}'), change(5, '{"id": 0, "count": 0}'), order(5)])
    def test_lines_of_an_earlier_commit_that_are_taken_out_are_gone(self, fresh: Fresh, gone: bytes) -> None:
        store = fresh()
        normalised(store, add(0, item='{"id": 0}'))
        assert [row[:2] for row in rows(store, "basket_line")] == [("15", "0")]
        normalised(store, gone)
        assert rows(store, "basket_line") == []

    def test_prices_are_exact_and_what_is_no_number_is_null(self, fresh: Fresh) -> None:
        store = fresh()
        prices = {
            "0": "0.1234565",
            "1": '"5"',
            "2": "null",
            "3": "true",
            "4": "1e14",
            "5": "-2.5",
            "6": "99999999999999.5",
        }
        normalised(store, *(add(0, item=f'{{"id": {key}, "price": {price}}}') for key, price in prices.items()))
        with store.database.read() as connection:
            found = connection.execute(sa.text("SELECT key, CAST(price AS TEXT) FROM item ORDER BY key")).all()
        assert [tuple(row) for row in found] == [
            ("0", "0.123456"), ("1", None), ("2", None), ("3", None), ("4", None), ("5", "-2.5"), ("6", "99999999999999.5"),
        ]  # fmt: skip

    def test_processed_again_from_the_beginning_the_rows_are_the_same(self, fresh: Fresh) -> None:
        store = fresh()
        lines = [
            add(n, customer=str(n % 3), item=f'{{"id": {n % 5}, "price": {n}, "count": {n % 4}}}') for n in range(40)
        ]
        lines[20:20] = [order(20, None, str(n)) for n in range(3)]
        normalised(store, *lines)
        before = {table: rows(store, table) for table in TABLES}
        assert all(before.values())
        with store.database.write() as connection:
            connection.exec_driver_sql("DELETE FROM state")
            connection.exec_driver_sql("DELETE FROM checkpoint")
        normalised(store)
        assert {table: rows(store, table) for table in TABLES} == before

    @pytest.mark.parametrize(
        "number", ["1e400", "1e999999", "1e9999999", "1e99999999999999999999", "1e-9999999", "1" * 5_000]
    )
    def test_a_number_out_of_all_reach_stops_nobody(self, fresh: Fresh, number: str) -> None:
        store = fresh()
        lines = [add(0, item=f'{{"id": 1, "price": {number}, "count": {number}}}') for _ in "ab"]
        append_lines(store, "events", [*lines, order(1, obj=f'{{"basket": [{{"id": 2, "price": {number}}}]}}'), add(2)])
        assert all_of(store) == {}


class TestRemind:
    def _reminded(self, store: Store, *steps: bytes | int) -> list[tuple[Any, int]]:
        given(store, "abandonment", *steps)
        events = given(store, "remind")
        return [(e["object"]["id"], e["event"]["inserted_at"] - T0) for e in events]

    def test_an_abandonment_gives_one_reminder_and_other_events_none(self, fresh: Fresh) -> None:
        store = fresh()
        steps = [add(0), tick(31 * M), browse(20 * M, 32 * M), order(60 * M), add(0, 60 * M, '"ann"'), tick(91 * M)]
        assert self._reminded(store, *steps) == [(15, 31 * M), ("ann", 91 * M)]
        [row] = [r for r in read_status(store, build_topology(store.settings)).processors if r.processor == "remind"]
        assert (row.read, row.processed, row.ignored) == (5, 2, 3)

    @pytest.mark.parametrize(("wait", "again"), [(D - 1, False), (D, True)])
    def test_a_customer_gets_no_second_reminder_within_24_hours_of_log_time(
        self, fresh: Fresh, wait: int, again: bool
    ) -> None:
        steps = [add(0), tick(31 * M), browse(60 * M), add(5, customer="16"), tick(31 * M + wait)]
        expected = [(15, 31 * M), (16, 31 * M + wait)] + ([(15, 31 * M + wait)] if again else [])
        assert self._reminded(fresh(), *steps) == expected

    def test_the_gap_counts_from_the_last_reminder_and_is_a_setting(self, fresh: Fresh) -> None:
        steps: list[bytes | int] = [add(0), tick(31 * M)]
        for hour in range(1, 6):
            steps += [browse(hour * 60 * M), tick((hour * 60 + 31) * M)]
        assert self._reminded(fresh(reminder_gap="2h"), *steps) == [(15, (hour * 60 + 31) * M) for hour in (0, 2, 4)]

    def test_a_reminder_carries_the_abandonment_and_is_named_after_it(self, fresh: Fresh) -> None:
        store = fresh(not_after="1h")
        given(store, "abandonment", add(0), tick(31 * M))
        given(store, "remind")
        assert log_bytes(store.home, "reminders") == (
            b'{"subject":{"id":"EMAIL_SYSTEM"},"verb":"EMAIL","object":{"id":15,"type":"CUSTOMER","template":"basket-reminder"},'
            b'"context":{"at":1700001860000,"caused_by":' + log_bytes(store.home, "baskets").rstrip(b"\n")
            + b',"source":{"log":"baskets","partition":0,"offset":0},"not_after":1700005460000},"event":{"id":'
            b'"remind/abandonment/events:0:0/abandoned/basket-reminder","inserted_at":1700001860000}}\n'
        )  # fmt: skip


OWN = '''
"""Loyalty: every third order earns a thank-you; a customer who is silent for a day is missed."""
import msgspec
from tasks.processors import contract

class Orders(msgspec.Struct):
    count: int = 0
    last: int = 0

class Processor(contract.Processor[Orders]):
    name, reads, writes, ticks, state = "loyalty", "events", "loyalty", True, Orders

    def event(self, event, state, out):
        if event.verb != "ORDERED":
            out.ignored += 1
            return
        seen = state.get(event.key) or Orders()
        seen.count, seen.last = seen.count + 1, event.clock
        state.put(event.key, seen, (event.clock + 86_400_000, event.offset))
        if seen.count % 3 == 0:
            out.emit(self, event, {"id": event.id}, "THANKED", {"orders": seen.count}, name="thanks")

    def tick(self, as_of, due, state, out):
        for key, seen in due:
            out.write({"subject": {"id": key}, "verb": "MISSED", "event": {"id": f"loyalty/{key}/{seen.last}", "inserted_at": as_of}})
            state.put(key, seen)
'''


UNMAKEABLE = """
from tasks.processors import contract
class Processor(contract.Processor):
    name, reads = "unmakeable", "events"
    def __init__(self):
        1 / 0
"""


class TestAProcessorOfOnesOwn:
    @pytest.fixture
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
        folder = tmp_path / "modules"
        folder.mkdir()
        monkeypatch.syspath_prepend(str(folder))

        def write(name: str, source: str) -> str:
            (folder / f"{name}.py").write_text(source)
            return name

        return write

    def test_it_is_one_module_of_under_30_lines_with_state_and_ticks(
        self, fresh: Fresh, module: Callable[[str, str], str]
    ) -> None:
        assert len(OWN.splitlines()) < 30
        store = fresh(processors=[module("loyalty_module", OWN)])
        steps = [order(n, None, who) for n in range(6) for who in ("1", '"b"')] + [browse(9)]
        events = given(store, "loyalty", *steps, tick(D), tick(D + 5), tick(D + 50), order(D + 60))
        assert [(e["verb"], e["subject"]["id"], e.get("object")) for e in events] == [
            ("THANKED", 1, {"orders": 3}), ("THANKED", "b", {"orders": 3}), ("THANKED", 1, {"orders": 6}),
            ("THANKED", "b", {"orders": 6}), ("MISSED", "1", None), ("MISSED", "b", None),
        ]  # fmt: skip
        assert all_of(store) == {}
        assert "loyalty" in build_topology(store.settings).reserved_logs()

    @pytest.mark.parametrize(
        ("source", "sentence"),
        [
            ("", "AFTERLOG_PROCESSORS: mine: the module has no class Processor that inherits tasks.processors.contract.Processor"),
            ("class Processor: pass", "AFTERLOG_PROCESSORS: mine: the module has no class Processor"),
            ("import nowhere_to_be_found", "mine: cannot import the module: No module named 'nowhere_to_be_found'"),
            ("from tasks.processors.derive import Processor", "AFTERLOG_PROCESSORS: mine: a second processor called 'derive'"),
            ("from tasks.processors.contract import Processor as P\nclass Processor(P): name = 'x'", "its Processor has no `reads`"),
        ],
    )  # fmt: skip
    def test_a_module_that_cannot_be_used_is_refused_in_one_sentence(
        self,
        fresh: Fresh,
        module: Callable[[str, str], str],
        monkeypatch: pytest.MonkeyPatch,
        source: str,
        sentence: str,
    ) -> None:
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        with pytest.raises(UsageError) as raised:
            build_topology(load_settings(processors=[module("mine", source)]))
        assert sentence in str(raised.value)

    @pytest.mark.parametrize(
        ("what", "sentence"),
        [
            ("raise KeyError('basket')", r"events:0:\d+: KeyError: 'basket'. Correct it, at .*/clumsy.py:6$"),
            ("assert 0", r"events:0:\d+: AssertionError: ?. Correct it, at .*/clumsy.py:6$"),
            ("sys.exit(0)", r"events/0, from 0 to \d+: SystemExit: 0. Correct it, at .*/clumsy.py:6$"),
            ("out.write({})", r"events:0:\d+: TypeError: it gives an event, and its class names no log for it: `writes`. Correct it, at .*/clumsy.py:6$"),
        ],
    )  # fmt: skip
    def test_what_it_raises_is_told_with_its_kind_the_event_and_the_line_and_stops_no_other(
        self, fresh: Fresh, module: Callable[[str, str], str], what: str, sentence: str
    ) -> None:
        source = (
            "import sys\nfrom tasks.processors import contract\nclass Processor(contract.Processor):\n"
            f"    name, reads = 'clumsy', 'events'\n    def event(self, event, state, out):\n        {what}\n"
        )
        sys.modules.pop("clumsy", None)
        store = fresh(processors=[module("clumsy", source)])
        append_lines(store, "events", [b"no event", browse(1)])
        failures = all_of(store)
        assert list(failures) == ["clumsy"]
        assert re.search(sentence, str(failures["clumsy"]))

    @pytest.mark.parametrize(
        ("what", "fails"),
        [
            ("pass", True),
            ("[state.put(key, value, due=(0, 0)) for key, value in due]", True),
            ("[state.put(key, value, due=(2, 0)) for key, value in due]", True),
            ("[state.put(key, value, due=(0, 0)) for key, value in due[1:]], state.drop(due[0][0])", True),
            ("[state.put(key, value, due=(as_of, 0)) for key, value in due]", False),
            ("[state.put(key, value) for key, value in due]", False),
            ("[state.drop(key) for key, _ in due]", False),
        ],
    )
    def test_a_tick_that_leaves_a_state_due_is_refused(
        self, fresh: Fresh, module: Callable[[str, str], str], what: str, fails: bool
    ) -> None:
        """Else a tick would come for it every second, for ever."""
        source = (
            "from tasks.processors import contract\nclass Processor(contract.Processor):\n"
            "    name, reads, ticks = 'forgetful', 'events', True\n"
            "    def event(self, event, state, out):\n        state.put(event.key, {}, due=(1, 0))\n"
            f"    def tick(self, as_of, due, state, out):\n        {what}\n"
        )
        sys.modules.pop("forgetful", None)
        store = fresh(processors=[module("forgetful", source)])
        append_lines(store, "events", [browse(n, customer=str(n)) for n in (7, 8, 9)])
        failures = all_of(store)
        assert list(failures) == ["forgetful"] * fails
        if fails:
            said = str(failures["forgetful"])
            assert re.fullmatch(
                r"AfterlogError: a tick of forgetful has left a state due; found '[789]', expected each one .* dropped, or put with a due that the tick does not reach. Correct `tick` in forgetful",
                said,
            ), said

    @pytest.mark.parametrize(("name", "source"), [
        ("broken", "1 / 0"), ("unreadable", "def Processor(:"), ("leaving", "raise SystemExit(3)"),
        ("unmakeable", UNMAKEABLE),
    ])  # fmt: skip
    def test_a_module_that_fails_at_import_is_refused_in_one_sentence(
        self, module: Callable[[str, str], str], name: str, source: str
    ) -> None:
        with pytest.raises(UsageError, match=f"setting AFTERLOG_PROCESSORS: {name}"):
            build_topology(load_settings(processors=[module(name, source)]))


@needs_shared
def test_odd_documents_as_lines_are_counted_and_stop_nobody(fresh: Fresh) -> None:
    store = fresh(batch_bytes=50_000)
    lines: list[bytes] = []
    for path in sorted((SHARED / "badjson").glob("*/*.json")):
        document = path.read_bytes()
        bodies = [
            did("X", 0, obj='{"body": @}'),
            add(0, item='{"id": 1, "x": @}'),
            order(0, obj='{"basket": [@], "value": @}'),
        ]
        lines += [piece for text in (b"@", *bodies) for piece in text.replace(b"@", document).split(b"\n")]
    append_lines(store, "events", lines)
    assert all_of(store) == {}
    for row in read_status(store, build_topology(store.settings)).processors:
        if row.log == "events":
            assert row.read == row.processed + row.quarantined + row.ignored == len(lines)
            assert row.quarantined == log_bytes(store.home, "quarantine").count(b"\n") > 600


@pytest.mark.parametrize("kind", [abandonment.Customer, normalise.Current])
def test_states_that_are_read_share_their_items(kind: type[Any]) -> None:
    items = {"3": b'{"id": 3, "price": 1.5}', "long": b"x" * 5_000}
    written = msgspec.msgpack.encode(kind(1, 2, items=items))
    one, other = (msgspec.msgpack.decode(written, type=kind) for _ in "ab")
    assert one.items == other.items == items
    assert one.items is not other.items
    assert one.items["3"] is other.items["3"]
    assert one.items["long"] is not other.items["long"]  # few are, and none is kept for that
