"""What `status` says of mails in doubt: those that are UNKNOWN, and those that were claimed by somebody who is gone."""

from __future__ import annotations

from storage.brake import PAUSED, put_on, release
from storage.contacts import Entry, save_contacts
from storage.locks import RunLock
from storage.outbox import Outbox
from storage.store import DELIVERIES, Store
from storage.times import now
from tasks.status import read_status
from tasks.topology import build_topology
from tests.test_deliver import deliver, submitted


def problems(store: Store) -> list[str]:
    return read_status(store, build_topology(store.settings)).problems


def test_a_claim_is_in_doubt_once_nobody_holds_the_lock(store: Store) -> None:
    save_contacts(store.database, [Entry("CLIENT", str(n), f"{n}@example.com", False) for n in (1, 2, 3)])
    put_on(store.database, PAUSED, "a test")
    submitted(store, 1, 2, 3)
    deliver(store)
    release(store.database)
    outbox, lock = Outbox(store, DELIVERIES), RunLock(store.lock_path("deliver.lock"), "a shift")
    one, two, three = outbox.waiting(now(), 10)
    outbox.claim(one)
    assert outbox.recover() == 1
    outbox.claim(two)
    outbox.claim(three)
    told = "mails are in doubt: see `afterlog deliveries list --state UNKNOWN`"
    assert [each for each in problems(store) if "doubt" in each] == [f"3 {told}"]
    assert lock.try_acquire()
    try:
        assert [each for each in problems(store) if "doubt" in each] == [f"1 {told}"]
    finally:
        lock.release()
