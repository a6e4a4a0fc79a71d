"""The mails on their way: one row each, and a log of what became of them.

A row is claimed, durably, before anything is sent. What became of it goes to the log `deliveries` first, and to the row
and the log's committed end in one transaction after that; so an unconfirmed tail is news, and is adopted at the next start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import sqlalchemy as sa

from storage.brake import HOUR, LOOK_BACK
from storage.commit import Pending, Position, commit, set_end
from storage.contacts import Entry
from storage.database import Database
from storage.derived import DerivedWriter, whole_lines
from storage.errors import ConflictError
from storage.mails import (
    AGAIN,
    CLAIMED,
    LONGEST_WAIT,
    MAY_HAVE_BEEN_SENT,
    UNKNOWN,
    WAITING,
    WITHDRAWN,
    Mail,
    Result,
    outcome_line,
    outcome_row,
)  # fmt: skip
from storage.reader import PartitionReader
from storage.restore import last_restored
from storage.steps import reached
from storage.store import Store
from storage.tables import Contact, Delivery
from storage.times import now
from storage.written_by import Author, note

_DELIVERY: sa.Table = Delivery.__table__  # type: ignore[attr-defined]  # SQLModel hides it from the types
_CONTACT: sa.Table = Contact.__table__  # type: ignore[attr-defined]  # likewise
_INSERT = (
    'INSERT INTO delivery (event_id, state, log, generation, partition, "offset", recipient_type, recipient_id, not_after, '
    "next_at, attempts, reason, changed_at) VALUES (:event_id, :state, :log, :generation, :partition, :offset, "
    ":recipient_type, :recipient_id, :not_after, 0, 0, :reason, :changed_at) ON CONFLICT (event_id) "
)
# The row of a mail that was withdrawn, and so never sent: what is live has it after all, so it is as new.
_FORGET_WITHDRAWN = "DELETE FROM delivery WHERE event_id = :event_id AND state = 'SUPPRESSED' AND reason = :withdrawn"
# A row that only the log `deliveries` knew of learns whom it is for; one that waits, where its mail lies now.
_TAKE_IN = _INSERT + (
    'DO UPDATE SET generation = excluded.generation, partition = excluded.partition, "offset" = excluded."offset", '
    "recipient_type = excluded.recipient_type, recipient_id = excluded.recipient_id, not_after = excluded.not_after "
    "WHERE delivery.not_after = 0 OR delivery.state = 'WAITING'"
)
_ADOPT = sa.text(_INSERT + "DO NOTHING")
_SETTLED = (
    "INSERT INTO settled (abandonment, verb, event_id) VALUES (:abandonment, :verb, :event_id) "
    "ON CONFLICT (abandonment, verb) DO NOTHING"
)
_TALLY = (
    "INSERT INTO tally (what, bucket, count) VALUES (:what, :bucket, :count) "
    "ON CONFLICT (what, bucket) DO UPDATE SET count = tally.count + excluded.count"
)
_FORGET_TALLIES = "DELETE FROM tally WHERE bucket < :before"
# The brake is asked in the statement that claims: once it is on, nothing is claimed any more.
_CLAIM = sa.text(
    "UPDATE delivery SET state = 'CLAIMED', attempts = attempts + 1, reason = '', changed_at = :wall "
    "WHERE event_id = :event_id AND state = 'WAITING' "
    "AND NOT EXISTS (SELECT 1 FROM brake WHERE name = 'deliver' AND state <> 'RUNNING')"
)
_FORGET_DECISION = sa.text("DELETE FROM decision WHERE event_id = :event_id")
# Made once: SQLAlchemy takes longer to make a statement than SQLite to run it.
_DUE = (
    sa.select(_DELIVERY)
    .where(_DELIVERY.c.state == WAITING)
    .where(sa.or_(_DELIVERY.c.next_at <= sa.bindparam("wall"), _DELIVERY.c.next_at > sa.bindparam("beyond")))
    .where(
        sa.or_(_DELIVERY.c.recipient_type != "", _DELIVERY.c.reason != AGAIN)
    )  # whom it is for is still to be derived
    .order_by(_DELIVERY.c.next_at, _DELIVERY.c.log, _DELIVERY.c.partition, _DELIVERY.c.offset)
    .limit(sa.bindparam("limit", type_=sa.Integer))
)
_CLAIMED = sa.select(_DELIVERY).where(_DELIVERY.c.state == CLAIMED)
_CLAIMED_FOR = _CLAIMED.where(_DELIVERY.c.reason == sa.bindparam("reason"))
# A row that only the log `deliveries` knew of has no recipient.
_IS_KNOWN = sa.text("SELECT 1 FROM delivery WHERE event_id = :event_id AND recipient_type <> ''")
_IS_WAITING = sa.text("SELECT 1 FROM delivery WHERE event_id = :event_id AND state = 'WAITING'")
_UPDATE = sa.update(_DELIVERY).where(_DELIVERY.c.event_id == sa.bindparam("its_id"))
_COUNTS = sa.text("SELECT state, COUNT(*) FROM delivery GROUP BY state")
_ADDRESS = sa.select(_CONTACT.c.email, _CONTACT.c.unsubscribed).where(
    _CONTACT.c.type == sa.bindparam("type"), _CONTACT.c.id == sa.bindparam("id")
)
_SETTLED_BY = sa.text("SELECT verb FROM settled WHERE abandonment = :abandonment")
_ORDERED = sa.text("SELECT at, id FROM orders WHERE customer = :customer AND at >= :started ORDER BY at")


class Outbox:
    """The queue of mails. Its user holds the lock of `deliver`, so there is one."""

    def __init__(self, store: Store, log: str, author: Author | None = None) -> None:
        self.store, self.log, self._author = store, log, author
        self._noted: set[int] = set()
        self._writers: dict[int, DerivedWriter] = {}

    @property
    def _database(self) -> Database:
        return self.store.database

    def take_in(
        self,
        source: PartitionReader,
        position: Position,
        mails: Sequence[Mapping[str, Any]],
        settled: Sequence[Mapping[str, Any]],
        tallies: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Queue what was read up to `position`, each event once, whatever was read before; count what is to be counted.

        A mail is WAITING, or CLAIMED where it may have been sent before; `give_up` makes that UNKNOWN. What is live has
        these mails: one that waited for another generation waits for this one, and one that was withdrawn waits again.
        """
        back = [{"event_id": mail["event_id"], "withdrawn": WITHDRAWN} for mail in mails]
        old = [{"before": now() - LOOK_BACK - HOUR}] if tallies else []
        statements = (
            (_FORGET_WITHDRAWN, back), (_TAKE_IN, mails), (_SETTLED, settled), (_TALLY, tallies), (_FORGET_TALLIES, old),
        )  # fmt: skip
        pending: list[Any] = [(sql, rows) for sql, rows in statements if rows]
        commit(self._database, source, None, position, Pending(statements=pending))

    def waiting(self, wall: int, limit: int) -> list[Mail]:
        """The mails to be tried now, oldest first; those too that wait for a time that a clock which was ahead has set."""
        due = {"wall": wall, "beyond": wall + LONGEST_WAIT, "limit": limit}
        with self._database.read() as connection:
            return [Mail(**row) for row in connection.execute(_DUE, due).mappings()]

    def claim(self, mail: Mail) -> bool:
        """Note durably that `mail` is about to be sent: from here on a crash leaves it UNKNOWN, never sent again.

        False where the brake is on: nothing has changed.

        Raises:
            ConflictError: another run has taken it.
        """
        with self._database.write() as connection:
            done = connection.execute(_CLAIM, {"event_id": mail.event_id, "wall": now()}).rowcount
            if not done and connection.scalar(_IS_WAITING, {"event_id": mail.event_id}) is None:
                raise ConflictError(
                    "another run has taken this mail",
                    where=mail.event_id,
                    expected=WAITING,
                    do="This run has not sent it; the other one goes on",
                )
        reached("mail-claimed")
        return done == 1

    def put_back(self, mail: Mail, next_at: int, reason: str) -> None:
        """Let a claimed mail wait again: it is certain that it was not sent."""
        self._set(mail, state=WAITING, next_at=next_at, reason=reason)

    def settle(self, results: Sequence[Result]) -> None:
        """Write down what became of mails, in the log and then in their rows."""
        for partition in sorted({result.mail.partition for result in results}):
            mine = [result for result in results if result.mail.partition == partition]
            end = self.store.committed_end(self.log, partition)
            data = b"".join(outcome_line(result) for result in mine)
            self._writer(partition).extend(end, data, may_differ=False)
            reached("outcome-logged")
            with self._database.write() as connection:
                for result in mine:
                    self._set_outcome(connection, result.mail.event_id, result.state, result.reason)
                set_end(connection, self.log, 1, partition, end + len(data))
                if self._author is not None and partition not in self._noted:
                    note(connection, self._author, self.log, end, partition=partition)
            self._noted.add(partition)
            reached("outcome-committed")

    def recover(self) -> int:
        """After a crash: adopt what the log says of mails whose row does not know yet; the other claims are UNKNOWN.

        Gives how many became UNKNOWN.
        """
        for partition in self.store.partitions(self.log):
            self._adopt_tail(partition)
        return self.give_up()

    def give_up(self, reason: str | None = None) -> int:
        """Settle claims as UNKNOWN, all of them or those of one `reason`; gives how many."""
        with self._database.read() as connection:
            rows = (
                connection.execute(_CLAIMED) if reason is None else connection.execute(_CLAIMED_FOR, {"reason": reason})
            )
            claimed = [Mail(**row) for row in rows.mappings()]
        if claimed:
            died = "the sender died while it was sending"
            self.settle([Result(mail, UNKNOWN, mail.reason or died) for mail in claimed])
        return len(claimed)

    def contact(self, mail: Mail) -> Entry | None:
        """Where the recipient of a mail is reached."""
        whose = {"type": mail.recipient_type, "id": mail.recipient_id}
        with self._database.read() as connection:
            row = connection.execute(_ADDRESS, whose).first()
        if row is None:
            return None
        return Entry(mail.recipient_type, mail.recipient_id, *row)

    def settled_by(self, abandonment: str) -> set[str]:
        """Which verbs the log has shown for an abandonment since it was flagged."""
        with self._database.read() as connection:
            return set(connection.scalars(_SETTLED_BY, {"abandonment": abandonment}))

    def ordered(self, customer: str, started: int, last: int, offset: int) -> int | None:
        """When a customer ordered what was left behind at `last`, by the rows of `normalise`; None if never.

        That is after `last`; or since `started`, and only heard of behind the basket's last event, at `offset`: an order that came late.
        """
        with self._database.read() as connection:
            rows = connection.execute(_ORDERED, {"customer": customer, "started": started}).all()
        return next((at for at, id in rows if at > last or int(id.rpartition(":")[2]) > offset), None)

    def counts(self) -> dict[str, int]:
        """How many mails are in each state."""
        with self._database.read() as connection:
            rows = connection.execute(_COUNTS)
            return {state: count for state, count in rows}  # noqa: C416  # rows are not pairs to the type checker

    def _adopt_tail(self, partition: int) -> None:
        end = self.store.committed_end(self.log, partition)
        tail = self._writer(partition).tail(end)
        whole = whole_lines(tail)
        if len(tail) > whole:
            self._writer(partition).cut(end + whole)  # half a line was never anybody's news
        if not whole:
            return
        restored = last_restored(self._database)
        with self._database.write() as connection:
            for line in tail[:whole].splitlines():
                event = orjson.loads(line)
                row = outcome_row(event)
                if row["reason"] == AGAIN and (
                    connection.scalar(_IS_KNOWN, row) is None or (restored and event["context"]["at"] <= restored.at)
                ):  # whoever wrote that line may have sent it once more, and died before the next line
                    row |= {"state": CLAIMED, "reason": MAY_HAVE_BEEN_SENT}
                if row["reason"] != AGAIN:
                    connection.execute(_ADOPT, [row])
                # It became so then, not now: what was sent yesterday is none of the mails of this hour.
                self._set_outcome(connection, row["event_id"], row["state"], row["reason"], row["changed_at"])
            set_end(connection, self.log, 1, partition, end + whole)

    def _set_outcome(
        self, connection: sa.Connection, event_id: str, state: str, reason: str, at: int | None = None
    ) -> None:
        """What the log says of a mail, into its row, as of `at` or now; a person's decision about it is carried out by that."""
        values = {"state": WAITING, "next_at": 0} if reason == AGAIN else {"state": state}
        self._update(connection, event_id, **values, reason=reason, changed_at=now() if at is None else at)
        connection.execute(_FORGET_DECISION, {"event_id": event_id})

    def _set(self, mail: Mail, **values: Any) -> None:
        with self._database.write() as connection:
            self._update(connection, mail.event_id, **values, changed_at=now())

    def _update(self, connection: sa.Connection, event_id: str, **values: Any) -> None:
        connection.execute(_UPDATE, {**values, "its_id": event_id})

    def _writer(self, partition: int) -> DerivedWriter:
        if partition not in self._writers:
            settings = self.store.settings
            self._writers[partition] = DerivedWriter(
                self.store.directory(self.log, partition),
                f"{self.log}/{partition}",
                limit=settings.segment_bytes,
                daily=settings.segment_daily,
                archive=lambda: self.store.archive,
            )
        return self._writers[partition]
