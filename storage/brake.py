"""The brake of delivery: one row that says whether mails may be claimed, and what "the usual" is.

PAUSED by a person, STOPPED by delivery itself, else RUNNING. `Outbox.claim` asks in the very statement that claims.
"""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from storage.database import Database
from storage.mails import CLAIMED, LONGEST_WAIT, MAY_HAVE_BEEN_SENT, SENT, SENT_BEFORE, UNKNOWN, WAITING
from storage.tables import Contact, Delivery, LiveGeneration
from storage.times import now

DELIVER = "deliver"
RUNNING, PAUSED, STOPPED = "RUNNING", "PAUSED", "STOPPED"
HOUR, BUCKET = 3_600_000, 600_000
LOOK_BACK = 7 * 24 * HOUR
"""How far back "the usual" looks, and how long tallies are kept."""

_DELIVERY: sa.Table = Delivery.__table__  # type: ignore[attr-defined]  # SQLModel hides it from the types
_CONTACT: sa.Table = Contact.__table__  # type: ignore[attr-defined]  # likewise
_LIVE: sa.Table = LiveGeneration.__table__  # type: ignore[attr-defined]  # likewise
_READ = sa.text("SELECT state, reason, since FROM brake WHERE name = :name")
_UPSERT = (
    "INSERT INTO brake (name, state, reason, since) VALUES (:name, :state, :reason, :since) "
    "ON CONFLICT (name) DO UPDATE SET state = excluded.state, reason = excluded.reason, since = excluded.since"
)
_SET = sa.text(_UPSERT)
_HOLD = sa.text(f"{_UPSERT} WHERE brake.state = 'RUNNING'")
_CLEAR = sa.text("UPDATE delivery SET cleared = :yes WHERE state = 'WAITING' AND cleared = :no")
_SENT_BY_HOUR = sa.text(
    "SELECT COUNT(*) FROM delivery WHERE state = 'SENT' AND changed_at >= :first AND changed_at < :last "
    "AND reason <> :settled GROUP BY changed_at / 3600000"
)
_TALLY_BY_HOUR = sa.text(
    "SELECT SUM(count) FROM tally WHERE what = :what AND bucket >= :first AND bucket < :last GROUP BY bucket / 3600000"
)
_TALLY_SINCE = sa.text("SELECT SUM(count) FROM tally WHERE what = :what AND bucket >= :first")

_MAILED_SINCE = sa.select(sa.func.count()).where(
    _DELIVERY.c.state.in_((SENT, CLAIMED, UNKNOWN)),
    _DELIVERY.c.changed_at >= sa.bindparam("since"),
    _DELIVERY.c.changed_at < sa.bindparam("beyond"),  # a clock that was ahead has set it
    _DELIVERY.c.cleared.is_(False),
    _DELIVERY.c.reason.not_in([MAY_HAVE_BEEN_SENT, SENT_BEFORE]),  # nobody knows when
)


@dataclass(frozen=True)
class Brake:
    """Whether mails may be claimed, why not, and since when that is so (milliseconds)."""

    state: str = RUNNING
    reason: str = ""
    since: int = 0

    @property
    def is_on(self) -> bool:
        """Whether mails are held."""
        return self.state != RUNNING


def read_brake(database: Database) -> Brake:
    """The brake as it is now."""
    with database.read() as connection:
        return _brake(connection)


def put_on(database: Database, state: str, reason: str) -> Brake:
    """Hold all mails, PAUSED or STOPPED; where they are held already, nothing changes. Gives the brake as it is then.

    Once this returns, no mail is claimed; one that was claimed before may still be on its way.
    """
    with database.write() as connection:
        # Not looked at first: of two at once the second would replace the first.
        connection.execute(_HOLD, _row(Brake(state, reason, now())))
        return _brake(connection)


