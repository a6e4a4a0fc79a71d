"""Promotion and rollback: another generation becomes live, in one transaction, and who follows goes on with it.

Whoever follows lets go of its lock while the promotion lock is held. So only what came in meanwhile is left to be caught
up with under the locks, and the schedule waits for that and for one transaction. Nothing here can send a mail: what the
new generation adds is queued, by the difference, and `deliver` decides.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import msgspec

from storage.clock import Clock
from storage.errors import ConflictError, UsageError
from storage.generations import (
    DISCARDED,
    LIVE,
    READY,
    Move,
    Reader,
    find_replay,
    list_replays,
    move,
    read_ends,
    set_state,
)  # fmt: skip
from storage.locks import RunLock
from storage.outbox import Outbox
from storage.staged import Staged, staging
from storage.store import CLOCK, DELIVERIES, Store
from tasks.follow import PartitionFollower
from tasks.intake import Intake, logs_taken_in
from tasks.process import positions
from tasks.promote_mails import Staging
from tasks.replay import bring, held
from tasks.replay_follow import ReplayRun, versions_of
from tasks.replay_plan import Planned, check_readers, read_plan, write_plan
from tasks.restored import Restores
from tasks.run import PROMOTION, Run
from tasks.timeline import Place, Version, recorded, same_json
from tasks.topology import DELIVER, Topology

_ROUNDS, _NEAR = 5, 1 << 20
_LONGEST_WAIT = 60_000


@dataclass
class Moved:
    """What a promotion or a rollback has done."""

    generation: int
    """That of the replay."""
    live: dict[str, int]
    """By log, which generation is live now."""
    queued: int = 0
    """Mails that only the new generation has, and that are still worth sending."""
    too_soon: int = 0
    """Those of them left out: their recipient was mailed within the gap between two reminders."""
    seconds: float = 0.0
    """For how long those who follow waited."""
    notes: list[str] = field(default_factory=list)


def promote(
    store: Store, topology: Topology, which: int | str, holder: str, stop: threading.Event | None = None
) -> Moved:
    """Make a replay's generation live.

    Raises:
        UsageError: it is not ready, was made of what is no longer live, or without one who reads it.
        ConflictError: somebody holds a processor for too long; nothing has changed.
        Stopped: `stop` was set; nothing has changed.
    """
    return _Promotion(store, topology, which, holder, stop, back=False).run()


def rollback(
    store: Store, topology: Topology, which: int | str, holder: str, stop: threading.Event | None = None
) -> Moved:
    """Make live again what was live before a replay's generation was promoted. Raises as `promote` does."""
    return _Promotion(store, topology, which, holder, stop, back=True).run()


def _to_promote(store: Store, which: int | str) -> Planned:
    planned = read_plan(find_replay(store.database, which))
    if planned.row.state != READY:
        raise UsageError(
            f"generation {planned.generation} is {planned.row.state}", expected=READY,
            do="Replay it to its end first" if planned.row.state == "RUNNING" else "See afterlog replays list",
        )  # fmt: skip
    if planned.plan.request.as_of != "recorded":
        raise UsageError(
            "a replay with ticks of its own is for comparing only", found=f"as_of {planned.plan.request.as_of}",
            do="Replay with the recorded ticks to promote",
        )  # fmt: skip
    _check_live(store, planned.plan.base)
    return planned


def _to_roll_back(store: Store, which: int | str) -> Planned:
    planned = read_plan(find_replay(store.database, which))
    plan = planned.plan
    if planned.row.state != LIVE:
        raise UsageError(f"generation {planned.generation} is {planned.row.state}, so there is nothing to roll back")
    _check_live(store, {**plan.base, **dict.fromkeys(plan.logs, planned.generation)})
    back = {plan.base[log] for log in plan.logs}
    for row in list_replays(store.database):
        if row.generation in back and row.state == DISCARDED:
            raise UsageError(f"generation {row.generation}, to which this would go back, was discarded")
    return planned


def _check_live(store: Store, expected: Mapping[str, int]) -> None:
    for log, generation in expected.items():
        if (found := store.live_generation(log)) != generation:
            raise UsageError(
                f"another generation of {log} is live by now", found=found, expected=generation,
                do="Roll that one back first, or replay again",
            )  # fmt: skip


