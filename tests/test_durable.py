"""What is relied upon is durable first, whoever wrote it: he may have died before his own fsync."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest

import storage.append
from storage.backup import make_backup
from storage.clock import Clock
from storage.commit import Pending, Target, commit, load_position
from storage.derived import DerivedWriter
from storage.door import _partition, append_lines
from storage.errors import AfterlogError, AppendError, ConflictError
from storage.locks import RunLock
from storage.mails import SENT, Mail, Result, outcome_line
from storage.manifest import archived_end, note_archived, read_manifest, seal
from storage.outbox import Outbox
from storage.segment import check_contiguous, create_segment, list_segments, make_directory
from storage.store import Store
from tests.conftest import log_bytes
from tests.simulator.disk import Fault, Process
from tests.simulator.world import world
from tests.test_commit import T0, leave_tail, process, processed, tax


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of what was made durable, in order."""
    found: list[str] = []

    def spy(call: Callable[[int], None]) -> Callable[[int], None]:
        def wrapped(handle: int) -> None:
            call(handle)
            found.append(os.readlink(f"/proc/self/fd/{handle}"))  # noqa: PTH115  # a link of the kernel's

        return wrapped

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, spy(getattr(os, name)))
    return found


def full_disk(*_arguments: object) -> Any:
    raise OSError(28, "No space left on device")


class TestClock:
    def test_a_tick_is_made_durable_by_whoever_reads_it(self, store: Store, synced: list[str]) -> None:
        append_lines(store, "events", [tax(1)])
        Clock(store, ("events",)).tick(T0)
        synced.clear()
        other = Clock(store, ("events",))
        end = other.snapshot("events", 0, 0).clock_end
        assert [tick.as_of for tick in other.ticks(0, end)[0]] == [T0]
        segment = next(store.directory("clock", 0).glob("*.jsonl"))
        assert synced == [str(segment), str(segment.parent)]
        other.snapshot("events", 0, 0)
        assert len(synced) == 2  # nothing new
        other.close()


class TestSource:
    def test_a_segment_of_one_who_died_has_a_durable_name_before_it_is_relied_upon(
        self, store: Store, synced: list[str]
    ) -> None:
        append_lines(store, "events", [tax(1)])
        directory = store.directory("events", 0)
        end = next(directory.glob("*.jsonl")).stat().st_size
        segment = directory / f"{end:020d}.jsonl"
        segment.touch()  # and there he died; somebody with a shell goes on in it
        segment.write_bytes(tax(2) + b"\n")
        synced.clear()
        reader = store.reader("events", 0)
        reader.sync(reader.end())
        reader.sync(reader.end())
        reader.close()
        assert synced == [str(segment), str(directory), str(segment)]


