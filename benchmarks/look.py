"""What it costs to look something up in a large log, in processes that are started for it: CPU and wall seconds.

    python -m benchmarks.look LOG.jsonl [CUSTOMER ...]

LOG.jsonl is a log of any length; it is cut into segments of 64 MiB in a folder of its own, which is removed afterwards. It is
looked through as it is, then without its chain, as a log that was made by hand has none.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.archive import cut
from benchmarks.measure import measure
from storage.manifest import MANIFEST, seal
from storage.settings import load_settings
from storage.store import Store

REPEATED = 5


def main(log: Path, customers: Sequence[str]) -> None:
    """Print a line for each command: the median of its CPU and the least and greatest of its wall seconds."""
    with tempfile.TemporaryDirectory(prefix="afterlog-look-") as folder:
        store = Store(load_settings(home=Path(folder) / "home"))
        directory = store.directory("events", 0)
        total = cut(log, directory)
        seal(directory)
        early = _clock_at(log, total // 10)
        print(f"{total / 1e9:.2f} GB")
        for chain in ("with the chain", "without"):
            for customer in customers:
                for command in (["basket", customer], ["basket", customer, "--known-at", early], ["why-not", customer]):
                    _show(store.home, f"{' '.join(command)}, {chain}", command)
            (directory / MANIFEST).unlink(missing_ok=True)
        seal(directory)
        _show(store.home, "verify", ["verify"])


def _clock_at(log: Path, offset: int) -> str:
    with log.open("rb") as file:
        file.seek(offset)
        file.readline()
        return str(json.loads(file.readline())["event"]["inserted_at"])


def _show(home: Path, what: str, command: list[str]) -> None:
    env = {"AFTERLOG_HOME": str(home)}
    taken = [measure([sys.executable, "-m", "deployments.cli", *command], env) for _ in range(REPEATED)]
    walls = [each.wall for each in taken]
    cpu = statistics.median(each.cpu for each in taken)
    print(f"{what}: {cpu:.2f} CPU s, {min(walls):.2f} to {max(walls):.2f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["15", "120034"])
