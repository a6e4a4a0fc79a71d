"""The tables in the UI: what a person reads of baskets, anomalies and mails, row by row."""

from __future__ import annotations

from collections.abc import Callable

import orjson
import pytest

from storage.brake import PAUSED, put_on, release
from storage.contacts import Entry, save_contacts
from storage.door import append_lines
from storage.outbox import Outbox
from storage.store import DELIVERIES, Store
from storage.times import now, show
from tests.helpers import process
from tests.test_deliver import deliver, submitted
from tests.test_replay import MINUTE, START

MakeStore = Callable[..., Store]


def did(customer: int, minutes: float, verb: str = "ADDED_ITEM_TO_BASKET", **obj: object) -> bytes:
    """What a customer did so many minutes after the start, 2001-09-09 01:46."""
    at = START + round(minutes * MINUTE)
    event = {"subject": {"id": customer, "type": "CUSTOMER"}, "verb": verb, "object": obj, "context": {"at": at}}
    return orjson.dumps(event)


def test_a_basket_tells_its_items_its_value_and_what_became_of_it(store: Store) -> None:
    from flows.tables import ROWS, abandoned_baskets

    items = [{"id": 1, "name": "Lemon", "price": 0.25}, {"id": 2, "price": 3, "count": 2}]
    items += [{"id": 3, "name": "Ham", "price": 1200, "count": 1.5}]
    first = [did(1, 0, item=item) for item in items]
    others = [did(n, n / 10, item={"id": 1, "name": "Lemon", "price": 5}) for n in (2, 3, 4)]
    many = did(5, 0.5, item={"id": 1, "name": "Lemon", "price": 5, "count": 10**13})
    append_lines(store, "events", [*first, *others, many])
    process(store.home, as_of=START + 31 * MINUTE)
    # 2 was there after all; 3 orders for an amount, and 4 for nobody knows how much.
    append_lines(
        store, "events",
        [did(2, 29, "VISITED"), did(3, 32, "ORDERED", value=7.5), did(4, 32, "ORDERED", basket=[{"id": 1}])],
    )  # fmt: skip
    process(store.home)
    rows = abandoned_baskets(store)
    assert (rows[0]["items"], rows[0]["value"]) == ("Lemon", "not known"), "a count that is a fault is none"
    assert rows[-1] == {
        "customer": "1", "items": "Lemon, 2 × item 2, 1.5 × Ham", "value": "1,806.25", "idle for": "31m", "since then": "",
        "left at": "09-09 01:46",
    }  # fmt: skip
    assert [(row["customer"], row["since then"]) for row in rows] == [
        ("5", ""), ("4", "ordered"), ("3", "ordered for 7.50"), ("2", "was there after all"), ("1", ""),
    ]  # fmt: skip
    append_lines(store, "events", [did(n, 40 + n, item=items[0]) for n in range(10, 40)])
    process(store.home, as_of=START + 200 * MINUTE)
    assert [row["customer"] for row in abandoned_baskets(store)] == [str(n) for n in range(39, 39 - ROWS, -1)]


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ({"price": 2, "count": 3}, "6"),
        ({"price": 2}, "2"),
        ({"count": 2}, None),
        ({"price": True}, None),
        ({"price": 2, "count": "3"}, None),
        ({"price": 999_999_999_999}, "999999999999"),
        ({"price": 10**12}, None),
        ({"price": float("inf")}, None),
        ("Lemon", None),
    ],
)
def test_a_basket_has_a_value_where_all_of_it_is_known(item: object, value: str | None) -> None:
    from flows.tables import basket_value

    found = basket_value([{"price": 0}, item])
    assert (None if found is None else str(found)) == value


def test_an_anomaly_is_told_in_a_sentence(make_store: MakeStore) -> None:
    from flows.tables import anomalies

    measures = {"measures": ["object.n", "object.body.length"], "samples": 2}
    store = make_store(anomalies=measures)
    odd = [did(1, 3, "SCORED", n=10), did(2, 4, "SCORED", n=-2000.5), did(3, 5, "SCORED", n=True)]
    same = [did(4, 6 + n, "SAID", body="same") for n in range(3)]
    append_lines(store, "events", [did(1, 1, "SCORED", n=1), did(1, 2, "SCORED", n=3), *odd, *same])
    append_lines(store, "events", [did(5, 9, "SAID", body="others"), did(6, 10, "SAID", body={"n": 1})])
    process(store.home, "anomalies", anomalies=measures)
    rows = [(row["measure"], row["value"], row["expected"], row["the sentence"]) for row in anomalies(store)]
    assert rows == [
        ("object.body.length", "6", "4 ± 0", "above the mean, and all before were the same: SAID by 5"),
        ("object.n", "True", "-497 ± 868", "no usable number: SCORED by 3"),
        ("object.n", "-2,000", "4.67 ± 3.86", "519.7 deviations below the mean: SCORED by 2"),
        ("object.n", "10", "2 ± 1", "8.0 deviations above the mean: SCORED by 1"),
    ]
    assert [row["its text"] for row in anomalies(store)] == ["others", "", "", ""]
    assert anomalies(store)[0]["at"] == "09-09 01:55"


def test_mails_that_wait_come_first_and_each_says_why(store: Store) -> None:
    from flows.tables import ROWS, mails

    save_contacts(store.database, [Entry("CLIENT", str(n), f"{n}@example.com", False) for n in (1, 3, 4, 5)])
    submitted(store, 1, 2)
    deliver(store)
    put_on(store.database, PAUSED, "a test")
    submitted(store, 3, 4, 5)
    deliver(store)
    release(store.database)
    outbox = Outbox(store, DELIVERIES)
    three, four, _ = outbox.waiting(now(), 10)
    outbox.claim(three)
    assert outbox.recover() == 1  # who sent it has died
    outbox.claim(four)
    rows = mails(store)
    assert [(row["to"], row["state"], row["why"]) for row in rows] == [
        ("CLIENT 3", "UNKNOWN", "the sender died while it was sending"),
        ("CLIENT 4", "CLAIMED", "being sent"),
        ("CLIENT 5", "WAITING", "not tried yet"),
        ("CLIENT 2", "SUPPRESSED", "no address"),
        ("CLIENT 1", "SENT", "accepted by the mail server"),
    ]
    assert {row["what"] for row in rows} == {"tax-received"}
    assert {row["at"][:5] for row in rows} == {show(now())[5:10]}

    submitted(store, *range(10, 32))
    deliver(store)  # who claimed 4 has died too, and 5 is sent
    rows = mails(store)
    assert [row["to"] for row in rows[:4]] == ["CLIENT 3", "CLIENT 4", "CLIENT 31", "CLIENT 30"]
    assert len(rows) == ROWS
    with store.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM delivery")
    assert mails(store) == [], "an older database: what only the log knows is not adopted yet"
