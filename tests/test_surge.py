"""Which abandonments are a surge while the log is silent: those since then, an hour at most, and none that a person released."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from storage.brake import BUCKET, STOPPED, read_brake, release
from storage.contacts import Entry, save_contacts
from storage.door import append_lines
from storage.store import Store
from storage.times import now
from tests.helpers import process
from tests.test_brake import MINUTE, deliver, make_silent

MakeStore = Callable[..., Store]


def leave(store: Store, *customers: int, silent: float) -> None:
    """These left a basket 31 minutes ago, a tick shows it, and the last line was written so many minutes ago."""
    at = now() - 31 * MINUTE
    lines = [
        json.dumps({
            "subject": {"id": c, "type": "CUSTOMER"}, "verb": "ADDED_ITEM_TO_BASKET", "object": {"item": {"id": 3}},
            "context": {"at": at}, "event": {"inserted_at": at},
        }).encode()
        for c in customers
    ]  # fmt: skip
    append_lines(store, "events", lines)
    save_contacts(store.database, [Entry("CUSTOMER", str(c), f"c{c}@example.com", False) for c in customers])
    process(store.home, as_of="now")
    make_silent(store, silent)


def tallied(store: Store, minutes_ago: float, count: int) -> None:
    bucket = (now() - round(minutes_ago * MINUTE)) // BUCKET * BUCKET
    with store.database.write() as connection:
        connection.exec_driver_sql("INSERT INTO tally VALUES ('ABANDONED_BASKET', ?, ?)", (bucket, count))


def test_after_a_release_those_that_come_next_are_counted_anew(make_store: MakeStore) -> None:
    store = make_store(brake_surge_floor=20)
    leave(store, *range(21), silent=31)
    assert deliver(store).states == {}
    assert read_brake(store.database).state == STOPPED
    assert release(store.database) == 21
    assert deliver(store).states == {"SENT": 21}
    leave(store, 50, silent=31)
    assert deliver(store).states == {"SENT": 1}


@pytest.mark.parametrize(("minutes_ago", "silent"), [(90, 120), (45, 20)])
def test_those_of_more_than_an_hour_ago_or_from_before_the_silence_are_none_of_it(
    make_store: MakeStore, minutes_ago: float, silent: float
) -> None:
    store = make_store(brake_surge_floor=20)
    tallied(store, minutes_ago, 30)
    leave(store, 1, silent=silent)
    assert deliver(store).states == {"SENT": 1}


def test_more_than_twice_the_usual_is_a_surge(make_store: MakeStore) -> None:
    store = make_store(brake_surge_floor=20)
    for hours in range(2, 9):
        tallied(store, hours * 60, 30)
    leave(store, *range(40), silent=31)
    assert deliver(store).states == {}
    assert "40 baskets, usual for as long 16, and no new event for 31m" in read_brake(store.database).reason
