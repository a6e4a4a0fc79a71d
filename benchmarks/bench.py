"""`make bench`: Afterlog beside what a user would pick instead, in turn, on the same log; writes benchmarks/RESULTS.md.

    python -m benchmarks.bench [--events 1000000 5000000] [--runs 5] [--shared ../shared/bench]

Three processors (derive, abandonment, anomalies) with every commit durable; anomalies with the two measures of the comparison
work (SEMANTICS.txt), and all processors with the default ones beside. The peers are installed in benchmarks/work. Each round
runs every contender once, in an order that turns; figures are medians, ratios are medians of a round's own pairs.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.measure import WORK, Figures, fresh, link_log, measure
from benchmarks.small import small_figures

TWO = '["object.body.length","object.body.whitespace"]'
THREE = "derive,abandonment,anomalies"
DIFFERS = (
    "What still differs: Afterlog commits durably as it goes, keeps its state for the next run, judges every line, and takes late "
    "events and ticks into account; the peers read a whole, clean file once and keep nothing."
)
OURS, ALL, DUCKDB, POLARS, BYTEWAX = (
    "Afterlog",
    "Afterlog, all processors, default measures",
    "DuckDB",
    "Polars",
    "Bytewax, fused",
)


def main() -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, nargs="+", default=[1_000_000, 5_000_000])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parent.parent.parent / "shared" / "bench")
    arguments = parser.parse_args()
    python = _peers()
    lines = [
        "# Results", "",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, `make bench`: runs of each contender in turn. {_machine(python)}", "",
        DIFFERS,
    ]  # fmt: skip
    for events in arguments.events:
        log = _log(events, python, arguments.shared)
        figures = _rounds(_contenders(log, python, arguments.shared), arguments.runs)
        title = f"## {events:,} events, {log.stat().st_size / 1e6:.0f} MB, median of {arguments.runs}"
        lines += ["", title, "", *_table(figures)]
        _write(lines)
    # The last figures are those of the last, and largest, log.
    wall = statistics.median(run.wall for run in figures[DUCKDB])
    lines += ["", "## One by one", "", *small_figures(WORK / f"events-{arguments.events[0]}.jsonl", log, wall)]
    _write(lines)


def _write(lines: list[str]) -> None:
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "RESULTS.md").write_text(text)
    print(text, flush=True)


def _contenders(log: Path, python: Path, shared: Path) -> dict[str, Callable[[], Figures]]:
    """What runs in a round, each with a fresh folder."""

    def ours(processors: str, measures: str | None) -> Figures:
        link_log(log)
        env = {"AFTERLOG_HOME": str(WORK / "home")}
        if measures is not None:
            env["AFTERLOG_ANOMALIES__MEASURES"] = measures
        return measure([sys.executable, "-m", "benchmarks.catch_up", processors], env)

    def peer(script: str) -> Figures:
        return measure([str(python), str(shared / script), str(log), str(fresh("out"))], {})

    def bytewax() -> Figures:
        as_of = (WORK / f"{log.stem}.as_of").read_text()
        env = {"EV": str(log), "OUTD": str(fresh("out")), "ASOF": as_of, "NOGC": "1", "PYTHONPATH": str(shared)}
        return measure([str(python), "-m", "bytewax.run", "peer_bytewax_fused:flow"], env)

    return {
        OURS: lambda: ours(THREE, TWO), DUCKDB: lambda: peer("peer_duckdb.py"), POLARS: lambda: peer("peer_polars.py"),
        BYTEWAX: bytewax, ALL: lambda: ours("all", None),
    }  # fmt: skip


def _rounds(contenders: dict[str, Callable[[], Figures]], runs: int) -> dict[str, list[Figures]]:
    figures: dict[str, list[Figures]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(runs):
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:
            figures[name].append(contenders[name]())
            print(f"round {number + 1}: {name}: {figures[name][-1]}", flush=True)
    return figures


def _table(figures: dict[str, list[Figures]]) -> list[str]:
    rows = [
        "| contender | CPU s | wall s | peak MiB | CPU of Afterlog's three over it, pair by pair |",
        "|---|---|---|---|---|",
    ]
    for name, runs in figures.items():
        cpu, wall, memory = (
            statistics.median(getattr(run, field) for run in runs) for field in ("cpu", "wall", "memory")
        )
        ratios = [ours.cpu / theirs.cpu for ours, theirs in zip(figures[OURS], runs, strict=True)]
        shown = "" if name == OURS else f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        rows.append(f"| {name} | {cpu:.2f} | {wall:.2f} | {memory:.0f} | {shown} |")
    return rows


def _peers() -> Path:
    python = WORK / "peer" / "bin" / "python"
    WORK.mkdir(exist_ok=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", WORK / "peer"], check=True)
        wanted = ["duckdb", "polars", "bytewax", "orjson", "msgspec", "numpy", "xxhash"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def _log(events: int, python: Path, shared: Path) -> Path:
    """The generated log, and its greatest time beside it, which Bytewax wants to be told."""
    log = WORK / f"events-{events}.jsonl"
    if not log.exists():
        subprocess.run([python, shared / "gen.py", str(events), log], check=True)
    if not (as_of := WORK / f"{log.stem}.as_of").exists():
        code = (
            "import orjson, sys; print(max(orjson.loads(l)['context']['at'] for l in open(sys.argv[1], 'rb')), end='')"
        )
        as_of.write_bytes(subprocess.run([python, "-c", code, log], check=True, capture_output=True).stdout)
    return log


def _machine(python: Path) -> str:
    code = "import duckdb, polars, importlib.metadata as m; print(duckdb.__version__, polars.__version__, m.version('bytewax'))"
    duckdb, polars, bytewax = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    said = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in said if line.startswith("model name")), "")
    return (
        f"{os.cpu_count()} shared cores ({model}), {platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"DuckDB {duckdb}, Polars {polars}, Bytewax {bytewax}."
    )


if __name__ == "__main__":
    main()