class _Promotion:
    """One move from what is live to other generations."""

    def __init__(
        self,
        store: Store,
        topology: Topology,
        which: int | str,
        holder: str,
        stop: threading.Event | None,
        *,
        back: bool,
    ) -> None:
        self._find = _to_roll_back if back else _to_promote
        self.planned = planned = self._find(store, which)
        self.store, self.topology, self.plan = store, topology, planned.plan
        if not back:
            check_readers(topology, self.plan)
        self.holder, self.stop, self.back = holder, stop or threading.Event(), back
        mine, before = dict.fromkeys(self.plan.logs, planned.generation), self.plan.base
        self.new = {log: before[log] for log in self.plan.logs} if back else mine
        self.old = mine if back else {log: before[log] for log in self.plan.logs}
        self.live = Run(store, topology, holder)
        self.run_ = ReplayRun(store, topology, holder, {**before, **self.new})
        reading = [p.name for p in topology.all() if p.reads in self.plan.logs and p.name not in self.plan.processors]
        self.others = reading
        """Who reads what is promoted and writes no log: it is set to the new end, and its rows stay as they are."""

    def run(self) -> Moved:
        """Do it."""
        with held(self.store, self.planned.generation, self.holder):
            for _ in range(_ROUNDS):  # without any lock, until little is left
                if self._catch_up() < _NEAR:
                    break
            with staging(self.store.database) as staged:
                mails = Staging(self.run_, staged, self.plan, self.old, self.new)
                mails.read_on()
                with self._locks():
                    begun = time.monotonic()
                    moved = self._move(staged, mails)
                    moved.seconds = time.monotonic() - begun
        moved.notes += self._settings_notes()
        return moved

    @contextmanager
    def _locks(self) -> Iterator[None]:
        """Everybody who works on what is moved lets go: readers first, for `deliver` waits for the processors it asks."""
        wait = min(_LONGEST_WAIT, self.store.settings.shift_every) / 1000
        with ExitStack() as stack:
            self._lock(stack, PROMOTION.removesuffix(".lock"), wait)
            for name in [DELIVER, *self.others, *reversed(self.plan.processors)]:
                self._lock(stack, name, wait)
            yield

    def _lock(self, stack: ExitStack, name: str, wait: float) -> None:
        lock = RunLock(self.store.lock_path(f"{name}.lock"), self.holder)
        if not lock.acquire(self.stop, wait):
            raise ConflictError(
                f"{name} is held for longer than {wait:g} s", found=lock.held_by(),
                do="Nothing has changed; promote again once it is at the end",
            )  # fmt: skip
        stack.callback(lock.release)

    def _catch_up(self) -> int:
        """Bring the new generation to where the live one is; gives how many bytes that were."""
        live, _ = read_ends(self.store.database, {})
        goals = {
            (p.processor, p.partition): Place(p.offset, p.tick_offset)
            for p in live
            if p.processor in self.plan.processors and p.log not in self.plan.logs
        }
        self.run_.stop.clear()
        return sum(s.bytes for s in bring(self.run_, self.plan, goals, self._versions))

    def _versions(self, name: str, partition: int) -> list[Version]:
        """With which settings to catch up: a replay's own over what was live; going back, as before until others were set."""
        if not self.back:
            return versions_of(self.run_, name, partition, self.plan.base, self.plan.changed.get(name, {}))
        left = versions_of(self.run_, name, partition, {**self.plan.base, **self.old}, {})
        log, writes = self.topology.reads(name), str(self.topology.writes(name))
        with Clock(self.store, self.topology.raw_logs()) as clock:
            own = recorded(clock.versions(), name, self.new[writes], f"{log}/{partition}")
        return [*own, *(version for version in left if version.at_clock >= self.plan.moved_at)] or left

    def _move(self, staged: Staged, mails: Staging) -> Moved:
        self._find(self.store, self.planned.generation)  # another one may have been moved since this one began
        self._catch_up()
        self._bring_readers()
        mails.read_on()
        generation, database = self.planned.generation, self.store.database
        if not self.back:
            clock_end = self.store.reader(CLOCK, 0).end()
            set_state(database, generation, READY, write_plan(msgspec.structs.replace(self.plan, moved_at=clock_end)))
        live, _ = read_ends(database, {})
        concerned = {*self.plan.processors, *self.others}
        what = Move(
            generations=self.new,
            processors={
                name: (self.old[log], self.new[log])
                for name in self.plan.processors
                if (log := self.topology.writes(name)) is not None
            },
            readers=[reader for log in self.plan.logs for reader in self._readers(log)],
            expected=[
                p for p in live if p.processor in concerned or (p.processor, p.log in self.new) == (DELIVER, True)
            ],
        )
        queued = move(staged, what, generation, READY if self.back else LIVE)
        notes = mails.settle(self._outbox())
        return Moved(generation, dict(self.new), queued.count, queued.too_soon, notes=notes)

    def _bring_readers(self) -> None:
        """Have those who stay at the end of what was live: what they have taken by then, they never take again."""
        for name in self.others:
            for partition in self.store.partitions(self.topology.reads(name)):
                follower = PartitionFollower(self.live, name, partition)
                try:
                    while follower.advance(follower.snapshot()):
                        pass
                finally:
                    follower.close()
        outbox = self._outbox()
        outbox.recover()
        intake = Intake(self.live, outbox, Restores(self.live))
        try:
            while intake.round():
                pass
        finally:
            intake.close()

    def _outbox(self) -> Outbox:
        return Outbox(self.store, DELIVERIES, self.live.author)

    def _readers(self, log: str) -> list[Reader]:
        generation = self.new[log]
        partitions = sorted({*self.store.partitions(log, generation), *self.store.partitions(log, self.old[log])})
        names = [(name, False) for name in self.others if self.topology.reads(name) == log]
        names += [(DELIVER, True)] if log in logs_taken_in(self.topology) else []
        clocks = self._clocks(log, generation)
        return [
            Reader(name, log, part, self.store.committed_end(log, part, generation), clocks.get(part, 0), own)
            for name, own in names
            for part in partitions
        ]

    def _clocks(self, log: str, generation: int) -> dict[int, int]:
        """The clock of a log's writer, by partition: nothing that it writes from now on is before that."""
        return {
            p.partition: p.clock
            for p in positions(self.store, every=True)
            if p.generation == generation and self._writes(p.processor) == log
        }

    def _writes(self, name: str) -> str | None:
        return self.topology.writes(name) if name in self.plan.processors else None

    def _settings_notes(self) -> list[str]:
        """Where the schedule goes on with other settings than the generation was made with."""
        notes = []
        for name in self.plan.processors:
            log, now = self.topology.writes(name), self.topology.make(name).version()["settings"]
            for partition in self.store.partitions(self.topology.reads(name)):
                versions = self._versions(name, partition)
                if log is not None and not same_json(versions[-1].settings, now):
                    then = {
                        key: value for key, value in versions[-1].settings.items() if not same_json(value, now.get(key))
                    }
                    notes.append(
                        f"{name} was replayed with {then}, and goes on with { ({key: now.get(key) for key in then}) }, as the "
                        "settings say: change those to keep it"
                    )
                    break
        return notes
