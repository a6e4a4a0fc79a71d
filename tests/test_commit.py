"""One commit: all of it or nothing, checked at every recovery, and each processor on its own."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlmodel import SQLModel

from storage.clock import Clock
from storage.database import Database
from storage.derived import DerivedWriter
from storage.door import append_lines
from storage.errors import AfterlogError, ConflictError, CorruptLogError, LostDataError, NondeterminismError, Stopped
from storage.outbox import Outbox
from storage.schema import HEAD
from storage.state import StateStore
from storage.statements import execute_many
from storage.steps import arm
from storage.store import DELIVERIES, Store
from storage.times import now
from tasks.deliver import follow_mail
from tasks.follow import PartitionFollower
from tasks.local import side_by_side
from tasks.process import AsOf, FinalTick, follow, positions, process_to_end, tick_now
from tasks.run import Run
from tasks.status import read_status
from tasks.topology import build_topology
from tests.conftest import ROOT, afterlog, log_bytes, settings_of
from tests.operations import PATIENCE, wait_for

MakeStore = Callable[..., Store]
BOTH_DATABASES = True
T0 = 1_700_000_000_000


def tax(number: int, at: int = T0) -> bytes:
    event = {"subject": {"id": "UK"}, "verb": "SUBMIT_TAX", "object": {"id": number}, "context": {"at": at + number}}
    return json.dumps(event).encode()


def shop(verb: str, minutes: float, customer: int = 15, **obj: Any) -> bytes:
    """What a customer did, minutes after T0."""
    at = T0 + round(minutes * 60_000)
    event = {"subject": {"id": customer, "type": "CUSTOMER"}, "verb": verb, "object": obj, "context": {"at": at}}
    return json.dumps(event).encode()


def add(minutes: float, customer: int = 15, **item: Any) -> bytes:
    return shop("ADDED_ITEM_TO_BASKET", minutes, customer, item={"id": 3, "price": 5, **item})


def new_run(store: Store) -> Run:
    return Run(store, build_topology(store.settings), "a test")


def process(store: Store, as_of: AsOf = "log-end") -> tuple[Run, dict[str, Exception]]:
    """All processors on raw logs to the end, side by side; gives the run and what failed."""
    run, final = new_run(store), FinalTick(as_of)
    if as_of == "now":
        tick_now(run)
    outcome = side_by_side(run, run.topology.on_raw_logs(), lambda r, name: process_to_end(r, name, final))
    return run, outcome.failures


def processed(store: Store, *lines: bytes, as_of: AsOf = "log-end") -> Run:
    """Append `lines` and process them; nothing may fail."""
    append_lines(store, "events", lines)
    run, failures = process(store, as_of)
    assert failures == {}
    return run


def database(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, without the wall times that are there for people."""
    tables = SQLModel.metadata.sorted_tables
    with store.database.read() as connection:
        return {
            table.name: sorted(connection.execute(sa.select(*(c for c in table.c if c.name != "committed_at"))), key=repr)
            for table in tables
        }  # fmt: skip


