"""Whoever follows a log: partitions that begin meanwhile, waiting for another run, and the files that are left open."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
import sqlalchemy as sa

from storage.clock import Clock
from storage.door import append_events
from storage.errors import AfterlogError
from storage.settings import load_settings
from storage.store import Store
from storage.times import now
from tasks.process import Summary, _followers, _round, positions, process_to_end
from tasks.run import Run
from tasks.topology import build_topology
from tests.conftest import ROOT, empty_database
from tests.helpers import followed
from tests.operations import wait_for

MakeStore = Callable[..., Store]


def run_of(store: Store) -> Run:
    return Run(store, build_topology(store.settings), "test")


def append(store: Store, *customers: int) -> list[tuple[int, int]]:
    return append_events(
        store, "events", [{"subject": {"id": i, "type": "CUSTOMER"}, "verb": "VISITED"} for i in customers]
    )


def open_files(store: Store) -> int:
    """How many files of logs this process has open."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # what has listed them
            links.append(os.readlink(f"/proc/self/fd/{number}"))  # noqa: PTH115  # a link of the kernel's
    return sum(link.startswith(str(store.home / "logs")) for link in links)


def test_a_partition_that_begins_during_a_run_is_followed_at_once(make_store: MakeStore) -> None:
    store = make_store(partitions=4)
    [(first, _)] = append(store, 1)
    with followed(store, "derive"):
        wait_for(lambda: any(p.offset for p in positions(store)), every=0.02)
        other = next(p for i in range(2, 100) for p, _ in append(store, i) if p not in (0, first))
        end = store.reader("events", other).end()
        wait_for(lambda: any((p.partition, p.offset) == (other, end) for p in positions(store)), every=0.02)


def test_a_tick_is_none_the_worse_for_partitions_that_a_producer_begins_meanwhile(make_store: MakeStore) -> None:
    store, producer = make_store(), make_store(partitions=400)
    append(producer, 0)
    store.database.engine  # noqa: B018  # made before the race
    done, failures, ticks = threading.Event(), [], []

    def tick() -> None:
        with closing(Clock(store, ["events"])) as clock:
            number = 1_700_000_000_000
            while not done.is_set():
                number += 1
                try:
                    ticks.append(clock.tick(number))
                except Exception as error:  # noqa: BLE001  # the assertion tells it
                    failures.append(repr(error))

    ticking = threading.Thread(target=tick)
    ticking.start()
    number = 0
    while number < 800 or (
        len(ticks) < 6 and not failures
    ):  # beside a busy neighbour a tick of 400 partitions takes its time
        append(producer, number)
        number += 1
    done.set()
    ticking.join()
    assert failures == []


def test_waiting_for_the_run_that_is_at_it_leaves_no_file_open(store: Store) -> None:
    append(store, 1)
    process_to_end(run_of(store), "derive", None)
    holder = run_of(store).lock("derive")
    assert holder.try_acquire()
    before = open_files(store)
    for _ in range(20):
        process_to_end(run_of(store), "derive", None)
    assert open_files(store) == before
    holder.release()


def test_a_run_whose_database_is_away_at_its_end_leaves_no_file_open(store: Store) -> None:
    append(store, 1)
    run = run_of(store)
    process_to_end(run, "derive", None)
    append(store, 2)
    before = open_files(store)
    with (  # noqa: PT012
        pytest.raises(AfterlogError, match="the database refused"),
        _followers(run, "derive", Summary("derive")) as [follower],
    ):
        follower.advance(follower.snapshot())
        assert open_files(store) > before
        with store.database.write() as connection:
            connection.execute(sa.text("ALTER TABLE checkpoint RENAME TO gone"))
    assert open_files(store) == before


def test_a_file_of_somebody_elses_beside_the_logs_is_none_of_them(store: Store) -> None:
    append(store, 1)
    before = store.folders(), store.logs()
    (store.home / "logs" / "notes").write_text("mine")
    assert (store.folders(), store.logs()) == before


def test_many_partitions_are_not_too_many_files(make_store: MakeStore) -> None:
    """What a system begins a process with is enough for none of 1,024 partitions, 64 here for 80."""
    store = make_store(partitions=80)
    lines = b"".join(
        b'{"subject": {"id": %d}, "verb": "VISITED", "context": {"at": 1700000000000}}\n' % n for n in range(900)
    )
    for command in (["append", "events"], ["process", "--no-prefect"]):
        done = subprocess.run(
            [sys.executable, "-m", "deployments.cli", *command], cwd=ROOT, input=lines, capture_output=True, check=False,
            env={**os.environ, "AFTERLOG_HOME": str(store.home), "AFTERLOG_PARTITIONS": "80"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 20_000)),
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (
            0,
            b"900 lines appended to events\n" if command[0] == "append" else b"",
        )


def test_one_follower_of_a_processor_ticks_for_all_of_its_partitions(make_store: MakeStore) -> None:
    """Whoever ticks opens every partition of every log, so with each of many this would be a square of files."""
    store, item = (
        make_store(partitions=8, tick_every="1ms", settle="1ms"),
        {"type": "ITEM", "item": {"id": 1, "count": 1}},
    )
    run = run_of(store)
    with _followers(run, "abandonment", Summary("abandonment")) as followers:
        for number in range(40):
            event = {"subject": {"id": number, "type": "CUSTOMER"}, "verb": "ADDED_ITEM_TO_BASKET", "object": item}
            append_events(store, "events", [{**event, "context": {"at": now() - 3_600_000}}])
            while _round(run, followers):
                pass
        assert sum(follower.position.derived for follower in followers) > 20
        assert open_files(store) < 8 * len(followers)


def test_who_reads_on_makes_no_database_where_it_was_moved_away_and_is_told_of_another(tmp_path: Path) -> None:
    """An empty one would be in the way of what is put back, and its journal would be taken for that of the other."""
    from deployments.reading import Reading

    store = Store(load_settings(home=tmp_path))
    there, aside = tmp_path / "afterlog.db", tmp_path / "aside.db"
    shutil.copy(empty_database(), there)
    reading = Reading(store, "baskets", derived=True, generation=1)
    there.rename(aside)
    reading.check_live()
    assert not there.exists()
    aside.rename(there)
    reading.check_live()
    shutil.copy(there, aside)
    aside.rename(there)
    with pytest.raises(AfterlogError, match="another database is in its place by now"):
        reading.check_live()
