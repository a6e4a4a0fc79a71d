"""Delivery: every EMAIL at most once, and never in doubt silently.

A mail is claimed before a connection is made, the logs are then followed to their ends, and only who still should get it
gets it. What is not known after a crash or a lost connection is UNKNOWN and waits for a person.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from storage.brake import read_brake
from storage.commit import Position, load_position
from storage.decisions import carry_out
from storage.errors import Stopped, UsageError
from storage.mails import CLAIMED, FAILED, MAY_HAVE_BEEN_SENT, SENT, SUPPRESSED, UNKNOWN, Mail, Result
from storage.outbox import Outbox
from storage.reader import PartitionReader
from storage.times import now
from tasks.brake import ABANDONED, BrakeCheck, tallies
from tasks.guards import Guards, read_event
from tasks.intake import OUTCOMES, mail_row, settled_row
from tasks.mail import AddressError, MailError, compose, parse_address
from tasks.mail_url import parse_mail_url
from tasks.process import IDLE_WAIT, UNCONFIRMED_WAIT
from tasks.restored import Restores
from tasks.run import Run
from tasks.sending import NotSent, OutcomeUnknown, Transport
from tasks.topology import DELIVER, DELIVERIES
from tasks.transport import open_transport

Told = Callable[[str], None]
_FIRST_DELAY, _LONGEST_DELAY = 5_000, 600_000
_AT_ONCE = 200
_DECIDE_EVERY = 0.25
_GRACE = 0.5  # seconds that a send may still take once the run is to stop


@dataclass
class DeliverySummary:
    """What one run did with mails; `reasons` of those not sent, with how many of each."""

    taken_in: int = 0
    states: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    waiting: int = 0
    held: str = ""
    """Why mails are held at the end of the run: a person paused delivery, or it stopped itself."""


@dataclass
class _Source:
    log: str
    reader: PartitionReader
    position: Position


class Deliverer:
    """Takes EMAIL events in and sends them; its maker holds the lock of `deliver`."""

    def __init__(self, run: Run, told: Told) -> None:
        self.run, self.settings, self._told = run, run.store.settings, told
        self.summary = DeliverySummary()
        self.outbox = Outbox(run.store, DELIVERIES, run.author)
        self._guards, self._restores = Guards(run, self.outbox), Restores(run)
        self._brake, self._decide_at = BrakeCheck(run, self.outbox), 0.0
        logs = [*run.topology.mail_logs(), "baskets"]
        self._sources = [self._open(log, part) for log in logs for part in run.store.partitions(log)]
        self._transport: Transport = open_transport(
            parse_mail_url(self.settings.mail_url.get_secret_value()), run.store.home
        )
        self._check_sender()
        self.summary.states[UNKNOWN] += self.outbox.recover()
        self._closed = threading.Event()
        threading.Thread(target=self._interrupt_when_stopped, name="interrupt", daemon=True).start()

    def close(self) -> None:
        """Close every file and connection, and count what still waits."""
        self._closed.set()
        self._transport.close()
        for source in self._sources:
            source.reader.close()
        self.summary.waiting = self.outbox.counts().get("WAITING", 0)
        self.summary.held = read_brake(self.run.store.database).reason

    def round(self, limit: int | None = None) -> bool:
        """Take in what is there and try what is due, unless mails are held; says whether there was anything."""
        taken = [self._take_in(source) for source in self._sources]
        decided = self._carry_out()
        mails = self.outbox.waiting(now(), _AT_ONCE if limit is None else min(limit, _AT_ONCE))
        if mails and self._brake.holds(limit or sys.maxsize):
            if self._brake.stopped:
                self._told(self._brake.stopped)
                self._brake.stopped = None
            return any(taken) or decided
        tried = self._try(mails)
        return any(taken) or decided or tried

    def unconfirmed(self) -> bool:
        """Whether a log that is followed has bytes that its processor has not committed yet."""
        return any(source.reader.end() > source.position.offset for source in self._sources)

    def _check_sender(self) -> None:
        """A sender that is no address is a wrong setting, and must not cost a single mail."""
        try:
            parse_address(self.settings.mail_from)
        except AddressError as error:
            raise UsageError(
                f"setting AFTERLOG_MAIL_FROM: {error}", do="Give an address, `Shop <shop@example.com>` say"
            ) from error

    def _interrupt_when_stopped(self) -> None:
        """A mail server that does not answer must not keep a stopped run alive."""
        self.run.stop.wait()
        if not self._closed.wait(_GRACE):
            self._transport.interrupt()

    def _open(self, log: str, partition: int) -> _Source:
        store = self.run.store
        return _Source(log, store.reader(log, partition), load_position(store.database, DELIVER, 1, log, partition))

    def _take_in(self, source: _Source) -> bool:
        """Queue a source's mails, and note what became of abandonments, up to its committed end."""
        position, moved = source.position, False
        end = self.run.store.committed_end(source.log, position.partition)
        while batch := self.run.derived_batches.get(
            source.reader, source.log, position.partition, position.offset, end, position.clock
        ):
            mails = [mail_row(event, position, self._restores) for event in batch.events if event.verb == "EMAIL"]
            settled = [settled_row(event) for event in batch.events if event.verb in OUTCOMES]
            left = [event.clock for event in batch.events if source.log == "baskets" and event.verb == ABANDONED]
            position.offset, position.clock = batch.end, batch.clock
            position.lines += batch.lines
            position.quarantined += len(batch.bad)
            position.processed += len(mails) + len(settled)
            position.ignored += len(batch.events) - len(mails) - len(settled)
            self.outbox.take_in(source.reader, position, mails, settled, tallies(left))
            if any(mail["state"] == CLAIMED for mail in mails):
                self.summary.states[UNKNOWN] += self.outbox.give_up(MAY_HAVE_BEEN_SENT)
            self.summary.taken_in += len(mails)
            moved = True
        return moved

    def _carry_out(self) -> bool:
        """What people decided, looked for a few times a second at most; says whether there was anything."""
        if time.monotonic() < self._decide_at:
            return False
        self._decide_at = time.monotonic() + _DECIDE_EVERY
        decided = carry_out(self.run.store.database, self.outbox)
        self._count(decided)
        return bool(decided)

    def _try(self, mails: Sequence[Mail]) -> bool:
        decided: list[Result] = []
        for mail in mails:
            if self.run.stop.is_set():
                break
            reason = self._guards.plain_reason(mail)
            if reason:
                decided.append(Result(mail, SUPPRESSED, reason))
            else:
                self._settle(decided)
                if not self._deliver(mail):
                    return False
        self._settle(decided)
        return bool(mails)

    def _settle(self, results: list[Result]) -> None:
        if results:
            self.outbox.settle(results)
            self._count(results)
            results.clear()

    def _count(self, results: Sequence[Result]) -> None:
        for result in results:
            self.summary.states[result.state] += 1
            if result.reason:
                self.summary.reasons[result.reason] += 1

    def _deliver(self, mail: Mail) -> bool:
        """Claim, follow the logs to their ends as of the claim, ask once more, send; False where mails are held by now."""
        self._guards.follow_logs()
        if not self.outbox.claim(mail):
            return False
        try:
            self._guards.follow_logs()
            for source in self._sources:
                self._take_in(source)
            event = read_event(self.run, mail.log, mail.partition, mail.offset)
            reason = self._guards.plain_reason(mail) or self._guards.log_reason(event)
        except BaseException:
            self.outbox.put_back(mail, now(), mail.reason)
            raise
        self._settle([Result(mail, SUPPRESSED, reason)] if reason else self._send(mail, event))
        return True

    def _send(self, mail: Mail, event: dict[str, Any]) -> list[Result]:
        contact = self.outbox.contact(mail)
        try:
            to = parse_address(contact.email if contact else "")
            salt = self._restores.salt(event)
            self._transport.send(compose(event, to, self.settings.mail_from, datetime.now(UTC), salt))
        except OutcomeUnknown as error:
            return [Result(mail, UNKNOWN, error.reason)]
        except NotSent as error:
            if error.permanent:
                return [Result(mail, FAILED, error.reason)]
            delay = min(_FIRST_DELAY * 2**mail.attempts, _LONGEST_DELAY)
            self.outbox.put_back(mail, now() + delay, error.reason)
            self.summary.retries += 1
            self.summary.reasons[f"will be tried again: {error.reason}"] += 1
            return []
        except MailError as error:
            return [Result(mail, FAILED, error.reason)]
        return [Result(mail, SENT)]


