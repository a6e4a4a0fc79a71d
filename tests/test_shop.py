"""Real behaviour in shops, and an example log: whose basket was left, however the log came in and whoever was killed."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deployments.example import history
from storage.door import append_lines
from storage.settings import load_settings
from storage.store import Store
from tests import oracle
from tests.conftest import ROOT, SHARED, afterlog, log_bytes, needs_shared
from tests.helpers import DERIVED, parsed, process, undisturbed

SHOP = SHARED / "shop"
LOGS = ("rees46_cosmetics_oct", "rees46_cosmetics_nov", "taobao_a_dev", "taobao_slice")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def unzipped(name: str) -> list[bytes]:
    return gzip.decompress((SHOP / f"{name}.jsonl.gz").read_bytes()).splitlines()


def last_at(lines: list[bytes]) -> int:
    """The greatest `context.at` of a log."""
    return max(int(json.loads(line)["context"]["at"]) for line in lines)


def abandoned(name: str) -> set[tuple[str, int]]:
    """The standing abandonments that two independent programs found."""
    events = [json.loads(line) for line in unzipped(f"{name}.abandoned")]
    return {(str(event["subject"]["id"]), event["context"]["at"]) for event in events}


def standing(home: Path) -> set[tuple[str, int]]:
    return oracle.standing(parsed(log_bytes(home, "baskets")))


@needs_shared
@pytest.mark.parametrize("name", LOGS)
def test_one_pass_gives_exactly_the_known_abandonments(home: Path, name: str) -> None:
    lines = unzipped(name)
    assert afterlog(home, "append", "events", stdin=b"\n".join(lines)).returncode == 0
    result = afterlog(home, "process", "--as-of", str(last_at(lines)), "--no-prefect")
    assert result.returncode == 0, result.stderr.decode()
    assert standing(home) == abandoned(name)
    assert [e["event"]["id"] for e in parsed(log_bytes(home, "quarantine"))] == []


@needs_shared
@pytest.mark.parametrize(("name", "batch"), [*zip(LOGS, (700, 700, 40_000, 400_000), strict=True)])
@pytest.mark.parametrize("how", ["appends", "bytes"])
def test_any_cut_of_the_log_gives_the_known_abandonments(home: Path, name: str, batch: int, how: str) -> None:
    """Cut into appends of whole lines; or at any byte, as whoever appends by hand may leave it for a while."""
    lines, rng = unzipped(name), random.Random(f"{name} {how}")
    log = b"".join(line + b"\n" for line in lines)
    cuts = sorted(rng.sample(range(len(lines) if how == "appends" else len(log)), 7))
    settings = {"batch_bytes": batch, "commit_bytes": 4 * batch, "segment_bytes": max(10_000, len(log) // 9)}
    store = Store(load_settings(home=home, **settings))
    for start, end in zip([0, *cuts], [*cuts, None], strict=True):
        if how == "appends":
            append_lines(store, "events", lines[start:end])
        else:
            append_by_hand(home, log[start:end])
        process(home, "abandonment", as_of="log-end" if end else last_at(lines), **settings)
    assert log_bytes(home, "events") == log
    assert standing(home) == abandoned(name)


def append_by_hand(home: Path, data: bytes) -> None:
    folder = home / "logs/events/0"
    folder.mkdir(parents=True, exist_ok=True)
    with max(folder.glob("*.jsonl"), default=folder / f"{0:020d}.jsonl").open("ab") as file:
        file.write(data)


@needs_shared
@pytest.mark.parametrize(
    ("name", "kills", "batch"), [("rees46_cosmetics_nov", 4, 20_000), ("taobao_a_dev", 4, 200_000)]
)
def test_kills_at_any_moment_change_nothing_of_what_comes_out(home: Path, name: str, kills: int, batch: int) -> None:
    """At any moment after the first commit of a run, that is: what goes before it has a test in test_crash."""
    lines, rng = unzipped(name), random.Random(name)
    cut = rng.randrange(len(lines) // 3, len(lines) * 2 // 3)
    store = Store(load_settings(home=home))
    for piece, as_of in ((lines[:cut], "log-end"), (lines[cut:], str(last_at(lines)))):
        append_lines(store, "events", piece)
        delays = [rng.uniform(0, len(piece) / 50_000) for _ in range(kills // 2)]
        killed = [killed_at_work(home, seconds, as_of, batch) for seconds in delays]
        assert any(killed)
        assert afterlog(home, "process", "--as-of", as_of, "--no-prefect").returncode == 0
    process(home)
    assert standing(home) == abandoned(name)
    other = undisturbed(home)
    assert {log: log_bytes(home, log) for log in DERIVED} == {log: log_bytes(other, log) for log in DERIVED}


def killed_at_work(home: Path, seconds: float, as_of: str, batch: int) -> bool:
    """Start `process` with small batches, and kill it so many seconds after its first commit; whether it was at work."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("AFTERLOG_")} | {"AFTERLOG_HOME": str(home)}
    sizes = {"BATCH": batch, "COMMIT": 2 * batch, "SEGMENT": 10 * batch}
    env |= {f"AFTERLOG_{name}_BYTES": str(size) for name, size in sizes.items()}
    command = [sys.executable, "-m", "deployments.cli", "process", "--as-of", as_of, "--no-prefect"]
    before = positions(home)
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as working:
        while positions(home) == before and working.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds)
        working.kill()
        errors = working.stderr.read() if working.stderr else b""
    assert working.returncode in (0, -signal.SIGKILL), errors.decode()
    return working.returncode != 0


def positions(home: Path) -> int:
    """A number that changes with whatever is committed."""
    wal = home / "afterlog.db-wal"
    return wal.stat().st_mtime_ns if wal.exists() else 0


def test_an_example_log_gives_what_a_brute_force_gives_that_imports_nothing_of_afterlog(home: Path) -> None:
    lines = list(history(1_700_000_000_000, customers=60, hours=72))
    store, rng = Store(load_settings(home=home)), random.Random(3)
    cuts = sorted(rng.sample(range(len(lines)), 6))
    for start, end in zip([0, *cuts], [*cuts, len(lines)], strict=True):
        append_lines(store, "events", lines[start:end])
        process(home, as_of="log-end")
    process(home, as_of=1_700_000_000_000)
    noted = [e["object"] for e in parsed(log_bytes(home, "clock")) if e["verb"] == "TICK"]
    ticks = [oracle.Tick(tick["as_of"], tick["ends"]["events/0"]) for tick in noted]
    expected = oracle.run(b"".join(line + b"\n" for line in lines), ticks, baskets=log_bytes(home, "baskets"))
    for log in ("baskets", "reactions", "quarantine", "reminders"):
        found = parsed(log_bytes(home, log))
        for event in found if log == "quarantine" else ():
            event["object"]["reason"] = event["object"]["reason"].split(":")[0]
        assert found == getattr(expected, log), log
    assert standing(home) == oracle.standing(expected.baskets)
    counts = [expected.counts[verb] for verb in ("ABANDONED_BASKET", "RECOVERED_BASKET", "ABANDONMENT_RETRACTED")]
    assert min(counts) > 0


@needs_shared
def test_the_brute_force_agrees_with_the_known_abandonments() -> None:
    for name in LOGS[:2]:
        lines = unzipped(name)
        log = b"".join(line + b"\n" for line in lines)
        assert oracle.standing(oracle.run(log, [oracle.Tick(last_at(lines), len(log))]).baskets) == abandoned(name)
