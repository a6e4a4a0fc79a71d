"""What `deliver` takes in: EMAIL events as rows of the outbox, and what became of abandonments. It sends nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import sqlalchemy as sa

from storage.commit import Position, load_position
from storage.database import Database
from storage.event import Event
from storage.mails import CLAIMED, FAILED, MAY_HAVE_BEEN_SENT, WAITING, Mail, Result
from storage.outbox import Outbox
from storage.reader import PartitionReader
from storage.tables import Delivery
from storage.times import now
from tasks.brake import ABANDONED, tallies
from tasks.restored import Restores
from tasks.run import Run
from tasks.topology import DELIVER, Topology

OUTCOMES = frozenset({"ABANDONMENT_RETRACTED", "RECOVERED_BASKET"})

BASKETS = "baskets"
_GREATEST = 2**63 - 1  # more is no column's
_DELIVERY: sa.Table = Delivery.__table__  # type: ignore[attr-defined]  # SQLModel hides it from the types
_NO_MAIL = "no mail, see "
_FOR_NOBODY = sa.select(_DELIVERY).where(_DELIVERY.c.state == WAITING, _DELIVERY.c.recipient_type == "")


class _Recipient(msgspec.Struct):
    id: int | str
    type: Annotated[str, msgspec.Meta(min_length=1)]


class _Source(msgspec.Struct):
    log: str
    partition: int
    offset: int


class _MailContext(msgspec.Struct):
    not_after: Annotated[int, msgspec.Meta(ge=0, le=_GREATEST)]
    source: _Source


class _Mail(msgspec.Struct):
    object: _Recipient
    context: _MailContext


class _Context(msgspec.Struct):
    abandonment: str = ""


class _Outcome(msgspec.Struct):
    context: _Context


_decode_mail = msgspec.json.Decoder(_Mail).decode
_decode_outcome = msgspec.json.Decoder(_Outcome).decode


def mail_row(event: Event, log: str, partition: int, generation: int) -> dict[str, Any]:
    """The row of an EMAIL event that waits to be sent.

    Of one that can never be sent, a mistake of a processor of one's own: without a recipient, too old from the start, and
    with the reason.
    """
    place = f"{log}:{partition}:{event.offset}"
    kind, ident, not_after = "", "", 0
    reason = "" if event.event_id else f"{_NO_MAIL}{place}: it has no `event.id`"
    try:
        mail = _decode_mail(event.raw)
        kind, ident, not_after = mail.object.type, str(mail.object.id), mail.context.not_after
    except msgspec.DecodeError as error:
        reason = f"{_NO_MAIL}{place}: {error}"
    if reason:
        kind, not_after = "", 0
    return {
        "event_id": event.event_id or place, "state": WAITING, "reason": reason, "log": log, "generation": generation,
        "partition": partition, "offset": event.offset, "recipient_type": kind, "recipient_id": ident,
        "not_after": not_after, "changed_at": now(),
    }  # fmt: skip


def recipient_of(raw: bytes) -> tuple[str, int | None]:
    """Whom an EMAIL event is for (type and id), and until when it is worth sending; nobody where no mail can be made of it."""
    try:
        mail = _decode_mail(raw)
    except msgspec.DecodeError:
        return "", None
    return f"{mail.object.type} {mail.object.id}", mail.context.not_after


def refuse(database: Database, outbox: Outbox) -> list[str]:
    """Settle as FAILED every mail that waits and can never be sent; gives what a person should be told of that."""
    with database.read() as connection:
        waiting = [Mail(**row) for row in connection.execute(_FOR_NOBODY).mappings()]
    mails = [mail for mail in waiting if mail.reason.startswith(_NO_MAIL)]
    outbox.settle([Result(mail, FAILED, mail.reason) for mail in mails])
    return _never_sent(Counter(mail.log for mail in mails))


def _never_sent(counts: Counter[str]) -> list[str]:
    why = "can never be sent; `afterlog deliveries list --state FAILED` says why"
    return [f"{count} EMAIL events of log {log} {why}" for log, count in counts.items() if count]


def settled_row(event: Event) -> dict[str, Any]:
    """The row of an event of the log `baskets` that says what became of an abandonment."""
    return {
        "abandonment": _decode_outcome(event.raw).context.abandonment, "verb": event.verb, "event_id": event.event_id,
    }  # fmt: skip


def logs_taken_in(topology: Topology) -> list[str]:
    """The logs on which `deliver` has checkpoints."""
    return [*topology.mail_logs(), BASKETS]


@dataclass
class _Followed:
    log: str
    reader: PartitionReader
    position: Position


class Intake:
    """Follows the derived logs that mails come from, in the generations that are live; its maker holds the lock of `deliver`."""

    def __init__(self, run: Run, outbox: Outbox, restores: Restores) -> None:
        self._run, self._outbox, self._restores = run, outbox, restores
        logs = logs_taken_in(run.topology)
        self._sources = [self._open(log, part) for log in logs for part in run.store.partitions(log)]
        self.taken_in = 0
        """How many mails were queued."""
        self.unknown = 0
        """How many of them may have been sent before, and wait for a person."""
        self.failed = 0
        """How many of them can never be sent."""

    def close(self) -> None:
        """Close every file."""
        for source in self._sources:
            source.reader.close()

    def round(self) -> bool:
        """Take in what is there, up to the committed ends; says whether there was anything."""
        taken = [self._take_in(source) for source in self._sources]
        return any(taken)

    def unconfirmed(self) -> bool:
        """Whether a log that is followed has bytes that its processor has not committed yet."""
        return any(source.reader.end() > source.position.offset for source in self._sources)

    def _open(self, log: str, partition: int) -> _Followed:
        store, generation = self._run.store, self._run.generation(log)
        reader = store.reader(log, partition, generation)
        self._run.pulse.watch(reader.directory)
        return _Followed(log, reader, load_position(store.database, DELIVER, generation, log, partition))

    def _take_in(self, source: _Followed) -> bool:
        """Queue a source's mails, and note what became of abandonments, up to its committed end."""
        position, moved = source.position, False
        end = self._run.store.committed_end(source.log, position.partition, position.generation)
        while batch := self._run.derived_batches.get(
            source.reader, source.log, position.partition, position.offset, end, position.clock
        ):
            mails = [self._mail(event, position) for event in batch.events if event.verb == "EMAIL"]
            baskets = batch.events if source.log == BASKETS else []
            settled = [settled_row(event) for event in baskets if event.verb in OUTCOMES]
            left = [event.clock for event in baskets if event.verb == ABANDONED]
            position.offset, position.clock = batch.end, batch.clock
            position.lines += batch.lines
            position.quarantined += len(batch.bad)
            position.processed += len(mails) + len(settled)
            position.ignored += len(batch.events) - len(mails) - len(settled)
            self._outbox.take_in(source.reader, position, mails, settled, tallies(left))
            if any(mail["state"] == CLAIMED for mail in mails):
                self.unknown += self._outbox.give_up(MAY_HAVE_BEEN_SENT)
            if unusable := {mail["event_id"]: mail["reason"] for mail in mails if not mail["recipient_type"]}:
                self._refuse(source.log, unusable)
            self.taken_in += len(mails)
            moved = True
        return moved

    def _refuse(self, log: str, unusable: dict[str, str]) -> None:
        """Settle as FAILED what can never be sent, so that it holds nothing back.

        After a crash just before this it is SUPPRESSED as too old, with the same reason.
        """
        with self._run.store.database.read() as connection:
            mails = [Mail(**row) for row in connection.execute(_FOR_NOBODY).mappings() if row["event_id"] in unusable]
        self._outbox.settle([Result(mail, FAILED, unusable[mail.event_id]) for mail in mails])
        self.failed += len(mails)
        self._run.notes += _never_sent(Counter({log: len(mails)}))

    def _mail(self, event: Event, position: Position) -> dict[str, Any]:
        """The row of a mail: WAITING, or CLAIMED where it may have been sent before a backup was put back and is not too old."""
        row = mail_row(event, position.log, position.partition, position.generation)
        if not row["recipient_type"]:
            return row
        if self._restores.may_have_been_sent_at(position.log, position.partition, event.offset):
            row["reason"] = MAY_HAVE_BEEN_SENT
            if row["not_after"] >= now():
                row["state"] = CLAIMED
        return row
