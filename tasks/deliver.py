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
from storage.decisions import carry_out
from storage.errors import Stopped
from storage.mails import FAILED, LONGEST_WAIT, SENT, SUPPRESSED, UNKNOWN, WITHDRAWN, Mail, Result
from storage.outbox import Outbox
from storage.store import DELIVERIES
from storage.times import now
from tasks.brake import BrakeCheck
from tasks.guards import Guards, read_event
from tasks.intake import Intake, logs_taken_in
from tasks.mail import MailError, TemplateUnusable, compose, parse_address
from tasks.mail_url import parse_mail_url
from tasks.process import IDLE_WAIT, UNCONFIRMED_WAIT
from tasks.restored import Restores
from tasks.run import Growth, Run
from tasks.sending import NotSent, OutcomeUnknown, Transport
from tasks.topology import DELIVER
from tasks.transport import check_sender, open_transport

Told = Callable[[str], None]
_FIRST_DELAY = 5_000
_AT_ONCE = 200
_DECIDE_EVERY = 0.25
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 60.0  # seconds after a try to reach the mail server
_LOOK_EVERY = 0.1  # seconds


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


class Deliverer:
    """Takes EMAIL events in and sends them; its maker holds the lock of `deliver`."""

    def __init__(self, run: Run, told: Told, summary: DeliverySummary | None = None) -> None:
        self.run, self.settings, self._told = run, run.store.settings, told
        self.summary = DeliverySummary() if summary is None else summary
        self.outbox = Outbox(run.store, DELIVERIES, run.author)
        self._guards, self._restores = Guards(run, self.outbox), Restores(run)
        self._brake, self._decide_at = BrakeCheck(run), 0.0
        self._rows_may_be_old = False
        self._is_away, self._pause, self._reach_at = False, 0.0, 0.0
        self.tried = 0
        """How many mails were looked at to be sent."""
        self._intake = Intake(run, self.outbox, self._restores)
        self._transport: Transport = open_transport(parse_mail_url(self.settings.mail_url.reveal()), run.store.home)
        check_sender(self.settings.mail_from)
        self.summary.states[UNKNOWN] += self.outbox.recover()
        self._closed = threading.Event()
        threading.Thread(target=self._interrupt_when_stopped, name="interrupt", daemon=True).start()

    def close(self) -> None:
        """Close every file and connection, and count what still waits."""
        self._closed.set()
        self._transport.close()
        self._intake.close()
        self.summary.waiting = self.outbox.counts().get("WAITING", 0)
        self.summary.held = read_brake(self.run.store.database).reason

    def round(self, limit: int | None = None) -> bool:
        """Take in what is there and try what is due, unless mails are held; says whether there was anything.

        Where the mail server cannot be reached, or does not let us in, one mail has found out for all: those that were to be sent
        wait for a while.
        """
        taken = self._take_in()
        decided = self._carry_out()
        self._rows_may_be_old = False
        if time.monotonic() < self._reach_at:
            return taken or decided
        mails = self.outbox.waiting(now(), _AT_ONCE if limit is None else min(limit, _AT_ONCE))
        if mails and self._brake.holds(limit or sys.maxsize):
            if self._brake.stopped:
                self._told(self._brake.stopped)
                self._brake.stopped = None
            return taken or decided
        self._is_away = False
        tried = self._try(mails)
        self._pause = min(max(_FIRST_PAUSE, 2 * self._pause), _LONGEST_PAUSE) if self._is_away else 0.0
        self._reach_at = time.monotonic() + self._pause
        return taken or decided or tried

    def unconfirmed(self) -> bool:
        """Whether a log that is followed has bytes that its processor has not committed yet."""
        return self._intake.unconfirmed()

    def _take_in(self) -> bool:
        taken, intake = self._intake.round(), self._intake
        self.summary.taken_in += intake.taken_in
        self.summary.states[UNKNOWN] += intake.unknown
        self.summary.states[FAILED] += intake.failed
        intake.taken_in = intake.unknown = intake.failed = 0
        self._rows_may_be_old |= taken
        return taken

    def _interrupt_when_stopped(self) -> None:
        """A mail server that does not answer must not keep a stopped run alive for long."""
        self.run.stop.wait()
        begun = time.monotonic()
        while not self._closed.wait(_LOOK_EVERY):
            if time.monotonic() - begun >= self.run.grace:  # asked each time: a signal cuts it short
                self._transport.interrupt()  # once more, where it came between two calls that wait

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
            self.tried += 1
            reason = self._guards.plain_reason(mail)
            if reason == WITHDRAWN and self._rows_may_be_old:
                continue  # what is live may have given this mail a moment ago: the next round reads its row
            if reason:
                decided.append(Result(mail, SUPPRESSED, reason))
            elif not self._is_away:
                self._settle(decided)
                if not self._deliver(mail):
                    return False
        self._settle(decided)
        return bool(mails) and not self._is_away

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
            self._take_in()
            event = read_event(self.run, mail.log, mail.partition, mail.offset, mail.generation)
            reason = self._guards.plain_reason(mail) or self._guards.log_reason(event)
            salt = self._restores.salt(event)
        except BaseException:
            self.outbox.put_back(mail, now(), mail.reason)
            raise
        self._settle([Result(mail, SUPPRESSED, reason)] if reason else self._send(mail, event, salt))
        return True

    def _send(self, mail: Mail, event: dict[str, Any], salt: str) -> list[Result]:
        address, reason = self._guards.address(mail)  # it may be another one by now
        if reason:
            return [Result(mail, SUPPRESSED, reason)]
        try:
            to = parse_address(address)
            self._transport.send(compose(event, to, self.settings.mail_from, datetime.now(UTC), salt))
        except OutcomeUnknown as error:
            return [Result(mail, UNKNOWN, error.reason)]
        except MailError as error:
            if isinstance(error, TemplateUnusable) or (isinstance(error, NotSent) and not error.permanent):
                self._is_away = isinstance(error, NotSent) and error.of_session
                self._try_again(mail, error.reason)
                return []
            return [Result(mail, FAILED, error.reason)]
        return [Result(mail, SENT)]

    def _try_again(self, mail: Mail, reason: str) -> None:
        delay = min(_FIRST_DELAY * 2**mail.attempts, LONGEST_WAIT)
        self.outbox.put_back(mail, now() + delay, reason)
        self.summary.retries += 1
        self.summary.reasons[f"will be tried again: {reason}"] += 1


def deliver_to_end(run: Run, limit: int | None = None, told: Told = lambda _reason: None) -> DeliverySummary:
    """Try every mail that is due, at most `limit` of them, then end; `told` hears why, where delivery stops itself.

    Raises:
        Stopped: the run is to stop; the rest waits for the next one.
    """
    lock = run.lock(DELIVER)
    run.take(lock)
    try:
        deliverer = Deliverer(run, told)
        try:
            while deliverer.round(None if limit is None else limit - deliverer.tried) and deliverer.tried != limit:
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
        while not run.stop.is_set():
            run.take(lock)
            growth = Growth(run.store, logs_taken_in(run.topology))
            deliverer = Deliverer(run, told, summary)
            try:
                while not (run.stop.is_set() or run.promoting() or growth.seen()):
                    beat = run.pulse.beat
                    if not deliverer.round():
                        run.pulse.wait(beat, UNCONFIRMED_WAIT if deliverer.unconfirmed() else IDLE_WAIT)
            finally:
                deliverer.close()
            lock.release()
    except Stopped:
        pass  # what was not sent waits for the successor
    finally:
        lock.release()
    return summary
