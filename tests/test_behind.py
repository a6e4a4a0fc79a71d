"""A follower that begins behind what the clock has recorded: a new processor, an older database put back, or a lost one."""

from __future__ import annotations

import functools
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

import pytest

import storage.clock
from storage import steps
from storage.clock import Clock, Tick
from storage.door import append_lines
from storage.errors import LostDataError, Stopped
from storage.store import Store
from tasks.follow import PartitionFollower
from tasks.process import positions, process_to_end
from tasks.promote import promote
from tasks.run import Run
from tasks.topology import build_topology
from tasks.verify_derived import report, verify_derived
from tests.conftest import log_bytes
from tests.helpers import copy_raw_logs, derived, parsed, process
from tests.test_promotion import check_as_ever, replayed
from tests.test_replay import MINUTE, START, line

MakeStore = Callable[..., Store]


def to_end(store: Store, name: str) -> Run:
    run = Run(store, build_topology(store.settings), "test")
    process_to_end(run, name, None)
    return run


class TestManyTicks:
    def _ticks(self, store: Store, end: int, first: int, count: int, apart: int) -> None:
        """Write ticks as an idle log gets them."""
        store.writer("clock", 0).append(
            [
                b'{"subject":{"id":"CLOCK"},"verb":"TICK","object":{"type":"TICK","as_of":%d,"ends":{"events/0":%d}},'
                b'"context":{"at":%d},"event":{"inserted_at":%d}}' % (at, end, at, at)
                for at in range(first, first + count * apart, apart)
            ]
        )

    def test_are_not_taken_into_memory_at_once(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        class Counted(Tick):
            alive = most = 0

            def __init__(self, *values: Any) -> None:
                super().__init__(*values)
                Counted.alive += 1
                Counted.most = max(Counted.most, Counted.alive)

            def __del__(self) -> None:
                Counted.alive -= 1

        monkeypatch.setattr(storage.clock, "Tick", Counted)
        append_lines(store, "events", [line(1, 0)])
        end = len(log_bytes(store.home, "events"))
        self._ticks(store, end, START, 20_000, 80)  # nothing is due at any
        self._ticks(store, end, START + 31 * MINUTE, 1, 1)
        to_end(store, "abandonment")
        assert 1_000 < Counted.most < 12_000
        (event,) = parsed(log_bytes(store.home, "baskets"))
        assert event["event"]["inserted_at"] == START + 31 * MINUTE

    def test_give_the_same_in_blocks_of_any_size(
        self, store: Store, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for part in range(4):
            append_lines(store, "events", [line(part, 100 * part), line(9, 100 * part + 40)])
            self._ticks(store, len(log_bytes(store.home, "events")), START + (100 * part + 50) * MINUTE, 10, 4 * MINUTE)
        process(store.home, "abandonment")
        baskets = log_bytes(store.home, "baskets")
        assert len(parsed(baskets)) > 6
        for size in (1, 700, 2000):
            other = make_store(f"blocks of {size}")
            copy_raw_logs(store.home, other.home)
            with monkeypatch.context() as patched:
                patched.setattr(Clock, "ticks", functools.partialmethod(Clock.ticks, size=size))
                process(other.home, "abandonment")
            assert log_bytes(other.home, "baskets") == baskets


class Shop:
    """A HOME that lives through settings, and whose database is then put back, or lost, while the logs stay."""

    def __init__(self, make_store: MakeStore, **always: object) -> None:
        self.make_store, self.always, self.minutes = make_store, always, 0.0
        self.home = make_store(**always).home
        self.kept = self.home.with_name("kept.db")

    def live(self, *, timeout: str, gap: str = "24h") -> None:
        """Half a day of six customers, with ticks on the way."""
        for _ in range(3):
            customers = [line(n % 6, self.minutes + n * 6.5) for n in range(40)]
            append_lines(self.make_store(**self.always), "events", customers)
            self.minutes += 300
            as_of = START + round(self.minutes * MINUTE)
            process(self.home, as_of=as_of, timeout=timeout, reminder_gap=gap, **self.always)

    def keep(self) -> None:
        with closing(sqlite3.connect(self.home / "afterlog.db")) as there, closing(sqlite3.connect(self.kept)) as kept:
            there.backup(kept)

    def lose(self) -> None:
        for path in self.home.glob("afterlog.db*"):
            path.unlink()

    def put_back(self) -> None:
        self.lose()
        shutil.copy(self.kept, self.home / "afterlog.db")

    def store(self, **settings: object) -> Store:
        return self.make_store(**self.always, **settings)

    def recorded(self, processor: str) -> list[Any]:
        events = [e["object"] for e in parsed(log_bytes(self.home, "clock")) if e["verb"] == "VERSION"]
        return [e for e in events if e["processor"] == processor]

    def other_code(self, processor: str, count: int) -> None:
        """Have the first `count` versions of a processor be of code that is gone, and what the database knows, too."""
        with (store := self.store()).database.write() as connection:
            connection.exec_driver_sql(f"UPDATE checkpoint SET version = 'of it' WHERE processor = '{processor}'")  # noqa: S608  # of this module
        store.database.dispose()
        (clock,) = (self.home / "logs" / "clock" / "0").glob("*.jsonl")
        lines = clock.read_bytes().splitlines(keepends=True)
        mine = [n for n, each in enumerate(lines) if b'"VERSION","processor":"%s"' % processor.encode() in each]
        for n in mine[:count]:
            code = json.loads(lines[n])["object"]["code"].encode()
            lines[n] = lines[n].replace(code, code[::-1])
        clock.write_bytes(b"".join(lines))


@pytest.fixture
def shop(make_store: MakeStore) -> Shop:
    return Shop(make_store)


def verified(store: Store) -> bool:
    told: list[str] = []
    return report(verify_derived(store, build_topology(store.settings)), told.append)


class TestRecordedSettings:
    """Over what the clock has recorded beyond the checkpoint, the follower goes with the settings of then."""

    def _there_and_back(self, shop: Shop) -> dict[str, bytes]:
        for timeout, gap in (("30m", "24h"), ("45m", "1h"), ("31m", "2h"), ("30m", "24h")):
            shop.live(timeout=timeout, gap=gap)
            if timeout == "30m" and not shop.kept.exists():
                shop.keep()
        return derived(shop.home)

    def test_an_older_database_comes_to_the_same_bytes(self, shop: Shop) -> None:
        before = self._there_and_back(shop)
        clock = log_bytes(shop.home, "clock")
        shop.put_back()
        process(shop.home)
        assert derived(shop.home) == before
        assert log_bytes(shop.home, "clock") == clock  # there was nothing to record
        assert verified(shop.store())
        shop.live(timeout="30m")
        assert verified(shop.store())

    def test_a_lost_database_comes_to_the_same_bytes(self, shop: Shop) -> None:
        before = self._there_and_back(shop)
        shop.lose()
        process(shop.home)
        assert derived(shop.home) == before
        assert verified(shop.store())

    @pytest.mark.parametrize("gone", [1, 2, 4])
    def test_a_lost_database_of_code_that_is_gone_too_where_it_gave_the_same(self, shop: Shop, gone: int) -> None:
        before = self._there_and_back(shop)
        shop.other_code("abandonment", gone)
        shop.lose()
        process(shop.home)
        assert derived(shop.home) == before
        assert verified(shop.store())
        today = build_topology(shop.store().settings).make("abandonment").version()["code"]
        assert shop.recorded("abandonment")[-1]["code"] == today

    @pytest.mark.parametrize("gone", [0, 4])
    def test_also_where_every_commit_is_a_runs_last(
        self, shop: Shop, gone: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = self._there_and_back(shop)
        shop.other_code("abandonment", gone)
        shop.lose()
        run: list[Run] = []
        confirm = PartitionFollower._commit

        def once(follower: PartitionFollower) -> None:
            confirm(follower)
            run[-1].stop.set()

        with monkeypatch.context() as patched:
            patched.setattr(PartitionFollower, "_commit", once)
            for _ in range(200):
                store = shop.store(commit_bytes=1, batch_bytes=2_000)
                run.append(Run(store, build_topology(store.settings), "test"))
                with suppress(Stopped):
                    process_to_end(run[-1], "abandonment", None)
                    if not run[-1].stop.is_set():
                        break
                store.database.dispose()
        assert 20 < len(run) < 200
        assert log_bytes(shop.home, "baskets") == before["baskets"]
        process(shop.home)
        assert derived(shop.home) == before
        assert verified(shop.store())

    @pytest.mark.parametrize("database_is", ["older", "lost"])
    def test_what_was_never_recorded_holds_after_it_and_may_give_others(self, shop: Shop, database_is: str) -> None:
        shop.live(timeout="30m")
        shop.keep()
        shop.live(timeout="45m", gap="1h")
        shop.live(timeout="45m")
        before = log_bytes(shop.home, "baskets")
        shop.lose() if database_is == "lost" else shop.put_back()
        run = to_end(shop.store(timeout="30m"), "abandonment")
        assert [note.partition(":")[0] for note in run.notes] == ["abandonment"] * 2
        assert run.notes[1].endswith("were cut, since its code or settings changed")
        assert log_bytes(shop.home, "baskets") != before
        (at,) = [p.offset for p in positions(shop.store()) if p.processor == "remind"]
        process(shop.home)
        assert shop.recorded("remind")[-1]["from"] == {"baskets/0": at}  # places in what was replaced are none any more
        assert verified(shop.store())

    def test_where_the_derived_logs_are_lost_too_todays_hold(self, shop: Shop) -> None:
        self._there_and_back(shop)
        shop.lose()
        for log in ("baskets", "reminders"):
            shutil.rmtree(shop.home / "logs" / log)
        process(shop.home, timeout="45m")
        assert verified(shop.store(timeout="45m"))
        check_as_ever(shop.store(timeout="45m"), timeout="45m")

    def test_where_nothing_was_derived_since_todays_hold_and_are_recorded_anew(self, shop: Shop) -> None:
        append_lines(shop.store(), "events", [line(1, 0)])
        process(shop.home)
        shop.keep()
        append_lines(shop.store(), "events", [line(1, 40)])  # too long a pause for half an hour only
        process(shop.home, timeout="45m")
        process(shop.home)
        assert log_bytes(shop.home, "baskets") == b""
        shop.put_back()
        process(shop.home)
        assert len(parsed(log_bytes(shop.home, "baskets"))) == 1
        assert verified(shop.store())

    def test_other_code_since_the_backup_may_give_others(self, shop: Shop) -> None:
        self._there_and_back(shop)
        shop.put_back()
        shop.other_code("abandonment", 3)
        (folder,) = (shop.home / "logs" / "baskets").glob("[0-9]")
        (baskets,) = folder.glob("*.jsonl")
        end = shop.store().committed_end("baskets", 0)
        text = baskets.read_bytes()
        baskets.write_bytes(text[:end] + text[end:].replace(b"ABANDONED", b"ABANDONEE", 1))
        run = to_end(shop.store(), "abandonment")
        assert run.notes[1].endswith("were cut, since its code or settings changed")
        assert b"ABANDONEE" not in baskets.read_bytes()
        assert verified(shop.store())

    def test_in_each_partition(self, make_store: MakeStore) -> None:
        shop = Shop(make_store, partitions=2)
        self._there_and_back(shop)
        before = {part: log_bytes(shop.home, "baskets", part) for part in range(2)}
        assert all(before.values())
        shop.lose()
        process(shop.home, partitions=2)
        assert {part: log_bytes(shop.home, "baskets", part) for part in range(2)} == before

    def test_in_a_generation_that_was_promoted(self, shop: Shop) -> None:
        shop.live(timeout="30m")
        store = shop.store()
        replayed(store, settings={"timeout": "35m"}, name="longer")
        promote(store, build_topology(store.settings), "longer", "test")
        shop.live(timeout="31m")
        shop.keep()
        for timeout in ("45m", "31m"):
            shop.live(timeout=timeout)
        before = log_bytes(shop.home, "baskets@2"), log_bytes(shop.home, "reminders@2")
        assert all(before)
        shop.put_back()
        process(shop.home, timeout="31m")
        assert (log_bytes(shop.home, "baskets@2"), log_bytes(shop.home, "reminders@2")) == before
        assert verified(shop.store(timeout="31m"))

    def test_as_a_rule_little_of_the_clock_is_read(self, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
        shop.live(timeout="30m")
        shop.live(timeout="45m")
        asked: list[int] = []
        versions = Clock.versions

        def spy(clock: Clock, start: int = 0) -> list[Any]:
            asked.append(start)
            return versions(clock, start)

        monkeypatch.setattr(Clock, "versions", spy)
        shop.live(timeout="45m")
        ends = [p.tick_offset for p in positions(shop.store()) if p.tick_offset]
        assert len(asked) == 3 * len(ends)
        assert min(asked) > max(ends) // 2


class TestAfterAnOrdinaryCrash:
    """No database is older than its logs; settings were changed between the crash and the next run."""

    def _die(self, store: Store, name: str) -> None:
        """Run a processor that dies between its bytes and its transaction."""

        def die(step: str) -> None:
            if step == "transaction-ready":
                raise OSError("died")

        steps.arm(die)
        try:
            with pytest.raises(OSError, match="died"):
                to_end(store, name)
        finally:
            steps.arm(None)

    def _recorded(self, store: Store, name: str) -> int:
        with Clock(store, ["events"]) as clock:
            return sum(version["processor"] == name for version in clock.versions())

    def test_who_reads_the_log_and_has_no_tail_of_its_own_goes_on_as_if_nothing_was(
        self, store: Store, make_store: MakeStore
    ) -> None:
        append_lines(store, "events", [line(1, 0)])
        process(store.home, as_of=START + 60 * MINUTE)
        at_work = PartitionFollower(Run(store, build_topology(store.settings), "a shift"), "remind", 0)
        append_lines(store, "events", [line(2, 70), line(2, 130)])
        self._die(store, "abandonment")
        assert to_end(make_store(timeout="20m"), "abandonment").notes
        assert at_work.advance(at_work.snapshot())
        at_work.close()
        assert (to_end(store, "remind").notes, self._recorded(store, "remind")) == ([], 1)

    def test_what_is_recorded_is_not_read_where_the_checkpoint_knows_it(
        self, store: Store, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        append_lines(store, "events", [line(1, 0)])
        process(store.home, as_of=START + 60 * MINUTE)
        other = make_store(timeout="20m")
        PartitionFollower(Run(other, build_topology(other.settings), "it dies"), "abandonment", 0).close()
        started: list[int] = []
        versions = Clock.versions
        monkeypatch.setattr(Clock, "versions", lambda clock, start=0: started.append(start) or versions(clock, start))
        to_end(other, "abandonment")
        assert started
        assert 0 not in started

    def test_where_it_cannot_be_read_today_s_hold_and_must_give_what_is_there(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        append_lines(store, "events", [line(1, 0)])
        process(store.home, "abandonment", as_of=START + 60 * MINUTE)
        self._die(store, "remind")
        before = log_bytes(store.home, "reminders")

        def away(clock: Clock, start: int = 0) -> list[dict[str, Any]]:
            raise LostDataError("a segment is in the archive, which is away")

        monkeypatch.setattr(Clock, "versions", away)
        [note] = to_end(store, "remind").notes
        assert note.startswith("remind: what was recorded of its settings cannot be read: a segment is in the archive")
        assert log_bytes(store.home, "reminders") == before
