"""The archive: what is appended is read back the same wherever it lies, and nothing goes from here before it is safe there."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from benchmarks.crash_archive import SMALL as crash_settings
from benchmarks.crash_archive import Archiving
from deployments import cli_backup
from deployments.reading import Reading
from storage.archive import Archive
from storage.backup import ARCHIVE_LOCK, make_backup
from storage.derived import DerivedWriter
from storage.door import append_lines
from storage.errors import AfterlogError, CorruptLogError, LostDataError, UsageError
from storage.locks import RunLock
from storage.manifest import archived_end, note_archived, read_manifest
from storage.restore import restore_database, restore_logs
from storage.segment import list_segments
from storage.store import Store
from storage.times import show
from tasks.archive import Archived, archive_all
from tasks.topology import build_topology
from tasks.verify import verify_all
from tests.conftest import log_bytes
from tests.test_commit import T0, add, process, processed, result, shop, tax
from tests.test_crash import ended, start
from tests.test_deliver import deliver

MakeStore = Callable[..., Store]
SMALL: dict[str, object] = {"segment_bytes": 300, "live_window": "1ms"}


def archive(store: Store) -> dict[str, Archived]:
    """Archive everything, old at once: the last lines are made a second older."""
    for path in (store.home / "logs").rglob("*.jsonl"):
        state = path.stat()
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns - 1_000_000_000))
    return {done.name: done for done in archive_all(store, build_topology(store.settings), "test")}


def local(store: Store, log: str = "events") -> list[str]:
    return sorted(path.name for path in store.directory(log, 0).glob("*.jsonl"))


def whole(store: Store, log: str = "events") -> bytes:
    """Every byte of a log, as a reader gives it."""
    reader = store.reader(log, 0)
    data = b"".join(reader.raw(0, reader.end()))
    reader.close()
    return data


def test_a_thousand_random_rolls_and_archives_read_as_what_was_appended(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time some lines come, maybe the segment rolls, maybe it is archived; two readers follow, one jumps about."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # about bytes; what a power loss leaves is other tests' matter
    rng = random.Random(11)
    store = make_store(segment_bytes=1, live_window="1ms")
    directory, appended, starts = store.directory("events", 0), bytearray(), [0]
    writer, follower, jumper = store.writer("events", 0), store.reader("events", 0), store.reader("events", 0)
    at, followed = 0, bytearray()
    for number in range(1000):
        writer.limit = rng.choice([1, 200, 1 << 20])
        lines = [b'{"n":%d,"x":"%s"}' % (number, b"y" * rng.randrange(60)) for _ in range(rng.randrange(1, 4))]
        assert writer.append(lines)[0] == len(appended)
        for line in lines:
            appended += line + b"\n"
            starts.append(len(appended))
        if rng.random() < 0.5:
            put_and_remove(store, directory, rng.randrange(len(appended)))
        if rng.random() < 0.3:
            while block := follower.read(at, follower.end(), rng.choice([64, 1024]), 1 << 20):
                followed += b"\n".join([*block.lines, b""])
                at = block.end
        first = rng.randrange(len(starts))
        start, stop = starts[first], starts[min(len(starts) - 1, first + rng.randrange(12))]
        assert b"".join(jumper.raw(start, stop)) == appended[start:stop]
        place = rng.randrange(len(appended))
        assert jumper.line_start(place) == max(start for start in starts if start <= place)
        begin = rng.choice(starts[:-1])
        assert jumper.line(begin) == appended[begin : appended.index(b"\n", begin)]
    while block := follower.read(at, follower.end(), 4096, 1 << 20):
        followed += b"\n".join([*block.lines, b""])
        at = block.end
    assert followed == appended == whole(store)
    assert archived_end(directory) > 10_000
    assert len(local(store)) < len(read_manifest(directory)) - 50


def put_and_remove(store: Store, directory: Path, before: int) -> None:
    """Archive what is sealed, and remove here what ends before a place."""
    end = archived_end(directory)
    entries = {entry.base: entry for entry in read_manifest(directory)}
    for entry in entries.values():
        if entry.base >= end:
            store.archive.put(directory, entry)
            note_archived(directory, end := entry.end)
    for segment in list_segments(directory):
        if segment.base in entries and entries[segment.base].end <= before:
            segment.path.unlink()


class TestRemoval:
    """A segment goes from here when it is old and behind every checkpoint, never sooner."""

    def _appended(self, store: Store, count: int = 20) -> bytes:
        append_lines(store, "events", [tax(n) for n in range(count)])
        for n in range(count):
            append_lines(store, "events", [tax(n)])
        return log_bytes(store.home, "events")

    def test_nothing_goes_before_every_processor_has_read_it(self, make_store: MakeStore) -> None:
        store = make_store(**SMALL)
        appended = self._appended(store)
        there = local(store)
        done = archive(store)["events/0"]
        assert (done.put, done.removed) == (len(there) - 1, 0)
        assert local(store) == there
        assert process(store)[1] == {}
        with store.database.write() as connection:  # one of them is at the third segment's second line
            third = int(there[2].removesuffix(".jsonl"))
            connection.exec_driver_sql(
                f"UPDATE checkpoint SET \"offset\" = {third + 90} WHERE processor = 'anomalies'"  # noqa: S608  # a number of this test
            )
        done = archive(store)["events/0"]
        assert (done.put, done.removed, done.waits_for) == (0, 2, "anomalies")
        assert local(store) == there[2:]
        assert whole(store) == appended

    def test_nothing_goes_before_it_is_old(self, make_store: MakeStore) -> None:
        store = make_store(segment_bytes=300, live_window="1h")
        appended = self._appended(store)
        assert process(store)[1] == {}
        there = local(store)
        assert archive(store)["events/0"].removed == 0
        for name in there[:3]:
            path = store.directory("events", 0) / name
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 3_600_000_000_000))
        assert archive(store)["events/0"].removed == 3
        assert local(store) == there[3:]
        assert whole(store) == appended
        assert archive(make_store(**SMALL))["events/0"].removed == len(there) - 4

    def test_the_segment_that_grows_stays_and_is_not_archived(self, make_store: MakeStore) -> None:
        store = make_store(live_window="1ms")
        self._appended(store)
        assert process(store)[1] == {}
        assert (archive(store)["events/0"].put, len(local(store))) == (0, 1)

    def test_nothing_goes_that_the_archive_has_lost_or_changed(self, make_store: MakeStore, tmp_path: Path) -> None:
        store = make_store(**SMALL)
        self._appended(store)
        archive(store)
        assert process(store)[1] == {}
        there = local(store)
        name = store.home / "archive" / "events" / "0" / f"{there[1]}.zst"
        for spoil in (name.unlink, lambda: name.write_bytes(b"x" * 50), lambda: name.write_bytes(_frame(b"other\n"))):
            whole_object = name.read_bytes()
            spoil()
            with pytest.raises(AfterlogError, match=r"gone from the archive|no whole zstd|another segment"):
                archive(store)
            name.write_bytes(whole_object)
        assert local(store) == there[1:]  # the first was good
        assert archive(store)["events/0"].removed == len(there) - 2

    def test_a_segment_that_has_changed_since_it_was_archived_stays(self, make_store: MakeStore) -> None:
        store = make_store(**SMALL)
        self._appended(store)
        archive(store)
        assert process(store)[1] == {}
        there = local(store)
        path = store.directory("events", 0) / there[1]
        data = path.read_bytes()
        for other in (data + b"more\n", data[:-9], data.replace(b"UK", b"US")):
            path.write_bytes(other)
            with pytest.raises(CorruptLogError, match=r"is not what was sealed; it stays here; found \d+ bytes, SHA"):
                archive(store)
            assert path.read_bytes() == other
        assert local(store) == there[1:]  # the first was good
        path.write_bytes(data)
        assert archive(store)["events/0"].removed == len(there) - 2

    def test_an_object_that_is_found_is_made_durable_before_anybody_relies_on_it(
        self, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who put it may have been killed between its name and the fsync of its folder."""
        store = make_store(**SMALL)
        self._appended(store)
        archive(store)
        assert process(store)[1] == {}
        directory, fsync = store.directory("events", 0), os.fsync
        first, *_, last = (store.home / "archive/events/0" / f"{name}.zst" for name in local(store)[:-1])
        note_archived(directory, int(last.name[:20]))  # killed before it was noted
        done: list[Path] = []
        monkeypatch.setattr(os, "fsync", lambda fd: done.append(Path(f"/proc/self/fd/{fd}").readlink()) or fsync(fd))
        assert archive(store)["events/0"].removed > 1
        above = list(first.parents)[:4]
        assert above[3] == store.home
        noted, gone = done.index(directory / ".archived.new"), len(done) - done[::-1].index(directory)
        assert {last, *above} <= set(done[:noted])
        assert first in done[noted:gone]

    def test_a_changed_segment_is_not_archived(self, make_store: MakeStore) -> None:
        store = make_store(**SMALL)
        self._appended(store)
        path = store.directory("events", 0) / local(store)[1]
        path.write_bytes(path.read_bytes().replace(b"UK", b"US"))
        with pytest.raises(
            CorruptLogError, match=re.escape(f"{path}: a sealed segment was changed; it is not archived")
        ):
            archive(store)
        assert archived_end(store.directory("events", 0)) == int(path.stem)

    def test_what_a_kill_left_of_an_object_is_replaced_and_another_log_s_object_is_not(
        self, make_store: MakeStore
    ) -> None:
        store, other = make_store(**SMALL), make_store("other", **SMALL)
        self._appended(store)
        entry = read_manifest(store.directory("events", 0))[0]
        name = store.home / "archive" / "events" / "0" / f"{entry.base:020d}.jsonl.zst"
        name.parent.mkdir(parents=True)
        frame = _frame((store.directory("events", 0) / local(store)[0]).read_bytes())
        for cut in (0, 3, 20, len(frame) - 5, len(frame) - 1):
            name.write_bytes(frame[:cut])
            assert store.archive.put(store.directory("events", 0), entry) == len(name.read_bytes())
        append_lines(other, "events", [tax(-n) for n in range(1, 30)])
        append_lines(other, "events", [tax(1)])
        elsewhere = make_store("other", archive_url=str(store.home / "archive"), **SMALL)
        with pytest.raises(CorruptLogError, match="the archive has another segment than the manifest says"):
            archive(elsewhere)

    def test_a_folder_that_is_not_written_in_full_is_in_home_wherever_a_command_runs(
        self, make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = make_store(**SMALL, archive_url="kept/here")
        for folder in ("one", "other"):
            (tmp_path / folder).mkdir()
            monkeypatch.chdir(tmp_path / folder)
            self._appended(make_store(**SMALL, archive_url="kept/here"))
            archive(make_store(**SMALL, archive_url="kept/here"))
        assert sorted(path.name for path in tmp_path.iterdir() if path.name in ("kept", "one", "other")) == [
            "one",
            "other",
        ]
        assert not [*(tmp_path / "one").iterdir(), *(tmp_path / "other").iterdir()]
        assert (store.home / "kept" / "here" / "events" / "0").is_dir()

    def test_a_partition_that_fails_keeps_no_other_one_back(self, make_store: MakeStore) -> None:
        store = make_store(**SMALL)
        self._appended(store)
        for n in range(5):
            processed(store, tax(n))
        path = store.directory("events", 0) / local(store)[0]
        path.write_bytes(path.read_bytes().replace(b"UK", b"US"))
        with pytest.raises(CorruptLogError, match="a sealed segment was changed; it is not archived"):
            archive(store)
        others = [store.directory(log, 0) for log in ("clock", "reactions")]  # one before it, one after it
        assert all(archived_end(directory) > 0 for directory in others)
        place = store.home / "archive/reactions/0" / f"{0:020d}.jsonl.zst"
        place.write_bytes(_frame(b"another one\n"))
        (store.directory("reactions", 0) / "archived").unlink()
        with pytest.raises(AfterlogError, match=r"it is not archived.*; .*the archive has another segment"):
            archive(store)

    def test_a_full_disk_is_told_in_a_sentence(self, make_store: MakeStore) -> None:
        store = make_store(**SMALL)
        self._appended(store)
        directory = store.directory("events", 0)
        [entry, *_] = read_manifest(directory)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))  # no file may be longer
        try:
            with pytest.raises(
                AfterlogError, match=r"archive/events/0/0{20}.jsonl.zst.part: cannot compress a segment: "
            ):
                store.archive.put(directory, entry)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list((store.home / "archive/events/0").iterdir()) == []
        assert store.archive.put(directory, entry) > 20


