"""Appending to one partition: one write a call, confirmed by an fsync that calls may share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

from storage.errors import AppendError
from storage.locks import locked
from storage.manifest import read_manifest, seal_if_possible
from storage.segment import create_segment, fsync_directory, is_full, list_segments, make_directory, write_all
from storage.steps import reached
from storage.times import now

LOCK = ".lock"


class _Tail:
    """The newest segment as this process last saw it; closed when the last writer lets go of it."""

    def __init__(self, base: int, path: Path) -> None:
        self.base, self.path = base, path
        self.written = self.synced = 0  # up to which offset this process has written, and an fsync covers it
        self.handle = -1
        self.handle = os.open(path, os.O_RDWR | os.O_APPEND)

    def is_in_place(self) -> bool:
        """Whether the file that is open still has its name; a backup may have taken its place."""
        ours, there = os.fstat(self.handle), self.path.stat()
        return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)


class PartitionWriter:
    """Appends to one partition, together with any number of other threads and processes.

    Whoever appends holds the partition's lock file, also by hand: `flock .lock sh -c 'cat >> newest'`.
    """

    def __init__(self, directory: Path, name: str, *, limit: int, daily: bool, closing: bytes = b"\n") -> None:
        self.directory, self.name, self.limit, self.daily, self._closing = directory, name, limit, daily, closing
        self._write_lock, self._sync_lock = threading.Lock(), threading.Lock()
        self._tail: _Tail | None = None
        self._rolled = False
        make_directory(directory)

    def append(self, lines: Sequence[bytes] | Callable[[int], Sequence[bytes]], count: int = 0) -> list[int]:
        """Append lines (without their newlines) and give their offsets, once an fsync covers them.

        `lines` may be a function of the stamp, which is taken under the lock and never less than the one before; `count` says
        how many lines it gives.

        Raises:
            AppendError: the write or the fsync failed; it names the offsets that are in, which after a failed fsync the
                machine's power may still take.
        """
        with self._write_lock, locked(self.directory / LOCK) as lock:
            given = lines
            try:
                lines = given(_stamp(lock)) if callable(given) else given
                tail, start = self._prepare()
            except OSError as error:
                raise self._failed(error, [], count if callable(given) else len(given)) from error
            offsets, end = _offsets(lines, start)
            failure = self._write(tail, lines, offsets)
            tail.written = end if failure is None else start
            rolled, self._rolled = self._rolled, False
        reached("append-written")
        try:
            self._sync(tail, end)
        except OSError as error:
            raise AppendError(
                f"cannot make the last lines durable, which the machine's power may take: {error.strerror}", where=str(tail.path),
                offsets=offsets if failure is None else failure.offsets, missing=[] if failure is None else failure.missing,
                durable=False,
            ) from error  # fmt: skip
        reached("append-synced")
        if rolled:
            seal_if_possible(self.directory)  # by who has sealed it, once its lines are in; nobody else waits for that
        if failure is not None:
            raise failure
        return offsets

    def _prepare(self) -> tuple[_Tail, int]:
        """The segment to write to, its last line closed, and the offset where the next one begins."""
        segments = list_segments(self.directory)
        newest = segments[-1] if segments else create_segment(self.directory, self._first_base())
        tail = self._use(newest.base, newest.path)
        state = os.fstat(tail.handle)
        size = state.st_size
        if size and os.pread(tail.handle, 1, size - 1) != b"\n":
            write_all(tail.handle, self._closing)  # a torn line is closed, never cut
            size += len(self._closing)
        if is_full(size, state.st_mtime, now(), self.limit, self.daily):
            os.fsync(tail.handle)
            newest = create_segment(self.directory, tail.base + size)
            tail, size, self._rolled = self._use(newest.base, newest.path), 0, True
            reached("segment-rolled")
        return tail, tail.base + size

    def _first_base(self) -> int:
        """Where a partition without a file begins: where its sealed past ends, so that no offset is given twice."""
        entries = read_manifest(self.directory)
        return entries[-1].end if entries else 0

    def _use(self, base: int, path: Path) -> _Tail:
        if self._tail is None or self._tail.path != path or not self._tail.is_in_place():
            tail = _Tail(base, path)
            fsync_directory(self.directory)  # whoever made it may have died before its name was durable
            self._tail = tail  # only now: where the fsync failed, the next append tries it again
        return self._tail

    def _write(self, tail: _Tail, lines: Sequence[bytes], offsets: list[int]) -> AppendError | None:
        if not lines:
            return None
        try:
            write_all(tail.handle, b"\n".join([*lines, b""]))
        except OSError as error:
            end = tail.base + os.fstat(tail.handle).st_size
            # A line that lacks nothing but its newline is in: the next append closes it. An empty one is nothing without it.
            whole = [at for at, line in zip(offsets, lines, strict=True) if end >= at + max(len(line), 1)]
            failure = self._failed(error, whole, len(lines))
            failure.__cause__ = error
            return failure
        return None

    def _failed(self, error: OSError, offsets: list[int], count: int) -> AppendError:
        return AppendError(
            f"cannot write: {error.strerror}", where=str(self.directory), offsets=offsets,
            missing=list(range(len(offsets), count)),
        )  # fmt: skip

    def _sync(self, tail: _Tail, end: int) -> None:
        """Return once an fsync of this very file covers what it has before `end`; whoever waits for the lock may find it done."""
        with self._sync_lock:
            if tail.synced >= end:
                return
            written = tail.written
            os.fsync(tail.handle)
            tail.synced = max(tail.synced, written)


def _offsets(lines: Sequence[bytes], start: int) -> tuple[list[int], int]:
    offsets = list(accumulate(map((1).__add__, map(len, lines)), initial=start))
    return offsets, offsets.pop()


def _stamp(lock: int) -> int:
    """The wall clock, but never less than the stamp before, which the lock file remembers."""
    before = os.pread(lock, 20, 0).strip()
    stamp = max(now(), int(before)) if before.isdigit() else now()
    os.pwrite(lock, b"%020d" % stamp, 0)
    return stamp