def deliver_to_end(run: Run, limit: int | None = None, told: Told = lambda _reason: None) -> DeliverySummary:
    """Try every mail that is due, at most `limit` of them, then end; `told` hears why, where delivery stops itself.

    Raises:
        Stopped: the run is to stop; the rest waits for the next one.
    """
    lock = run.lock(DELIVER)
    lock.acquire(run.stop)
    try:
        deliverer = Deliverer(run, told)
        try:
            while deliverer.round(limit) and limit is None:
                if run.stop.is_set():
                    raise Stopped("stopped between two mails")
        finally:
            deliverer.close()
        return deliverer.summary
    finally:
        lock.release()


def follow_mail(run: Run, told: Told = lambda _reason: None) -> DeliverySummary:
    """Deliver as mails come, until the run is to stop; `told` hears why, where delivery stops itself."""
    lock = run.lock(DELIVER)
    summary = DeliverySummary()
    try:
        run.stand_by()
        lock.acquire(run.stop)
        deliverer = Deliverer(run, told)
        summary = deliverer.summary
        try:
            while not run.stop.is_set():
                beat = run.pulse.beat
                if not deliverer.round():
                    run.pulse.wait(beat, UNCONFIRMED_WAIT if deliverer.unconfirmed() else IDLE_WAIT)
        finally:
            deliverer.close()
    except Stopped:
        pass  # what was not sent waits for the successor
    finally:
        lock.release()
    return summary
