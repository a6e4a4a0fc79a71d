"""The answers to why, as rows for a table or a page: (place, what, value)."""

from __future__ import annotations

import orjson

from storage.times import show
from tasks.evidence import WrittenBy
from tasks.why import Step, Why
from tasks.why_sent import Sending

Row = tuple[str, str, str]
UNKNOWN_RUN = "not known: it was written before runs were noted, or its row is gone"


def rows_of(answer: Why) -> list[Row]:
    """Everything that is known, the thing that was asked for first."""
    first = answer.chain[0]
    rows = _step(first)
    if answer.sending is not None:
        rows += _sending(first.place, answer.sending)
    for step in answer.chain[1:]:
        rows += _step(step)
    for step in answer.came_of_it:
        rows.append((step.place, "came of it", f"{step.verb} {step.id}"))
    return rows


def sentence(answer: Why) -> str:
    """The answer in a line: the rules from the thing itself back to the raw bytes."""
    steps = [step.rule or f"{step.verb or 'a line'} at {step.place}" for step in answer.chain]
    return "; because ".join(steps)


def _step(step: Step) -> list[Row]:
    values = [
        ("event", step.id), ("verb", step.verb), ("happened", show(step.at) if step.at >= 0 else ""),
        ("known", show(step.known_at) if step.known_at >= 0 else ""), ("rule", step.rule), ("shown by", step.shown_by),
        ("settings", orjson.dumps(step.settings).decode() if step.code else ""),
        ("code", f"sha256 {step.code}, in force by {step.version}" if step.code else ""),
        ("written by", run_text(step.run) if step.id else ""), *(("note", note) for note in step.notes),
        ("verbatim", step.line),
    ]  # fmt: skip
    return [(step.place, what, value) for what, value in values if value]


def _sending(place: str, sending: Sending) -> list[Row]:
    tries = "1 try" if sending.attempts == 1 else f"{sending.attempts} tries"
    state = f"{sending.state}, {tries}" if sending.state else "not queued" if sending.reason else "not queued yet"
    rows = [(place, "mail", f"{state}, to {sending.recipient}" if sending.recipient else state)]
    if sending.reason:
        rows.append((place, "reason", sending.reason))
    if sending.message_id:
        rows.append((place, "message-id", sending.message_id))
    for each in sending.outcomes:
        because = f", {each.reason}" if each.reason else ""
        rows.append((each.place, "outcome", f"{each.state} at {show(each.at)}{because}; {run_text(each.run)}"))
    return rows


def run_text(run: WrittenBy | None) -> str:
    """Which run wrote an event, with its link where Prefect knew it."""
    if run is None:
        return UNKNOWN_RUN
    return f"{run.run}, from {show(run.since)} on" + (f": {run.link}" if run.link else "")