def result(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """What the rows say, in whichever order processors began and however many commits there were."""
    rows = database(store)
    del rows["written_by"]  # who did it, and when
    names = {row[0]: row[1:5] for row in rows["checkpoint"]}
    rows["state"] = sorted((names[row[0]], *row[1:]) for row in rows["state"])
    columns = (
        "processor",
        "log",
        "partition",
        "offset",
        "clock",
        "as_of",
        "lines",
        "processed",
        "quarantined",
        "ignored",
    )
    table = SQLModel.metadata.tables["checkpoint"]
    with store.database.read() as connection:
        rows["checkpoint"] = sorted(connection.execute(sa.select(*(table.c[name] for name in columns))), key=repr)
    return rows


def derived(store: Store) -> dict[str, bytes]:
    return {log: log_bytes(store.home, log) for log in ("reactions", "baskets", "anomalies", "quarantine", "clock")}


def leave_tail(store: Store, log: str, tail: bytes) -> None:
    """What a run that was killed between its write and its transaction leaves behind."""
    with sorted(store.directory(log, 0).glob("*.jsonl"))[-1].open("ab") as file:
        file.write(tail)


def versions(store: Store, processor: str) -> list[dict[str, Any]]:
    events = [json.loads(text) for text in log_bytes(store.home, "clock").splitlines()]
    return [e["object"] for e in events if e["verb"] == "VERSION" and e["object"]["processor"] == processor]


def ticks(store: Store) -> list[tuple[int, dict[str, int]]]:
    events = [json.loads(text) for text in log_bytes(store.home, "clock").splitlines()]
    return [(e["object"]["as_of"], e["object"]["ends"]) for e in events if e["verb"] == "TICK"]


class TestTail:
    @pytest.mark.parametrize("kept", range(21))
    def test_a_tail_of_any_length_is_compared_and_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
    ) -> None:
        file, data = tmp_path / "p" / f"{0:020d}.jsonl", b"line one\nline twenty\n"
        out = DerivedWriter(tmp_path / "p", "reactions/0", limit=1 << 20, daily=True)
        out.extend(0, b"before\n", may_differ=False)
        file.write_bytes(b"before\n" + data[:kept])
        monkeypatch.delattr(os, "ftruncate")
        assert out.extend(7, data, may_differ=False) == ""
        assert file.read_bytes() == b"before\n" + data
        assert out.extend(7, data[:9], may_differ=False) == ""
        assert file.read_bytes() == b"before\n" + data

    @pytest.mark.parametrize("place", range(20))
    def test_one_other_byte_anywhere_in_a_tail_is_found_and_nothing_changed(self, tmp_path: Path, place: int) -> None:
        data = b"line one\nline twenty\n"
        other = data[:place] + b"#" + data[place + 1 :]
        out = DerivedWriter(tmp_path, "reactions/0", limit=1 << 20, daily=True)
        out.extend(0, b"before\n" + other, may_differ=False)
        with pytest.raises(NondeterminismError) as raised:
            out.extend(7, data, may_differ=False)
        assert str(raised.value) == (
            f"reactions/0:{7 + place}: the processor gave other bytes than before, for the same input, code and settings; "
            f"found in the file {other[place:]!r}, expected as given now {data[place:]!r}. "
            "Find what in the processor depends on more than its input; nothing was changed"
        )
        assert log_bytes_of(tmp_path) == b"before\n" + other

    @pytest.mark.parametrize("kept", [1, 250, 500, 501])
    def test_a_run_that_goes_on_after_a_crash_gives_what_an_undisturbed_one_gives(
        self, make_store: MakeStore, kept: int
    ) -> None:
        whole, store = make_store("whole"), make_store("killed")
        for one in (whole, store):
            processed(one, tax(1), tax(2))
        before = len(log_bytes(store.home, "reactions"))
        processed(whole, tax(3), tax(4))
        append_lines(store, "events", [tax(3), tax(4)])
        leave_tail(store, "reactions", log_bytes(whole.home, "reactions")[before : before + kept])
        run, failures = process(store)
        assert (failures, run.notes) == ({}, [])
        assert log_bytes(store.home, "reactions") == log_bytes(whole.home, "reactions")
        assert result(store) == result(whole)

    def test_readers_do_not_look_beyond_the_committed_end(self, store: Store) -> None:
        processed(store, add(0), shop("X", 60))
        committed = log_bytes(store.home, "baskets")
        assert committed.count(b"\n") == 1
        leave_tail(store, "baskets", committed.replace(b'"id":15', b'"id":16'))
        process_to_end(new_run(store), "remind", None)
        assert log_bytes(store.home, "reminders").count(b"\n") == 1
        assert afterlog(store.home, "read", "baskets").stdout == committed

    def test_a_tail_that_differs_stops_its_processor_loudly_and_no_other(self, store: Store) -> None:
        processed(store, tax(1))
        append_lines(store, "events", [tax(2), b"bad"])
        leave_tail(store, "reactions", b'{"subject": "somebody else wrote this"}\n')
        before = database(store), derived(store)
        _, failures = process(store)
        assert [(name, type(error)) for name, error in failures.items()] == [("derive", NondeterminismError)]
        after = database(store), derived(store)
        assert after[1]["reactions"] == before[1]["reactions"]
        assert after[1]["quarantine"].count(b"\n") == 1
        (mine,) = [row for row in before[0]["checkpoint"] if "derive" in row]
        assert mine in after[0]["checkpoint"]
        assert process(store)[1].keys() == {"derive"}

    def test_a_differing_tail_is_cut_where_settings_have_changed_and_the_run_says_so(
        self, make_store: MakeStore
    ) -> None:
        processed(make_store(), tax(1))
        store, first = make_store(not_after="1h"), log_bytes(make_store().home, "reactions")
        append_lines(store, "events", [tax(2)])
        leave_tail(store, "reactions", (tail := first.replace(b'"id":1', b'"id":2')))
        run, failures = process(store)
        assert failures == {}
        [note] = [note for note in run.notes if "cut" in note]
        assert note == (
            f"derive: {len(tail)} bytes that a crash had left unconfirmed were cut, since its code or settings changed"
        )
        now_there = log_bytes(store.home, "reactions")
        assert now_there.startswith(first)
        assert [json.loads(text)["context"]["not_after"] for text in now_there.splitlines()] == [
            T0 + 1 + 86_400_000, T0 + 2 + 3_600_000,
        ]  # fmt: skip

    def test_a_tail_of_older_settings_does_not_stop_later_runs_where_the_new_ones_give_nothing_for_it(
        self, make_store: MakeStore
    ) -> None:
        processed(make_store(), add(0), shop("X", 60))
        first = log_bytes(make_store().home, "baskets")
        store = make_store(timeout="50m")
        append_lines(store, "events", [add(70), shop("X", 110)])  # 40 minutes: an abandonment by the old settings only
        leave_tail(store, "baskets", first.replace(b"events:0:0", b"events:0:999"))
        assert process(store)[1] == {}
        append_lines(store, "events", [shop("X", 200)])
        assert process(store)[1] == {}
        found = log_bytes(store.home, "baskets")[len(first) :]
        assert [json.loads(text)["context"]["at"] for text in found.splitlines()] == [T0 + 110 * 60_000]


def log_bytes_of(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.glob("*.jsonl")))


class TestSwap:
    def test_a_second_run_gets_a_clear_error_and_has_changed_nothing(self, store: Store) -> None:
        append_lines(store, "events", [tax(1), tax(2)])
        first, second = (PartitionFollower(new_run(store), "derive", 0) for _ in range(2))
        assert first.advance(first.snapshot())
        before = database(store), derived(store)
        with pytest.raises(ConflictError) as raised:
            second.advance(second.snapshot())
        assert str(raised.value) == (
            "processor derive, events/0: another run has committed since this one read its checkpoint; expected commit "
            "number 0. This run has changed nothing; the other one goes on"
        )
        assert (database(store), derived(store)) == before

    def test_a_second_run_that_had_read_further_harms_nothing(self, make_store: MakeStore) -> None:
        whole, store = make_store("whole"), make_store()
        processed(whole, tax(1), tax(2), tax(3))
        append_lines(store, "events", [tax(1)])
        first, second = (PartitionFollower(new_run(store), "derive", 0) for _ in range(2))
        assert first.advance(first.snapshot())
        append_lines(store, "events", [tax(2), tax(3)])
        before = database(store)
        with pytest.raises(ConflictError):
            second.advance(second.snapshot())
        assert database(store) == before
        assert first.advance(first.snapshot())
        assert log_bytes(store.home, "reactions") == log_bytes(whole.home, "reactions")

    def test_two_processes_at_once_give_the_bytes_of_one(self, make_store: MakeStore, tmp_path: Path) -> None:
        lines = [add(n / 7, n % 90) for n in range(900)] + [tax(n) for n in range(500)] + [b"bad"] * 30
        lines += [shop("ORDERED", 200 + n, n) for n in range(0, 90, 2)]
        whole, store = make_store("whole", batch_bytes=10_000), make_store("two")
        processed(whole, *lines)
        append_lines(store, "events", lines)
        env = {
            **os.environ,
            **{f"AFTERLOG_{name.upper()}": value for name, value in settings_of(store.home).items()},
            "AFTERLOG_COMMIT_BYTES": "20000",
            "AFTERLOG_BATCH_BYTES": "10000",
        }
        command = [sys.executable, "-m", "deployments.cli", "process", "--no-prefect", "--as-of", "log-end"]
        runs = [
            subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE) for _ in "ab"
        ]
        assert [(run.communicate(timeout=PATIENCE)[1], run.returncode) for run in runs] == [(b"", 0)] * 2
        two, one = derived(store), derived(whole)
        assert one.pop("clock")
        assert two.pop("clock")
        assert len(one["baskets"].splitlines()) == 135
        assert two == one
        assert result(store) == result(whole)
        rows = read_status(store, build_topology(store.settings)).processors
        assert [row.lag_bytes for row in rows if row.log == "events"] == [0] * 5