def release(database: Database) -> int:
    """Let mails be claimed again; gives how many had been held, which the brake will not count again."""
    with database.write() as connection:
        connection.execute(_SET, _row(Brake(RUNNING, "", now())))
        return connection.execute(_CLEAR, {"yes": True, "no": False}).rowcount


def usual_mails(database: Database, wall: int) -> float:
    """Mails sent in a usual hour: the median of the hours of the last 7 days in which there were any, but for the last one."""
    with database.read() as connection:
        hours = {"first": wall - LOOK_BACK, "last": wall - HOUR, "settled": SENT_BEFORE}
        return _median(connection.scalars(_SENT_BY_HOUR, hours))


def usual_tally(database: Database, what: str, before: int) -> float:
    """How many there are in a usual hour, likewise, up to `before`."""
    with database.read() as connection:
        return _median(connection.scalars(_TALLY_BY_HOUR, {"what": what, "first": before - LOOK_BACK, "last": before}))


def tally_since(database: Database, what: str, since: int) -> int:
    """How many there were since then, to the ten minutes."""
    with database.read() as connection:
        return int(connection.scalar(_TALLY_SINCE, {"what": what, "first": since // BUCKET * BUCKET}) or 0)


def mailed_since(database: Database, since: int) -> int:
    """How many mails went out since then, or may have, but for those that a person had released."""
    with database.read() as connection:
        return int(connection.scalar(_MAILED_SINCE, {"since": since, "beyond": now() + HOUR}) or 0)


def would_mail(database: Database, wall: int, allow: Sequence[str], limit: int) -> int:
    """How many mails are due that nobody has released and that, as far as the address book tells, would be sent."""
    with database.read() as connection:
        due = {"wall": wall, "beyond": wall + LONGEST_WAIT, "limit": limit}
        return int(connection.scalar(_would_mail(tuple(allow)), due) or 0)


@functools.cache
def _would_mail(allow: tuple[str, ...]) -> sa.Select[Any]:
    address, wall = sa.func.lower(sa.func.trim(_CONTACT.c.email)), sa.bindparam("wall", type_=sa.BigInteger)
    # The database makes both small, whatever it knows of capitals: what `is_allowed` takes is equal so.
    allowed = [
        address.like(sa.func.lower("%" + re.sub("([/%_])", r"/\1", entry)), escape="/")
        if entry.startswith("@")
        else address == sa.func.lower(entry)
        for entry in allow
    ]
    mine = (_CONTACT.c.type == _DELIVERY.c.recipient_type, _CONTACT.c.id == _DELIVERY.c.recipient_id)
    live = sa.select(_LIVE.c.generation).where(_LIVE.c.log == _DELIVERY.c.log).scalar_subquery()
    wanted = (
        sa.select(sa.literal(1))
        .select_from(_DELIVERY.join(_CONTACT, sa.and_(*mine)))
        .where(_DELIVERY.c.state == WAITING, _DELIVERY.c.not_after >= wall)
        .where(sa.or_(_DELIVERY.c.next_at <= wall, _DELIVERY.c.next_at > sa.bindparam("beyond", type_=sa.BigInteger)))
        .where(_DELIVERY.c.cleared.is_(False), _CONTACT.c.unsubscribed.is_(False))
        .where(_DELIVERY.c.generation == sa.func.coalesce(live, 1))  # else it is withdrawn
        .where(sa.or_(*allowed) if allowed else sa.true())
        .limit(sa.bindparam("limit", type_=sa.Integer))
    )
    return sa.select(sa.func.count()).select_from(wanted.subquery())


def _brake(connection: sa.Connection) -> Brake:
    row = connection.execute(_READ, {"name": DELIVER}).first()
    return Brake(*row) if row is not None else Brake()


def _row(brake: Brake) -> dict[str, Any]:
    return {"name": DELIVER, **vars(brake)}


def _median(counts: Iterable[int]) -> float:
    return float(statistics.median(found) if (found := [int(count) for count in counts]) else 0)
