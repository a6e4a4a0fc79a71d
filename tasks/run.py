"""What the followers of one run share: the store, the topology, decoded batches, one stop event, and a pulse."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from storage.batches import BatchCache
from storage.commit import Target, let_differ, load_position
from storage.derived import DerivedWriter
from storage.errors import Stopped
from storage.event import MAX_DERIVED_DEPTH
from storage.heap import share_heap
from storage.locks import POLL, RunLock, is_held
from storage.store import CLOCK, DELIVERIES, Store
from storage.written_by import Author
from tasks.processors.contract import Processor
from tasks.pulse import Pulse
from tasks.topology import DELIVER, Topology

PROMOTION = "promotion.lock"
_LOOK_EVERY = 1.0  # seconds


class _Collector:
    """Python's cycle collector, paused while anybody in this process catches up: events form no cycles, and are many."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause it until the last of those who asked is done."""
        with self._lock:
            self._users += 1
            gc.disable()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    gc.enable()


COLLECTOR = _Collector()


class Growth:
    """Whether logs have more partitions by now than when they were opened: others begin logs, and a derived one has its first line."""

    def __init__(self, store: Store, logs: Sequence[str]) -> None:
        self._store, self._logs = store, logs
        self._known, self._look_at = self._count(), time.monotonic() + _LOOK_EVERY

    def seen(self) -> bool:
        """Whether there are more; looked for once a second."""
        if time.monotonic() < self._look_at:
            return False
        self._look_at = time.monotonic() + _LOOK_EVERY
        return self._count() > self._known

    def _count(self) -> int:
        return sum(len(self._store.partitions(log)) for log in self._logs)


class Run:
    """One run of this process, finite or following. Its `stop` event ends every follower at a batch boundary."""

    is_live = True
    """Whether it works on what is live, and not on a generation of a replay."""
    grace = 0.5
    """Seconds that a mail on its way may still take once the run is to stop: cut off, it is in doubt."""

    def __init__(self, store: Store, topology: Topology, holder: str, flow_run_id: str = "") -> None:
        share_heap()  # before the threads that will follow
        self.store, self.topology, self.holder = store, topology, holder
        self.author = Author(holder, flow_run_id)
        self.stop = threading.Event()
        self.notes: list[str] = []
        """What a person should be told: settings that changed, tails that were cut."""
        self.turn = threading.Lock()
        """Held for a batch, by whoever catches up: one at a time on the same batch is much quicker than all at once."""
        settings = store.settings
        self.batches = BatchCache(settings.batch_bytes, settings.max_line, stop=self.stop)
        # A derived line carries its cause, so it may be longer and nest deeper than a raw one.
        self.derived_batches = BatchCache(settings.batch_bytes, 1 << 40, MAX_DERIVED_DEPTH, stop=self.stop)
        logs = [*topology.raw_logs(), *sorted(topology.derived_logs()), CLOCK, DELIVERIES]
        live = {log: store.live_generation(log) for log in logs}
        directories = [
            store.directory(log, part, live[log]) for log in logs for part in store.partitions(log, live[log])
        ]
        self._ready: set[str] = set()
        self.pulse = Pulse(directories, settings.poll / 1000, self.stop)

    def generation(self, log: str | None) -> int:
        """Which generation of a log this run reads and writes: the one that is live; of a processor without a log, the first."""
        return 1 if log is None else self.store.live_generation(log)

    def target(self, log: str | None, partition: int) -> Target | None:
        """Where the writer of a derived log goes on."""
        if log is None:
            return None
        store, settings, generation = self.store, self.store.settings, self.generation(log)
        writer = DerivedWriter(
            store.directory(log, partition, generation),
            f"{log}/{partition}",
            limit=settings.segment_bytes,
            daily=settings.segment_daily,
            archive=lambda: store.archive,
        )
        return Target(log, writer, store.committed_end(log, partition, generation))

    def has_tail(self, log: str | None, partition: int) -> bool:
        """Whether a derived log has lines beyond its committed end: a crash left them, or the database is an older one."""
        if log is None:
            return False
        generation = self.generation(log)
        with self.store.reader(log, partition, generation) as reader:
            return reader.end() > self.store.committed_end(log, partition, generation)

    def let_readers_differ(self, writer: Processor[Any], partition: int) -> None:
        """Where a tail of `writer` may be replaced, so may be the tail that was derived from it, by whoever is at work no more."""
        if not (self.is_live and self.has_tail(writer.writes, partition)):
            return
        for name in self.topology.downstream([writer.name])[1:]:
            reads, writes = self.topology.reads(name), self.topology.writes(name)
            if self.has_tail(writes, partition) and not self.is_held(name):
                let_differ(
                    self.store.database,
                    load_position(self.store.database, name, self.generation(writes), reads, partition),
                )

    def lock(self, name: str) -> RunLock:
        """The lock of a processor, or of `deliver`, for this run."""
        return RunLock(self.store.lock_path(f"{name}.lock"), self.holder)

    def promoting(self) -> bool:
        """Whether somebody promotes a generation at this moment, and waits for the locks of those who follow."""
        return is_held(self.store.lock_path(PROMOTION))

    def take(self, lock: RunLock) -> None:
        """Wait for a lock, and while somebody promotes leave it to them.

        Raises:
            Stopped: the run is to stop.
        """
        while True:
            lock.acquire(self.stop)
            if not self.promoting():
                return
            lock.release()
            while self.promoting():
                if self.stop.wait(POLL):
                    raise Stopped("stopped while a generation is promoted")

    def is_held(self, name: str) -> bool:
        """Whether any run holds the lock of `name`."""
        return is_held(self.store.lock_path(f"{name}.lock"))

    def stand_by(self, name: str = DELIVER) -> None:
        """The follower `name` says that it is ready, and will wait for its lock now; as often as it is tried."""
        self._ready.add(name)

    def ready(self) -> int:
        """How many followers have said that they are ready."""
        return len(self._ready)
