"""What a promotion takes with many open baskets: time, how long the schedule is held, and memory.

    python -m benchmarks.promotion [BASKETS] [MINUTES]

Each customer put one thing into a basket, so many minutes ago (10: open, and flagged by nobody yet; 120: flagged, with a
mail that waits for each). Replayed with 45 minutes, promoted and rolled back, each in a process of its own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from storage.door import append_lines
from storage.outbox import Outbox
from storage.settings import load_settings
from storage.store import DELIVERIES, Store
from storage.times import now
from tasks.intake import Intake
from tasks.local import side_by_side
from tasks.process import FinalTick, process_to_end
from tasks.promote import Moved, promote, rollback
from tasks.replay import run_replay, start
from tasks.replay_plan import Request
from tasks.restored import Restores
from tasks.run import Run
from tasks.topology import build_topology

_AT_ONCE = 20_000
NAME = "longer"


def prepare(store: Store, baskets: int, minutes: int) -> None:
    """The baskets, what is live of them, and the mails that wait."""
    first = now() - (minutes + 2) * 60_000
    for begin in range(0, baskets, _AT_ONCE):
        lines = [_line(customer, first + customer * 60_000 // baskets) for customer in range(begin, begin + _AT_ONCE)]
        append_lines(store, "events", lines[: baskets - begin])
    run = Run(store, build_topology(store.settings), "benchmark")
    for name, final in (("abandonment", FinalTick("now")), ("remind", None)):
        outcome = side_by_side(run, [name], lambda r, each, final=final: process_to_end(r, each, final))  # type: ignore[misc]  # a default binds it
        assert not outcome.failures, outcome.failures
        run.stop.clear()
    intake = Intake(run, Outbox(store, DELIVERIES, run.author), Restores(run))
    while intake.round():
        pass
    intake.close()


def _line(customer: int, at: int) -> bytes:
    return (
        b'{"subject":{"id":%d,"type":"CUSTOMER"},"verb":"ADDED_ITEM_TO_BASKET","object":{"type":"ITEM","item":'
        b'{"id":3,"price":5,"count":2}},"context":{"at":%d},"event":{"inserted_at":%d}}' % (customer, at, at)
    )


def replay(store: Store) -> None:
    """The generation that is to be promoted."""
    topology = build_topology(store.settings)
    planned, _ = start(store, topology, Request(settings={"timeout": "45m"}, name=NAME), "benchmark")
    run_replay(planned, store, topology, "benchmark")


def step(name: str, store: Store, baskets: int, minutes: int) -> None:
    """One step, in this process; prints what it took as JSON."""
    begun, before, held = time.monotonic(), _peak(), 0.0
    if name == "prepare":
        prepare(store, baskets, minutes)
    elif name == "replay":
        replay(store)
    else:
        moving = promote if name == "promote" else rollback
        moved: Moved = moving(store, build_topology(store.settings), NAME, "benchmark")
        held = moved.seconds
    print(json.dumps([time.monotonic() - begun, held, before, _peak()]))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    baskets = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    minutes = int(sys.argv[2]) if len(sys.argv) > 2 else 10
    if len(sys.argv) > 3:
        step(sys.argv[3], Store(load_settings()), baskets, minutes)
        return
    print(f"{baskets:,} baskets left {minutes} minutes ago; load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory(prefix="afterlog-promotion-") as folder:
        for name in ("prepare", "replay", "promote", "rollback", "promote"):
            command = [sys.executable, "-m", "benchmarks.promotion", str(baskets), str(minutes), name]
            env = {**os.environ, "AFTERLOG_HOME": str(Path(folder) / "home")}
            done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
            seconds, held, before, peak = json.loads(done.stdout)
            print(
                f"{name}: {seconds:.1f} s, of which the schedule is held {held:.2f} s; {peak:.0f} MiB at most, {before:.0f} before",
                flush=True,
            )


if __name__ == "__main__":
    main()
