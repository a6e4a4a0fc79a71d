"""What a promotion means for mails: which ones are added, which ones stay, and what became of abandonments.

Only the end of each log is looked at: what is older is past its `not_after`, and too old to be sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from storage.batches import BatchCache
from storage.event import MAX_DERIVED_DEPTH, Event
from storage.mails import CLAIMED, MAY_HAVE_BEEN_SENT, SENT, SUPPRESSED, UNKNOWN, WAITING, WITHDRAWN
from storage.reader import PartitionReader
from storage.store import Store
from storage.tables import Delivery
from storage.times import DAY, now
from tasks.diff import parse_line
from tasks.intake import BASKETS, OUTCOMES, mail_row, settled_row
from tasks.replay_plan import Plan
from tasks.restored import Restores
from tasks.topology import Topology

_DELIVERY: sa.Table = Delivery.__table__  # type: ignore[attr-defined]  # SQLModel hides it from the types
_MARGIN = 7 * DAY  # beyond the `not_after` of today: an earlier setting may have been longer
_NEAR = 65_536


@dataclass
class Mails:
    """The mails of a new generation that are still worth sending."""

    queued: list[dict[str, Any]] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    too_soon: int = 0


def mails_of(store: Store, topology: Topology, plan: Plan, new: Mapping[str, int], restores: Restores) -> Mails:
    """By the difference: mails that no row knows are to be queued, those that wait are to be sent from their new place.

    One that may have been sent before a backup was put back is queued CLAIMED: `give_up` makes that UNKNOWN.
    """
    found, wall = Mails(), now()
    for name in plan.processors:
        log = str(topology.writes(name))
        if log not in topology.mail_logs():
            continue
        gap = int(getattr(topology.make(name).settings, "gap", 0))
        for part in store.partitions(log, new[log]):
            for event in _recent(store, log, part, new[log], wall - _reach(topology)):
                if event.verb != "EMAIL":
                    continue
                row = mail_row(event, log, part, new[log])
                if row["not_after"] >= wall:
                    _sort(store, found, row, gap, wall, restores)
    return found


def outcomes_of(
    store: Store, topology: Topology, plan: Plan, old: Mapping[str, int], new: Mapping[str, int]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Which abandonments' outcomes are to be forgotten, and what became of abandonments by the new generation."""
    if BASKETS not in plan.logs:
        return [], []
    since = now() - _reach(topology)
    before = [
        settled_row(event)["abandonment"]
        for part in store.partitions(BASKETS, old[BASKETS])
        for event in _recent(store, BASKETS, part, old[BASKETS], since)
        if event.verb in OUTCOMES
    ]
    after = [
        settled_row(event)
        for part in store.partitions(BASKETS, new[BASKETS])
        for event in _recent(store, BASKETS, part, new[BASKETS], since)
        if event.verb in OUTCOMES
    ]
    return sorted(set(before)), list({(row["abandonment"], row["verb"]): row for row in after}.values())


def _sort(store: Store, found: Mails, row: dict[str, Any], gap: int, wall: int, restores: Restores) -> None:
    """A mail that has a row is kept where it waits, and else left as it is: what was delivered is never delivered again.

    One that was withdrawn was not delivered: it is queued as if it had no row.
    """
    wanted = sa.select(_DELIVERY.c.state, _DELIVERY.c.reason).where(_DELIVERY.c.event_id == row["event_id"])
    with store.database.read() as connection:
        known = connection.execute(wanted).first()
        state = None if known is None or tuple(known) == (SUPPRESSED, WITHDRAWN) else known.state
        mailed = None
        if state is None and gap:
            mailed = connection.scalar(
                sa.select(_DELIVERY.c.event_id)
                .where(
                    _DELIVERY.c.log == row["log"],
                    _DELIVERY.c.recipient_type == row["recipient_type"],
                    _DELIVERY.c.recipient_id == row["recipient_id"],
                    _DELIVERY.c.state.in_((SENT, CLAIMED, UNKNOWN)),
                    _DELIVERY.c.changed_at > wall - gap,
                )
                .limit(1)
            )
    if state == WAITING:
        changing = ("event_id", "generation", "partition", "offset", "recipient_type", "recipient_id", "not_after")
        found.kept.append({key: row[key] for key in changing})
    elif mailed is not None:
        found.too_soon += 1
    elif state is None:
        if restores.may_have_been_sent_at(row["log"], row["partition"], row["offset"]):
            row |= {"state": CLAIMED, "reason": MAY_HAVE_BEEN_SENT}
        found.queued.append(row)


def _reach(topology: Topology) -> int:
    return _MARGIN + max((int(getattr(p.settings, "not_after", 0)) for p in topology.all()), default=0)


def _recent(store: Store, log: str, partition: int, generation: int, since: int) -> Iterator[Event]:
    """The events of a derived log that came in at `since` or later; a few before that may be among them."""
    reader, clock = store.reader(log, partition, generation), 0
    end = store.committed_end(log, partition, generation)
    cache = BatchCache(1 << 20, 1 << 40, MAX_DERIVED_DEPTH, kept=1)
    try:
        offset = _halve(reader, end, since)
        while batch := cache.get(reader, log, partition, offset, end, clock):
            yield from batch.events
            offset, clock = batch.end, batch.clock
    finally:
        reader.close()


def _halve(reader: PartitionReader, end: int, since: int) -> int:
    """The start of a line not far before the first one that came in at `since`: a derived log is in that order."""
    low, high = 0, end
    while high - low > _NEAR:
        middle = reader.line_start((low + high) // 2)
        if middle <= low:
            return low
        if parse_line(reader.line(middle), middle, derived_source=False).at < since:
            low = middle
        else:
            high = middle
    return low
