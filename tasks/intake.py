"""What `deliver` takes in: EMAIL events as rows of the outbox, and what became of abandonments. It sends nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from storage.commit import Position, load_position
from storage.event import Event
from storage.mails import CLAIMED, MAY_HAVE_BEEN_SENT, WAITING
from storage.outbox import Outbox
from storage.reader import PartitionReader
from storage.times import now
from tasks.brake import ABANDONED, tallies
from tasks.restored import Restores
from tasks.run import Run
from tasks.topology import DELIVER, Topology

OUTCOMES = frozenset({"ABANDONMENT_RETRACTED", "RECOVERED_BASKET"})

BASKETS = "baskets"


class _Recipient(msgspec.Struct):
    id: int | str
    type: str


class _Context(msgspec.Struct):
    not_after: int = 0
    abandonment: str = ""


class _Wire(msgspec.Struct):
    context: _Context


_decode_recipient = msgspec.json.Decoder(_Recipient).decode
_decode_wire = msgspec.json.Decoder(_Wire).decode


def mail_row(event: Event, log: str, partition: int, generation: int) -> dict[str, Any]:
    """The row of an EMAIL event that waits to be sent."""
    recipient, context = _decode_recipient(event.object), _decode_wire(event.raw).context
    return {
        "event_id": event.event_id, "state": WAITING, "reason": "", "log": log, "generation": generation,
        "partition": partition, "offset": event.offset, "recipient_type": recipient.type,
        "recipient_id": str(recipient.id), "not_after": context.not_after, "changed_at": now(),
    }  # fmt: skip


def settled_row(event: Event) -> dict[str, Any]:
    """The row of an event that says what became of an abandonment."""
    return {
        "abandonment": _decode_wire(event.raw).context.abandonment, "verb": event.verb, "event_id": event.event_id,
    }  # fmt: skip


def logs_taken_in(topology: Topology) -> list[str]:
    """The logs on which `deliver` has checkpoints."""
    return [*topology.mail_logs(), BASKETS]


@dataclass
class _Source:
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

    def _open(self, log: str, partition: int) -> _Source:
        store, generation = self._run.store, self._run.generation(log)
        reader = store.reader(log, partition, generation)
        self._run.pulse.watch(reader.directory)
        return _Source(log, reader, load_position(store.database, DELIVER, generation, log, partition))

    def _take_in(self, source: _Source) -> bool:
        """Queue a source's mails, and note what became of abandonments, up to its committed end."""
        position, moved = source.position, False
        end = self._run.store.committed_end(source.log, position.partition, position.generation)
        while batch := self._run.derived_batches.get(
            source.reader, source.log, position.partition, position.offset, end, position.clock
        ):
            mails = [self._mail(event, position) for event in batch.events if event.verb == "EMAIL"]
            settled = [settled_row(event) for event in batch.events if event.verb in OUTCOMES]
            left = [event.clock for event in batch.events if source.log == BASKETS and event.verb == ABANDONED]
            position.offset, position.clock = batch.end, batch.clock
            position.lines += batch.lines
            position.quarantined += len(batch.bad)
            position.processed += len(mails) + len(settled)
            position.ignored += len(batch.events) - len(mails) - len(settled)
            self._outbox.take_in(source.reader, position, mails, settled, tallies(left))
            if any(mail["state"] == CLAIMED for mail in mails):
                self.unknown += self._outbox.give_up(MAY_HAVE_BEEN_SENT)
            self.taken_in += len(mails)
            moved = True
        return moved

    def _mail(self, event: Event, position: Position) -> dict[str, Any]:
        """The row of a mail: WAITING, or CLAIMED where it may have been sent before a backup was put back and is not too old."""
        row = mail_row(event, position.log, position.partition, position.generation)
        if self._restores.may_have_been_sent_at(position.log, position.partition, event.offset):
            row["reason"] = MAY_HAVE_BEEN_SENT
            if row["not_after"] >= now():
                row["state"] = CLAIMED
        return row
