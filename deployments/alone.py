"""Server and runner run once for each HOME: two of them would share Prefect's database and take over each other's shifts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from storage.errors import AfterlogError
from storage.locks import RunLock
from storage.segment import make_directory

PROCESSES = {"server": b"\0prefect\0server\0start\0", "runner": b"\0deployments.serve\0"}
"""What `up` starts: a name, and what its command line holds."""


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Be the one who runs server and runner on HOME.

    Raises:
        AfterlogError: another is, or one that was killed has left them behind; the sentence has the process ids.
    """
    make_directory(home / "locks")
    lock = RunLock(home / "locks" / "up", f"process {os.getpid()}")  # no processor's lock: those end in .lock
    if not lock.try_acquire():
        raise AfterlogError(
            "`afterlog up` or `demo` is at work on this HOME already", where=str(home), found=lock.held_by(),
            do="Stop it first, or set AFTERLOG_HOME to another folder",
        )  # fmt: skip
    try:
        if left := _left_behind(home):
            raise AfterlogError(
                "an `afterlog up` that was killed has left its server or runner at work",
                where=str(home), found=f"process {' and '.join(left)}", do=f"End them first: kill {' '.join(left)}",
            )  # fmt: skip
        yield
    finally:
        lock.release()


def pid_file(home: Path, name: str) -> Path:
    """Where the process id of one of PROCESSES is kept while it runs."""
    return home / "prefect" / f"{name}.pid"


def _left_behind(home: Path) -> list[str]:
    """The ids of what an earlier one started that still runs, as far as this system tells."""
    found = []
    for name, command in PROCESSES.items():
        with suppress(OSError):  # none was kept, it has ended, or there is no /proc
            pid = pid_file(home, name).read_text()
            ours = f"AFTERLOG_HOME={home}".encode() in Path("/proc", pid, "environ").read_bytes().split(b"\0")
            if ours and command in Path("/proc", pid, "cmdline").read_bytes():  # else another has its number now
                found.append(pid)
    return found
