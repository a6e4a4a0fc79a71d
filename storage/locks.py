"""Locks that the operating system drops when their holder dies: `flock` on a file."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from storage.errors import Stopped

POLL = 0.005


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[int]:
    """Hold the lock file `path` for a moment; waits for as long as it takes. Gives its descriptor."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


class RunLock:
    """A lock held for the length of a run, by one holder in one process.

    Its file tells who holds it: a line for people, which decides nothing.
    """

    def __init__(self, path: Path, holder: str) -> None:
        self.path, self.holder = path, holder
        self._handle: int | None = None

    def try_acquire(self) -> bool:
        """Take the lock if it is free."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(OSError):  # a full disk, say: the lock is held, signed or not
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{self.holder}\n".encode(), 0)
        except BlockingIOError:
            os.close(handle)
            return False
        except BaseException:
            os.close(handle)  # else nobody would ever give it back
            raise
        self._handle = handle
        return True

    def acquire(self, stop: threading.Event, timeout: float | None = None) -> bool:
        """Wait for the lock until it is free; False where `timeout` seconds passed.

        Raises:
            Stopped: `stop` was set meanwhile.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self.try_acquire():
            if stop.is_set():
                raise Stopped(f"stopped while waiting for {self.path.name}")
            if until is not None and time.monotonic() >= until:
                return False
            stop.wait(POLL)
        return True

    def release(self) -> None:
        """Give the lock back; nothing happens where it was not held."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def held_by(self) -> str:
        """Who holds the lock, as they signed it; empty where nobody ever did."""
        return signed_by(self.path)


def is_held(path: Path) -> bool:
    """Whether anybody holds the lock file `path`; for a look, which makes no file and signs nothing."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def signed_by(path: Path) -> str:
    """Who held the lock file `path` last, as they signed it; empty where nobody ever did."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
