"""What `deliver` takes in: EMAIL events as rows of the outbox, and what became of abandonments."""

from __future__ import annotations

from typing import Any

import msgspec

from storage.commit import Position
from storage.event import Event
from storage.mails import CLAIMED, MAY_HAVE_BEEN_SENT, WAITING
from storage.times import now
from tasks.restored import Restores

OUTCOMES = frozenset({"ABANDONMENT_RETRACTED", "RECOVERED_BASKET"})


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


def mail_row(event: Event, position: Position, restores: Restores) -> dict[str, Any]:
    """The row of an EMAIL event: WAITING, or CLAIMED where it may have been sent before a backup was put back."""
    recipient, context = _decode_recipient(event.object), _decode_wire(event.raw).context
    doubtful = context.not_after >= now() and restores.may_have_been_sent_at(
        position.log, position.partition, event.offset
    )
    return {
        "event_id": event.event_id, "state": CLAIMED if doubtful else WAITING,
        "reason": MAY_HAVE_BEEN_SENT if doubtful else "", "log": position.log, "generation": position.generation,
        "partition": position.partition, "offset": event.offset, "recipient_type": recipient.type,
        "recipient_id": str(recipient.id), "not_after": context.not_after, "changed_at": now(),
    }  # fmt: skip


def settled_row(event: Event) -> dict[str, Any]:
    """The row of an event that says what became of an abandonment."""
    return {
        "abandonment": _decode_wire(event.raw).context.abandonment, "verb": event.verb, "event_id": event.event_id,
    }  # fmt: skip
