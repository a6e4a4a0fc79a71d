"""The simulator: many seeds hold every promise, a seed repeats itself to the call, and planted bugs are found."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from random import Random

import pytest

import tests.simulator.database
from tests.conftest import ROOT
from tests.simulator import memory
from tests.simulator.disk import Disk, Fault, KilledError, Process
from tests.simulator.files import File, Folder
from tests.simulator.many import live
from tests.simulator.plants import PLANTS
from tests.simulator.schedule import STEPS, FoundError, simulate
from tests.simulator.through_sqlalchemy import ThroughSQLAlchemy

SEEDS = int(os.environ.get("AFTERLOG_TEST_SEEDS", "500"))
PATIENCE = int(os.environ.get("AFTERLOG_TEST_PLANT_SEEDS", "150"))
FOUND = {
    "drop the swap": 1, "trust the tail without comparing": 85, "use a tick before it is durable": 7, "write before the swap is sure": 57,
    "take NULs of a power loss for another result": 85, "make a name in a folder whose own is not durable": 41, "count a line twice": 7,
    "begin a log with a shell's own number of partitions": 8,
}  # fmt: skip
"""The first seed that finds a planted bug, where it is not the very first one."""


def _finds(plant: str, seed: int) -> bool:
    with PLANTS[plant]():
        try:
            simulate(seed)
        except FoundError:
            return True
    return False


@pytest.mark.long
def test_every_promise_holds_whatever_the_seed() -> None:
    went = list(live(range(SEEDS), STEPS, 2, get_context("spawn")))
    assert len(went) == SEEDS
    assert not isinstance(went[-1], str), went[-1]


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_found(plant: str) -> None:
    """By the seed that found it first, or, once the schedule has changed, by any of the first few."""
    known = FOUND.get(plant, 0)
    assert _finds(plant, known) or any(_finds(plant, seed) for seed in range(PATIENCE)), f"not by {PATIENCE} seeds"


def test_a_seed_repeats_itself_to_the_call_whatever_the_order_of_sets() -> None:
    found = set()
    for hashes in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": hashes}
        command = [sys.executable, "-c", "from tests.simulator.schedule import simulate as s; print(s(7), s(8))"]
        found.add(subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=True).stdout)
    assert len(found) == 1


def test_a_seed_makes_the_same_calls_through_sqlalchemys_own_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick one of the simulator leaves out what takes long, and nothing else."""
    quick = [simulate(seed) for seed in range(5)]
    monkeypatch.setattr(tests.simulator.database, "Connection", ThroughSQLAlchemy)
    assert [simulate(seed) for seed in range(5)] == quick


def test_a_database_that_is_given_back_is_as_new() -> None:
    """Worlds follow one another in it; nothing of one is in the next."""
    memory._SPARE.clear()
    new = memory.connect()
    simulate(3)
    assert memory._SPARE
    for spare in memory._SPARE:
        assert [*spare.iterdump()] == [*new.iterdump()]


def test_a_failure_prints_its_seed_and_what_led_there() -> None:
    with (
        PLANTS["confirm before the fsync"](),
        pytest.raises(FoundError, match=r"seed 0, \d+ of 20 steps: .*durable") as raised,
    ):
        simulate(0)
    assert "append at 1" in str(raised.value)


class TestDisk:
    """A simulator that forgives finds nothing: what the disk forgets."""

    def test_what_was_not_fsynced_is_lost_and_what_was_is_not(self) -> None:
        file = File()
        file.write(0, b"one\n")
        file.sync()
        file.write(4, b"two\n")
        assert file.content == b"one\ntwo\n"
        assert file.after_power_loss("lost", Random(0)) == b"one\n"
        assert file.after_power_loss("kept", Random(0)) == b"one\ntwo\n"

    def test_some_of_it_is_left_in_any_order_torn_or_as_nuls(self) -> None:
        file = File()
        for at in (0, 4, 8):
            file.write(at, b"abc\n")
        left = {file.after_power_loss("some", Random(seed)) for seed in range(300)}
        assert {b"", b"abc\n" * 3} <= left
        assert any(len(one) % 4 for one in left)
        assert any(bytes(4) in one for one in left)

    def test_a_name_is_lost_with_its_folder_unsynced_whatever_was_done_to_the_file(self) -> None:
        folder = Folder()
        folder.put("a", File())
        folder.sync()
        folder.put("b", File())
        folder.remove("a")
        assert set(folder.after_power_loss("lost", Random(0))) == {"a"}
        assert set(folder.after_power_loss("kept", Random(0))) == {"b"}

    def test_who_is_dead_does_nothing_more(self, tmp_path: Path) -> None:
        disk = Disk(tmp_path, Random(0))
        disk.process, disk.fault = Process("one"), Fault("kill", 1)
        with pytest.raises(KilledError):
            disk.leave(disk.enter("fsync", "x"))
        with pytest.raises(KilledError):
            disk.enter("write", "x")

    def test_a_lock_is_held_by_one_or_shared(self) -> None:
        file = File()
        assert file.lock(1, shared=True)
        assert file.lock(2, shared=True)
        assert not file.lock(1, shared=False)
        file.holders.discard(2)
        assert file.lock(1, shared=False)
        assert not file.lock(2, shared=True)

    def test_who_is_not_simulated_finds_what_is_there_and_leaves_what_it_makes(self, tmp_path: Path) -> None:
        disk = Disk(tmp_path, Random(0))
        disk.give(("logs", "events", "0"), "00000000000000000000.jsonl", b"one\n")
        disk.give(("logs",), "gone", b"")
        disk.save()
        disk.remove(f"{tmp_path}/logs/gone")
        _, file = disk.known(f"{tmp_path}/logs/events/0/00000000000000000000.jsonl")
        assert file is not None
        file.write(4, b"two\n")
        disk.save()
        there = tmp_path / "logs" / "events" / "0" / "00000000000000000000.jsonl"
        assert there.read_bytes() == b"one\ntwo\n"
        assert not (tmp_path / "logs" / "gone").exists()
        there.write_bytes(b"one\n")
        disk.adopt()
        assert disk.log("events", 0, durable=True) == disk.log("events", 0, durable=False) == b"one\n"
