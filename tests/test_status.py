"""`afterlog status`: idle, working, stuck, dead and paused look different, lag rises for whoever is dead, and it starts at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from storage.brake import PAUSED, put_on
from storage.contacts import Entry, save_contacts
from storage.door import append_lines
from storage.failures import note_failure
from storage.locks import RunLock
from storage.owner import take_over
from storage.store import Store
from storage.times import now
from tests.conftest import ROOT, afterlog
from tests.smtp_server import refusing_port

QUICK = {"stuck_after": "1s", "dead_after": "1s"}
ON_RAW = {"quarantine", "derive", "abandonment", "anomalies", "normalise"}

FAILING = """
from tasks.processors import contract


class Processor(contract.Processor):
    name, reads, writes = "picky", "events", "picked"

    def event(self, event, state, out):
        raise ValueError("cannot take that")
"""


def browse(store: Store, ident: int = 1, ago: int = 0, verb: str = "STARTED_BROWSING", **obj: Any) -> None:
    event = {
        "subject": {"id": ident, "type": "CUSTOMER"}, "verb": verb, "object": obj, "context": {"at": now() - ago},
        "event": {"inserted_at": now() - ago},
    }  # fmt: skip
    append_lines(store, "events", [json.dumps(event).encode()])


def status(home: Path, **settings: str) -> dict[str, Any]:
    done = afterlog(home, "status", "--json", **settings)
    assert (done.returncode, done.stderr) == (0, b"")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def states(found: dict[str, Any]) -> dict[str, str]:
    return {p["processor"]: p["state"] for p in found["processors"]}


def problems(home: Path, **settings: str) -> list[str]:
    """What `--check` says, each in a sentence of its own; its exit code tells whether there is any."""
    done = afterlog(home, "status", "--check", **settings)
    said = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout) == (1 if said else 0, b"")
    assert all(line.startswith("afterlog: ") for line in said)
    return [line.removeprefix("afterlog: ") for line in said]


@contextmanager
def following(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real process that follows the raw logs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deployments.cli", "process", "--no-prefect", "--follow-for", "300"],
        cwd=ROOT, env={**os.environ, "AFTERLOG_HOME": str(home)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until_idle(home: Path, lines: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        rows = [p for p in status(home)["processors"] if p["processor"] in ON_RAW]
        if all((p["read"], p["state"]) == (lines, "idle") for p in rows):
            return
    raise AssertionError("it never was idle")


class TestStates:
    def test_with_nothing_to_do_all_is_idle_and_the_check_says_nothing(self, store: Store) -> None:
        assert problems(store.home) == []
        browse(store)
        assert afterlog(store.home, "process", "--no-prefect").returncode == 0
        time.sleep(1.1)
        found = status(store.home, **QUICK)
        assert set(states(found).values()) == {"idle"}
        assert {(p["lag_bytes"], p["lag_ms"], p["held_by"]) for p in found["processors"]} == {(0, 0, "")}
        assert found["problems"] == problems(store.home, **QUICK) == []

    def test_frozen_is_stuck_killed_is_dead_and_lag_rises_meanwhile(self, store: Store) -> None:
        browse(store)
        with following(store.home) as follower:
            wait_until_idle(store.home, 1)
            assert {p["held_by"] for p in status(store.home)["processors"] if p["processor"] in ON_RAW} == {
                f"afterlog process, process {follower.pid}"
            }
            follower.send_signal(signal.SIGSTOP)
            browse(store)
            fresh = status(store.home)
            assert {states(fresh)[name] for name in ON_RAW} == {"working"}
            assert fresh["problems"] == []
            time.sleep(1.1)
            stuck = status(store.home, **QUICK)
            assert {states(stuck)[name] for name in ON_RAW} == {"stuck"}
            said = problems(store.home, **QUICK)
            assert len(said) == len(ON_RAW)
            assert all(f"held by afterlog process, process {follower.pid}" in each for each in said)
            assert said[0].startswith("quarantine (events/0) is stuck: ")

            follower.send_signal(signal.SIGCONT)
            wait_until_idle(store.home, 2)
            follower.kill()
            follower.wait()
        browse(store)
        time.sleep(1.1)
        dead = status(store.home, **QUICK)
        assert {states(dead)[name] for name in ON_RAW} == {"dead"}
        later = status(store.home, **QUICK)
        for row, after in zip(dead["processors"][:5], later["processors"][:5], strict=True):
            assert row["lag_bytes"] == after["lag_bytes"] > 0
            assert 1_000 < row["lag_ms"] < after["lag_ms"]
        said = problems(store.home, **QUICK)
        assert len(said) == len(ON_RAW)
        assert all("is dead: " in each and each.endswith("to do, and nobody is at it") for each in said)

    def test_a_processor_that_fails_again_and_again_is_stuck_and_says_why(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "picky_two.py").write_text(FAILING)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        browse(store)
        for _ in range(2):
            assert afterlog(store.home, "process", "--no-prefect", processors='["picky_two"]').returncode == 1
        assert states(status(store.home, processors='["picky_two"]'))["picky"] == "stuck"
        [said] = problems(store.home, processors='["picky_two"]')
        assert said.startswith("picky (events/0) is stuck: it failed 2 times since its last commit, last at 20")
        assert ": events:0:0: ValueError: cannot take that. Correct it, at " in said
        (tmp_path / "picky_two.py").write_text(FAILING.replace('raise ValueError("cannot take that")', "pass"))
        assert afterlog(store.home, "process", "--no-prefect", processors='["picky_two"]').returncode == 0
        assert problems(store.home, processors='["picky_two"]') == []

    def test_a_tick_that_nobody_writes_is_lag_too(self, store: Store) -> None:
        """A basket is abandoned while its log is silent; whoever should say so is dead."""
        browse(store, ago=60_000, verb="ADDED_ITEM_TO_BASKET", item={"id": 3, "count": 1})
        assert afterlog(store.home, "process", "--no-prefect", "--as-of", "log-end", timeout="62s").returncode == 0
        assert set(states(status(store.home, timeout="62s")).values()) == {"idle"}
        time.sleep(7)
        found = status(store.home, timeout="62s", **QUICK)
        assert states(found)["abandonment"] == "dead"
        [row] = [p for p in found["processors"] if p["processor"] == "abandonment"]
        assert (row["lag_bytes"], 1_000 < row["lag_ms"] < 60_000) == (0, True)
        [said] = problems(store.home, timeout="62s", **QUICK)
        assert said.startswith("abandonment (events/0) is dead: a tick for ")

    def test_a_checkpoint_beyond_its_log_is_told(self, store: Store) -> None:
        browse(store)
        afterlog(store.home, "process", "--no-prefect")
        [path] = store.directory("events", 0).glob("*.jsonl")
        path.write_bytes(b"")
        said = problems(store.home)
        assert len(said) == len(ON_RAW)
        assert "lies beyond the log's end 0" in said[0]

    def test_a_derived_log_that_was_cut_is_told(self, store: Store) -> None:
        browse(store, ago=3_600_000, verb="ADDED_ITEM_TO_BASKET", item={"id": 1})
        assert afterlog(store.home, "process", "--no-prefect").returncode == 0
        [file] = (store.home / "logs" / "baskets" / "0").glob("*.jsonl")
        end = file.stat().st_size
        file.write_bytes(b"")
        assert status(store.home)["problems"] == [f"baskets/0 was cut: it ends at 0, and up to {end} it was there"]

    def test_a_wall_clock_that_was_ahead_hides_nobody_who_is_dead(self, store: Store) -> None:
        browse(store)
        assert afterlog(store.home, "process", "--no-prefect", "--as-of", "log-end").returncode == 0
        with store.database.write() as connection:
            connection.exec_driver_sql("UPDATE checkpoint SET committed_at = committed_at + 86400000")
        note_failure(store.database, "derive", "of tomorrow")
        with store.database.write() as connection:
            connection.exec_driver_sql("UPDATE failure SET at = at + 86400001")
        assert problems(store.home, **QUICK) == []
        browse(store)
        assert "stuck" not in states(status(store.home)).values()
        time.sleep(1.1)
        assert {states(status(store.home, **QUICK))[name] for name in ON_RAW} == {"dead"}

    def test_a_partition_whose_folder_is_lost_is_told(self, make_store: Callable[..., Store]) -> None:
        """A derived log has as many as the log that it comes from; no setting of this shell tells how many."""
        store = make_store(partitions=3)
        for ident in range(12):
            browse(store, ident, ago=3_600_000, verb="ADDED_ITEM_TO_BASKET", item={"id": 1})
        assert afterlog(store.home, "process", "--no-prefect").returncode == 0
        assert afterlog(store.home, "deliver", "--no-prefect").returncode == 0
        assert problems(store.home) == []
        end = (folder := store.directory("baskets", 2)).joinpath(f"{0:020d}.jsonl").stat().st_size
        shutil.rmtree(folder)
        found = status(store.home)
        assert found["problems"] == [f"baskets/2 was cut: it ends at 0, and up to {end} it was there"]
        assert [p["partition"] for p in found["processors"] if p["processor"] == "remind"] == [0, 1, 2]

    def test_a_clock_that_lies_ahead_is_told_since_all_that_comes_counts_as_late(self, store: Store) -> None:
        line = {"subject": {"id": 1}, "verb": "X", "object": {}, "context": {"at": 4_000_000_000_000}}
        store.writer("events", 0).append([json.dumps(line).encode()])  # past the door, or before it looked
        browse(store)
        assert afterlog(store.home, "process", "--no-prefect").returncode == 0
        [problem] = status(store.home)["problems"]
        assert problem.startswith("the clock of events/0 lies ahead, at 2096-10-02T07:06:40.000Z: ")

    def test_a_bad_line_has_waited_for_as_long_as_it_is_there(self, store: Store) -> None:
        """It has no clock of its own: those before it may be a week old, or there are none."""
        append_lines(store, "events", [b"no event"])
        found = status(store.home)
        assert {states(found)[name] for name in ON_RAW} == {"working"}
        assert all(p["lag_ms"] < 60_000 for p in found["processors"])
        assert found["problems"] == []
        browse(store, ago=7_200_000)  # in the log for longer, by its clock
        assert all(p["lag_ms"] >= 7_200_000 for p in status(store.home)["processors"] if p["processor"] in ON_RAW)
        assert afterlog(store.home, "process", "--no-prefect", "--as-of", "log-end").returncode == 0
        append_lines(store, "events", [b"no event"])
        with store.database.write() as connection:
            connection.exec_driver_sql("UPDATE checkpoint SET committed_at = committed_at - 7200000")
        assert problems(store.home) == []
        append_lines(store, "events", [b"no event" * 10] * 1000)  # and for how long such have come nobody knows
        assert "is dead: " in problems(store.home)[0]

    def test_a_log_that_is_broken_hides_nothing_of_the_others(self, make_store: Callable[..., Store]) -> None:
        store = make_store(segment_bytes=100)
        for _ in range(3):
            browse(store)
        assert afterlog(store.home, "process", "--no-prefect").returncode == 0
        sorted(store.directory("events", 0).glob("*.jsonl"))[1].unlink()
        put_on(store.database, PAUSED, "a person said so")
        broken, delivery = problems(store.home)
        assert broken.startswith("events/0 cannot be read: ")
        assert ": a segment is missing or has changed its length; found base offset " in broken
        assert delivery.startswith("delivery is paused since ")
        found = status(store.home)
        assert {states(found)[name] for name in ON_RAW} == {"stuck"}
        assert states(found)["remind"] == "idle"
        assert all(p["read"] == 3 for p in found["processors"] if p["processor"] in ON_RAW)

    def test_a_runner_that_is_gone_shows_on_an_idle_log_too(self, store: Store) -> None:
        browse(store)
        afterlog(store.home, "process", "--no-prefect")
        take_over(store.database, "process", "a run", now())
        assert problems(store.home) == []
        with store.database.write() as connection:
            connection.exec_driver_sql("UPDATE flow_owner SET since = since - 7200000")
            connection.exec_driver_sql("UPDATE checkpoint SET committed_at = committed_at - 7200000")
        [said] = problems(store.home)
        assert said.startswith("no shift of process is at work; the last one took over at 20")
        lock = RunLock(store.lock_path("derive.lock"), "a shift")
        assert lock.try_acquire()
        assert problems(store.home) == []
        lock.release()
        browse(store)
        afterlog(store.home, "process", "--no-prefect")  # somebody's cron does it now
        assert problems(store.home) == []


def test_mails_that_are_due_and_not_sent_are_stuck_or_dead(store: Store) -> None:
    save_contacts(store.database, [Entry("CLIENT", "1", "ann@example.com", False)])
    line = {"subject": {"id": "UK"}, "verb": "SUBMIT_TAX", "object": {"id": 1}, "context": {"at": now()}}
    append_lines(store, "events", [json.dumps(line).encode()])
    afterlog(store.home, "process", "--no-prefect")
    tried = time.monotonic()
    with refusing_port() as port:
        afterlog(store.home, "deliver", "--no-prefect", mail_url=f"smtp://127.0.0.1:{port}")
    found = problems(store.home, **QUICK)
    assert found == [] or time.monotonic() - tried > 5  # until its next try
    time.sleep(6.2)
    [said] = problems(store.home, **QUICK)
    assert said.startswith("delivery is dead: 1 mails are due, the oldest for ")
    lock = RunLock(store.lock_path("deliver.lock"), "a shift")
    assert lock.try_acquire()
    [said] = problems(store.home, **QUICK)
    assert said.startswith("delivery is stuck: 1 mails are due, the oldest for ")
    assert said.endswith("held by a shift")
    lock.release()


def test_a_look_waits_for_nobody_and_leaves_nothing_behind(store: Store) -> None:
    lock = RunLock(store.lock_path("derive.lock"), "somebody at work")
    assert lock.try_acquire()
    assert states(status(store.home))["derive"] == "idle"
    assert lock.held_by() == "somebody at work"
    assert sorted(path.name for path in (store.home / "locks").iterdir()) == ["derive.lock"]
    lock.release()


IMPORTED = """
import sys
from deployments.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"prefect", "sqlmodel", "sqlalchemy", "alembic", "rich.table", "jinja2"} & set(sys.modules)
    sys.stderr.write(" ".join(sorted(heavy)))
