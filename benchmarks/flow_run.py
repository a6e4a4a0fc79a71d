"""What it costs to run as a Prefect flow run: CPU seconds over those of `--no-prefect`, import and server excluded.

    python -m benchmarks.flow_run [--events 1000000] [--runs 3]

Both process the same log to its end with every processor, each run in a process of its own, in an order that turns. The server
is a process of its own, too, and is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from benchmarks.measure import WORK, link_log
from deployments.server import Processes, free_port
from storage.settings import load_settings

WAYS = ("plain", "flow")


def run(way: str) -> None:
    """Catch up with all processors, one way or the other; prints the CPU seconds that it took once all was imported."""
    from flows.process import process  # for both, so that both have imported the same

    begun = time.process_time()
    if way == "flow":
        process(as_of="log-end")
    else:
        from benchmarks.catch_up import main as plain

        plain("all")
    print(f"CPU {time.process_time() - begun}")


def main() -> None:
    """Print the CPU seconds of each run, and the median of the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="afterlog-flow-run-") as folder:
        log = _beginning(arguments.events)
        processes = Processes(load_settings(home=Path(folder)), free_port())
        try:
            processes.start_server(lambda _: None)
            ratios = []
            for number in range(arguments.runs):
                taken = {way: _measured(way, log, processes.api) for way in (WAYS if number % 2 else WAYS[::-1])}
                ratios.append(taken["flow"] / taken["plain"])
                print(f"{arguments.events:,} events: {taken} {ratios[-1]:.3f} x", flush=True)
            print(f"median {statistics.median(ratios):.3f} x")
        finally:
            processes.stop()


def _beginning(events: int) -> Path:
    """The first events of the comparison work's log, as a file of its own; that log itself where it has as many."""
    whole = WORK / f"events-{events}.jsonl"
    if whole.exists():
        return whole
    short = WORK / f"first-{events}.jsonl"
    if not short.exists():
        with (WORK / "events-1000000.jsonl").open("rb") as source, short.open("wb") as target:
            target.writelines(islice(source, events))
    return short


def _measured(way: str, log: Path, api: str) -> float:
    home = link_log(log)
    env = {**os.environ, "AFTERLOG_HOME": str(home), "PREFECT_API_URL": api, "PREFECT_HOME": str(home / "prefect")}
    command = [sys.executable, "-m", "benchmarks.flow_run", way]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return float(next(line for line in done.stdout.splitlines() if line.startswith("CPU ")).split()[1])


if __name__ == "__main__":
    run(sys.argv[1]) if sys.argv[1:2] and sys.argv[1] in WAYS else main()
