"""What people decide about mails: UNKNOWN ones are settled, held ones dropped.

A decision is a row; whoever holds the lock of `deliver` carries it out, so the log of outcomes keeps its one writer.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from storage.database import Database
from storage.errors import UsageError
from storage.mails import AGAIN, FAILED, SENT, SENT_BEFORE, SUPPRESSED, UNKNOWN, WAITING, Mail, Result
from storage.outbox import Outbox
from storage.times import now

_AT_ONCE = 1_000
_MEANT = {
    SENT: (UNKNOWN, SENT, SENT_BEFORE),
    FAILED: (UNKNOWN, FAILED, "not sent, says a person"),
    WAITING: (UNKNOWN, FAILED, AGAIN),
    SUPPRESSED: (WAITING, SUPPRESSED, "dropped by a person"),
}
"""By what was decided: the state that the mail must be in, then the outcome and its reason."""

_STATE = sa.text("SELECT state FROM delivery WHERE event_id = :event_id")
_DECIDE = sa.text(
    "INSERT INTO decision (event_id, state, at) VALUES (:event_id, :state, :at) "
    "ON CONFLICT (event_id) DO UPDATE SET state = excluded.state, at = excluded.at"
)
_DROP = sa.text(
    "INSERT INTO decision (event_id, state, at) SELECT event_id, 'SUPPRESSED', :at FROM delivery WHERE state = 'WAITING' "
    "ON CONFLICT (event_id) DO NOTHING"
)
_OPEN = sa.text(
    "SELECT decision.state AS decided, decision.event_id AS of_mail, delivery.* "
    "FROM decision LEFT JOIN delivery ON delivery.event_id = decision.event_id "
    'ORDER BY delivery.log, delivery.partition, delivery."offset" LIMIT :limit'
)
_FORGET = sa.text("DELETE FROM decision WHERE event_id = :event_id")


def decide(database: Database, event_id: str, decision: str) -> None:
    """Note what a person says of an UNKNOWN mail: SENT, FAILED (not sent), or WAITING (not sent: once more).

    Raises:
        UsageError: there is no such mail, or it is not in doubt.
    """
    with database.write() as connection:
        state = connection.scalar(_STATE, {"event_id": event_id})
        if state is None:
            raise UsageError("no such mail", found=repr(event_id), do="See: afterlog deliveries list")
        if state != UNKNOWN:
            raise UsageError(
                "only a mail in doubt can be resolved", where=event_id, found=state, expected=UNKNOWN,
                do="Nothing was changed",
            )  # fmt: skip
        connection.execute(_DECIDE, {"event_id": event_id, "state": decision, "at": now()})


def drop_waiting(database: Database) -> int:
    """Note that a person drops every mail that waits now; gives how many."""
    with database.write() as connection:
        return connection.execute(_DROP, {"at": now()}).rowcount


def undecided(database: Database) -> int:
    """How many decisions are still to be carried out."""
    with database.read() as connection:
        return int(connection.scalar(sa.text("SELECT COUNT(*) FROM decision")) or 0)


def carry_out(database: Database, outbox: Outbox) -> Sequence[Result]:
    """Carry out what was decided; the caller holds the lock of `deliver`. Gives what became of the mails."""
    done: list[Result] = []
    while True:
        with database.read() as connection:
            rows = [dict(row) for row in connection.execute(_OPEN, {"limit": _AT_ONCE}).mappings()]
        results, stale = [], []
        for row in rows:
            (required, state, reason), of_mail = _MEANT[row.pop("decided")], row.pop("of_mail")
            if row["state"] == required:
                results.append(Result(Mail(**row), state, reason))
            else:
                stale.append({"event_id": of_mail})
        outbox.settle(results)
        if stale:  # it was sent, settled or withdrawn meanwhile: too late
            with database.write() as connection:
                connection.execute(_FORGET, stale)
        done += results
        if len(rows) < _AT_ONCE:
            return done
