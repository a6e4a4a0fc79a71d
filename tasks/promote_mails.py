"""What a promotion means for mails: which ones are added, which ones stay, and what became of abandonments.

Only the end of each log is looked at: what is older is past its `not_after`, and too old to be sent. How long a mail of a processor
of one's own is worth sending nobody knows before it is read: of those all are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from storage.batches import BatchCache
from storage.clock import Clock
from storage.event import MAX_DERIVED_DEPTH, Event
from storage.mails import MAY_HAVE_BEEN_SENT
from storage.outbox import Outbox
from storage.reader import PartitionReader
from storage.staged import Staged
from storage.times import DAY, now
from tasks.diff import parse_line
from tasks.intake import BASKETS, OUTCOMES, mail_row, refuse, settled_row
from tasks.replay_plan import Plan
from tasks.restored import Restores
from tasks.run import Run
from tasks.topology import DECIDES

_MARGIN = 7 * DAY  # beyond the longest `not_after` that was ever recorded
_NEAR = 65_536


class Staging:
    """Puts together what a move from `old` to `new` generations means for mails. May be asked before anything is locked, and again."""

    def __init__(self, run: Run, staged: Staged, plan: Plan, old: Mapping[str, int], new: Mapping[str, int]) -> None:
        self._store, self._topology, self._staged, self._plan = run.store, run.topology, staged, plan
        self._old, self._new, self._restores = old, new, Restores(run)
        self._since = self._worth_a_look()
        self._at: dict[tuple[str, int, int], tuple[int, int]] = {}

    def read_on(self) -> None:
        """Take in what is committed by now; what was taken in before is not read again."""
        for name in self._plan.processors:
            log = str(self._topology.writes(name))
            if log in self._topology.mail_logs():
                gap = int(getattr(self._topology.make(name).settings, "gap", 0))
                for part, events in self._events(log, self._new[log]):
                    wall, mails = now(), (self._mail(e, log, part, gap) for e in events if e.verb == "EMAIL")
                    self._staged.mails([m for m in mails if m["not_after"] >= wall or not m["recipient_type"]])
        if BASKETS in self._plan.logs:
            for _, events in self._events(BASKETS, self._old[BASKETS]):
                self._staged.before([settled_row(event) for event in events if event.verb in OUTCOMES])
            for _, events in self._events(BASKETS, self._new[BASKETS]):
                self._staged.outcomes([settled_row(event) for event in events if event.verb in OUTCOMES])

    def settle(self, outbox: Outbox) -> list[str]:
        """After the move: settle what is in doubt and what can never be sent. Gives what a person should be told of that.

        Where a crash comes before it, the next `deliver` does it; what can never be sent is then SUPPRESSED as too old, with its reason.
        """
        outbox.give_up(MAY_HAVE_BEEN_SENT)
        return refuse(self._store.database, outbox)

    def _worth_a_look(self) -> dict[str, int]:
        """From which log time on each log of the plan may have a mail that is still worth sending, or what became of its cause."""
        names = [name for name, _ in DECIDES["not_after"]]
        with Clock(self._store, self._topology.raw_logs()) as clock:
            settings = [line["settings"] for line in clock.versions() if line["processor"] in names]
        settings += [self._plan.changed.get(name, {}) for name in names]
        today = self._store.settings.not_after
        first = now() - _MARGIN - max([today, *(int(each.get("not_after", 0)) for each in settings)])
        mail_logs = set(self._topology.mail_logs())
        writers = {str(self._topology.writes(name)): name for name in self._plan.processors}
        since = {log: 0 if log in mail_logs and name not in names else first for log, name in writers.items()}
        return since | {BASKETS: min([first, *since.values()])}

    def _mail(self, event: Event, log: str, partition: int, gap: int) -> dict[str, Any]:
        row = mail_row(event, log, partition, self._new[log])
        in_doubt = row["not_after"] >= now() and self._restores.may_have_been_sent_at(log, partition, event.offset)
        return row | {"gap": gap, "in_doubt": int(in_doubt)}

    def _events(self, log: str, generation: int) -> Iterator[tuple[int, list[Event]]]:
        """The events of a derived log that came in lately, by partition and in pieces; a few before that may be among them."""
        for partition in self._store.partitions(log, generation):
            reader, place = self._store.reader(log, partition, generation), (log, generation, partition)
            end = self._store.committed_end(log, partition, generation)
            cache = BatchCache(1 << 20, 1 << 40, MAX_DERIVED_DEPTH, kept=1)
            try:
                offset, clock = self._at.get(place) or (_halve(reader, end, self._since[log]), 0)
                while batch := cache.get(reader, log, partition, offset, end, clock):
                    yield partition, batch.events
                    offset, clock = batch.end, batch.clock
                self._at[place] = offset, clock
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
