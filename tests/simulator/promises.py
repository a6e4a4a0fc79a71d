"""DESIGN's promises as assertions, held after every step against what is committed and what would survive a power loss."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from storage.mails import MAY_HAVE_BEEN_SENT
from storage.segment import segment_path
from tests.simulator.actors import Actors
from tests.simulator.disk import Process
from tests.simulator.lines import tag_of
from tests.simulator.world import BrokenPromiseError, World

DERIVED = ("quarantine", "reactions", "baskets", "anomalies", "reminders")
TABLES = ("customer", "item", "orders", "order_line", "basket_line")
_POSITIONS = 'SELECT processor, log, partition, "offset", tick_offset, lines, processed, quarantined, ignored, derived FROM checkpoint'

_ENDS = 'SELECT log, partition, "end" FROM committed_end'


class Promises:
    """What must hold, and what was seen before."""

    def __init__(self, world: World, actors: Actors) -> None:
        self.world, self.actors = world, actors
        self._committed: dict[tuple[str, int], bytes] = {}
        self._offsets: dict[tuple[str, str, int], tuple[int, int]] = {}
        self._seen: dict[tuple[str, int], int] = {}
        self._durable: dict[tuple[str, int], bytes] = {}
        self._told: dict[int, bytes] = {}
        self._sure = 0
        self._moment: tuple[Any, ...] = ()
        self._positions: list[tuple[Any, ...]] = []
        self._ends: dict[tuple[str, int], int] = {}
        self._needed: dict[tuple[str, int], int] = {}
        self._database = world.database
        world.database.after_commit = self.nothing_rests_on_what_may_be_lost

    def check(self) -> None:
        """After every step.

        Raises:
            BrokenPromiseError: one does not hold.
        """
        self.nothing_rests_on_what_may_be_lost()
        self._nobody_goes_back()
        self._committed_bytes_stay()
        self._confirmed_lines_stay()
        self._no_line_is_there_twice()
        self._at_most_once()

    def check_end(self) -> None:
        """After everything was brought to its end: nothing is missing, and all is as an undisturbed run would have it."""
        self.check()
        self._nothing_is_left()
        self._every_mail_is_accounted_for()
        self._as_undisturbed()

    def _demand(self, holds: bool, what: str) -> None:
        if not holds:
            raise BrokenPromiseError(what)

    def _look(self) -> None:
        """See what is committed, unless no row has changed since the last look."""
        moment = (self.world.database, *self.world.database.moment)
        if moment == self._moment:
            return
        self._moment, self._positions = moment, self.world.rows(_POSITIONS)
        self._ends = {(log, part): end for log, part, end in self.world.rows(_ENDS)}
        self._needed = needed = dict(self._ends)
        for _, log, part, offset, tick_offset, *_ in self._positions:
            needed[log, part] = max(needed.get((log, part), 0), offset)
            needed["clock", 0] = max(needed.get(("clock", 0), 0), tick_offset)

    def nothing_rests_on_what_may_be_lost(self) -> None:
        """No checkpoint, tick or committed end lies beyond what an fsync has covered; after every single commit."""
        self._look()
        for processor, _, _, _, _, lines, done, bad, ignored, _ in self._positions:
            if lines != done + bad + ignored:
                self._demand(False, f"{processor} read {lines}, and accounts for {done + bad + ignored}")
        for (log, part), end in self._not_seen(self._needed):
            there = self.world.disk.log(log, part, durable=False)[:end]
            self._demand(len(there) == end, f"{log}/{part} has {len(there)} bytes, and {end} were relied upon")
            durable = self.world.disk.log(log, part, durable=True)[:end]
            self._demand(durable == there, f"{log}/{part}: of {end} bytes relied upon not all are durable")
            self._seen[log, part] = end

    def _not_seen(self, needed: dict[tuple[str, int], int]) -> list[tuple[tuple[str, int], int]]:
        """What is to be looked at: where nothing was written since the last look, what was durable then is so still."""
        touched, logs = self.world.disk.touched, f"{self.world.home}/logs"
        if touched:
            self._seen = {
                place: end for place, end in self._seen.items()
                if "" not in touched and f"{logs}/{place[0]}/{place[1]}" not in touched
            }  # fmt: skip
            touched.clear()
        return [(place, end) for place, end in needed.items() if end > self._seen.get(place, -1)]

    def _nobody_goes_back(self) -> None:
        """No checkpoint lies before the one that was committed before it, unless an older database was put back."""
        if self._database is not self.world.database:
            self._database, self._offsets = self.world.database, {}
            self._database.after_commit = self.nothing_rests_on_what_may_be_lost
        self._look()
        for processor, log, part, offset, tick_offset, *_ in self._positions:
            before = self._offsets.get((processor, log, part), (0, 0))
            self._demand(offset >= before[0] and tick_offset >= before[1], f"the checkpoint of {processor} went back")
            self._offsets[processor, log, part] = offset, tick_offset

    def _committed_bytes_stay(self) -> None:
        self._look()
        for (log, part), end in self._ends.items():
            there = self.world.disk.log(log, part, durable=False)
            before = self._committed.get((log, part), b"")
            self._demand(there.startswith(before), f"{log}/{part}: committed bytes have changed")
            if end > len(before):
                self._committed[log, part] = there[:end]

    def _confirmed_lines_stay(self) -> None:
        places = {(log, part) for log, part, _, _ in self.actors.confirmed}
        durable = {(log, part): self.world.disk.log(log, part, durable=True) for log, part in places}
        if not all(durable[place].startswith(before) for place, before in self._durable.items()):
            self._sure = 0  # else what was there at the last look is there still
        for log, part, offset, line in self.actors.confirmed[self._sure :]:
            holds = durable[log, part].startswith(line, offset)
            self._demand(holds, f"{log}/{part}:{offset}: a confirmed line is not durable: {line!r}")
        self._durable, self._sure = durable, len(self.actors.confirmed)

    def _no_line_is_there_twice(self) -> None:
        parts = range(self.world.settings.partitions)
        there = {part: self.world.disk.log("events", part, durable=False) for part in parts}
        if there == self._told:
            return
        found = (tag_of(line) for log in there.values() for line in log.split(b"\n"))
        tags = Counter(tag for tag in found if tag is not None)
        self._demand(max(tags.values(), default=0) <= 1, "a line is in the log twice")
        self._told = there

    def _at_most_once(self) -> None:
        server = self.world.server
        self._demand(not server.broken, "; ".join(server.broken))
        self._demand(max(server.accepted.values(), default=0) <= 1, f"mailed twice: {server.accepted}")

    def _nothing_is_left(self) -> None:
        found = {(p[0], p[2]): p for p in self._positions}
        for name, make in self.world.topology.processors.items():
            processor = make()
            for part in range(self.world.settings.partitions):
                log = self.world.disk.log(processor.reads, part, durable=False)
                if processor.reads in DERIVED:
                    log = log[: self._ends.get((processor.reads, part), 0)]
                if not log:
                    continue
                position = found[name, part]
                self._demand(position[3] == log.rfind(b"\n") + 1, f"{name} is at {position[3]} of {len(log)}")
                self._demand(position[5] == log.count(b"\n"), f"{name} read {position[5]} of {log.count(10)} lines")
                if processor.writes is not None:
                    end = self._ends.get((processor.writes, part), 0)
                    given = self.world.disk.log(processor.writes, part, durable=False)[:end].count(b"\n")
                    self._demand(position[9] == given, f"{name} gave {position[9]}, its log has {given}")

    def _every_mail_is_accounted_for(self) -> None:
        """Each EMAIL is in one state, the log of outcomes says the same, and a mail sent is never one that waits."""
        rows = self.world.rows("SELECT event_id, state, reason FROM delivery")
        states = {event_id: state for event_id, state, _ in rows}
        in_doubt = {event_id for event_id, state, why in rows if state == "UNKNOWN" or why.endswith(MAY_HAVE_BEEN_SENT)}
        wanted, outcomes = set(), Counter[str]()
        for part in range(self.world.settings.partitions):
            for log in ("reactions", "reminders"):
                there = self.world.disk.log(log, part, durable=False)[: self._ends.get((log, part), 0)]
                wanted |= {json.loads(line)["event"]["id"] for line in there.splitlines()}
            there = self.world.disk.log("deliveries", part, durable=False)
            for line in there[: self._ends.get(("deliveries", part), 0)].splitlines():
                outcome = json.loads(line)
                outcomes[outcome["object"]["id"]] += 1
                self._demand(states[outcome["object"]["id"]] == outcome["verb"], f"a row does not say {line!r}")
        self._demand(set(states) == wanted, f"mails without an event, or events without a mail: {set(states) ^ wanted}")
        for event_id, state in states.items():
            self._demand(
                outcomes[event_id] == (state != "WAITING"), f"{event_id} is {state}: {outcomes[event_id]} outcomes"
            )
            accepted = self.world.server.accepted[event_id]
            holds = accepted == 1 if state == "SENT" else accepted == 0 or event_id in in_doubt
            self._demand(holds, f"{event_id} is {state}, and was accepted {accepted} times")

    def _as_undisturbed(self) -> None:
        """Derived logs and rows, byte for byte, by a run over the same log and ticks in another HOME, in one go."""
        world = self.world
        other = World(_folder(world.home.parent / "undisturbed"), world.random, partitions=world.settings.partitions)
        try:
            for log, part in (("events", part) for part in range(world.settings.partitions)):
                _copy(world, other, log, part)
            _copy(world, other, "clock", 0)
            with world.seam.serving(other.disk):
                other.act(Process("undisturbed"), lambda: Actors(other)._to_end(_all(other), None))
            for log in DERIVED:
                for part in range(world.settings.partitions):
                    mine = world.disk.log(log, part, durable=False)[: self._ends.get((log, part), 0)]
                    theirs = other.disk.log(log, part, durable=False)
                    self._demand(mine == theirs, f"{log}/{part} is not an undisturbed run's:\n{mine!r}\n{theirs!r}")
            for table in TABLES if world.settings.partitions == 1 else ():  # items are of no partition
                mine, theirs = (sorted(w.rows(f"SELECT * FROM {table}"), key=repr) for w in (world, other))  # noqa: S608  # names of ours
                self._demand(mine == theirs, f"the rows of {table} are not an undisturbed run's")
        finally:
            other.close()


def _copy(world: World, other: World, log: str, part: int) -> None:
    """Have a log in another HOME, as one segment: where a new one began is nothing that a derived byte may show."""
    if data := world.disk.log(log, part, durable=False):
        other.disk.give(("logs", log, str(part)), segment_path(Path(), 0).name, data)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _all(world: World) -> list[str]:
    return [*world.topology.on_raw_logs(), *world.topology.on_derived_logs()]
