"""How a mail stands: its row in the outbox, its outcomes, and why it has none where a promotion has passed it over."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

from storage.errors import UsageError
from storage.event import MAX_DERIVED_DEPTH, Rejected
from storage.judge import judge
from storage.store import DELIVERIES
from tasks.evidence import Event, Evidence, Place, WrittenBy, as_json, parse_event
from tasks.mail_domain import as_ascii
from tasks.topology import DELIVER


@dataclass(frozen=True)
class Outcome:
    """What the log `deliveries` says became of a mail."""

    state: str
    at: int
    reason: str
    place: str
    run: WrittenBy | None


@dataclass(frozen=True)
class Sending:
    """How a mail stands: its row in the outbox (empty where it is not queued; then `reason` says why it never will be, if
    that is so), and every outcome so far."""

    message_id: str
    state: str
    attempts: int
    reason: str
    next_at: int
    not_after: int
    recipient: str
    outcomes: list[Outcome]


def sending_of(evidence: Evidence, place: Place, event: Event) -> Sending:
    """How the mail of the EMAIL event at a place stands."""
    mail, outcomes = event["event"]["id"] or str(place), []  # as delivery calls one without an id
    for spot, line in evidence.lines_with(DELIVERIES, as_json(mail)):
        told = parse_event(line)
        if told["object"]["id"] == mail:
            reason, at = told["object"].get("reason", ""), told["context"]["at"]
            outcomes.append(Outcome(told["verb"], at, reason, str(spot), evidence.written_by(spot)))
    rows = evidence.look.rows("SELECT * FROM delivery WHERE event_id = :mail", mail=mail)
    row = rows[0] if rows else {}
    recipient = f"{row['recipient_type']} {row['recipient_id']}" if row else ""
    return Sending(
        _message_id(evidence, mail), row.get("state", ""), row.get("attempts", 0), row["reason"] if row else _passed_over(evidence, place, event),
        row.get("next_at", 0), row.get("not_after", 0), recipient, outcomes,
    )  # fmt: skip


def _passed_over(evidence: Evidence, place: Place, event: Event) -> str:
    """Why an EMAIL event is not in the outbox and will not come into it: what a promotion adds is queued then, or never, and so is what is no event.

    Empty where `deliver` has not got there yet.
    """
    if place.log not in evidence.topology.mail_logs():
        return f"no processor of today has its mails delivered that writes the log {place.log}"
    generation, live = evidence.generation_at(place), evidence.generation_of(place.log)
    if generation != live:
        return f"generation {generation} is not live; what it alone has is queued when it is promoted, if it is worth sending then"
    at = evidence.look.rows(
        'SELECT MAX("offset") AS at FROM checkpoint WHERE processor = :name AND log = :log AND generation = :live '
        'AND "partition" = :partition AND live',
        name=DELIVER, log=place.log, live=live, partition=place.partition,
    )[0]["at"]  # fmt: skip
    if (at or 0) <= place.offset:
        return ""
    try:
        judge(evidence.line(place), place.offset, 0, MAX_DERIVED_DEPTH)
    except Rejected as error:
        return f"delivery took it for no event: {error}"
    moved = evidence.look.rows("SELECT changed_at FROM replay WHERE generation = :live AND state = 'LIVE'", live=live)
    when = f"when generation {live} became live"
    if moved and event["context"].get("not_after", 0) < moved[0]["changed_at"]:
        return f"too old: past its not_after {when}"
    too_soon = f"too soon: its recipient had been mailed within the gap between two reminders {when}"
    return too_soon if moved else f"too old, past its not_after {when}; or {too_soon}"


def _salts(evidence: Evidence) -> list[str]:
    """What the Message-ID of a mail may have been made of beside its event's id: see `tasks.restored`."""
    return ["", *(f"\n{row['at']}" for row in evidence.look.rows("SELECT at FROM restored"))]


def _digest(mail: str, salt: str) -> str:
    return sha256((mail + salt).encode("utf-8", "surrogatepass")).hexdigest()


def _message_id(evidence: Evidence, mail: str) -> str:
    """The Message-ID of a mail; empty where a backup was put back, since which it may be one of several."""
    domain = as_ascii(evidence.store.settings.mail_from.rpartition("@")[2].rstrip("> "))
    return f"<{_digest(mail, '')}@{domain}>" if len(_salts(evidence)) == 1 else ""


def mail_of(evidence: Evidence, digest: str) -> str:
    """The event of the mail whose Message-ID begins with a digest.

    Raises:
        UsageError: there is none.
    """
    salts = _salts(evidence)
    for row in evidence.look.rows("SELECT event_id FROM delivery"):
        if any(_digest(row["event_id"], salt) == digest for salt in salts):
            return str(row["event_id"])
    raise UsageError("no mail has this Message-ID", found=digest, do="See: afterlog deliveries list")
