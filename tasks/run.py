"""What the followers of one run share: the store, the topology, decoded batches, one stop event, and a pulse."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.batches import BatchCache
from storage.clock import CLOCK
from storage.event import MAX_DERIVED_DEPTH
from storage.locks import RunLock
from storage.segment import list_segments
from storage.store import Store
from tasks.topology import DELIVERIES, Topology


class Pulse:
    """Looks at the logs' files for all followers of a run, and wakes them when one has grown."""

    def __init__(self, directories: list[Path], every: float, stop: threading.Event) -> None:
        self._newest: dict[Path, tuple[int, Path | None]] = dict.fromkeys(directories, (-1, None))
        self._every, self._stop = every, stop
        self._changed = threading.Condition()
        self._sizes: list[int] = []
        self.beat = 0
        self._thread = threading.Thread(target=self._watch, name="pulse", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def wait(self, beat: int, timeout: float) -> None:
        """Return when a log has grown since `beat`, when the run is to stop, or after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.beat != beat or self._stop.is_set(), timeout)

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            sizes = [self._size(path) for path in self._newest]
            if sizes != self._sizes:
                self._sizes = sizes
                self._wake()
        self._wake()

    def _wake(self) -> None:
        with self._changed:
            self.beat += 1
            self._changed.notify_all()

    def _size(self, directory: Path) -> int:
        try:
            modified = directory.stat().st_mtime_ns
            known, newest = self._newest[directory]
            if modified != known or newest is None:
                segments = list_segments(directory)
                newest = segments[-1].path if segments else None
                self._newest[directory] = (modified, newest)
            return newest.stat().st_size if newest is not None else -1
        except FileNotFoundError:
            return -1


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


class Run:
    """One run of this process, finite or following. Its `stop` event ends every follower at a batch boundary."""

    def __init__(self, store: Store, topology: Topology, holder: str) -> None:
        self.store, self.topology, self.holder = store, topology, holder
        self.stop = threading.Event()
        self.notes: list[str] = []
        """What a person should be told: settings that changed, tails that were cut."""
        settings = store.settings
        self.batches = BatchCache(settings.batch_bytes, settings.max_line, stop=self.stop)
        # A derived line carries its cause, so it may be longer and nest deeper than a raw one.
        self.derived_batches = BatchCache(settings.batch_bytes, 1 << 40, MAX_DERIVED_DEPTH, stop=self.stop)
        logs = [*topology.raw_logs(), *sorted(topology.derived_logs()), CLOCK, DELIVERIES]
        directories = [store.directory(log, part) for log in logs for part in store.partitions(log)]
        self._waiting = 0
        self._lock = threading.Lock()
        self.pulse = Pulse(directories, settings.poll / 1000, self.stop)

    def lock(self, name: str) -> RunLock:
        """The lock of a processor, or of `deliver`, for this run."""
        return RunLock(self.store.lock_path(f"{name}.lock"), self.holder)

    def is_held(self, name: str) -> bool:
        """Whether any run holds the lock of `name`."""
        lock = self.lock(name)
        if lock.try_acquire():
            lock.release()
            return False
        return True

    def stand_by(self) -> None:
        """A follower says that it is ready, and will wait for its lock now."""
        with self._lock:
            self._waiting += 1

    def ready(self) -> int:
        """How many followers have said that they are ready."""
        return self._waiting
