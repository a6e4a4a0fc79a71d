"""Nobody is reminded of what they have bought, also where the row of the order is gone: the log has shown it."""

from __future__ import annotations

import pytest

from storage.brake import PAUSED, put_on, release
from storage.contacts import Entry, save_contacts
from storage.door import append_lines
from storage.errors import LostDataError
from storage.manifest import archived_end
from storage.store import Store
from storage.times import now
from tests.helpers import process
from tests.test_archive import MakeStore, archive
from tests.test_promotion import MINUTE, deliver, outbox, recent


def test_a_basket_that_was_recovered_gets_no_reminder(store: Store) -> None:
    save_contacts(store.database, [Entry("CUSTOMER", str(n), f"{n}@example.com", False) for n in (1, 2)])
    put_on(store.database, PAUSED, "a test")
    append_lines(store, "events", [recent(1, 50), recent(2, 50)])
    process(store.home, as_of=now() - 15 * MINUTE)
    append_lines(store, "events", [recent(1, 5, "ORDERED")])
    process(store.home)
    deliver(store)
    assert [state for _, state, _ in outbox(store)] == ["WAITING", "WAITING"]
    with store.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM orders")
    release(store.database)
    deliver(store)
    assert outbox(store) == [("1", "SUPPRESSED", "ordered since"), ("2", "SENT", "")]


def test_a_cause_that_the_archive_has_is_not_said_to_be_gone_while_that_is_away(make_store: MakeStore) -> None:
    store = make_store(segment_bytes=1, live_window="1ms")
    save_contacts(store.database, [Entry("CUSTOMER", str(n), f"{n}@example.com", False) for n in (1, 2)])
    put_on(store.database, PAUSED, "a test")
    for customer in (1, 2):
        append_lines(store, "events", [recent(customer, 50)])
        process(store.home, segment_bytes=1, as_of=now() - 15 * MINUTE + customer)
    deliver(store)
    archive(store)
    assert archived_end(store.directory("baskets", 0)) > 0
    there = store.home / "archive" / "baskets"
    there.rename(store.home / "away")
    release(store.database)
    with pytest.raises(LostDataError, match="a segment is neither here nor in the archive"):
        deliver(store)
    assert {state for _, state, _ in outbox(store)} == {"WAITING"}
    (store.home / "away").rename(there)
    deliver(store)
    assert [state for _, state, _ in outbox(store)] == ["SENT", "SENT"]
