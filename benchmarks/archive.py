"""What the archive and the chain cost: seal, archive, verify and read in MB/s, and bytes an event, raw and archived.

    python -m benchmarks.archive LOG.jsonl

LOG.jsonl is a log of any length; it is cut into segments of 64 MiB in a folder of its own, which is removed afterwards.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from storage.manifest import read_manifest, seal
from storage.segment import create_segment, make_directory
from storage.settings import load_settings
from storage.store import Store
from tasks.archive import archive_all
from tasks.topology import build_topology

SEGMENT = 64 << 20


def main() -> None:
    """Measure each step once and print a line for it."""
    with tempfile.TemporaryDirectory(prefix="afterlog-archive-") as folder:
        store = Store(load_settings(home=Path(folder) / "home", live_window="1ms"))
        directory = store.directory("events", 0)
        total = cut(Path(sys.argv[1]), directory)
        _show("seal", total, lambda: seal(directory))
        events = sum(entry.events for entry in read_manifest(directory))
        _show("verify, all of it here", total, lambda: _afterlog(store.home, "verify"))
        _show(
            "archive, with reading back", total, lambda: archive_all(store, build_topology(store.settings), "benchmark")
        )
        archived = sum(path.stat().st_size for path in (store.home / "archive").rglob("*.zst"))
        for path in directory.glob("*.jsonl"):
            if path.stat().st_size:
                path.unlink()
        _show("verify, all of it archived", total, lambda: _afterlog(store.home, "verify"))
        _show("read, all of it archived", total, lambda: _afterlog(store.home, "read", "events"))
        print(
            f"{events} events: {total / events:.1f} bytes each raw, {archived / events:.1f} archived ({total / archived:.1f} x)"
        )


def cut(log: Path, directory: Path) -> int:
    """Make a partition of segments of 64 MiB of a log; gives its length."""
    make_directory(directory)
    base = 0
    with log.open("rb") as source:
        while data := source.read(SEGMENT) + source.readline():
            create_segment(directory, base).path.write_bytes(data)
            base += len(data)
    create_segment(directory, base)
    return base


def _afterlog(home: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "deployments.cli", *arguments]
    subprocess.run(command, env={"AFTERLOG_HOME": str(home)}, stdout=subprocess.DEVNULL, check=True)


def _show(what: str, total: int, work: Callable[[], object]) -> None:
    begun, worked = time.monotonic(), _cpu()
    work()
    seconds, cpu = time.monotonic() - begun, _cpu() - worked
    print(f"{what}: {total / seconds / 1e6:.0f} MB/s ({seconds:.2f} s, {cpu:.2f} CPU s)", flush=True)


def _cpu() -> float:
    return sum(os.times()[:4])  # with the processes that were started


if __name__ == "__main__":
    main()
