"""What the kernel was asked for, in which order: the source durable before the derived log, that before the transaction.

A test of the code's own steps would believe the code; strace does not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from deployments.example import history
from tests.conftest import ROOT, afterlog, log_bytes

NOW = 1_700_000_000_000  # 2023: nothing is ahead of the wall clock
CALL = re.compile(r"(\d+) +(?:\[\S+\] )?(?P<call>write|pwrite64|fsync|fdatasync)\(\d+<(?P<path>[^>]*)>.*")

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def traced(home: Path, *command: str, **settings: str) -> dict[str, list[tuple[str, str]]]:
    """Run a command under strace; what each of its threads wrote and made durable, as (call, path under HOME)."""
    output = home.with_name("trace")
    env = {k: v for k, v in os.environ.items() if not k.startswith("AFTERLOG_")} | {"AFTERLOG_HOME": str(home)}
    env |= {f"AFTERLOG_{name.upper()}": value for name, value in settings.items()}
    watched = ["strace", "-f", "-y", "-s", "0", "-e", "trace=write,pwrite64,fsync,fdatasync", "-o", str(output)]
    done = subprocess.run(
        [*watched, sys.executable, "-m", "deployments.cli", *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    calls = defaultdict(list)
    for line in output.read_text().splitlines():
        if (match := CALL.match(line)) and match["path"].startswith(f"{home}/"):
            calls[match[1]].append((match["call"], match["path"].removeprefix(f"{home}/")))
    return calls


def letters(calls: list[tuple[str, str]], derived: str) -> str:
    """One letter a call.

    s: the source made durable; d, f, g: the derived log written, made durable, its folder too; w, c: the database's
    write-ahead log written, made durable.
    """
    found = ""
    for call, path in calls:
        syncs = call in ("fsync", "fdatasync")
        if path.startswith("logs/events/0/") and path.endswith(".jsonl"):
            found += "s" if syncs else "!"
        elif path == f"logs/{derived}/0":
            found += "g"
        elif path.startswith(f"logs/{derived}/0/") and path.endswith(".jsonl"):
            found += "f" if syncs else "d"
        elif path == "afterlog.db-wal":
            found += "c" if syncs else "w"
    return found


def written(calls: dict[str, list[tuple[str, str]]], log: str) -> str:
    """What the thread did that wrote a derived log."""
    [writer] = [
        thread for thread, did in calls.items()
        if any(call == "write" and path.startswith(f"logs/{log}/0/") and path.endswith(".jsonl") for call, path in did)
    ]  # fmt: skip
    return letters(calls[writer], log)


@needs_strace
@pytest.mark.parametrize("log", ["quarantine", "reactions", "baskets", "anomalies"])
def test_a_commit_makes_the_source_durable_then_the_derived_log_then_the_transaction(tmp_path: Path, log: str) -> None:
    home = tmp_path / "home"
    lines = [*history(NOW, seed=1, customers=60, hours=48)][-1500:]
    lines += [b"no event %d" % number for number in range(20)]
    assert afterlog(home, "append", "events", stdin=b"\n".join(lines)).returncode == 0
    small = {"batch_bytes": "40000", "commit_bytes": "80000"}
    calls = traced(home, "process", "--as-of", "log-end", "--no-prefect", **small)
    assert log_bytes(home, log)
    found = written(calls, log)
    assert "d" in found
    assert re.fullmatch(r"[wcg]*(s+(g?d+fg)?w+c)+", found), found


@needs_strace
def test_what_is_written_ahead_of_a_commit_never_outlives_what_it_came_from(tmp_path: Path) -> None:
    home = tmp_path / "home"
    lines = [*history(NOW, seed=1, customers=60, hours=48)][-1500:]
    assert afterlog(home, "append", "events", stdin=b"\n".join(lines)).returncode == 0
    small = {"batch_bytes": "40000", "commit_bytes": "160000", "spill_bytes": "1000"}
    found = written(traced(home, "process", "--as-of", "log-end", "--no-prefect", **small), "baskets")
    assert "dsd" in found
    assert re.fullmatch(r"[wcg]*((s+g?d)*s*(fg)?w+c)+", found), found


@needs_strace
def test_an_append_is_durable_before_it_is_confirmed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (tmp_path / "lines").write_bytes(b"one line\n")
    calls = [call for did in traced(home, "append", "events", str(tmp_path / "lines")).values() for call in did]
    kinds = [(call, path.rpartition("/")[2] or path) for call, path in calls if path.startswith("logs/events")]
    segment = f"{0:020d}.jsonl"
    assert ("write", segment) in kinds
    assert kinds.index(("fsync", "0")) < kinds.index(("fsync", segment))
    assert kinds.index(("write", segment)) < kinds.index(("fsync", segment))