class TestLostData:
    def _stops(self, store: Store, names: set[str], error: type[AfterlogError], sentence: str) -> None:
        before = database(store)
        _, failures = process(store)
        assert failures.keys() == names
        for failure in failures.values():
            assert isinstance(failure, error)
            assert sentence in str(failure)
            assert "Restore" in str(failure)
        assert [row for row in before["checkpoint"] if set(row) & names] == [
            row for row in database(store)["checkpoint"] if set(row) & names
        ]

    RAW = {"quarantine", "derive", "abandonment", "anomalies", "normalise"}

    @pytest.mark.parametrize("gone", [True, False], ids=["gone", "shorter"])
    def test_a_raw_log_shorter_than_a_checkpoint_stops_the_processors_until_it_is_back(
        self, store: Store, make_store: MakeStore, gone: bool
    ) -> None:
        processed(store, tax(1), tax(2))
        file = store.directory("events", 0) / f"{0:020d}.jsonl"
        whole, before = file.read_bytes(), log_bytes(store.home, "reactions")
        if gone:
            file.unlink()
        else:
            os.truncate(file, len(tax(1)) + 1)
        length = 0 if gone else len(tax(1)) + 1
        sentence = (
            f"the log is shorter than what was read from it; found {length} bytes, expected at least {len(whole)}"
        )
        self._stops(store, self.RAW, LostDataError, sentence)
        file.write_bytes(whole)
        processed(make_store(), tax(3))
        assert log_bytes(store.home, "reactions").startswith(before)
        assert log_bytes(store.home, "reactions").count(b"\n") == 3

    def test_a_run_over_a_lost_raw_log_does_no_harm_that_stays_when_it_is_back(self, store: Store) -> None:
        processed(store, tax(1), tax(2))
        file = store.directory("events", 0) / f"{0:020d}.jsonl"
        away = file.rename(store.home / "away")
        with pytest.raises(LostDataError, match="the log is shorter than what was read from it"):
            process(store, "now")  # it begins with a tick
        away.rename(file)
        assert process(store, "now")[1] == {}

    @pytest.mark.parametrize("gone", [True, False], ids=["gone", "shorter"])
    def test_a_clock_shorter_than_a_checkpoint_stops_the_processors(self, store: Store, gone: bool) -> None:
        processed(store, tax(1))
        file = store.directory("clock", 0) / f"{0:020d}.jsonl"
        whole = file.read_bytes()
        file.write_bytes(b"" if gone else whole[: whole.find(b"\n") + 1])
        # A run that begins with a tick of its own must not make up for what is missing.
        run = new_run(store)
        with pytest.raises(LostDataError, match="the clock is shorter than what was read from it; found"):
            process_to_end(run, "derive", None)
        file.write_bytes(whole)
        processed(store, tax(2))
        assert log_bytes(store.home, "reactions").count(b"\n") == 2

    def test_a_derived_log_shorter_than_its_committed_end_stops_its_processor_only(self, store: Store) -> None:
        processed(store, tax(1), b"bad")
        file = store.directory("reactions", 0) / f"{0:020d}.jsonl"
        whole = file.read_bytes()
        os.truncate(file, len(whole) - 1)
        append_lines(store, "events", [tax(2), b"worse"])
        sentence = f"the derived log is shorter than its committed end; found {len(whole) - 1} bytes, expected at least"
        self._stops(store, {"derive"}, LostDataError, sentence)
        assert log_bytes(store.home, "quarantine").count(b"\n") == 2
        file.write_bytes(whole)
        processed(store)
        assert log_bytes(store.home, "reactions").count(b"\n") == 2

    def test_a_missing_segment_of_a_raw_log_stops_the_processors(self, make_store: MakeStore) -> None:
        store = make_store(segment_bytes=1)
        for number in range(3):
            append_lines(store, "events", [tax(number)])
        victim = sorted(store.directory("events", 0).glob("*.jsonl"))[1]
        saved = victim.read_bytes()
        victim.unlink()
        with pytest.raises(CorruptLogError, match="a segment is missing or has changed its length"):
            process_to_end(new_run(store), "derive", None)
        victim.write_bytes(saved)
        processed(store)
        assert log_bytes(store.home, "reactions").count(b"\n") == 3

    @pytest.mark.only("sqlite")
    def test_a_lost_database_is_rebuilt_from_the_logs_to_the_same_bytes_and_rows(self, store: Store) -> None:
        processed(store, tax(1), add(0), add(1, 16), as_of=T0 + 3_600_000)
        processed(store, shop("ORDERED", 100), b"bad", add(200))
        before, logs = result(store), derived(store)
        store.database.dispose()
        for file in store.home.glob("afterlog.db*"):
            file.unlink()
        rebuilt = Store(store.settings)
        assert process(rebuilt)[1] == {}
        assert {**derived(rebuilt), "clock": b""} == {**logs, "clock": b""}
        assert result(rebuilt) == before


