"""Guards: whether a mail that is due should still be sent, asked of the address book and of the logs.

A reminder that arrives after the purchase is what such systems are complained about most.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import sqlalchemy as sa

from storage.errors import LostDataError
from storage.mails import MAY_HAVE_BEEN_SENT, NOT_ALLOWED, WITHDRAWN, Mail, is_allowed
from storage.outbox import Outbox
from storage.times import now, show
from tasks.latest import integer
from tasks.process import positions, process_to_end
from tasks.run import Run

_BY_OTHERS = sa.text(
    "SELECT recipient_type, recipient_id, MAX(changed_at) FROM delivery WHERE state IN ('SENT', 'CLAIMED', 'UNKNOWN') "
    "AND changed_at > :since AND log = :log AND generation <> :live GROUP BY recipient_type, recipient_id"
)
PROCESSORS = ("abandonment", "normalise")
"""They must be at their logs' ends before a mail goes out: they tell who is back and who has ordered."""


class _Left(NamedTuple):
    """The cause of a mail: a basket that was left behind, with its customer, times, and the offset of the event that left it."""

    ident: str
    customer: str
    started: int
    last: int
    offset: int


class Guards:
    """Says why a mail must not be sent, or nothing."""

    def __init__(self, run: Run, outbox: Outbox) -> None:
        self._run, self._outbox, self._allow = run, outbox, run.store.settings.mail_allow
        self._by_others: dict[tuple[str, str, str], int] | None = None
        gaps = {p.writes: int(getattr(p.settings, "gap", 0)) for p in run.topology.all()}
        self._gaps = {log: gaps.get(log, 0) for log in run.topology.mail_logs()}

    def follow_logs(self) -> None:
        """Have the processors that tell at the ends of the raw logs as they are now; while they lag, mail waits."""
        store, known = self._run.store, positions(self._run.store)
        for name in PROCESSORS:
            log = self._run.topology.reads(name)
            for partition in store.partitions(log):
                reader = store.reader(log, partition)
                end = reader.end()
                reader.close()
                at = next((p.offset for p in known if (p.processor, p.log, p.partition) == (name, log, partition)), 0)
                if at < end:
                    process_to_end(self._run, name, None)
                    break

    def plain_reason(self, mail: Mail) -> str:
        """Why a mail is not to be sent, as far as that can be told without looking at the logs."""
        if now() > mail.not_after:
            known = mail.reason if mail.reason in ("", MAY_HAVE_BEEN_SENT) else f"last try: {mail.reason}"
            return "too old: past its not_after" + (f"; {known}" if known else "")
        if mail.generation != self._run.generation(mail.log):
            return WITHDRAWN
        at = self._mailed_by_others().get((mail.log, mail.recipient_type, mail.recipient_id))
        if at is not None and now() - at < self._gaps[mail.log]:
            return f"too soon: mailed at {show(at)}, when another generation was live"
        return self.address(mail)[1]

    def address(self, mail: Mail) -> tuple[str, str]:
        """Where a mail goes, as the address book says at this moment; or why it goes nowhere."""
        contact = self._outbox.contact(mail)
        if contact is None:
            return "", "no address"
        if contact.unsubscribed:
            return "", "unsubscribed"
        return (contact.email, "") if is_allowed(contact.email, self._allow) else ("", NOT_ALLOWED)

    def log_reason(self, event: dict[str, Any]) -> str:
        """Why a reminder is not to be sent: its abandonment was retracted, or the customer has ordered since."""
        source = event["context"]["source"]
        if source["log"] != "baskets":
            return ""
        cause = self._cause(event, source)
        if cause is None:
            return f"its cause is not at baskets:{source['partition']}:{source['offset']}, where it says: another generation is live"
        verbs = self._outbox.settled_by(cause.ident)
        if "ABANDONMENT_RETRACTED" in verbs:
            return "retracted"
        ordered = self._outbox.ordered(cause.customer, cause.started, cause.last, cause.offset)
        if ordered is not None:
            return f"ordered since: at {show(ordered)}"
        return "ordered since" if "RECOVERED_BASKET" in verbs else ""

    def _cause(self, event: dict[str, Any], source: dict[str, Any]) -> _Left | None:
        """What an EMAIL event has as its cause; None where something else lies there.

        So it is where `baskets` was rolled back under a processor of one's own that had read on.
        """
        carried = event["context"].get("caused_by")
        found = event_there(self._run, source["log"], source["partition"], source["offset"])
        try:
            context = found["context"]
            last, behind = context["at"], context["source"]["offset"]
            left = _Left(
                found["event"]["id"], str(found["subject"]["id"]), context.get("started_at", last), last, behind
            )
        except (KeyError, TypeError):
            return None
        is_whole = isinstance(carried, dict) and "event" in carried  # of a long one only the digest is carried
        return left if not is_whole or carried == found else None

    def _mailed_by_others(self) -> dict[tuple[str, str, str], int]:
        """Who was mailed within the gap between two reminders before this was asked, by a generation that is not live, and when.

        What is live does not know of those mails. None are added while this run has the lock of `deliver`: asked once.
        """
        if self._by_others is None:
            self._by_others = {}
            with self._run.store.database.read() as connection:
                for log, gap in self._gaps.items():
                    since, live = now() - gap, self._run.generation(log)
                    rows = connection.execute(_BY_OTHERS, {"log": log, "since": since, "live": live})
                    self._by_others |= {(log, type_, id_): at for type_, id_, at in rows}
        return self._by_others


def read_event(run: Run, log: str, partition: int, offset: int, generation: int | None = None) -> dict[str, Any]:
    """The event at a place; json takes numbers that orjson refuses, and a cause may carry one."""
    reader = run.store.reader(log, partition, generation)
    try:
        event: dict[str, Any] = json.loads(reader.line(offset), parse_int=integer)
    finally:
        reader.close()
    return event


def event_there(run: Run, log: str, partition: int, offset: int, generation: int | None = None) -> dict[str, Any]:
    """`read_event` of a place that another event names; empty where no event begins, since another generation is live, say.

    Raises:
        LostDataError: one may begin there, but the archive is away.
    """
    try:
        event = read_event(run, log, partition, offset, generation)
    except LostDataError:
        with run.store.reader(log, partition, generation) as reader:
            if offset < reader.end():
                raise
        return {}
    except ValueError:  # the middle of a line
        return {}
    return event if isinstance(event, dict) else {}
