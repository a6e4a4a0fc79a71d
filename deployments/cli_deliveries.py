"""`afterlog deliveries`: what became of mails, and what people decide about them."""

from __future__ import annotations

import sys
from typing import Literal

import orjson
from cyclopts import App

from deployments.cli_arguments import Whole
from deployments.console import say, show_table
from storage.errors import UsageError
from storage.look import Look
from storage.settings import load_settings
from storage.store import Store
from storage.times import show

deliveries = App(name="deliveries", help="Mails: what became of them, and what to do with those in doubt or held.")

COLUMNS = ("id", "state", "recipient", "attempts", "changed", "reason")
_MOST = 1_000_000_000
State = Literal["WAITING", "CLAIMED", "SENT", "SUPPRESSED", "FAILED", "UNKNOWN"]
_SELECT = (
    "SELECT event_id AS id, state, recipient_type, recipient_id, attempts, next_at, not_after, changed_at, reason FROM delivery "
    "WHERE (:state = '' OR state = :state) ORDER BY changed_at DESC, event_id LIMIT :limit"
)


@deliveries.command(name="list")
def list_(*, state: State | None = None, limit: Whole = 100, json: bool = False) -> None:
    """Show mails, the latest change first.

    Args:
        state: only those in this state.
        limit: at most so many; 0 shows all.
        json: one JSON document on standard output.
    """
    if not 0 <= limit <= _MOST:
        raise UsageError("--limit is no number of mails", found=limit, expected=f"1 to {_MOST:,}, or 0 for all")
    look = Look(Store(load_settings()))
    rows = look.rows(_SELECT, state=state or "", limit=limit + 1 if limit else sys.maxsize)
    look.close()
    more, rows = bool(limit) and len(rows) > limit, rows[:limit] if limit else rows
    if json:
        sys.stdout.buffer.write(orjson.dumps(rows, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    else:
        shown = [
            (r["id"], r["state"], f"{r['recipient_type']} {r['recipient_id']}", r["attempts"], show(r["changed_at"]), r["reason"])
            for r in rows
        ]  # fmt: skip
        show_table("Mails", COLUMNS, shown)
    if more:
        say(f"There are more than these {limit}: --limit 0 shows all")


@deliveries.command
def resolve(id: str, outcome: Literal["sent", "not-sent"], *, again: bool = False) -> None:
    """Settle a mail that is UNKNOWN, after a look at the mail server's own log.

    Args:
        id: the mail's id, as `afterlog deliveries list` shows it, and its header X-Afterlog-Event-Id. `afterlog why ID` shows its
            Message-ID.
        outcome: whether it was sent.
        again: with not-sent: try it once more, under the same Message-ID, if it is still worth sending.
    """
    if again and outcome == "sent":
        raise UsageError("--again goes with not-sent only", do="A mail that was sent is never sent again")
    from tasks.settle import resolve as settle  # the list should not wait for it

    holder = settle(Store(load_settings()), id, outcome == "sent", again)
    say(f"{id}: {outcome}{', to be tried once more' if again else ''}" + _still(holder))


@deliveries.command
def drop() -> None:
    """Drop every mail that is held while delivery is paused or has stopped itself: SUPPRESSED, and never sent."""
    from tasks.settle import drop as settle  # the list should not wait for it

    count, holder = settle(Store(load_settings()))
    say(f"{count} mails dropped{_still(holder)}. Delivery is still stopped: `afterlog resume deliver`")


def _still(holder: str) -> str:
    return f"; noted, and carried out by {holder} when it is between two mails" if holder else ""
