"""What a promotion means for mails, put together beside the tables that it changes: a few statements then do it for all.

The tables here are temporary: they are gone with their connection, and memory does not grow with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from storage.database import Database
from storage.mails import MAY_HAVE_BEEN_SENT, WITHDRAWN

_TABLES = (
    (
        'CREATE TEMPORARY TABLE staged_mail (event_id TEXT PRIMARY KEY, log TEXT, generation INTEGER, partition INTEGER, "offset" BIGINT, '
        "recipient_type TEXT, recipient_id TEXT, not_after BIGINT, reason TEXT, gap BIGINT, in_doubt INTEGER)"
    ),
    "CREATE TEMPORARY TABLE staged_before (abandonment TEXT PRIMARY KEY)",
    "CREATE TEMPORARY TABLE staged_outcome (abandonment TEXT, verb TEXT, event_id TEXT, PRIMARY KEY (abandonment, verb))",
    (
        "CREATE TEMPORARY TABLE staged_mailed (log TEXT, recipient_type TEXT, recipient_id TEXT, last BIGINT, "
        "PRIMARY KEY (log, recipient_type, recipient_id))"
    ),
)
_MAIL = (
    'INSERT INTO staged_mail (event_id, log, generation, partition, "offset", recipient_type, recipient_id, not_after, reason, gap, in_doubt) '
    "VALUES (:event_id, :log, :generation, :partition, :offset, :recipient_type, :recipient_id, :not_after, :reason, :gap, :in_doubt) "
    "ON CONFLICT (event_id) DO NOTHING"
)
_BEFORE = "INSERT INTO staged_before (abandonment) VALUES (:abandonment) ON CONFLICT (abandonment) DO NOTHING"
_OUTCOME = (
    "INSERT INTO staged_outcome (abandonment, verb, event_id) VALUES (:abandonment, :verb, :event_id) "
    "ON CONFLICT (abandonment, verb) DO UPDATE SET event_id = excluded.event_id"
)

_WITHDRAWN = f"state = 'SUPPRESSED' AND reason = '{WITHDRAWN}'"
# Whether its recipient was mailed within the gap, or may have been; looked up in one pass over those who were.
_MAILED = (
    "INSERT INTO staged_mailed SELECT log, recipient_type, recipient_id, MAX(changed_at) FROM delivery "
    "WHERE state IN ('SENT', 'CLAIMED', 'UNKNOWN') AND changed_at > :wall - (SELECT COALESCE(MAX(gap), 0) FROM staged_mail) "
    "GROUP BY log, recipient_type, recipient_id"
)
_TOO_SOON = (
    "(s.gap > 0 AND EXISTS (SELECT 1 FROM staged_mailed m WHERE m.log = s.log AND m.recipient_type = s.recipient_type "
    "AND m.recipient_id = s.recipient_id AND m.last > :wall - s.gap))"
)
_KEEP = (
    'UPDATE delivery SET generation = s.generation, partition = s.partition, "offset" = s."offset", recipient_type = s.recipient_type, '
    "recipient_id = s.recipient_id, not_after = s.not_after FROM staged_mail s "
    "WHERE s.event_id = delivery.event_id AND delivery.state IN ('WAITING', 'UNKNOWN') AND s.not_after >= :wall"
)
_FORGET_WITHDRAWN = (
    f"DELETE FROM delivery WHERE {_WITHDRAWN} "  # noqa: S608  # texts of our own
    f"AND event_id IN (SELECT s.event_id FROM staged_mail s WHERE s.not_after >= :wall AND NOT {_TOO_SOON})"
)
_INTO_QUEUE = (
    'INSERT INTO delivery (event_id, state, log, generation, partition, "offset", recipient_type, recipient_id, not_after, '  # noqa: S608  # texts of our own
    "next_at, attempts, reason, changed_at, cleared) SELECT s.event_id, CASE WHEN s.in_doubt = 1 THEN 'CLAIMED' ELSE 'WAITING' END, "
    's.log, s.generation, s.partition, s."offset", s.recipient_type, s.recipient_id, s.not_after, 0, 0, '
    f"CASE WHEN s.in_doubt = 1 THEN '{MAY_HAVE_BEEN_SENT}' ELSE s.reason END, :wall, FALSE FROM staged_mail s "
    "WHERE NOT EXISTS (SELECT 1 FROM delivery d WHERE d.event_id = s.event_id) AND "
)
_QUEUE = f"{_INTO_QUEUE}s.not_after >= :wall AND NOT {_TOO_SOON}"
_QUEUE_UNUSABLE = f"{_INTO_QUEUE}s.recipient_type = ''"
_LEFT_OUT = (
    f"SELECT COUNT(*) FROM staged_mail s WHERE s.not_after >= :wall AND {_TOO_SOON} "  # noqa: S608  # texts of our own
    f"AND NOT EXISTS (SELECT 1 FROM delivery d WHERE d.event_id = s.event_id AND NOT ({_WITHDRAWN}))"
)
_FORGET_SETTLED = "DELETE FROM settled WHERE abandonment IN (SELECT abandonment FROM staged_before)"
_SETTLE = (
    "INSERT INTO settled (abandonment, verb, event_id) SELECT abandonment, verb, event_id FROM staged_outcome WHERE TRUE "
    "ON CONFLICT (abandonment, verb) DO UPDATE SET event_id = excluded.event_id"
)


@dataclass(frozen=True)
class Queued:
    """How many mails were queued that only the new generation has, and how many were left out as too soon after another."""

    count: int = 0
    too_soon: int = 0


class Staged:
    """The mails of a new generation that may be worth sending, and what became of abandonments by the old and the new one."""

    def __init__(self, connection: sa.Connection) -> None:
        self.connection = connection

    def mails(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put mails down: where each lies, `gap` (in which a recipient is mailed once), `in_doubt` where it may have been sent before."""
        self._add(_MAIL, rows)

    def before(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put down abandonments of which the old generation has an outcome: only the new one's count."""
        self._add(_BEFORE, rows)

    def outcomes(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put down what became of abandonments by the new generation."""
        self._add(_OUTCOME, rows)

    def apply(self, wall: int) -> Queued:
        """Have it in the tables, as a part of the transaction that is open; what is past its `not_after` at `wall` is none of it.

        A mail that has a row is kept where it waits or is in doubt, at its new place, since a person may have it sent once more;
        else it is left as it is: what was delivered is never delivered again. One that was withdrawn was not delivered: it is queued as if it had no row. One that may have been
        sent before a backup was put back is queued CLAIMED: `give_up` makes that UNKNOWN. One that can never be sent waits too, with
        its reason, and is none of those that are counted.
        """
        time = {"wall": wall}
        for sql in (_MAILED, _KEEP, _FORGET_WITHDRAWN):
            self.connection.execute(sa.text(sql), time)
        queued = self.connection.execute(sa.text(_QUEUE), time).rowcount
        too_soon = int(self.connection.scalar(sa.text(_LEFT_OUT), time) or 0)
        self.connection.execute(sa.text(_QUEUE_UNUSABLE), time)
        self.connection.execute(sa.text(_FORGET_SETTLED))
        self.connection.execute(sa.text(_SETTLE))
        return Queued(queued, too_soon)

    def _add(self, sql: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            with self.connection.begin():
                self.connection.execute(sa.text(sql), list(rows))


@contextmanager
def staging(database: Database) -> Iterator[Staged]:
    """Have temporary tables on a connection of their own; whatever is done in the end is to be done on that one."""
    with database.alone() as connection:
        with connection.begin():
            for sql in _TABLES:
                connection.execute(sa.text(sql))
        yield Staged(connection)
