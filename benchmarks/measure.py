"""What a process takes: CPU, wall and memory, by the operating system's own account."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

WORK = Path(__file__).parent / "work"


@dataclass(frozen=True)
class Figures:
    """CPU and wall seconds, and peak MiB."""

    cpu: float
    wall: float
    memory: float


def fresh(name: str) -> Path:
    """An empty folder in benchmarks/work."""
    shutil.rmtree(WORK / name, ignore_errors=True)
    (WORK / name).mkdir(parents=True)
    return WORK / name


def link_log(log: Path) -> Path:
    """A fresh HOME whose log `events` is `log`."""
    home = fresh("home")
    folder = home / "logs" / "events" / "0"
    folder.mkdir(parents=True)
    os.link(log, folder / f"{0:020d}.jsonl")
    return home


def measure(command: list[str], env: dict[str, str]) -> Figures:
    """Run `command` to its end.

    Raises:
        SystemExit: it failed.
    """
    begun = time.monotonic()
    # An installed program has its modules compiled; a workplace that forbids that would be measured compiling.
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, env={**inherited, **env}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return Figures(usage.ru_utime + usage.ru_stime, time.monotonic() - begun, usage.ru_maxrss / 1024)
