"""What a replay costs against the same range processed live: `python -m benchmarks.replay FILE [PROCESSOR ...]`.

CPU seconds of this process, the best of three, each on a fresh HOME: other load on the machine counts least that way.
"""

from __future__ import annotations

import gzip
import sys
import tempfile
import time
from pathlib import Path

from storage.door import append_lines
from storage.settings import load_settings
from storage.store import Store
from tasks.local import side_by_side
from tasks.process import FinalTick, process_to_end
from tasks.replay import run_replay, start
from tasks.replay_plan import Request
from tasks.run import Run
from tasks.topology import build_topology

_AT_ONCE = 10_000


def measure(lines: list[bytes], names: list[str]) -> tuple[float, float]:
    """CPU seconds live, and of a replay of the same."""
    with tempfile.TemporaryDirectory(prefix="afterlog-benchmark-") as folder:
        store = Store(load_settings(home=Path(folder)))
        topology = build_topology(store.settings)
        for begin in range(0, len(lines), _AT_ONCE):
            append_lines(store, "events", lines[begin : begin + _AT_ONCE])
        chosen = topology.downstream(names)
        began = time.process_time()
        run, final = Run(store, topology, "benchmark"), FinalTick("log-end")
        first = [name for name in chosen if topology.reads(name) in topology.raw_logs()]
        outcome = side_by_side(run, first, lambda r, name: process_to_end(r, name, final))
        assert not outcome.failures, outcome.failures
        run.stop.clear()
        for name in chosen:
            if name not in first:
                process_to_end(run, name, None)
        live = time.process_time() - began
        began = time.process_time()
        planned, _ = start(store, topology, Request(tuple(names)), "benchmark")
        run_replay(planned, store, topology, "benchmark")
        again = time.process_time() - began
        store.database.dispose()
        return live, again


def main() -> None:
    """Measure and print."""
    data = Path(sys.argv[1]).read_bytes()
    lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).splitlines()
    size = sum(map(len, lines)) + len(lines)
    found = [measure(lines, sys.argv[2:] or ["abandonment"]) for _ in range(3)]
    live, again = min(live for live, _ in found), min(again for _, again in found)
    print(
        f"{len(lines):,} lines, {size / 1e6:.1f} MB: live {live:.2f} CPU s, replay {again:.2f} CPU s, {live / again:.2f} x"
    )


if __name__ == "__main__":
    main()
