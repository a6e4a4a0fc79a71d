"""The chain: whatever is changed, missing, swapped or cut is found, and its place named."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

import storage.manifest
import storage.verify
from storage.door import append_events, append_lines
from storage.manifest import MANIFEST, genesis, read_manifest
from storage.remote import Remote
from storage.segment import Segment, list_segments
from storage.span import span_of
from storage.store import Store
from tasks.verify import verify_all
from tests import test_replay as replays
from tests.conftest import afterlog
from tests.test_archive import archive, local
from tests.test_commit import add, process, processed, tax

MakeStore = Callable[..., Store]


def problems(store: Store, *heads: str) -> list[str]:
    return verify_all(store, store.settings, heads)[1]


def head(store: Store, log: str = "events/0") -> str:
    return next(found.head for found in verify_all(store, store.settings)[0] if found.name == log)


@pytest.fixture
def store(make_store: MakeStore) -> Store:
    """A HOME whose log has a dozen sealed segments, those of the first half archived and gone from here."""
    store = make_store(segment_bytes=300, live_window="1ms")
    for n in range(24):
        append_lines(store, "events", [tax(n)])
    process(store)
    archive(store)
    for n in range(24):
        append_lines(store, "events", [tax(n + 24)])
    process(store)
    assert problems(store) == []
    return store


class TestEntries:
    def test_an_entry_says_what_its_segment_holds_and_names_the_one_before(self, make_store: MakeStore) -> None:
        store = make_store(segment_bytes=300)
        for n in (5, 3, 9, 2, 1, 4):
            append_lines(store, "events", [add(n), b"no event"])
        directory, previous, clock = store.directory("events", 0), hashlib.sha256(b"events/0").hexdigest(), 0
        lines = (directory / MANIFEST).read_bytes().splitlines()
        assert len(lines) == len(local(store)) - 1 == 2
        for line, name in zip(lines, local(store), strict=False):
            data = (directory / name).read_bytes()
            clocks = [json.loads(each)["context"]["at"] for each in data.splitlines() if each != b"no event"]
            assert json.loads(line) == {
                "base": int(name.removesuffix(".jsonl")), "length": len(data), "events": data.count(b"\n"),
                "first": max(clock, clocks[0]), "last": max(clock, *clocks),
                "sha256": hashlib.sha256(data).hexdigest(), "previous": previous,
            }  # fmt: skip
            previous, clock = hashlib.sha256(line).hexdigest(), max(clock, *clocks)
        assert head(store) == previous

    def test_who_appends_seals_at_once_and_what_a_crash_left_out_is_sealed_by_the_next(
        self, make_store: MakeStore
    ) -> None:
        store = make_store(segment_bytes=1)
        for n in range(6):
            append_events(store, "events", [{"subject": {"id": n}, "verb": "X", "object": {}, "context": {"at": 1}}])
        path = store.directory("events", 0) / MANIFEST
        whole = path.read_bytes()
        assert whole.count(b"\n") == 5
        for cut in [0, 1, *range(3, len(whole), 37), len(whole) - 1]:
            path.write_bytes(whole[:cut])
            assert problems(store) == [], cut
            assert path.read_bytes() == whole
        for left in (b"x", bytes(300), bytes(100) + whole[-50:]):  # the last two are what a power loss may leave
            path.write_bytes(whole[: whole[:-1].rindex(b"\n") + 1] + left)
            assert read_manifest(store.directory("events", 0))[-1].hash in whole.decode()
            assert problems(store) == []
            assert path.read_bytes() == whole

    @pytest.mark.parametrize("seed", range(4))
    def test_the_clocks_are_the_judge_s_whatever_the_lines_are(self, tmp_path: Path, seed: int) -> None:
        rng, clock = random.Random(seed), 0
        stamps = [1_700_000_000_000, 1_700_000_000, 1_700_000_001.5, "2023-11-14T22:13:25Z", "soon", None, True, -5]
        lines = []
        for _ in range(300):
            at = rng.choice(stamps)
            at = at + rng.randrange(10_000) if type(at) is int and at > 0 else at
            event = {"subject": {"id": 1}, "verb": "X", "object": {}, "context": {"at": at}}
            if rng.random() < 0.5:
                event["event"] = {"inserted_at": rng.choice([*stamps, 1_700_000_000_000 + rng.randrange(50_000)])}
            if rng.random() < 0.1:
                del event["subject"]
            lines.append(rng.choice([json.dumps(event).encode()] * 30 + [b"", b"{", b"\xff", b"[" * 2000]))
        for group in (lines, [line for line in lines if line[:1] == b"{" and len(line) > 1]):
            path = tmp_path / "segment"
            path.write_bytes(b"".join(line + b"\n" for line in group))
            clocks = [own for own in map(judged, group) if own is not None]
            assert span_of(path, clock)[1:4] == (len(group), clocks[0], max(clocks))
            later = max(clocks) + 1
            assert span_of(path, later)[2:4] == (later, later)

    def test_the_clocks_are_those_of_lines_where_json_counts_as_many_values(self, tmp_path: Path) -> None:
        """One value over two lines, and two values in one: none of the three is an event, and all together are three values."""
        line = b'{"subject": {"id": 1}, "verb": "X", "object": {}, "event": {"inserted_at": %d}}'
        early, late, latest = (line % (1_700_000_000_000 + step) for step in (1, 2, 3))
        before, after = latest[:20], latest[20:]
        path = tmp_path / "segment"
        for lines in itertools.permutations([before, after, latest + b" " + latest, early, late]):
            path.write_bytes(b"\n".join([*lines, b""]))
            clocks = [own for own in map(judged, lines) if own is not None]
            assert span_of(path, 0)[1:4] == (5, clocks[0], max(clocks)), lines

    def test_a_line_that_is_longer_than_what_is_read_at_once_has_its_clock(self, tmp_path: Path) -> None:
        line = b'{"subject": {"id": 1}, "verb": "X", "x": "%s", "event": {"inserted_at": %d}}\n'
        path, at = tmp_path / "segment", 1_700_000_000_000
        lines = [
            line % (b"y" * 900_000, at + 5),
            line % (b"", at),
            line % (b"y" * 900_000, at + 9),
            line % (b"", at + 1),
        ]
        path.write_bytes(b"".join(lines))
        assert span_of(path, 0)[1:4] == (4, at + 5, at + 9)


def judged(line: bytes) -> int | None:
    from storage.event import Rejected
    from storage.judge import judge

    try:
        return judge(line, 0, 0).clock
    except Rejected:
        return None


class TestPlaces:
    def test_any_changed_byte_of_a_sealed_file_names_the_file(self, store: Store) -> None:
        rng = random.Random(2)
        for name in local(store)[:-1]:
            path = store.directory("events", 0) / name
            whole = path.read_bytes()
            for place in (0, len(whole) - 1, rng.randrange(len(whole))):
                path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
                [problem] = problems(store)
                base = int(path.stem)
                assert problem.startswith(
                    f"events/0, offsets {base} to {base + len(whole)}: {path} was changed: SHA-256"
                )
            path.write_bytes(whole)
        assert problems(store) == []

    @pytest.mark.parametrize("how", ["cut", "grown", "missing", "swapped", "not in the chain"])
    def test_a_sealed_file_that_is_not_what_it_was(self, store: Store, how: str) -> None:
        one, two = (store.directory("events", 0) / name for name in local(store)[1:3])
        place = f"events/0, offsets {int(one.stem)} to {int(two.stem)}: "
        if how == "cut":
            one.write_bytes(one.read_bytes()[:-1])
            expected = {f"{place}{one} was cut: {int(two.stem) - int(one.stem) - 1} bytes, expected"}
        elif how == "grown":
            with one.open("ab") as file:
                file.write(b"x")
            expected = {f"{place}{one} has grown"}
        elif how == "missing":
            one.unlink()
            expected = {
                f"{place}the segment is missing, and not noted as archived (`afterlog archive` notes what the archive has)"
            }
        elif how == "swapped":
            a, b = one.read_bytes(), two.read_bytes()
            one.write_bytes(b)
            two.write_bytes(a)
            expected = {
                f"{one} holds the bytes of the segment at {int(two.stem)}: they were swapped",
                f"{two} holds the",
            }
        else:
            other = one.with_name(f"{int(one.stem) + 1:020d}.jsonl")
            other.write_bytes(b"x\n")
            expected = {f"events/0:{int(other.stem)}: {other} is no part of the chain"}
        found = problems(store)
        assert all(any(sentence in problem for problem in found) for sentence in expected), found

    @pytest.mark.parametrize("how", ["changed", "cut", "grown", "missing", "swapped", "another"])
    def test_an_object_of_the_archive_that_is_not_what_it_was(self, store: Store, how: str) -> None:
        one, two = sorted((store.home / "archive" / "events" / "0").glob("*.zst"))[:2]
        whole, other = one.read_bytes(), two.read_bytes()
        spoilt = {
            "changed": whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], "cut": whole[:-1], "grown": whole + b"x", "swapped": other,
            "another": zstandard.ZstdCompressor().compress(b"something else\n"),
        }  # fmt: skip
        if how == "missing":
            one.unlink()
        else:
            one.write_bytes(spoilt[how])
        [problem] = problems(store)
        expected = {
            "missing": "it is missing in the archive, ",
            "changed": "zstd",
            "cut": "cut off",
            "grown": "goes on after its end",
        }
        assert problem.startswith("events/0, offsets 0 to ")
        assert any(word in problem for word in expected.get(how, "another segment").split("|"))

    def test_a_line_of_the_manifest_that_is_not_what_it_was(self, store: Store) -> None:
        path = store.directory("events", 0) / MANIFEST
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        for number in range(len(lines) - 1):
            for place in (5, 60, 150, len(lines[number]) - 4):
                changed = bytearray(lines[number])
                changed[place] = ord("1") if changed[place] != ord("1") else ord("2")
                path.write_bytes(b"".join([*lines[:number], bytes(changed), *lines[number + 1 :]]))
                assert any(f"{path}, line " in problem for problem in problems(store)), (number, place)
        for spoilt in (lines[1:], [*lines[:3], *lines[4:]], [lines[0], lines[2], lines[1], *lines[3:]]):
            path.write_bytes(b"".join(spoilt))
            assert any(f"{path}, line " in problem for problem in problems(store))
        path.write_bytes(whole)
        assert problems(store) == []

    @pytest.mark.parametrize("archived", [False, True])
    def test_every_byte_of_the_last_line_of_a_manifest_is_held_against_its_segment(
        self, store: Store, archived: bool
    ) -> None:
        """No other line names its hash."""
        if archived:
            archive(store)
        path = store.directory("events", 0) / MANIFEST
        whole = path.read_bytes()
        begin = whole[:-1].rindex(b"\n") + 1
        assert (json.loads(whole[begin:])["base"] < int(local(store)[0].removesuffix(".jsonl"))) is archived
        for place in range(begin, len(whole) - 1, 3 if archived else 1):
            for byte in b"17" if whole[place : place + 1].isdigit() else b"x":
                if whole[place] != byte:
                    path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
                    assert problems(store), (place, byte)
        path.write_bytes(whole[:begin] + whole[begin:].replace(b'"last":1', b'"last":2'))
        [problem] = problems(store)
        assert problem.startswith(f"{path}, line {whole.count(bytes([10]))}: it was changed: it gives (")
        path.write_bytes(whole)
        assert problems(store) == []

    def test_the_growing_end_is_held_against_what_was_read_from_it(self, store: Store) -> None:
        path = store.directory("events", 0) / local(store)[-1]
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        [problem] = problems(store)
        end = int(path.stem) + len(whole) // 2
        assert problem == f"events/0:{end}: the log was cut: it ends there, and up to {end - len(whole) // 2 + len(whole)} was read from it"  # fmt: skip

    def test_derived_logs_are_sealed_up_to_what_is_certain(self, make_store: MakeStore) -> None:
        store = make_store(segment_bytes=600)
        for n in range(9):
            processed(store, tax(n))
        assert read_manifest(store.directory("reactions", 0)) == []
        assert problems(store) == []
        sealed = read_manifest(store.directory("reactions", 0))
        assert len(sealed) == len(local(store, "reactions")) - 1
        path = store.directory("reactions", 0) / local(store, "reactions")[2]
        path.write_bytes(path.read_bytes().replace(b"tax", b"TAX"))
        [problem] = problems(store)
        assert str(path) in problem

    def test_what_is_not_committed_yet_is_not_sealed(self, make_store: MakeStore) -> None:
        store = make_store(segment_bytes=600)
        for n in range(9):
            processed(store, tax(n))
        with store.database.write() as connection:
            connection.exec_driver_sql("UPDATE committed_end SET \"end\" = 700 WHERE log = 'reactions'")
        verify_all(store, store.settings)
        assert all(entry.end <= 700 for entry in read_manifest(store.directory("reactions", 0)))

    @pytest.mark.parametrize("log", ["events", "clock", "baskets"])
    def test_a_log_that_is_gone_whole_is_told(self, make_store: MakeStore, log: str) -> None:
        store = make_store()
        replays.write(store, replays.line(1, 0), as_of=60)
        assert problems(store) == []
        shutil.rmtree(store.home / "logs" / log)
        [problem] = problems(store)
        assert re.fullmatch(rf"{log}/0: the log is gone, and up to [1-9]\d* it was there", problem)

    def test_a_database_that_is_gone_is_told_since_then_nothing_says_how_far_a_log_reached(self, store: Store) -> None:
        store.database.engine.dispose()
        for path in store.home.glob("afterlog.db*"):
            path.unlink()
        [problem] = problems(store)
        assert problem.startswith("the database is gone")


class TestAtWork:
    """What is found while the disk fails, or others are at work."""

    def test_a_file_that_cannot_be_read_is_named_and_hides_nothing_else(self, store: Store) -> None:
        one, two = (store.directory("events", 0) / name for name in local(store)[1:3])
        one.unlink()
        one.mkdir()
        two.write_bytes(b"x" + two.read_bytes()[1:])
        unreadable, changed = problems(store)
        assert (
            unreadable == f"events/0, offsets {int(one.stem)} to {int(two.stem)}: {one} cannot be read: Is a directory"
        )
        assert f"{two} was changed" in changed

    def test_where_nothing_can_be_sealed_the_rest_is_verified(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = store.directory("events", 0) / local(store)[1]
        one.write_bytes(b"x" + one.read_bytes()[1:])

        def refuse(path: Path) -> Any:
            raise OSError(30, "Read-only file system", str(path))

        monkeypatch.setattr(storage.manifest, "locked", refuse)
        found = problems(store)
        place = store.directory("events", 0) / MANIFEST
        assert f"{place}: it cannot be sealed: Read-only file system" in found
        assert any(f"{one} was changed" in problem for problem in found)

    def test_each_object_is_fetched_once(self, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
        store, real, fetched = make_store(segment_bytes=300, live_window="1ms"), Remote.open, list[str]()
        for n in range(24):
            append_lines(store, "events", [tax(n)])
        process(store)
        archive(store)
        assert read_manifest(store.directory("events", 0))[-1].base < int(local(store)[0].split(".")[0])

        def spy(self: Remote, name: str) -> Any:
            fetched.append(name)
            return real(self, name)

        monkeypatch.setattr(Remote, "open", spy)
        assert problems(store) == []
        assert sorted(fetched) == sorted(set(fetched))
        assert "events/0/00000000000000000000.jsonl.zst" in fetched
        monkeypatch.undo()
        manifest = store.directory("events", 0) / MANIFEST
        text = manifest.read_text()
        manifest.write_text(
            text.replace('"first":1', '"first":2').replace('"first":2', '"first":1', text.count("first") - 1)
        )
        assert any("it was changed: it gives" in problem for problem in problems(store))

    @pytest.mark.parametrize("when", ["while it seals", "while it reads the chain"])
    def test_an_archive_that_goes_on_meanwhile_is_no_fault(
        self, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, when: str
    ) -> None:
        seals = when == "while it seals"
        store = make_store(segment_bytes=300, live_window="1ms" if seals else "1d")
        for n in range(24):
            append_lines(store, "events", [tax(n)])
        process(store)
        archive(make_store(segment_bytes=300, live_window="1d"))
        module, todo = storage.manifest if seals else storage.verify, [store.directory("events", 0)]

        def listed(directory: Path) -> list[Segment]:
            found = list_segments(directory)
            if todo == [directory]:
                todo.clear()
                append_lines(store, "events", [tax(24)] * 3)
                append_lines(store, "events", [tax(25)])
                archive(store)
            return found

        monkeypatch.setattr(module, "list_segments", listed)
        assert problems(store) == []
        assert todo == []


class TestHead:
    def test_a_history_that_was_written_anew_contradicts_a_head_that_was_noted(self, store: Store) -> None:
        noted = [head(store)]
        for n in range(6):
            append_lines(store, "events", [tax(n)])
        noted.append(head(store))
        assert problems(store, *noted) == []
        path = store.directory("events", 0) / local(store)[0]
        path.write_bytes(path.read_bytes().replace(b"UK", b"US"))
        manifest = store.directory("events", 0) / MANIFEST
        kept = [
            line
            for line in manifest.read_bytes().splitlines(keepends=True)
            if json.loads(line)["base"] < int(path.stem)
        ]
        manifest.write_bytes(b"".join(kept))
        assert problems(store) == []  # nothing contradicts anything any more
        found = problems(store, *noted)
        assert [problem[: len("head ") + 64] for problem in found] == [f"head {each}" for each in noted]
        assert "the history before it was rewritten or cut off" in found[0]

    def test_partitions_cannot_be_swapped(self, make_store: MakeStore) -> None:
        store = make_store(segment_bytes=1, partitions=2)
        for n in range(20):
            append_events(store, "events", [{"subject": {"id": n}, "verb": "X", "object": {}, "context": {"at": 1}}])
        one, two = store.directory("events", 0), store.directory("events", 1)
        assert problems(store) == []
        one.rename(one.with_name("x"))
        two.rename(one)
        one.with_name("x").rename(two)
        assert [str(path / MANIFEST) in problem for path, problem in zip((one, two), problems(store), strict=True)]
        assert genesis(one) != genesis(two)


class TestCommand:
    def test_it_prints_heads_and_ends_with_1_where_something_is_wrong(self, store: Store) -> None:
        done = afterlog(store.home, "verify", segment_bytes="300")
        assert (done.returncode, done.stderr) == (0, b"")
        rows = [line.split("\t") for line in done.stdout.decode().splitlines()]
        assert rows[0] == ["log", "segments", "archived", "events", "bytes", "head"]
        noted = {row[0]: row[-1] for row in rows[1:]}
        assert noted["events/0"] == head(store)
        assert afterlog(store.home, "verify", "--head", noted["events/0"]).returncode == 0
        path = store.directory("events", 0) / local(store)[0]
        path.write_bytes(path.read_bytes().replace(b"UK", b"US"))
        done = afterlog(store.home, "verify", "--head", "0" * 64)
        assert done.returncode == 1
        assert f"{path} was changed" in done.stderr.decode()
        assert f"head {'0' * 64}: no chain has an entry of this hash" in done.stderr.decode()
        assert "afterlog: 2 things are wrong" in done.stderr.decode()
