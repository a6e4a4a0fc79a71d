"""One catch-up of some processors (or `all`) over HOME's raw logs, to the log's end: what bench.py measures."""

from __future__ import annotations

import sys

from storage.settings import load_settings
from storage.store import Store
from tasks.local import side_by_side
from tasks.process import FinalTick, process_to_end
from tasks.run import Run
from tasks.topology import build_topology


def main(names: str) -> None:
    """Catch up with the named processors, side by side."""
    settings = load_settings()
    run = Run(Store(settings), build_topology(settings), "benchmark")
    final = FinalTick("log-end")
    chosen = run.topology.on_raw_logs() if names == "all" else names.split(",")
    outcome = side_by_side(run, chosen, lambda r, name: process_to_end(r, name, final))
    for summary in outcome.summaries:
        print(summary)
    for failure in outcome.failures.values():
        raise failure


if __name__ == "__main__":
    main(sys.argv[1])