class TestSettingsAndTicks:
    def test_a_changed_setting_is_recorded_with_its_offset_and_holds_from_there(self, make_store: MakeStore) -> None:
        processed(make_store(), tax(1))
        processed(make_store(), tax(2))
        end = len(log_bytes(make_store().home, "events"))
        run = processed(make_store(not_after="1h"), tax(3))
        processed(make_store(not_after="1h"), tax(4))
        store = make_store()
        events = [json.loads(text) for text in log_bytes(store.home, "reactions").splitlines()]
        lasting = [e["context"]["not_after"] - e["event"]["inserted_at"] for e in events]
        assert lasting == [86_400_000, 86_400_000, 3_600_000, 3_600_000]
        first, second = versions(store, "derive")
        assert (first["settings"], first["from"]) == ({"not_after": 86_400_000}, {"events/0": 0})
        assert (second["settings"], second["from"]) == ({"not_after": 3_600_000}, {"events/0": end})
        assert first["code"] == second["code"]
        assert len(first["code"]) == 64
        assert [note for note in run.notes if note.startswith("derive")] == [
            f"derive: its code or settings changed; they hold from events/0:{end} on"
        ]
        assert [len(versions(store, name)) for name in ("abandonment", "quarantine")] == [1, 1]

    def test_a_version_is_written_down_before_anything_is_derived_with_it(self, store: Store) -> None:
        append_lines(store, "events", [tax(1)])
        PartitionFollower(new_run(store), "derive", 0)
        assert len(versions(store, "derive")) == 1
        assert log_bytes(store.home, "reactions") == b""

    def test_a_tick_is_applied_where_it_was_noted_however_late_that_is_read(self, make_store: MakeStore) -> None:
        """One processor sees the tick at once, one only after the customer has come back: the bytes are the same."""
        lines = [add(0), add(5, 16)], [shop("X", 20), shop("ORDERED", 300)], [add(400)]
        prompt, late = make_store("prompt"), make_store("late")
        processed(prompt, *lines[0], as_of=T0 + 32 * 60_000)
        processed(prompt, *lines[1], as_of=T0 + 320 * 60_000)
        processed(prompt, *lines[2], as_of=T0 + 900 * 60_000)
        for group, minutes in zip(lines, (32, 320, 900), strict=True):
            append_lines(late, "events", group)
            Clock(late, ["events"]).tick(T0 + minutes * 60_000)
        processed(late, as_of=T0 + 900 * 60_000)
        assert log_bytes(late.home, "baskets") == log_bytes(prompt.home, "baskets")
        verbs = [json.loads(text)["verb"]["type"] for text in log_bytes(late.home, "baskets").splitlines()]
        assert verbs == [
            "ABANDONED_BASKET", "ABANDONMENT_RETRACTED", "ABANDONED_BASKET", "RECOVERED_BASKET", "ABANDONED_BASKET",
            "ABANDONED_BASKET",
        ]  # fmt: skip
        assert ticks(late) == ticks(prompt)

    def test_whoever_ends_between_two_ticks_goes_on_after_the_one_that_was_taken(self, make_store: MakeStore) -> None:
        lines = [add(0), add(5, 16)], [shop("X", 20), shop("ORDERED", 300)], [add(400)]
        whole, often = make_store("whole"), make_store("often", batch_bytes=1, commit_bytes=1)
        for store in (whole, often):
            for group, minutes in zip(lines, (32, 320, 900), strict=True):
                append_lines(store, "events", group)
                with Clock(store, ["events"]) as clock:
                    clock.tick(T0 + minutes * 60_000)
        process_to_end(new_run(whole), "abandonment", None)
        runs = 0
        while True:
            run, runs = new_run(often), runs + 1
            arm(lambda step, run=run: run.stop.set() if step == "committed" else None)  # type: ignore[misc]  # this turn's run
            try:
                process_to_end(run, "abandonment", None)
                break
            except Stopped:
                continue
            finally:
                arm(None)
        assert runs > 4
        assert log_bytes(often.home, "baskets") == log_bytes(whole.home, "baskets")
        [there], [expected] = positions(often), positions(whole)
        assert (there.offset, there.tick_offset, there.as_of) == (expected.offset, expected.tick_offset, expected.as_of)

    def test_ticks_are_given_a_part_at_a_time_and_none_is_left_out(self, store: Store) -> None:
        """There may be ticks of years."""
        with Clock(store, ["events"]) as clock:
            for number in range(50):
                clock.tick(T0 + number)
            end = clock.snapshot("events", 0, 0).clock_end
            found: list[int] = []
            parts = at = 0
            while at < end:
                ticks, at = clock.ticks(at, end, size=1000)
                found += [tick.as_of for tick in ticks]
                parts += 1
            assert parts > 5
            assert found == [T0 + number for number in range(50)]

    def test_log_end_is_the_greatest_clock_and_an_idle_log_costs_no_more_ticks(self, store: Store) -> None:
        processed(store, tax(1), tax(9), tax(5))
        assert ticks(store) == [(T0 + 9, {"events/0": len(log_bytes(store.home, "events"))})]
        clock, rows = log_bytes(store.home, "clock"), result(store)
        processed(store)
        processed(store, as_of=T0)
        assert log_bytes(store.home, "clock") == clock
        assert result(store) == rows

    def test_the_last_events_of_a_run_and_its_tick_are_one_commit(self, store: Store) -> None:
        append_lines(store, "events", [add(0), add(40, 16)])
        process_to_end(new_run(store), "abandonment", FinalTick("log-end"))
        assert [(p.commit, p.as_of) for p in positions(store)] == [(1, T0 + 40 * 60_000)]

    def test_a_tick_earlier_than_the_last_counts_as_the_last(self, store: Store) -> None:
        processed(store, add(0), as_of=T0 + 60_000)
        processed(store, add(1, 16), as_of=T0 + 50_000)
        assert [as_of for as_of, _ in ticks(store)] == [T0 + 60_000, T0 + 60_000]

    def test_the_clock_of_an_event_is_never_less_than_a_tick_before_it(self, store: Store) -> None:
        processed(store, tax(1), as_of=T0 + 5_000)
        processed(store, tax(2), b"bad", as_of=T0 + 5_000)
        stamps = [json.loads(text)["event"]["inserted_at"] for text in log_bytes(store.home, "reactions").splitlines()]
        assert stamps == [T0 + 1, T0 + 5_000]
        assert json.loads(log_bytes(store.home, "quarantine"))["event"]["inserted_at"] == T0 + 5_000

    def test_a_tick_of_now_is_the_wall_less_the_time_to_settle(self, store: Store) -> None:
        before = now()
        processed(store, tax(1), as_of="now")
        assert ticks(store)
        for as_of, _ in ticks(store):
            assert before - 2_000 <= as_of <= now() - 2_000