"""


@pytest.mark.parametrize(
    "arguments",
    [("status",), ("status", "--check"), ("read", "events"), ("read", "baskets"), ("append", "events", "/dev/null"),
     ("deliveries", "list"), ("quarantine", "list")],
)  # fmt: skip
def test_what_answers_at_once_imports_nothing_heavy(store: Store, arguments: tuple[str, ...]) -> None:
    store.database.live_generation("x")  # made and migrated
    env = {**os.environ, "AFTERLOG_HOME": str(store.home)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *arguments], cwd=ROOT, env=env, capture_output=True, check=True
    )
    assert done.stderr.decode().splitlines()[-1:] in ([], ["0 lines appended to events"])


def test_an_older_schema_is_migrated_by_the_status_as_by_everything_else(store: Store) -> None:
    from alembic import command
    from alembic.config import Config

    with store.database.write() as connection:
        config = Config()
        config.set_main_option("script_location", "storage:migrations")
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
    store.database.dispose()
    assert problems(store.home) == []
    assert set(states(status(store.home)).values()) == {"idle"}


def test_a_database_that_is_none_is_told_in_a_sentence(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "afterlog.db").write_bytes(b"no database" * 100)
    done = afterlog(home, "status")
    assert done.returncode == 1
    assert done.stderr.decode().startswith("afterlog: ")
    assert "the database refused" in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
