"""A mail in the outbox, and what became of it: as a row of the database, and as a line of the log `deliveries`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import orjson

from storage.times import now

WAITING, CLAIMED, SENT, SUPPRESSED, FAILED, UNKNOWN = "WAITING", "CLAIMED", "SENT", "SUPPRESSED", "FAILED", "UNKNOWN"
LONGEST_WAIT = 600_000
"""For how long at most a mail that was put back waits for its next try: a time beyond that was set by a clock that was ahead."""
MAY_HAVE_BEEN_SENT = "it may have been sent before a backup was put back"
NOT_ALLOWED = "not on the list of allowed recipients"
AGAIN = "not sent, says a person: once more"
SENT_BEFORE = "sent, says a person"
"""Why a mail is SENT that was in doubt: nobody knows when that was, only that it is settled now."""
WITHDRAWN = "withdrawn: the generation that is live now has no such mail"
"""Why a mail is SUPPRESSED that was certainly not sent, and is to be sent if what is live has it after all."""

_SMALL = str.maketrans(ascii_uppercase, ascii_lowercase)


@dataclass(frozen=True)
class Mail:
    """A row of the outbox: where its EMAIL event lies, whom it is for, and until when it is worth sending."""

    event_id: str
    state: str
    log: str
    generation: int
    partition: int
    offset: int
    recipient_type: str
    recipient_id: str
    not_after: int
    next_at: int
    attempts: int
    reason: str
    changed_at: int
    cleared: bool


@dataclass(frozen=True)
class Result:
    """What became of a mail: SENT, SUPPRESSED, FAILED or UNKNOWN, and why. AGAIN, as the reason, lets it wait once more."""

    mail: Mail
    state: str
    reason: str = ""


def is_allowed(email: str, allow: Sequence[str]) -> bool:
    """Whether the list of allowed recipients (addresses, or `@domain`) takes an address; an empty one takes all.

    Only of A to Z capitals do not matter: of others not every database knows, and the brake counts by it what would be sent.
    """
    allowed = [entry.translate(_SMALL) for entry in allow]
    address = email.strip().translate(_SMALL)
    return not allowed or any(address.endswith(e) if e.startswith("@") else address == e for e in allowed)


def outcome_row(event: Mapping[str, Any]) -> dict[str, Any]:
    """A row for what the log says became of a mail, and when; an older database may not know the mail yet."""
    obj, context = event["object"], event.get("context", {})
    source = context.get("source", {})
    return {
        "event_id": obj["id"], "state": event["verb"], "log": source.get("log", ""), "generation": source.get("generation", 1),
        "partition": source.get("partition", 0), "offset": source.get("offset", 0), "recipient_type": "",
        "recipient_id": "", "not_after": 0, "reason": obj.get("reason", ""), "changed_at": context.get("at", 0),
    }  # fmt: skip


def outcome_line(result: Result) -> bytes:
    """The line of the log `deliveries` that says what became of a mail."""
    wall, mail = now(), result.mail
    obj = {"type": "EMAIL", "id": mail.event_id}
    if result.reason:
        obj["reason"] = result.reason
    source = {"log": mail.log, "partition": mail.partition, "offset": mail.offset}
    if mail.generation != 1:
        source["generation"] = mail.generation
    return orjson.dumps(
        {
            "subject": {"id": "EMAIL_SYSTEM"},
            "verb": result.state,
            "object": obj,
            "context": {"at": wall, "source": source},
            "event": {"id": f"deliver/{mail.event_id}/{result.state.lower()}", "inserted_at": wall},
        },
        option=orjson.OPT_APPEND_NEWLINE,
    )
