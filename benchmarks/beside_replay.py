"""How much a replay delays what is live: append until every processor has it, without a replay, beside one, beside promotions.

    python -m benchmarks.beside_replay [CUSTOMERS] [SECONDS]

A live run follows an example log (some 30 events a customer); probes come at random moments, SECONDS for each of the three.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from deployments.example import history
from storage.door import append_events, append_lines
from storage.settings import load_settings
from storage.store import Store
from storage.times import now
from tasks.process import positions
from tasks.topology import build_topology
from tests.helpers import process

NAME = "longer"


def afterlog(home: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a command on a HOME."""
    env = {**os.environ, "AFTERLOG_HOME": str(home)}
    command = [sys.executable, "-m", "deployments.cli", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def behind(store: Store, names: set[str]) -> int:
    """Up to where every processor of raw logs has read `events`."""
    return min((p.offset for p in positions(store) if p.processor in names), default=0)


def probe(store: Store, names: set[str], seconds: float, rng: random.Random) -> list[float]:
    """Append at random moments for so long, and give the seconds until everybody had each."""
    found, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(rng.uniform(0.02, 0.3))
        item = {"id": 1, "price": 5, "count": 2}
        who = {"id": rng.randrange(200), "type": "CUSTOMER"}
        event = {"subject": who, "verb": "ADDED_ITEM_TO_BASKET", "object": {"type": "ITEM", "item": item}}
        begun = time.monotonic()
        append_events(store, "events", [{**event, "context": {"at": now()}}])
        end = store.reader("events", 0).end()
        while behind(store, names) < end:
            time.sleep(0.002)
        found.append(time.monotonic() - begun)
    return found


def beside(work: Callable[[], int], stop: threading.Event, done: list[int]) -> None:
    """Do a piece of work again and again."""
    while not stop.is_set():
        assert work() == 0
        done.append(1)


def measure(title: str, found: list[float], times: int) -> None:
    """Print one line."""
    ms = [1000 * v for v in (statistics.median(found), sorted(found)[int(len(found) * 0.99)], max(found))]
    print(
        f"{title}: {len(found)} probes, median {ms[0]:.0f} ms, p99 {ms[1]:.0f} ms, greatest {ms[2]:.0f} ms"
        + f"; {times} times" * bool(times),
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    customers = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 60
    rng = random.Random(1)
    with tempfile.TemporaryDirectory(prefix="afterlog-beside-") as folder:
        home = Path(folder) / "home"
        store = Store(load_settings(home=home))
        lines = list(history(now(), customers=customers))
        append_lines(store, "events", lines)
        process(home, as_of=now() - 2000)
        names = set(build_topology(store.settings).on_raw_logs())
        print(f"{len(lines):,} events, load {os.getloadavg()[0]:.1f}", flush=True)
        live = afterlog(home, "process", "--no-prefect", "--follow-for", "3600")
        try:
            probe(store, names, 10, rng)  # until it is warm
            measure("alone", probe(store, names, seconds, rng), 0)

            def replay() -> int:
                code = afterlog(home, "replay", "--set", "timeout=45m", "--name", NAME, "--no-prefect").wait()
                return code or afterlog(home, "replays", "discard", NAME).wait()

            def promote() -> int:
                code = afterlog(home, "replays", "promote", NAME).wait()
                return code or afterlog(home, "replays", "rollback", NAME).wait()

            for title, work in (("beside replays", replay), ("beside promotions and rollbacks", promote)):
                if work is promote:
                    assert afterlog(home, "replay", "--set", "timeout=45m", "--name", NAME, "--no-prefect").wait() == 0
                stop, done = threading.Event(), list[int]()
                thread = threading.Thread(target=beside, args=(work, stop, done))
                thread.start()
                found = probe(store, names, seconds, rng)
                stop.set()
                thread.join()
                measure(title, found, len(done))
        finally:
            live.send_signal(signal.SIGTERM)
            live.wait()


if __name__ == "__main__":
    main()