FAILING = """
from tasks.processors import contract

class Processor(contract.Processor):
    name, reads, writes = "picky", "events", "picked"

    def event(self, event, state, out):
        if event.offset == {offset}:
            raise ZeroDivisionError("this one I do not like")
        out.emit(self, event, {{"id": event.id}}, "PICKED", {{"type": "NONE"}}, name="picked")
"""


class TestOneFails:
    def test_a_processor_that_fails_neither_stops_nor_holds_back_the_others(
        self, make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, lines = make_store(), [tax(number) for number in range(30)]
        append_lines(store, "events", lines)
        offset = sum(len(text) + 1 for text in lines[:20])
        (tmp_path / "picky_one.py").write_text(FAILING.format(offset=offset))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        settings = {"processors": '["picky_one"]', "batch_bytes": "300", "commit_bytes": "1"}
        done = afterlog(store.home, "process", "--no-prefect", "--as-of", "log-end", **settings)
        assert done.returncode == 1
        assert done.stderr.decode().splitlines() == [
            f"picky failed: events:0:{offset}: ZeroDivisionError: this one I do not like. Correct it, at {tmp_path}/picky_one.py:9",
            "afterlog: 1 processors failed. What the others did stands; run it again",
        ]
        status = json.loads(afterlog(store.home, "status", "--json", **settings).stdout)["processors"]
        lags = {entry["processor"]: entry["lag_bytes"] for entry in status}
        assert {name for name, lag in lags.items() if lag} == {"picky"}
        assert 10 <= log_bytes(store.home, "picked").count(b"\n") <= 20
        (tmp_path / "picky_one.py").write_text(FAILING.format(offset=-1))
        done = afterlog(store.home, "process", "--no-prefect", "--as-of", "log-end", **settings)
        assert done.returncode == 0
        assert b"picky: its code or settings changed; they hold from events/0:" in done.stderr
        picked = [json.loads(text) for text in log_bytes(store.home, "picked").splitlines()]
        assert [e["context"]["caused_by"]["object"]["id"] for e in picked] == list(range(30))

    def test_a_follower_that_is_tried_again_is_ready_once(self, store: Store) -> None:
        processed(store, *[tax(number) for number in range(3)])
        [segment] = store.directory("events", 0).glob("*.jsonl")
        os.truncate(segment, 0)
        run = Run(store, build_topology(store.settings), "a shift")
        for _ in range(3):
            with pytest.raises(LostDataError):
                follow(run, "derive")
        assert run.ready() == 1
        with pytest.raises(LostDataError):
            follow(run, "abandonment")
        assert run.ready() == 2

    def test_followers_take_up_the_partitions_that_another_shell_begins(self, make_store: MakeStore) -> None:
        """Also those of a derived log, which come with their first lines; not only when the next shift begins."""
        store = make_store()
        run = new_run(store)
        run.pulse.start()
        followers = [
            threading.Thread(target=follow, args=(run, "derive")),
            threading.Thread(target=follow_mail, args=(run,)),
        ]
        for follower in followers:
            follower.start()
        try:
            wait_for(lambda: {p.processor for p in positions(store)} == {"derive", "deliver"})
            append_lines(make_store(partitions=4), "events", [tax(1), tax(2)])
            assert [part for part in range(4) if log_bytes(store.home, "events", part)] == [1]
            wait_for(lambda: Outbox(store, DELIVERIES).counts() == {"SUPPRESSED": 2}, seconds=20)
        finally:
            run.stop.set()
            for follower in followers:
                follower.join()

    def test_a_partition_that_fails_keeps_nothing_of_another_back(self, make_store: MakeStore) -> None:
        store = make_store(partitions=2)
        processed(store, *[shop("X", number, customer=number) for number in range(20)])
        [segment] = store.directory("events", 1).glob("*.jsonl")
        os.truncate(segment, 0)
        here = next(
            number for number in range(20) if f'{{"id": {number}, '.encode() in log_bytes(store.home, "events", 0)
        )
        append_lines(store, "events", [shop("ORDERED", 60, customer=here)])
        _, failures = process(store)
        assert {type(error) for error in failures.values()} == {LostDataError}
        at = {p.partition: p.offset for p in positions(store) if p.processor == "abandonment"}
        assert at[0] == len(log_bytes(store.home, "events", 0))

    def test_a_tick_that_cannot_be_written_keeps_nothing_of_what_was_read_back(self, store: Store) -> None:
        processed(store, tax(1))
        append_lines(store, "events", [tax(2)])

        def fail(step: str) -> None:
            if step == "append-written":
                raise OSError("the disk is full")

        arm(fail)
        try:
            with pytest.raises(OSError, match="full"):
                process_to_end(new_run(store), "derive", FinalTick("log-end"))
        finally:
            arm(None)
        assert [p.offset for p in positions(store) if p.processor == "derive"] == [2 * len(tax(1)) + 2]

    def test_a_processor_that_miscounts_is_stopped_before_it_commits(
        self, make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "miscounting.py").write_text(
            FAILING.format(offset=-1).replace("picky", "miscounting") + "        out.ignored += 2\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        store = make_store(processors=["miscounting"])
        append_lines(store, "events", [tax(1)])
        _, failures = process(store)
        assert {name: str(error) for name, error in failures.items()} == {
            "miscounting": (
                f"events/0, from 0 to {len(tax(1)) + 1}: processor miscounting does not account for every event; found "
                "2 ignored of 1 good and 0 bad, expected 1 in all"
            )
        }
        assert log_bytes(store.home, "picked") == b""


class TestCounts:
    def test_read_is_processed_and_quarantined_and_ignored(self, store: Store) -> None:
        processed(store, tax(1), add(0), b"bad", b"", shop("X", 60), b'{"subject": {"id": 1}}', tax(2))
        process_to_end(new_run(store), "remind", None)
        rows = read_status(store, build_topology(store.settings)).processors
        assert {r.processor: (r.read, r.processed, r.quarantined, r.ignored, r.derived) for r in rows} == {
            "quarantine": (7, 4, 3, 0, 3),
            "derive": (7, 2, 3, 2, 2),
            "abandonment": (7, 2, 3, 2, 1),
            "anomalies": (7, 1, 3, 3, 0),
            "normalise": (7, 2, 3, 2, 0),
            "remind": (1, 1, 0, 0, 1),
        }

    def test_a_bad_line_is_in_the_quarantine_with_its_place_and_its_bytes(self, store: Store) -> None:
        processed(store, tax(1), b"\xff{" + b"x" * 70_000)
        event = json.loads(log_bytes(store.home, "quarantine"))
        offset = len(tax(1)) + 1
        assert base64.b64decode(event["object"].pop("bytes")) == b"\xff{" + b"x" * 65_534
        assert event == {
            "subject": {"id": "events", "type": "LOG"},
            "verb": "REJECTED",
            "object": {"type": "LINE", "reason": "no JSON: byte 0 is not UTF-8", "length": 70_002},
            "context": {"at": T0 + 1, "source": {"log": "events", "partition": 0, "offset": offset}},
            "event": {"id": f"quarantine/events:0:{offset}/rejected", "inserted_at": T0 + 1},
        }


class TestSplits:
    def test_batches_commits_segments_and_memory_change_no_byte(self, make_store: MakeStore) -> None:
        lines = [add(n, n % 7, count=n % 4) for n in range(60)] + [b"bad", tax(1)]
        lines += [shop("ORDERED", 70 + 10 * n, n) for n in range(7)] + [add(200 + n, n % 5) for n in range(9)]
        whole, ahead = make_store("whole"), make_store("ahead", batch_bytes=1, spill_bytes=1, segment_bytes=700)
        processed(whole, *lines)
        processed(ahead, *lines)
        tiny = make_store("tiny", batch_bytes=1, commit_bytes=1, segment_bytes=700, cache_keys=1)
        for text in lines:
            append_lines(tiny, "events", [text])
        assert process(tiny)[1] == {}
        one, two, three = derived(whole), derived(tiny), derived(ahead)
        assert one["baskets"].count(b"\n") == 10
        for log in ("reactions", "baskets", "anomalies", "quarantine"):
            assert one[log] == two[log] == three[log]
        assert len(list(tiny.directory("baskets", 0).glob("*.jsonl"))) > 3
        assert result(tiny) == result(ahead) == result(whole)

    @pytest.mark.parametrize(("customers", "items", "commits"), [(30, 1, 7), (1, 30, 4)])
    def test_ten_states_and_rows_that_wait_make_a_commit(
        self, make_store: MakeStore, customers: int, items: int, commits: int
    ) -> None:
        """Five customers with a line each, or one with nine lines; and the tick with what is left."""
        store = make_store(batch_bytes=1, cache_keys=10)
        append_lines(store, "events", [add(n, n % customers, id=n % items) for n in range(30)])
        steps: list[str] = []
        arm(steps.append)
        try:
            process_to_end(new_run(store), "normalise", FinalTick("log-end"))
        finally:
            arm(None)
        assert steps.count("committed") == commits

    @pytest.mark.parametrize(("every", "commits"), [("1d", 1), ("1ms", 10)])
    def test_so_much_work_makes_a_commit(self, make_store: MakeStore, every: str, commits: int) -> None:
        store = make_store(batch_bytes=1, commit_every=every)
        append_lines(store, "events", [add(n) for n in range(600)])
        process_to_end(new_run(store), "abandonment", None)
        [position] = [p for p in positions(store) if p.processor == "abandonment"]
        assert position.commit == 1 if commits == 1 else position.commit >= commits

    def test_what_was_written_ahead_of_a_commit_that_never_came_is_no_readers_and_given_again(
        self, make_store: MakeStore
    ) -> None:
        lines = [add(n * 40, n % 3) for n in range(40)]
        whole, store = make_store("whole"), make_store("store", batch_bytes=400, spill_bytes=1)
        processed(whole, *lines)
        append_lines(store, "events", lines)
        steps: list[str] = []

        def stop_soon(step: str) -> None:
            steps.append(step)
            if steps.count("derived-written") == 5:
                run.stop.set()

        run, final = new_run(store), FinalTick("log-end")
        arm(stop_soon)
        try:
            with pytest.raises(Stopped):
                process_to_end(run, "abandonment", final)
        finally:
            arm(None)
        assert "committed" not in steps
        assert store.committed_end("baskets", 0) == 0
        left = derived(store)["baskets"]
        assert left
        assert b"".join(whole.reader("baskets", 0).raw(0, len(left))) == left
        processed(store)
        assert derived(store)["baskets"] == derived(whole)["baskets"]
        assert result(store) == result(whole)


class TestDatabase:
    def test_a_fresh_database_is_what_the_tables_say(self, store: Store) -> None:
        with store.database.read() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, SQLModel.metadata) == []
            assert context.get_current_revision() == HEAD

    def test_the_newest_revision_is_the_one_that_the_program_asks_for(self) -> None:
        config = Config()
        config.set_main_option("script_location", "storage:migrations")
        assert ScriptDirectory.from_config(config).get_heads() == [HEAD]

    def test_one_statement_takes_many_rows_by_name_or_in_order(self, store: Store) -> None:
        sql = "INSERT INTO item (key, name, set_by) VALUES (:key, '100% at 12:30', :key) ON CONFLICT (key) DO NOTHING"
        with store.database.write() as connection:
            execute_many(connection, sql, [{"key": "1"}, {"key": "2"}])
            execute_many(connection, sql, [("3", "4"), ("5", "6")])
            execute_many(connection, sql, [])
            rows = connection.execute(sa.text("SELECT key, name, set_by FROM item ORDER BY key")).all()
        text = "100% at 12:30"
        assert rows == [("1", text, "1"), ("2", text, "2"), ("3", text, "4"), ("5", text, "6")]

    @pytest.mark.only("sqlite")
    def test_sqlite_writes_ahead_and_fully_synchronised(self, store: Store) -> None:
        with store.database.read() as connection:
            mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
            level = connection.exec_driver_sql("PRAGMA synchronous").scalar()
        assert (mode, level) == ("wal", 2)

    def test_a_database_of_a_newer_version_is_refused_in_one_sentence(self, make_store: MakeStore) -> None:
        with make_store().database.write() as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        with pytest.raises(AfterlogError, match="the database is of another version of Afterlog") as raised:
            make_store().committed_end("reactions", 0)
        assert "\n" not in str(raised.value)

    @pytest.mark.only("sqlite")
    def test_a_file_that_is_no_database_is_told_in_one_sentence(self, store: Store) -> None:
        (store.home / "afterlog.db").write_bytes(b"this is no database" * 100)
        done = afterlog(store.home, "status")
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.startswith(b"afterlog: ")
        assert done.stderr.count(b"\n") == 1

    def test_what_is_due_is_found_by_an_index(self, store: Store, database: str) -> None:
        processed(store, *(add(0, customer) for customer in range(50)))
        asked: list[tuple[str, Any]] = []
        sa.event.listen(
            store.database.engine, "before_cursor_execute",
            lambda _c, _cursor, sql, parameters, *_: asked.append((sql, parameters)),
        )  # fmt: skip
        follower = PartitionFollower(new_run(store), "abandonment", 0)
        asked.clear()
        assert len(next(follower.states.due_before(T0 + 1, 20))) == 20
        follower.states.committed()
        plans, explain = [], "EXPLAIN" if database == "postgresql" else "EXPLAIN QUERY PLAN"
        with store.database.read() as connection:
            if database == "postgresql":  # fifty rows are quicker read than looked up
                connection.exec_driver_sql("SET enable_seqscan TO off")
                connection.exec_driver_sql("SET enable_sort TO off")
            for sql, parameters in [one for one in asked if one[0].startswith("SELECT")]:
                rows = connection.exec_driver_sql(f"{explain} {sql}", parameters).all()
                plans.append(" ".join(row[-1] for row in rows))
        assert len(plans) == 2
        for plan in plans:
            if database == "postgresql":
                assert "using state_due on state" in plan
                assert "Sort" not in plan.replace("Incremental Sort", "").replace("Sort Key", "")
                continue
            assert plan.startswith("SEARCH state USING")
            assert "INDEX state_due (checkpoint=?" in plan
            assert "TEMP B-TREE" not in plan

    def test_a_transaction_leaves_no_trace_where_it_fails(self, store: Store) -> None:
        processed(store, tax(1))
        before = database(store)

        def half_done() -> None:
            with store.database.write() as connection:
                connection.exec_driver_sql("DELETE FROM checkpoint")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            half_done()
        assert database(store) == before

    def test_a_look_at_the_database_does_not_wait_for_a_writer(self, store: Store) -> None:
        with store.database.write() as connection:
            connection.exec_driver_sql("DELETE FROM checkpoint")
            found: list[int] = []
            thread = threading.Thread(target=lambda: found.append(store.committed_end("reactions", 0)))
            thread.start()
            thread.join(1)
            waited = thread.is_alive()
        thread.join()
        assert (waited, found) == (False, [0])

    @pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
    def test_two_processes_that_make_the_database_at_once_agree(
        self, tmp_path: Path, kind: str, request: pytest.FixtureRequest
    ) -> None:
        url = f"sqlite:///{tmp_path}/a.db"
        if kind == "postgresql":
            url = request.getfixturevalue("postgres").create("template0")
        code = "from storage.database import Database; from pathlib import Path; import sys; Database(sys.argv[1], Path(sys.argv[2])).engine"
        command = [sys.executable, "-c", code, url, str(tmp_path)]
        runs = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for _ in "ab"]
        assert [(run.communicate(timeout=PATIENCE)[1], run.returncode) for run in runs] == [(b"", 0)] * 2
        with Database(url, tmp_path).read() as connection:
            assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == HEAD