class TestProducer:
    def test_an_append_is_durable_also_where_a_shorter_copy_has_taken_the_place_of_the_file(
        self, store: Store, synced: list[str]
    ) -> None:
        for number in range(20):
            append_lines(store, "events", [tax(number)])
        segment = next(store.directory("events", 0).glob("*.jsonl"))
        copy = segment.with_suffix(".copy")
        copy.write_bytes(segment.read_bytes()[: 3 * (len(tax(0)) + 1)])
        copy.rename(segment)
        synced.clear()
        append_lines(store, "events", [tax(99)])
        assert tax(99) in segment.read_bytes()
        assert str(segment) in synced

    def test_who_waits_for_an_fsync_gets_one_of_the_file_that_he_wrote_to(
        self, store: Store, synced: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another thread has gone on in a file that somebody with a shell has made."""
        append_lines(store, "events", [tax(1)])
        first = next(store.directory("events", 0).glob("*.jsonl"))

        def go_on(step: str) -> None:
            if step == "append-written" and len(list(first.parent.glob("*.jsonl"))) == 1:
                first.with_name(f"{first.stat().st_size:020d}.jsonl").touch()
                append_lines(store, "events", [tax(3)])
                synced.clear()

        monkeypatch.setattr(storage.append, "reached", go_on)
        append_lines(store, "events", [tax(2)])
        assert log_bytes(store.home, "events").splitlines() == [tax(1), tax(2), tax(3)]
        assert synced == [str(first)]


class TestFailedProducer:
    """Whatever fails, the error says what is in: all the rest may be appended again, and nothing else."""

    LINES: ClassVar = [b'{"subject": {"id": %d}, "verb": "X", "context": {"at": 1}}' % number for number in range(10)]

    def _rest(self, store: Store, monkeypatch: pytest.MonkeyPatch, *, fails: str) -> list[int]:
        """What is missing where the second partition's `write`, or the first one's `fsync`, fails."""
        first, second = dict.fromkeys(_partition(line, 2) for line in self.LINES)
        real, failing = getattr(os, fails), f"/{second if fails == 'write' else first}/"

        def call(handle: int, *data: bytes) -> Any:
            path = os.readlink(f"/proc/self/fd/{handle}")  # noqa: PTH115  # a link of the kernel's
            return full_disk() if failing in path and path.endswith(".jsonl") else real(handle, *data)

        with monkeypatch.context() as patched:
            patched.setattr(os, fails, call)
            with pytest.raises(AppendError) as raised:
                append_lines(store, "events", self.LINES)
        missing = raised.value.missing
        there = [index for index in range(10) if index not in missing]
        assert there == [index for index in range(10) if _partition(self.LINES[index], 2) == first]
        for index, offset in zip(there, raised.value.offsets, strict=True):
            assert store.reader("events", first).line(offset) == self.LINES[index]
        assert raised.value.durable == (fails == "write")
        assert f"{len(there)} lines are in; append the rest again, nothing else" in str(raised.value)
        return missing

    @pytest.mark.parametrize("fails", ["write", "fsync"])
    def test_with_several_partitions(
        self, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, fails: str
    ) -> None:
        store = make_store(partitions=2)
        append_lines(store, "events", [self.LINES[i] for i in self._rest(store, monkeypatch, fails=fails)])
        files = [path.read_bytes() for path in (store.home / "logs" / "events").glob("*/*.jsonl")]
        assert sorted(b"".join(files).splitlines()) == self.LINES

    def test_where_all_are_in_none_is_missing(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        append_lines(store, "events", [tax(1)])
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full_disk)
            with pytest.raises(AfterlogError, match="All 2 lines are in") as raised:
                append_lines(store, "events", [tax(2), tax(3)])
        assert not isinstance(raised.value, AppendError)
        assert log_bytes(store.home, "events").splitlines() == [tax(1), tax(2), tax(3)]

    def test_where_a_partition_cannot_be_made(self, make_store: Callable[..., Store]) -> None:
        store = make_store(partitions=2)
        first, second = dict.fromkeys(_partition(line, 2) for line in self.LINES)
        store.directory("events", 0).parent.mkdir()
        store.directory("events", second).touch()
        with pytest.raises(AppendError, match="cannot write: ") as raised:
            append_lines(store, "events", self.LINES)
        assert raised.value.missing == [i for i in range(10) if _partition(self.LINES[i], 2) != first]


class TestBackup:
    def test_what_a_backup_holds_is_durable_where_it_came_from(
        self, store: Store, tmp_path: Path, synced: list[str]
    ) -> None:
        """Else a power loss takes it from HOME, other lines take its place, and the backup cannot be put back any more."""
        processed(store, tax(1))
        segment = next(store.directory("events", 0).glob("*.jsonl"))
        with segment.open("ab") as file:  # somebody with a shell
            file.write(tax(2) + b"\n")
        synced.clear()
        assert make_backup(store, {"reactions"}, tmp_path / "backup")["events/0"] == segment.stat().st_size
        copy = tmp_path / "backup" / "logs" / "events" / "0" / segment.name
        assert synced.index(str(segment)) < synced.index(str(copy))

    def test_a_chain_that_a_backup_holds_is_durable_where_it_came_from(
        self, make_store: Callable[..., Store], tmp_path: Path, synced: list[str]
    ) -> None:
        store = make_store(segment_bytes=100)
        for number in range(3):
            processed(store, tax(number))
        chain = store.directory("events", 0) / "manifest"
        assert chain.stat().st_size
        synced.clear()
        make_backup(store, {"reactions"}, tmp_path / "backup")
        copy = tmp_path / "backup" / "logs" / "events" / "0" / "manifest"
        assert synced.index(str(chain)) < synced.index(str(copy))


class TestChain:
    def _unsealed(self, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> Store:
        """A store whose segments have rolled, as if each appending process had died before it sealed one."""
        store = make_store(segment_bytes=200)
        with monkeypatch.context() as patched:
            patched.setattr(storage.append, "seal_if_possible", lambda _: None)
            for number in range(8):
                append_lines(store, "events", [tax(number)])
        return store

    def test_a_short_write_of_an_entry_is_gone_on_with(
        self, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = self._unsealed(make_store, monkeypatch)
        real = os.pwrite
        directory = store.directory("events", 0)
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", lambda handle, data, at: real(handle, data[:9], at))
            sealed = seal(directory)
            note_archived(directory, 12345)
        assert sealed == len(read_manifest(directory)) > 1
        assert archived_end(directory) == 12345

    def test_an_entry_that_the_disk_has_no_space_for_is_written_once_there_is(
        self, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = self._unsealed(make_store, monkeypatch)
        real, directory = os.pwrite, store.directory("events", 0)

        def nearly_full(handle: int, data: bytes, at: int) -> int:
            return real(handle, data[:150], at) if data.startswith(b"{") else full_disk()

        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", nearly_full)
            with pytest.raises(OSError, match="No space left"):
                seal(directory)
        assert read_manifest(directory) == []
        assert seal(directory) == len(read_manifest(directory)) > 1


class TestRunLock:
    @pytest.mark.parametrize("call", ["ftruncate", "pwrite"])
    def test_a_lock_that_cannot_be_signed_is_held_and_given_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        mine, other = RunLock(tmp_path / "lock", "one"), RunLock(tmp_path / "lock", "another")
        with monkeypatch.context() as patched:
            patched.setattr(os, call, full_disk)
            assert mine.try_acquire()
            assert not other.try_acquire()
        mine.release()
        assert other.try_acquire()
        other.release()

    def test_an_interrupted_signature_leaves_no_lock_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_arguments: object) -> Any:
            raise KeyboardInterrupt

        lock = RunLock(tmp_path / "lock", "one")
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", interrupt)
            with pytest.raises(KeyboardInterrupt):
                lock.try_acquire()
        assert lock.try_acquire()
        lock.release()


class TestDoubledRun:
    def test_a_run_that_is_behind_writes_nothing(self, store: Store) -> None:
        append_lines(store, "events", [tax(1), tax(2)])
        writer = DerivedWriter(store.directory("reactions", 0), "reactions/0", limit=1 << 20, daily=False)
        reader = store.reader("events", 0)
        ahead, behind = (load_position(store.database, "derive", 1, "events", 0) for _ in range(2))
        ahead.offset = behind.offset = reader.end()
        target = Target("reactions", writer, 0)
        commit(store.database, reader, target, ahead, Pending([b"one\n"]))
        with pytest.raises(ConflictError, match="another run has committed"):
            commit(store.database, reader, Target("reactions", writer, 0), behind, Pending([b"one\n", b"two\n"]))
        behind.changed_at = behind.commit  # its settings are other ones: it would cut what is there
        with pytest.raises(ConflictError):
            commit(store.database, reader, Target("reactions", writer, 0), behind, Pending([b"1\n"]))
        assert log_bytes(store.home, "reactions") == b"one\n"
        reader.close()


class TestTailOfAPowerLoss:
    @pytest.mark.parametrize("kept", [0, 30])
    def test_what_never_reached_the_disk_is_cut_and_written_again(
        self, make_store: Callable[..., Store], kept: int
    ) -> None:
        whole, store = make_store("whole"), make_store("lost")
        processed(whole, tax(1), tax(2))
        processed(store, tax(1))
        before = len(log_bytes(store.home, "reactions"))
        append_lines(store, "events", [tax(2)])
        given = log_bytes(whole.home, "reactions")[before:]
        leave_tail(store, "reactions", given[:kept] + bytes(100) + given[kept + 100 :])
        run, failures = process(store)
        assert failures == {}
        assert log_bytes(store.home, "reactions") == log_bytes(whole.home, "reactions")
        cut = f"{len(given) - kept} bytes that a crash had left unconfirmed were cut"
        assert run.notes == [f"derive: {cut}, since a power loss had left NULs in them"]

    def test_where_the_power_is_lost_while_several_files_of_it_are_cut_no_gap_is_left(self) -> None:
        left = {_cut_without_power(seed) for seed in range(14 * 12)}
        assert {b"".join(b"%03d\n" % i for i in range(5)), b"000\n", b"000\nnew\n"} <= left

    def test_an_outcome_that_never_reached_the_disk_is_none(self, store: Store) -> None:
        mail = Mail("derive/events:0:0/x", "CLAIMED", "reactions", 1, 0, 0, "CLIENT", "1", 0, 0, 1, "", 0, False)
        line = outcome_line(Result(mail, SENT))
        make_directory(store.directory("deliveries", 0))
        create_segment(store.directory("deliveries", 0), 0)
        leave_tail(store, "deliveries", line + bytes(len(line) - 1) + b"\n")
        Outbox(store, "deliveries").recover()
        assert log_bytes(store.home, "deliveries") == line
        assert store.committed_end("deliveries", 0) == len(line)

    def test_an_outcome_is_durable_before_it_is_adopted(self, store: Store, synced: list[str]) -> None:
        mail = Mail("derive/events:0:0/x", "CLAIMED", "reactions", 1, 0, 0, "CLIENT", "1", 0, 0, 1, "", 0, False)
        make_directory(store.directory("deliveries", 0))
        segment = create_segment(store.directory("deliveries", 0), 0)
        leave_tail(store, "deliveries", outcome_line(Result(mail, SENT)))
        synced.clear()
        Outbox(store, "deliveries").recover()
        assert synced == [str(segment.path), str(segment.path.parent)]


def _cut_without_power(seed: int) -> bytes:
    """What is left of a tail of five files that was to be cut to one, by one who is killed, and by another when the power is lost."""
    with world(Random(seed), segment_bytes=1, segment_daily=False) as made:
        place = made.home / "logs" / "baskets" / "0"

        def extend(at: int, data: bytes, *, may_differ: bool = False) -> None:
            DerivedWriter(place, "baskets/0", limit=1, daily=False).extend(at, data, may_differ=may_differ)

        for i in range(5):
            made.act(Process("one"), partial(extend, 4 * i, b"%03d\n" % i))
        for fault in (Fault("kill", 1 + seed // 12), Fault("power", 1 + seed % 12)):
            made.disk.fault = fault
            made.act(Process("two"), lambda: extend(4, b"new\n", may_differ=True))
        made.lose_power()
        check_contiguous(list_segments(place))
        return made.disk.log("baskets", 0, durable=True)


class TestNames:
    def test_a_folder_of_one_who_died_is_durable_before_anything_is_made_in_it(
        self, tmp_path: Path, synced: list[str]
    ) -> None:
        died = tmp_path / "logs"
        died.mkdir()
        make_directory(died / "events" / "0")
        assert synced == [str(tmp_path), str(died), str(died / "events")]
        synced.clear()
        create_segment(died / "events" / "0", 0)
        assert synced == [str(died / "events"), str(died / "events" / "0")]
