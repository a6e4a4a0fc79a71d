"""CPU seconds and peak memory of a catch-up over 1M events, in turn with DuckDB doing the same from the whole file.

    python -m benchmarks.throughput [--events 1000000] [--runs 3] [--shared ../shared/bench]

Three processors (derive, abandonment, anomalies) with every commit durable; anomalies with the two measures of the comparison
work (SEMANTICS.txt), and once with the default ones. DuckDB is installed beside, in benchmarks/work.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

WORK = Path(__file__).parent / "work"
TWO = '["object.body.length","object.body.whitespace"]'
THREE = "derive,abandonment,anomalies"


def main() -> None:
    """Run the comparison and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parent.parent.parent / "shared" / "bench")
    arguments = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    log, peer = WORK / f"events-{arguments.events}.jsonl", WORK / "peer" / "bin" / "python"
    if not peer.exists():
        subprocess.run([sys.executable, "-m", "venv", WORK / "peer"], check=True)
        subprocess.run([peer, "-m", "pip", "install", "--quiet", "duckdb", "orjson"], check=True)
    if not log.exists():
        subprocess.run([peer, arguments.shared / "gen.py", str(arguments.events), log], check=True)
    ours: list[tuple[float, float, float]] = []
    theirs: list[tuple[float, float, float]] = []
    for _ in range(arguments.runs):
        ours.append(_ours(log, THREE, TWO))
        theirs.append(_measure([str(peer), str(arguments.shared / "peer_duckdb.py"), str(log), str(_fresh("out"))], {}))
    _show("Afterlog, three processors, two measures", ours)
    _show("DuckDB, the whole file", theirs)
    ratios = [a[0] / b[0] for a, b in zip(ours, theirs, strict=True)]
    print(f"CPU, Afterlog over DuckDB, pair by pair: {', '.join(f'{r:.2f}' for r in ratios)}")
    _show("Afterlog, three processors, default measures", [_ours(log, THREE, None)])
    _show("Afterlog, all processors, default measures", [_ours(log, "all", None)])


def _ours(log: Path, processors: str, measures: str | None) -> tuple[float, float, float]:
    folder = _fresh("home") / "logs" / "events" / "0"
    folder.mkdir(parents=True)
    os.link(log, folder / f"{0:020d}.jsonl")
    env = {"AFTERLOG_HOME": str(WORK / "home")}
    if measures is not None:
        env["AFTERLOG_ANOMALIES__MEASURES"] = measures
    return _measure([sys.executable, "-m", "benchmarks.catch_up", processors], env)


def _fresh(name: str) -> Path:
    shutil.rmtree(WORK / name, ignore_errors=True)
    (WORK / name).mkdir()
    return WORK / name


def _measure(command: list[str], env: dict[str, str]) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and peak MiB of one process, by the operating system's own account."""
    begun = time.monotonic()
    # An installed program has its modules compiled; a workplace that forbids that would be measured compiling.
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, env={**inherited, **env}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - begun, usage.ru_maxrss / 1024


def _show(title: str, runs: list[tuple[float, float, float]]) -> None:
    cpu, wall, memory = (statistics.median(run[i] for run in runs) for i in range(3))
    print(f"{title}: CPU {cpu:.2f} s, wall {wall:.2f} s, peak {memory:.0f} MiB (median of {len(runs)})", flush=True)


if __name__ == "__main__":
    main()
