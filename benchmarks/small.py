"""Figures that are not a whole catch-up: appends, a small run after a large past, cold starts."""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from itertools import islice
from pathlib import Path

from benchmarks.measure import WORK, fresh, measure
from storage.door import append_lines
from storage.settings import load_settings
from storage.store import Store
from tasks.local import side_by_side
from tasks.process import FinalTick, process_to_end
from tasks.run import Run
from tasks.topology import build_topology

NEW, RUNS = 10_000, 5
THREE = ("derive", "abandonment", "anomalies")


def small_figures(log: Path, largest: Path, duckdb_wall: float) -> list[str]:
    """Rows of a table: what, and the figure; DuckDB went over the whole of `largest` in `duckdb_wall` seconds."""
    with log.open("rb") as file:
        lines = [line.rstrip(b"\n") for line, _ in zip(file, range(300_000), strict=False)]
    rows = ["| what | figure |", "|---|---|"]
    many, one, eight = _append(lines, 1000), _append(lines[:3000], 1), _append_from_threads(lines[:12_000], 8)
    rows.append(f"| append, 1,000 a call, each call durable | {many:,.0f} events a second |")
    rows.append(
        f"| append, one a call, durable: one thread; eight | {one:,.0f}; {eight:,.0f} events a second, {eight / one:.1f} x |"
    )
    past = _count(largest) - RUNS * NEW
    short, long = _run_after(largest, 100_000), _run_after(largest, past)
    rows.append(
        f"| a run over {NEW:,} new events in a started process: after 100,000 events; after {past:,} | {short[0]:.2f} CPU s, "
        f"{short[1]:.2f} s; {long[0]:.2f} CPU s, {long[1]:.2f} s wall; {long[0] / short[0]:.2f} x |"
    )
    rows.append(f"| that run against DuckDB doing the whole again, wall | {long[1] / duckdb_wall:.3f} x |")
    for command in (["read", "events"], ["status"]):
        env = {"AFTERLOG_HOME": str(WORK / "home")}
        (WORK / "home" / "logs" / "events").rename(WORK / "home" / "logs" / "other")
        walls = [measure([sys.executable, "-m", "deployments.cli", *command], env).wall for _ in range(5)]
        (WORK / "home" / "logs" / "other").rename(WORK / "home" / "logs" / "events")
        rows.append(f"| cold start of `afterlog {command[0]}` | {statistics.median(walls):.2f} s |")
    return rows


def _store(home: Path) -> Store:
    os.environ["AFTERLOG_HOME"] = str(home)
    return Store(load_settings())


def _append(lines: list[bytes], at_once: int) -> float:
    store = _store(fresh("home"))
    begun = time.monotonic()
    for start in range(0, len(lines), at_once):
        append_lines(store, "events", lines[start : start + at_once])
    return len(lines) / (time.monotonic() - begun)


def _append_from_threads(lines: list[bytes], threads: int) -> float:
    store = _store(fresh("home"))

    def work(number: int) -> None:
        for line in lines[number::threads]:
            append_lines(store, "events", [line])

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    begun = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(lines) / (time.monotonic() - begun)


def _count(log: Path) -> int:
    with log.open("rb") as file:
        return sum(1 for _ in file)


def _run_after(log: Path, past: int) -> tuple[float, float]:
    """CPU and wall seconds of the three processors over `NEW` events after `past` ones: medians of `RUNS` runs in a row."""
    store = _store(fresh("home"))
    took: list[tuple[float, float]] = []
    with log.open("rb") as file:
        lines = (line[:-1] for line in file)
        for start in range(0, past, 50_000):
            append_lines(store, "events", list(islice(lines, min(50_000, past - start))))
        _process(store)
        for _ in range(RUNS):
            append_lines(store, "events", list(islice(lines, NEW)))
            cpu, wall = time.process_time(), time.monotonic()
            _process(store)
            took.append((time.process_time() - cpu, time.monotonic() - wall))
    return statistics.median(cpu for cpu, _ in took), statistics.median(wall for _, wall in took)


def _process(store: Store) -> None:
    run, final = Run(store, build_topology(store.settings), "benchmark"), FinalTick("log-end")
    outcome = side_by_side(run, THREE, lambda r, name: process_to_end(r, name, final))
    for failure in outcome.failures.values():
        raise failure
