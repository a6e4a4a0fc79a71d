"""What a replay found: how each log differs from the live generation, and whose inbox that would change."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from storage.store import Store
from storage.tables import Delivery
from storage.times import now
from tasks.diff import ADDED, REMOVED, Differ, LogDiff, Side
from tasks.replay_plan import Planned
from tasks.topology import Topology

PEOPLE = 20
_DELIVERY: sa.Table = Delivery.__table__  # type: ignore[attr-defined]  # SQLModel hides it from the types
_AT_ONCE = 500


@dataclass(frozen=True)
class Impact:
    """Who would have been mailed who was not, and the other way round; `mails_...` count mails, not people.

    A person whom both generations mail in what is compared, at other times or about other baskets, is in neither list.
    """

    mails_added: int
    mails_removed: int
    newly_mailed: int
    no_longer_mailed: int
    newly: list[str]
    no_longer: list[str]
    sent_already: int
    """Of the mails that are no longer there: those that were sent."""
    too_late: int
    """Of the mails that are added: those that are past their `not_after`, and would never be sent."""

    @property
    def people(self) -> str:
        """How many people it concerns, in words."""
        return (
            f"{self.newly_mailed:,} people would get a mail who now get none, "
            f"{self.no_longer_mailed:,} would get none who now get one"
        )


@dataclass(frozen=True)
class Comparison:
    """The result of a replay."""

    logs: list[LogDiff]
    impact: Impact | None
    """None where nothing that was replayed gives mails."""

    @property
    def is_nothing(self) -> bool:
        """Whether both generations are the same."""
        return all(log.is_nothing for log in self.logs)


def compare(store: Store, topology: Topology, planned: Planned) -> Comparison:
    """Compare a replay's generation with what was live, as far as its plan says."""
    plan, generation = planned.plan, planned.generation
    differ, mails = Differ(plan.since, plan.until), [log for log in plan.logs if log in topology.mail_logs()]
    try:
        found = []
        for name in plan.processors:
            log, source = str(topology.writes(name)), topology.reads(name)
            partitions = {*store.partitions(log, plan.base[log]), *store.partitions(log, generation)}
            sides = []
            for part in sorted(partitions):
                limits: tuple[int | None, int | None] = (None, None)
                if source in plan.logs:
                    limits = plan.ends.get(f"{source}/{part}", 0), store.committed_end(source, part, generation)
                old = Side(store.reader(log, part, plan.base[log]), plan.ends.get(f"{log}/{part}", 0), limits[0])
                new = Side(store.reader(log, part, generation), store.committed_end(log, part, generation), limits[1])
                sides.append((old, new))
            found.append(differ.compare(log, sides, mails=log in mails))
            for old, new in sides:
                old.reader.close()
                new.reader.close()
        return Comparison(found, _impact(store, differ, mails) if mails else None)
    finally:
        differ.close()


def _impact(store: Store, differ: Differ, mails: list[str]) -> Impact:
    # One without a recipient can never be sent, so it is in nobody's inbox.
    mail = f"FROM found WHERE verb = 'EMAIL' AND who <> '' AND kind = ? AND log IN ({', '.join('?' * len(mails))})"
    counts = [
        differ.rows(f"SELECT COUNT(*) {mail}", kind, *mails)[0][0]  # text of our own
        for kind in (ADDED, REMOVED)
    ]
    people = [differ.rows(f"SELECT COUNT(*) {_ONLY}", side)[0][0] for side in ("new", "old")]
    names = [
        [who for (who,) in differ.rows(f"SELECT who {_ONLY} ORDER BY rowid LIMIT {PEOPLE}", side)]
        for side in ("new", "old")
    ]
    late = differ.rows(f"SELECT COUNT(*) {mail} AND not_after < ?", ADDED, *mails, now())[0][0]  # text of our own
    removed = [ident for (ident,) in differ.rows(f"SELECT id {mail}", REMOVED, *mails)]  # text of our own
    return Impact(counts[0], counts[1], people[0], people[1], names[0], names[1], _sent(store, removed), late)


_ONLY = "FROM mailed m WHERE side = ? AND NOT EXISTS (SELECT 1 FROM mailed o WHERE o.who = m.who AND o.side <> m.side)"
"""Whom one generation alone mails."""


def _sent(store: Store, ids: list[str]) -> int:
    sent = 0
    with store.database.read() as connection:
        for start in range(0, len(ids), _AT_ONCE):
            wanted = sa.select(sa.func.count()).where(
                _DELIVERY.c.event_id.in_(ids[start : start + _AT_ONCE]), _DELIVERY.c.state == "SENT"
            )
            sent += int(connection.scalar(wanted) or 0)
    return sent
