"""Bugs to be planted: each takes one precaution away. A simulator that finds none of them finds nothing."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import sqlalchemy as sa

import storage.append
import storage.commit
import storage.derived
import storage.segment
import storage.store
import tasks.follow
from storage.append import PartitionWriter
from storage.clock import Clock
from storage.commit import Position
from storage.derived import DerivedWriter
from storage.locks import RunLock
from storage.outbox import Outbox
from storage.reader import PartitionReader
from storage.store import Store
from storage.tables import Checkpoint

Plant = AbstractContextManager[Any]


def _nothing(*_arguments: object, **_named: object) -> None:
    """Do nothing."""


def _drop_the_swap() -> Plant:
    real = storage.commit._swap
    table: Any = Checkpoint.__table__  # type: ignore[attr-defined]  # SQLModel hides it from the types

    def swap(connection: sa.Connection, position: Position, raised: int) -> None:
        position.commit = connection.scalar(sa.select(table.c.commit).where(table.c.id == position.id))
        real(connection, position, raised)

    return mock.patch.multiple(storage.commit, _swap=swap, _check_current=_nothing)


def _off_by_one() -> Plant:
    real = storage.commit.load_position

    def load(*arguments: Any, **named: Any) -> Position:
        position = real(*arguments, **named)
        position.offset = max(0, position.offset - 1)
        return position

    return mock.patch.object(tasks.follow, "load_position", load)


def _count_lines_twice() -> Plant:
    """A line read again after a crash is counted again: the counters are not of the same transaction."""
    real = storage.commit.load_position

    def load(*arguments: Any, **named: Any) -> Position:
        position = real(*arguments, **named)
        position.lines += position.commit % 7 == 6
        return position

    return mock.patch.object(tasks.follow, "load_position", load)


def _trust_the_tail() -> Plant:
    def common(_self: object, end: int, data: bytes, there: int) -> int:
        return min(len(data), there - end)

    return mock.patch.object(DerivedWriter, "_common", common)


def _unsynced_derived() -> Plant:
    real = DerivedWriter._write

    def write(self: DerivedWriter, at: int, data: bytes, *, durable: bool) -> None:
        with mock.patch.object(os, "fsync", _nothing):
            real(self, at, data, durable=durable)

    return mock.patch.object(DerivedWriter, "_write", write)


def _leaking_lock() -> Plant:
    def try_acquire(self: RunLock) -> bool:
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{self.holder}\n".encode(), 0)
        self._handle = handle
        return True

    return mock.patch.object(RunLock, "try_acquire", try_acquire)


def _unsynced_tick() -> Plant:
    real = Clock.__init__

    def init(self: Clock, *arguments: Any) -> None:
        real(self, *arguments)
        self._durable = 1 << 60

    return mock.patch.object(Clock, "__init__", init)


def _no_directory_fsync() -> Plant:
    return mock.patch.multiple(storage.segment, fsync_directory=_nothing)


def _unsynced_partitions() -> Plant:
    real = storage.store.record_partitions

    def record(log: Path, count: int) -> int:
        with mock.patch.object(os, "fsync", _nothing):
            return real(log, count)

    return mock.patch.object(storage.store, "record_partitions", record)


PLANTS: dict[str, Callable[[], Plant]] = {
    "commit before the derived log is durable": _unsynced_derived,
    "commit before the source is durable": lambda: mock.patch.object(PartitionReader, "sync", _nothing),
    "skip a directory's fsync": _no_directory_fsync,
    "drop the swap": _drop_the_swap,
    "off by one in the checkpoint": _off_by_one,
    "trust the tail without comparing": _trust_the_tail,
    "claim after send": lambda: mock.patch.object(Outbox, "claim", return_value=True),
    "confirm before the fsync": lambda: mock.patch.object(PartitionWriter, "_sync", _nothing),
    "use a tick before it is durable": _unsynced_tick,
    "leak a lock where the disk is full": _leaking_lock,
    "write before the swap is sure": lambda: mock.patch.object(storage.commit, "_check_current", _nothing),
    "take NULs of a power loss for another result": lambda: mock.patch.object(
        DerivedWriter, "_is_unwritten", return_value=False
    ),
    "make a name in a folder whose own is not durable": lambda: mock.patch.object(
        storage.segment, "_fsync_name", _nothing
    ),
    "count a line twice": _count_lines_twice,
    "begin a log with a shell's own number of partitions": lambda: mock.patch.object(
        Store, "begin", lambda store, _log: store.settings.partitions
    ),
    "append before the number of partitions is durable": _unsynced_partitions,
}
"""By what is wrong: the planted bugs of issue C first, then those that the simulator found in the real code."""