class TestState:
    def test_memory_is_bounded_and_only_what_changed_is_written(self, store: Store) -> None:
        def fresh() -> StateStore[dict[str, Any]]:
            return StateStore(store.database, 7, dict, cache_keys=10)

        def commit(states: StateStore[dict[str, Any]]) -> int:
            written: list[str] = []
            with store.database.write() as connection:
                sa.event.listen(
                    connection, "before_cursor_execute", lambda *a: written.extend(a[3] if a[5] else [a[3]])
                )
                states.write(connection)
            states.committed()
            return len(written)

        states = fresh()
        for number in range(100):
            states.put(f"k{number}", {"n": number}, (number, -number))
        assert commit(states) == 100
        assert len(states._cache) <= 10
        assert [states.get(f"k{number}") for number in (3, 99, 100)] == [{"n": 3}, {"n": 99}, None]
        states.put("k3", {"n": -3}, (1000, 0))
        states.drop("k4")
        assert commit(states) == 2
        assert commit(states) == 0
        again = fresh()
        assert due_keys(again, 6, 10) == [["k0", "k1", "k2", "k5"]]
        assert [again.get(key) for key in ("k3", "k4")] == [{"n": -3}, None]
        assert again.earliest == 0

    def test_what_is_read_takes_the_place_of_what_was_read_longest_ago(self, store: Store) -> None:
        states: StateStore[dict[str, Any]] = StateStore(store.database, 7, dict, cache_keys=10)
        for number in range(100):
            states.put(f"k{number}", {"n": number})
        with store.database.write() as connection:
            states.write(connection)
        states.committed()
        for first in range(0, 100, 4):
            states.prefetch([f"k{number}" for number in range(first, first + 4)])
            assert len(states._cache) <= 10
        assert {f"k{number}" for number in range(90, 100)} == states._cache.keys()
        states.prefetch(["k90", "k0"])  # what is wanted stays, however long ago it was read
        assert {"k90", "k0"} <= states._cache.keys()
        states.prefetch([f"k{number}" for number in range(20)])  # a batch may want more than memory is to hold
        assert {f"k{number}" for number in range(20)} <= states._cache.keys()
        states.put("k11", {"n": -11})
        with store.database.write() as connection:
            states.write(connection)
        states.committed()
        assert len(states._cache) == 10
        assert [*states._cache][-1] == "k11"

    def test_few_numbers_of_keys_are_looked_up_at_once(self, store: Store) -> None:
        """A connection keeps a hundred statements: one for each number of keys would take tens of megabytes."""
        states: StateStore[dict[str, Any]] = StateStore(store.database, 7, dict, cache_keys=10)
        states.put_all({f"k{number}": {"n": number} for number in range(700)})
        with store.database.write() as connection:
            states.write(connection)
        states.committed()
        asked: set[str] = set()
        sa.event.listen(store.database.engine, "before_cursor_execute", lambda *a: asked.add(a[2]))
        for count in (*range(1, 40), 600):
            states.prefetch([f"k{number}" for number in range(count)])
            assert [states.get(f"k{number}") for number in range(count)] == [{"n": number} for number in range(count)]
            states.prefetch([f"k{number}" for number in range(600, 700)])
        assert len(asked) <= 4

    def test_what_was_dropped_is_gone_before_that_is_committed(self, store: Store) -> None:
        states: StateStore[dict[str, Any]] = StateStore(store.database, 7, dict, cache_keys=10)
        states.put("a", {"n": 1})
        with store.database.write() as connection:
            states.write(connection)
        states.committed()
        states.drop("a")
        assert states.get("a") is None
        states.put("a", {"n": 2})
        assert states.get("a") == {"n": 2}

    def test_what_is_due_comes_in_order_of_due_and_then_of_rank(self, store: Store) -> None:
        states: StateStore[dict[str, Any]] = StateStore(store.database, 7, dict, cache_keys=10)
        for key, due in {"a": (5, 9), "b": (5, -1), "c": (4, 100), "d": (6, 0), "e": (5, 0)}.items():
            states.put(key, {}, due)
        states.put("never", {})
        with store.database.write() as connection:
            states.write(connection)
        states.committed()
        assert due_keys(states, 6, 10) == [["c", "b", "e", "a"]]
        assert due_keys(states, 6, 2) == [["c", "b"], ["e", "a"]]
        states.put("b", {}, (9, 0))
        states.put("a", {}, (5, -2))
        states.put("new", {}, (0, 0))
        states.drop("e")
        assert due_keys(states, 6, 10) == [["new", "c", "a"]]
        lists = states.due_before(7, 2)
        for key, _ in next(lists):
            states.put(key, {}, (8, 0))
        assert [[key for key, _ in found] for found in lists] == [["a", "d"]]

    def test_what_was_put_together_is_due_when_the_state_says(self, store: Store) -> None:
        states: StateStore[dict[str, Any]] = StateStore(
            store.database, 7, dict, 10, lambda value: (value["n"], 0) if value else None
        )
        states.put("b", {"n": 1}, (9, 0))
        states.put_all({"a": {"n": 5}, "b": {"n": 4}, "never": {}})
        assert states.earliest == 4
        assert due_keys(states, 6, 10) == [["b", "a"]]
        states.put("a", {"n": 5}, (3, 0))
        states.drop("b")
        assert (states.get("b"), due_keys(states, 6, 10)) == (None, [["a"]])
        states.put_all({"c": {"n": 2}})
        with store.database.write() as connection:
            states.write(connection)
        states.committed()
        assert (states.earliest, due_keys(states, 6, 10)) == (2, [["c", "a"]])

    def test_equals_are_in_the_order_of_their_keys_whether_they_are_committed_yet_or_not(self, store: Store) -> None:
        keys = ["a\x00", "a\x01", "a\x19", "a\x1a", "a\x1b", "b"]  # PostgreSQL has no NUL
        states: StateStore[dict[str, Any]] = StateStore(store.database, 7, dict, cache_keys=10)
        for key in keys:
            states.put(key, {}, (5, 0))
        [before] = due_keys(states, 6, 10)
        with store.database.write() as connection:
            states.write(connection)
        states.committed()
        [after] = due_keys(states, 6, 10)
        for key in keys[::2]:
            states.put(key, {}, (5, 0))
        [mixed] = due_keys(states, 6, 10)
        assert sorted(before) == keys
        assert before == after == mixed


def due_keys(states: StateStore[dict[str, Any]], bound: int, at_once: int) -> list[list[str]]:
    """The keys of what is due, list by list."""
    return [[key for key, _ in found] for found in states.due_before(bound, at_once)]


@pytest.mark.only("sqlite")
def test_copying_home_while_nothing_runs_is_a_backup(store: Store, tmp_path: Path) -> None:
    processed(store, add(0), tax(1))
    shutil.copytree(store.home, tmp_path / "copy")
    copied = Store(msgspec.structs.replace(store.settings, home=tmp_path / "copy"))
    for one in (store, copied):
        processed(one, shop("X", 60), tax(2))
    assert {**derived(copied), "clock": b""} == {**derived(store), "clock": b""}
    assert result(copied) == result(store)