def _frame(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


class TestAcross:
    """Whatever reads goes on across the border."""

    def test_processors_give_the_same_from_an_archived_past(self, make_store: MakeStore) -> None:
        """One HOME archives between runs, and starts a processor again from the beginning; the other does neither."""
        one, two = make_store("one", **SMALL), make_store("two", segment_bytes=300)
        for part in range(4):
            lines = [add(n / 7 + part * 100, n % 5) for n in range(20)] + [tax(n) for n in range(5)] + [b"bad"]
            for store in (one, two):
                append_lines(store, "events", lines)
                processed(store, shop("ORDERED", part * 100 + 50))
                deliver(store)
            done = archive(one)
        assert done["events/0"].removed
        assert {log for log in ("events", "reactions", "baskets") if local(one, log)[0] != f"{0:020d}.jsonl"} == {
            "events", "reactions", "baskets",
        }  # fmt: skip
        with one.database.write() as connection:
            connection.exec_driver_sql("DELETE FROM checkpoint WHERE processor IN ('derive', 'quarantine')")
            connection.exec_driver_sql("DELETE FROM committed_end WHERE log IN ('reactions', 'quarantine')")
        assert process(one)[1] == {}  # every byte is given again, and compared with those in the archive
        for log in ("events", "reactions", "baskets", "quarantine", "anomalies"):
            assert whole(one, log) == whole(two, log) == log_bytes(two.home, log)
        assert {k: v for k, v in result(one).items() if k in TABLES} == {
            k: v for k, v in result(two).items() if k in TABLES
        }

    def test_a_derived_log_that_comes_out_otherwise_is_not_cut_where_it_is_sealed(self, make_store: MakeStore) -> None:
        store = make_store(**SMALL)
        processed(store, *(tax(n) for n in range(20)))
        processed(store, tax(1))
        deliver(store)
        assert archive(store)["reactions/0"].removed
        before = local(store, "reactions"), whole(store, "reactions")
        with store.database.write() as connection:
            connection.exec_driver_sql("DELETE FROM checkpoint WHERE processor = 'derive'")
            connection.exec_driver_sql("DELETE FROM committed_end WHERE log = 'reactions'")
        changed = make_store(not_after="1h", **SMALL)
        failure = process(changed)[1]["derive"]
        assert "would have sealed lines of a derived log replaced" in str(failure)
        assert (local(store, "reactions"), whole(store, "reactions")) == before
        writer = DerivedWriter(
            store.directory("reactions", 0), "reactions/0", limit=300, daily=True, archive=lambda: store.archive
        )
        with pytest.raises(AfterlogError, match=r"would have sealed lines of a derived log replaced"):
            writer.extend(0, b"something else\n", may_differ=True)
        assert (local(store, "reactions"), whole(store, "reactions")) == before

    def test_the_command_reads_and_seeks_across(self, make_store: MakeStore, capfdbinary: Any) -> None:
        store = make_store(**SMALL)
        lines = [add(n, n % 5) for n in range(40)]
        for line in lines:
            append_lines(store, "events", [line])
        process(store)
        archive(store)
        text = b"".join(line + b"\n" for line in lines)
        offsets = [text.index(line) for line in lines]
        assert int(local(store)[0].removesuffix(".jsonl")) > offsets[30]
        reading = Reading(store, "events", False, 1)
        for n in (0, 1, 7, 22, 39):
            assert reading.place(0, show(T0 + n * 60_000)) == offsets[n]
        assert reading.place(0, show(T0 + 2_399_999)) == len(text)
        reading.write(0, offsets[3], None)
        reading.write(0, 0, offsets[25])
        assert capfdbinary.readouterr().out == text[offsets[3] :] + text[: offsets[25]]

    def test_seeking_a_time_opens_one_segment(self, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
        store, opened = make_store(**SMALL), []
        for n in range(40):
            append_lines(store, "events", [add(n, n % 5)])
        process(store)
        archive(store)
        fetch = Archive.open
        monkeypatch.setattr(Archive, "open", lambda self, *where: opened.append(where) or fetch(self, *where))
        Reading(store, "events", False, 1).place(0, show(T0 + 20 * 60_000))
        assert len(opened) == 1

    def test_a_segment_that_is_nowhere_stops_its_reader_with_a_sentence(self, make_store: MakeStore) -> None:
        store = make_store(**SMALL)
        for n in range(10):
            append_lines(store, "events", [tax(n)])
        process(store)
        archive(store)
        victim = min((store.home / "archive/events/0").glob("*.zst"))
        victim.unlink()
        with pytest.raises(
            LostDataError, match=r"a segment is neither here nor in the archive; expected 0{20}.jsonl in"
        ):
            whole(store)
        (store.directory("events", 0) / "archived").unlink()
        with pytest.raises(CorruptLogError, match=r"a segment is missing or has changed its length"):
            store.reader("events", 0).end()

    def test_an_archived_segment_that_was_changed_is_not_read(self, make_store: MakeStore) -> None:
        store = make_store(**SMALL)
        for n in range(10):
            append_lines(store, "events", [tax(n)])
        process(store)
        archive(store)
        victim = min((store.home / "archive/events/0").glob("*.zst"))
        data = zstandard.ZstdDecompressor().decompress(victim.read_bytes())
        victim.write_bytes(_frame(data.replace(b"UK", b"US", 1)))
        with pytest.raises(CorruptLogError, match="the archive has another segment than the manifest says"):
            whole(store)

    def test_a_reader_that_has_a_segment_in_its_list_finds_it_after_it_has_gone(self, make_store: MakeStore) -> None:
        store = make_store(**SMALL)
        for n in range(10):
            append_lines(store, "events", [tax(n)])
        process(store)
        reader = store.reader("events", 0)
        end, before = reader.end(), log_bytes(store.home, "events")
        archive(store)
        assert b"".join(reader.raw(0, end)) == before
        reader.close()

    def test_a_log_whose_files_are_all_gone_gives_no_offset_twice(self, make_store: MakeStore) -> None:
        store = make_store(**SMALL)
        for n in range(10):
            append_lines(store, "events", [tax(n)])
        process(store)
        archive(store)
        for name in local(store):
            (store.directory("events", 0) / name).unlink()
        end = read_manifest(store.directory("events", 0))[-1].end
        again = make_store(**SMALL)
        assert append_lines(again, "events", [tax(1)]).positions == [(0, end)]


class TestBackup:
    def test_a_backup_and_its_restore_go_with_the_archive(
        self, make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = make_store(**SMALL, archive_url=str(tmp_path / "archive"))
        monkeypatch.setenv("AFTERLOG_ARCHIVE_URL", str(tmp_path / "archive"))
        for n in range(4):
            processed(store, tax(n))
        deliver(store)
        archive(store)
        make_backup(store, build_topology(store.settings).derived_logs(), tmp_path / "backup")
        logs = {log: whole(store, log) for log in ("events", "reactions")}
        for n in range(4):
            processed(store, tax(n))
        archive(store)
        here = local(store)
        assert restore_logs(store, tmp_path / "backup") == []  # what has gone to the archive since stays there
        assert local(store) == here
        fresh = make_store("fresh", **SMALL)
        assert restore_logs(fresh, tmp_path / "backup") != []
        assert {log: whole(fresh, log) for log in logs} == logs
        restore_database(fresh, tmp_path / "backup", build_topology(fresh.settings).derived_logs())
        assert process(fresh)[1] == {}
        assert {log: whole(fresh, log) for log in logs} == logs
        assert archive(fresh)["events/0"].put == 0

    def test_a_backup_says_what_only_the_archive_has_and_a_restore_what_it_has_no_more(
        self, make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        store, away = make_store(**SMALL), tmp_path / "moved"
        for n in range(10):
            processed(store, tax(n))
        monkeypatch.setenv("AFTERLOG_HOME", str(store.home))
        cli_backup.backup(tmp_path / "without")
        assert "archive" not in capsys.readouterr().err
        archive(store)
        size = sum(min(map(int, (path.stem for path in part.glob("*.jsonl"))), default=0) for part in store.folders())
        assert size > 1000
        cli_backup.backup(tmp_path / "backup")
        assert f"{size} bytes of the logs are only in the archive, {store.home}/archive, and" in capsys.readouterr().err
        (store.home / "archive").rename(away)
        monkeypatch.setenv("AFTERLOG_HOME", str(tmp_path / "fresh"))
        monkeypatch.setenv("AFTERLOG_ARCHIVE_URL", str(away))
        cli_backup.restore(tmp_path / "backup")
        assert "archive" not in capsys.readouterr().err
        name = f"events/0/{0:020d}.jsonl.zst"
        (away / name).unlink()
        cli_backup.restore()
        [told] = [line for line in capsys.readouterr().err.splitlines() if "archive" in line]
        assert re.fullmatch(
            rf"events/0, offsets 0 to \d+: the segment is neither here nor in the archive, {away / name}", told
        )

    def test_nothing_is_put_back_while_an_archive_is_at_work(
        self, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = make_store()
        monkeypatch.setenv("AFTERLOG_HOME", str(store.home))
        held = RunLock(store.lock_path(ARCHIVE_LOCK), "a test")
        assert held.try_acquire()
        with pytest.raises(UsageError, match="archive or backup is at work: a test"):
            cli_backup.restore()
        held.release()
        cli_backup.restore()


TABLES = ("customer", "item", "orders", "order_line", "basket_line")


class TestKilled:
    @pytest.mark.parametrize(
        "step", ["archive-compressed", "archive-put", "archive-noted", "archive-checked", "archive-removed"]
    )
    def test_a_kill_at_any_step_loses_nothing_and_the_next_archive_goes_on(self, tmp_path: Path, step: str) -> None:
        archiving = Archiving(tmp_path / "home", seed=3)
        for nth in (1, 2, 3):
            for _ in range(3):
                archiving.grow()
            killed = start(archiving.home, "archive", "--no-prefect", kill=f"{step}:{nth}", **crash_settings)
            assert ended(killed) == -signal.SIGKILL
            archiving.check()
        archived, here = archiving.finish()
        assert archived > 3
        assert here == 1

    def test_kills_at_random_moments(self, tmp_path: Path) -> None:
        """Five here; benchmarks/crash_archive.py has as many as wanted."""
        archiving = Archiving(tmp_path / "home", seed=random.randrange(1 << 30))
        for _ in range(5):
            archiving.grow()
            archiving.hit()
        assert archiving.finish()[1] == 1


def test_appends_processors_readers_and_two_archives_side_by_side(make_store: MakeStore) -> None:
    """Lines come until each of the others has gone its round four times."""
    store, over, failed, appended = make_store(**SMALL), threading.Event(), [], []
    rounds: Counter[str] = Counter()

    def again(name: str, work: Callable[[], object], pause: float) -> Callable[[], None]:
        def loop() -> None:
            try:
                while not over.wait(pause):
                    work()
                    rounds[name] += 1
            except Exception as error:  # noqa: BLE001  # whatever it is, the test shows it
                failed.append(error)
                over.set()

        return loop

    def append_one() -> None:
        if len(appended) >= 100 and min(rounds[name] for name in others) >= 4:
            over.set()
            return
        line = add(len(appended) / 7, len(appended) % 5)
        append_lines(store, "events", [line])
        appended.append(line)

    def read_all() -> None:
        there = len(appended)
        assert whole(store).count(b"\n") >= there

    others = {
        "processors": lambda: process(store), "reader": read_all,
        "archive": lambda: archive_here(store), "another archive": lambda: archive_here(store),
    }  # fmt: skip
    loops = [again("appends", append_one, 0.01), *(again(name, work, 0.01) for name, work in others.items())]
    threads = [threading.Thread(target=loop) for loop in loops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failed == []
    assert over.is_set()
    assert whole(store) == b"".join(line + b"\n" for line in appended)
    assert process(store)[1] == {}
    archive(store)
    assert verify_all(store, store.settings)[1] == []
    assert len(local(store)) == 1


def archive_here(store: Store) -> None:
    archive_all(store, build_topology(store.settings), "a test")
