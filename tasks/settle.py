"""Carrying out at once what a person decided about mails, by whoever holds the lock of `deliver`: a shift, or else us."""

from __future__ import annotations

import os
import time

from storage.brake import read_brake
from storage.decisions import carry_out, decide, drop_waiting, undecided
from storage.errors import UsageError
from storage.locks import RunLock
from storage.mails import FAILED, SENT, WAITING
from storage.outbox import Outbox
from storage.store import DELIVERIES, Store
from tasks.topology import DELIVER

PATIENCE = 10.0
"""Seconds to wait for the run that delivers; it looks at least once a second, between two mails."""
_POLL = 0.05


def resolve(store: Store, event_id: str, sent: bool, again: bool) -> str:
    """Settle a mail that is UNKNOWN: it was sent; it was not; or it was not and is to be tried once more, under the same
    Message-ID. Gives who is still to carry that out, in words; empty where it is done.

    Raises:
        UsageError: there is no such mail, or it is not in doubt.
    """
    _settle(store)  # where the sender died, what it had claimed is in doubt only now
    decide(store.database, event_id, SENT if sent else WAITING if again else FAILED)
    return _wait(store)


def drop(store: Store) -> tuple[int, str]:
    """Drop every mail that is held: SUPPRESSED. Gives how many, and who is still to carry that out.

    Raises:
        UsageError: delivery is not stopped, so nothing is held.
    """
    if not read_brake(store.database).is_on:
        raise UsageError("delivery is running: nothing is held", do="First: afterlog pause deliver")
    return drop_waiting(store.database), _wait(store)


def _wait(store: Store) -> str:
    until = time.monotonic() + PATIENCE
    while undecided(store.database):
        holder = _settle(store)
        if holder and time.monotonic() > until:
            return holder
        time.sleep(_POLL if holder else 0)
    return ""


def _settle(store: Store) -> str:
    """Carry out what is decided, if nobody delivers; else gives who does."""
    lock = RunLock(store.lock_path(f"{DELIVER}.lock"), f"afterlog deliveries, process {os.getpid()}")
    if not lock.try_acquire():
        return lock.held_by() or "another run"
    try:
        outbox = Outbox(store, DELIVERIES)
        outbox.recover()
        carry_out(store.database, outbox)
    finally:
        lock.release()
    return ""
