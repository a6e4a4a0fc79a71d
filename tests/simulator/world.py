"""The world of one seed: a HOME, the processes at work on it, a wall clock and a mail server."""

from __future__ import annotations

import functools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec

import storage.batches
import tasks.deliver
import tasks.mail
from storage.errors import AfterlogError, ConflictError, CorruptLogError, LostDataError, NondeterminismError, Stopped
from storage.settings import Settings, load_settings
from storage.settings_sources import Secret
from storage.store import Store
from tasks.run import Run
from tasks.topology import Topology, build_topology
from tests.simulator.database import SimulatedDatabase
from tests.simulator.disk import Disk, KilledError, Process
from tests.simulator.mail import MailServer, SimulatedTransport, policy
from tests.simulator.seam import Seam

START = 1_700_000_000_000
NEVER = (NondeterminismError, LostDataError, CorruptLogError)
"""What no fault that is promised about may lead to."""


class BrokenPromiseError(Exception):
    """What DESIGN promises does not hold."""


class _Stop(threading.Event):
    """A stop event for one thread: whoever would wait for another is told to stop instead."""

    def wait(self, timeout: float | None = None) -> bool:
        self.set()
        return True


class _NoThread:
    """In place of the thread that interrupts a mail: it is not of the simulation, where no mail server keeps anybody waiting."""

    def __init__(self, **_what: object) -> None:
        """Forget what it would run."""

    def start(self) -> None:
        """Start nothing."""


class _Home(type(Path())):  # type: ignore[misc]  # the system's own kind of path
    """A path that is resolved: a run asks for that, and nothing in a world is a link. It makes each path below it but once."""

    def resolve(self, strict: bool = False) -> Path:
        return self

    def __truediv__(self, name: Any) -> Any:
        known: dict[Any, Any] = self.__dict__.setdefault("_below", {})
        found = known.get(name)
        if found is None:
            found = known[name] = super().__truediv__(name)
        return found


class World:
    """Everything that a schedule acts upon."""

    def __init__(self, folder: Path, random: Random, **settings: Any) -> None:
        self.random = random
        self.home, self.file = _Home(folder / "home"), folder / "database" / "afterlog.db"
        self.home.mkdir()
        self.file.parent.mkdir()
        place = {"home": self.home, "database_url": Secret(f"sqlite:///{self.file}")}
        self.settings: Settings = msgspec.structs.replace(_usual_settings(), **place, **settings)
        self.topology: Topology = build_topology(self.settings)
        self.disk = Disk(self.home, random)
        self.seam = Seam(self.disk)
        self.seam.wall = START
        self.database = SimulatedDatabase(self.file, self.home, self.disk)
        self.server = MailServer(random, self.disk, self.claimed)
        self.runs: list[Run] = []
        self._directories: dict[tuple[str, int, int], Path] = {}
        self.doubled = False
        self.begun = False
        """Whether a line was confirmed, and so the log's partitions are decided."""

    @property
    def wall(self) -> int:
        """The wall clock."""
        return self.seam.wall

    def store(self) -> Store:
        """A process's own view of HOME; the database is one for all. Some shell has another PARTITIONS, once the log was begun."""
        settings = self.settings
        if self.begun and self.random.random() < 0.2:
            settings = msgspec.structs.replace(settings, partitions=3)
        store = Store(settings)
        store.__dict__["database"] = self.database
        store._directories = self._directories  # what a path is called is no process's own, and takes long to say anew
        return store

    def run(self, name: str) -> Run:
        """A run of a process of its own."""
        run = Run(self.store(), self.topology, name)
        run.stop = _Stop()
        self.runs.append(run)
        return run

    def act(self, process: Process, work: Callable[[], None], *, lives_on: bool = False) -> None:
        """Let a process do something. Where it fails it ends, but for one that `lives_on` after an error.

        Raises:
            BrokenPromiseError: it failed with what may never be, or failed and nothing had gone wrong.
        """
        before, self.disk.process = self.disk.process, process
        try:
            work()
            return
        except KilledError:
            pass
        except (AfterlogError, OSError) as error:
            self._judge(process, error)
            if lives_on and not process.dead:
                return
        finally:
            self.disk.process = before
            for run in self.runs:
                run.stop.set()
            self.runs.clear()
        self.seam.end(process)

    def _judge(self, process: Process, error: Exception) -> None:
        if process.dead or self.disk.lost:
            return  # its last words were never heard
        if isinstance(error, NEVER):
            raise BrokenPromiseError(f"{process.name}: {type(error).__name__}: {error}") from error
        if isinstance(error, Stopped):
            return
        if isinstance(error, ConflictError) and (self.doubled or process.name.startswith("shift")):
            return  # a shift lives on from one step to the next, and hears of a stray one at its next commit
        if not self.disk.injected:
            raise BrokenPromiseError(f"{process.name} failed, and nothing had gone wrong: {error!r}") from error

    def lose_power(self) -> None:
        """What was not fsynced may be lost; whoever calls has seen to it that nobody lives on."""
        self.disk.lose_power()
        self.disk.lost = False

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """A look at what is committed."""
        return self.database.rows(sql)

    def claimed(self) -> list[str]:
        """The mails that may be on their way."""
        return [row[0] for row in self.rows("SELECT event_id FROM delivery WHERE state = 'CLAIMED'")]

    @contextmanager
    def aside(self) -> Iterator[Store]:
        """A person at work, with whom nothing goes wrong."""
        self.database.dispose()
        with self.seam.passing():
            self.disk.save()
            store = Store(self.settings)
            try:
                yield store
            finally:
                if "database" in store.__dict__:
                    store.database.dispose()

    def reopen(self) -> None:
        """What lies on the disk is durable, and the database's file is another one."""
        with self.seam.passing():
            self.disk.adopt()
        self.database.dispose()
        self.database = SimulatedDatabase(self.file, self.home, self.disk)

    def close(self) -> None:
        """End it all."""
        self.database.close()


@functools.cache
def _usual_settings() -> Settings:
    return load_settings(commit_every="1h")


@contextmanager
def world(random: Random, **settings: Any) -> Iterator[World]:
    """A world in memory, where the system has such a place."""
    memory = "/dev/shm"  # noqa: S108  # each world makes a folder of its own there
    folder = Path(tempfile.mkdtemp(prefix="afterlog-", dir=memory if os.access(memory, os.W_OK) else None))
    made = World(folder.resolve(), random, **settings)

    def connect(_where: object, _home: Path) -> SimulatedTransport:
        return SimulatedTransport(made.server)

    try:
        with (
            made.seam.installed(),
            mock.patch.object(storage.batches, "PATIENCE", 0.0),
            mock.patch.object(tasks.deliver, "_DECIDE_EVERY", 0.0),
            mock.patch.object(tasks.deliver, "open_transport", connect),
            mock.patch.object(tasks.mail, "header_policy", policy),
            mock.patch.object(tasks.deliver, "threading", SimpleNamespace(Event=threading.Event, Thread=_NoThread)),
        ):
            try:
                yield made
            finally:
                made.seam.let_go()
    finally:
        made.close()
        with suppress(OSError):
            _remove(str(folder))


def _remove(folder: str) -> None:
    """`shutil.rmtree`, where nobody is about to put links in its way."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _remove(entry.path)
            else:
                os.unlink(entry.path)  # noqa: PTH108  # a path would have to be made
    os.rmdir(folder)  # noqa: PTH106  # likewise
