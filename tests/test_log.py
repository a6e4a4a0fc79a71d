"""The log: what is appended is there, once, in order, whoever appends, and whatever breaks half way."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.cli_logs import append  # a command is a plain function
from storage.append import PartitionWriter
from storage.door import append_events, append_lines
from storage.errors import AfterlogError, AppendError, CorruptLogError, LostDataError, UsageError
from storage.partition import murmur2, partition_of
from storage.reader import PartitionReader
from storage.segment import list_segments, segment_path
from storage.store import Store
from storage.times import DAY, now
from tasks.local import side_by_side
from tasks.process import FinalTick, process_to_end
from tasks.run import Run
from tasks.topology import build_topology
from tests.conftest import ROOT, afterlog, log_bytes
from tests.operations import PATIENCE

MakeStore = Callable[..., Store]
LINES = [b'{"n": %d, "x": "%s"}' % (number, b"y" * (number * 7 % 50)) for number in range(200)]


def writer(directory: Path, limit: int = 64 << 20, *, daily: bool = True) -> PartitionWriter:
    return PartitionWriter(directory, "events/0", limit=limit, daily=daily)


def read_all(directory: Path, size: int = 1 << 20, start: int = 0) -> list[bytes]:
    reader = PartitionReader(directory, "events/0")
    lines: list[bytes] = []
    while block := reader.read(start, reader.end(), size, 1 << 20):
        lines += block.lines
        start = block.end
    reader.close()
    return lines


def segments(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.jsonl"))}


def event(ident: int | str = 1, **more: Any) -> dict[str, Any]:
    return {"subject": {"id": ident}, "verb": "X", "object": {}, **more}


def raw(ident: int | str = 1, **stamp: Any) -> bytes:
    return json.dumps(event(ident, context={"at": 1598616201410}, event=stamp)).encode()


class TestAppendAndRead:
    def test_an_offset_is_the_byte_position_and_cat_shows_the_whole_log(self, tmp_path: Path) -> None:
        assert writer(tmp_path / "p").append([b"one", b"two\r", b"", "drei é".encode()]) == [0, 4, 9, 10]
        assert writer(tmp_path / "p").append([b"five"]) == [18]
        assert segments(tmp_path / "p") == {"00000000000000000000.jsonl": "one\ntwo\r\n\ndrei é\nfive\n".encode()}

    def test_from_every_offset_that_append_gave_the_rest_is_read(self, tmp_path: Path) -> None:
        offsets = writer(tmp_path).append(LINES)
        assert all(read_all(tmp_path, start=offset) == LINES[index:] for index, offset in enumerate(offsets))

    def test_a_line_is_found_by_its_offset_also_an_empty_or_a_long_one(self, tmp_path: Path) -> None:
        lines = [b"", b"first", b"", b"x" * 100_000, b"", b"y" * 2000, b"z", b"one after it", b"and the last one"]
        offsets = writer(tmp_path / "p", limit=6).append(lines[:3])
        offsets += writer(tmp_path / "p", limit=6).append(lines[3:])
        assert len(segments(tmp_path / "p")) == 2
        for found in (reversed(range(9)), range(9)):
            for index in found:
                with PartitionReader(tmp_path / "p", "events/0") as fresh:
                    assert fresh.line(offsets[index]) == lines[index]
        with PartitionReader(tmp_path / "p", "events/0") as kept:
            assert [kept.line(offset) for offset in (*offsets, *reversed(offsets))] == [*lines, *reversed(lines)]

    def test_an_append_of_nothing_changes_nothing(self, tmp_path: Path) -> None:
        assert writer(tmp_path).append([]) == []
        assert writer(tmp_path).append([b"a"]) == [0]
        assert writer(tmp_path).append([]) == []
        assert log_bytes_of(tmp_path) == b"a\n"

    def test_a_log_that_was_never_written_ends_at_zero(self, tmp_path: Path) -> None:
        reader = PartitionReader(tmp_path / "nowhere", "events/0")
        assert reader.end() == 0
        assert reader.read(0, 0, 100, 100) is None

    def test_an_offset_inside_a_line_is_refused_with_the_start_of_that_line(self, tmp_path: Path) -> None:
        writer(tmp_path).append([b"first", b"second"])
        reader = PartitionReader(tmp_path, "events/0")
        with pytest.raises(CorruptLogError) as raised:
            reader.read(8, reader.end(), 100, 100)
        assert str(raised.value) == (
            "events/0:8: an offset that is not the start of a line. The line there starts at 6"
        )
        assert [reader.line_start(offset) for offset in (0, 1, 5, 6, 7, 12, 13)] == [0, 0, 0, 6, 6, 6, 13]

    def test_an_offset_beyond_the_files_is_lost_data(self, tmp_path: Path) -> None:
        writer(tmp_path).append([b"first"])
        reader = PartitionReader(tmp_path, "events/0")
        with pytest.raises(
            LostDataError, match="shorter than what was read from it; found 6 bytes, expected at least 20"
        ):
            reader.read(12, 20, 100, 100)

    @pytest.mark.parametrize("size", [1, 7, 64, 1000, 1 << 20])
    def test_readers_that_began_elsewhere_meet_at_the_same_block_ends(self, tmp_path: Path, size: int) -> None:
        offsets = writer(tmp_path).append(LINES)
        reader = PartitionReader(tmp_path, "events/0")

        def ends(start: int) -> list[int]:
            found = []
            while block := reader.read(start, reader.end(), size, 1 << 20):
                found.append(start := block.end)
            return found

        whole = ends(0)
        for start in offsets[::17]:
            assert ends(start) == [end for end in whole if end > start]

    def test_raw_lines_with_a_newline_inside_are_refused_and_nothing_is_appended(self, store: Store) -> None:
        with pytest.raises(UsageError, match="line 2 has a newline inside"):
            append_lines(store, "events", [raw(), b"a\nb"])
        assert log_bytes(store.home, "events") == b""


def log_bytes_of(directory: Path) -> bytes:
    return b"".join(segments(directory).values())


class TestTornLines:
    @pytest.mark.parametrize("kept", range(1, 12))
    def test_a_line_without_its_end_is_not_read_and_the_next_append_closes_it(self, tmp_path: Path, kept: int) -> None:
        writer(tmp_path).append([b"whole"])
        with (tmp_path / f"{0:020d}.jsonl").open("ab") as file:
            file.write(b"torn in two"[:kept])
        assert read_all(tmp_path) == [b"whole"]
        assert writer(tmp_path).append([b"next"]) == [7 + kept]
        assert log_bytes_of(tmp_path) == b"whole\n" + b"torn in two"[:kept] + b"\nnext\n"
        assert read_all(tmp_path) == [b"whole", b"torn in two"[:kept], b"next"]

    def test_a_log_that_is_one_torn_line_is_empty_to_a_reader(self, tmp_path: Path) -> None:
        (tmp_path / f"{0:020d}.jsonl").write_bytes(b"x" * 200_000)
        assert PartitionReader(tmp_path, "events/0").end() == 0
        assert writer(tmp_path).append([b"a"]) == [200_001]

    def test_a_torn_line_is_closed_before_its_segment_is_sealed(self, tmp_path: Path) -> None:
        writer(tmp_path).append([b"whole"])
        with (tmp_path / f"{0:020d}.jsonl").open("ab") as file:
            file.write(b"torn")
        assert writer(tmp_path, limit=8).append([b"next"]) == [11]
        assert segments(tmp_path) == {
            "00000000000000000000.jsonl": b"whole\ntorn\n", "00000000000000000011.jsonl": b"next\n",
        }  # fmt: skip

    def test_a_torn_line_that_a_writer_finds_later_is_closed_too(self, tmp_path: Path) -> None:
        mine = writer(tmp_path)
        mine.append([b"whole"])
        with (tmp_path / f"{0:020d}.jsonl").open("ab") as file:
            file.write(b"somebody died here")
        assert mine.append([b"next"]) == [25]

    def test_a_writer_notices_that_a_backup_took_the_place_of_its_file(self, tmp_path: Path) -> None:
        mine, file = writer(tmp_path), tmp_path / f"{0:020d}.jsonl"
        mine.append([b"first"])
        (tmp_path / "restored").write_bytes(b"first\n")
        (tmp_path / "restored").replace(file)
        assert mine.append([b"second"]) == [6]
        assert file.read_bytes() == b"first\nsecond\n"


class TestSegments:
    def test_a_segment_rolls_at_its_size_and_its_name_is_its_base_offset(self, tmp_path: Path) -> None:
        one = writer(tmp_path, limit=10)
        offsets = [one.append([text])[0] for text in (b"12345", b"1234", b"abcdef", b"xyz")]
        assert offsets == [0, 6, 11, 18]
        assert segments(tmp_path) == {
            "00000000000000000000.jsonl": b"12345\n1234\n", "00000000000000000011.jsonl": b"abcdef\nxyz\n",
        }  # fmt: skip

    def test_one_call_is_one_segment_however_many_events_it_carries(self, tmp_path: Path) -> None:
        writer(tmp_path, limit=10).append(LINES)
        assert list(segments(tmp_path)) == ["00000000000000000000.jsonl"]

    def test_segments_put_together_are_the_log_and_sealed_ones_never_change(self, tmp_path: Path) -> None:
        one, sealed = writer(tmp_path, limit=500), dict[str, bytes]()
        for text in LINES:
            one.append([text])
            found = segments(tmp_path)
            assert found.items() >= sealed.items()
            sealed = dict(list(found.items())[:-1])
        assert len(sealed) > 10
        assert log_bytes_of(tmp_path) == b"\n".join([*LINES, b""])
        bases = list(itertools.accumulate((len(part) for part in sealed.values()), initial=0))
        assert [int(name.removesuffix(".jsonl")) for name in segments(tmp_path)] == bases

    @pytest.mark.parametrize(
        ("daily", "since_midnight", "rolls"), [(True, -1, True), (True, 0, False), (False, -DAY, False)]
    )
    def test_a_segment_rolls_at_utc_midnight(
        self, tmp_path: Path, daily: bool, since_midnight: int, rolls: bool
    ) -> None:
        writer(tmp_path).append([b"yesterday"])
        modified = (now() // DAY * DAY + since_midnight) * 1_000_000
        os.utime(tmp_path / f"{0:020d}.jsonl", ns=(modified, modified))
        assert writer(tmp_path, daily=daily).append([b"today"]) == [10]
        assert len(segments(tmp_path)) == 1 + rolls
        assert read_all(tmp_path) == [b"yesterday", b"today"]

    @pytest.mark.parametrize("size", [1, 100, 1 << 20])
    def test_reading_goes_on_across_segments(self, tmp_path: Path, size: int) -> None:
        one = writer(tmp_path, limit=300)
        offsets = [one.append([text])[0] for text in LINES]
        assert read_all(tmp_path, size) == LINES
        assert read_all(tmp_path, size, offsets[150]) == LINES[150:]
        reader = PartitionReader(tmp_path, "events/0")
        assert b"".join(reader.raw(offsets[3], offsets[180])) == b"\n".join([*LINES[3:180], b""])
        assert [reader.line_start(offset) for offset in offsets] == offsets

    def test_a_reader_lets_go_of_a_file_that_another_took_the_name_of(self, tmp_path: Path) -> None:
        """As a cut of a derived log does in another process: it removes a segment, which is then made again."""
        path, reader = segment_path(tmp_path, 0), PartitionReader(tmp_path, "baskets/0")
        asks: list[tuple[Callable[[], object], object]] = [
            (reader.end, 6),
            (lambda: reader.line(3), b"22"),
            (lambda: [*reader.raw(0, 6)], [b"11\n22\n"]),
            (lambda: reader.line_start(5), 3),
            (lambda: getattr(reader.read(0, 6, 100, 100), "lines", None), [b"11", b"22"]),
        ]
        for ask, expected in asks:
            path.write_bytes(b"12345\n12345\n")
            assert (reader.end(), reader.line(0)) == (12, b"12345")
            path.unlink()
            path.write_bytes(b"11\n22\n")
            assert ask() == expected
            path.unlink()

    def test_a_reader_sees_segments_that_come_while_it_reads(self, tmp_path: Path) -> None:
        one, reader, start = writer(tmp_path, limit=40), PartitionReader(tmp_path, "events/0"), 0
        for text in LINES[:50]:
            one.append([text])
            block = reader.read(start, reader.end(), 1 << 20, 1 << 20)
            assert block is not None
            assert block.lines == [text]
            start = block.end

    @pytest.mark.parametrize("what", ["first missing", "middle missing", "short", "long"])
    def test_a_missing_or_changed_sealed_segment_is_a_corrupt_log(self, tmp_path: Path, what: str) -> None:
        one = writer(tmp_path, limit=1)
        for text in (b"aaaa", b"bbbb", b"cccc"):
            one.append([text])
        first, middle, _ = (tmp_path / name for name in segments(tmp_path))
        if what == "short":
            os.truncate(middle, 3)
        elif what == "long":
            middle.write_bytes(b"bbbb\nb\n")
        else:
            (first if what == "first missing" else middle).unlink()
        with pytest.raises(CorruptLogError, match="a segment is missing or has changed its length; found base offset"):
            PartitionReader(tmp_path, "events/0").end()

    def test_a_link_to_a_file_that_is_not_there_is_told(self, tmp_path: Path) -> None:
        one = writer(tmp_path / "p", limit=1)
        for text in (b"aaaa", b"bbbb", b"cccc"):
            one.append([text])
        moved = list_segments(tmp_path / "p")[1].path
        moved.rename(tmp_path / "moved")
        moved.symlink_to(tmp_path / "moved")
        assert read_all(tmp_path / "p") == [b"aaaa", b"bbbb", b"cccc"]
        (tmp_path / "moved").unlink()
        with pytest.raises(CorruptLogError, match=f"^{moved}: a segment is a link to a file that is not there"):
            PartitionReader(tmp_path / "p", "events/0").end()

    def test_the_command_line_tells_of_a_missing_segment_in_one_sentence(self, make_store: MakeStore) -> None:
        store = make_store(segment_bytes=10)
        for number in range(3):
            append_lines(store, "events", [raw(number)])
        victim = sorted(store.directory("events", 0).glob("*.jsonl"))[1]
        victim.unlink()
        done = afterlog(store.home, "read", "events")
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.decode().startswith("afterlog: ")
        assert done.stderr.count(b"\n") == 1
        assert (
            b"found base offset 194, expected 97. `afterlog archive` notes again what the archive has; else restore the"
            in done.stderr
        )


class TestStamps:
    def test_an_event_is_stamped_with_the_wall_clock_and_by_whom(self, store: Store) -> None:
        before = now()
        positions = append_events(store, "events", [event(1), event(2)], inserted_by="till 3")
        first, second = (json.loads(text) for text in log_bytes(store.home, "events").splitlines())
        assert positions == [(0, 0), (0, len(log_bytes(store.home, "events").split(b"\n")[0]) + 1)]
        assert before <= first["event"]["inserted_at"] == second["event"]["inserted_at"] <= now()
        assert first == event(1) | {"event": {"inserted_at": first["event"]["inserted_at"], "inserted_by": "till 3"}}

    def test_a_stamp_of_the_callers_own_is_replaced_and_what_else_is_there_stays(self, store: Store) -> None:
        append_events(store, "events", [event(event={"id": "mine", "inserted_at": 5}, context={"at": 7})])
        found = json.loads(log_bytes(store.home, "events"))
        assert found["context"] == {"at": 7}
        assert found["event"] == {"id": "mine", "inserted_at": found["event"]["inserted_at"]}
        assert found["event"]["inserted_at"] > 1_600_000_000_000

    def test_a_stamp_is_never_less_than_the_one_before_when_the_wall_clock_goes_back(
        self, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wall = 1_900_000_000_000
        for step in (0, 5, -3_600_000, -10, 6):
            monkeypatch.setattr(time, "time_ns", lambda step=step: (wall + step) * 1_000_000)
            append_events(make_store(), "events", [event()])  # a new store: the next process
        stamps = [
            json.loads(text)["event"]["inserted_at"] for text in log_bytes(make_store().home, "events").splitlines()
        ]
        assert [stamp - wall for stamp in stamps] == [0, 5, 5, 5, 6]

    def test_threads_stamp_in_the_order_of_the_log(self, store: Store) -> None:
        def work(name: str) -> None:
            for number in range(20):
                append_events(store, "events", [event(f"{name}{number}")])

        in_threads(work, "abcd")
        stamps = [json.loads(text)["event"]["inserted_at"] for text in log_bytes(store.home, "events").splitlines()]
        assert len(stamps) == 80
        assert stamps == sorted(stamps)

    @pytest.mark.parametrize(
        ("bad", "reason"),
        [
            ({"verb": "X"}, "event 2 is none: no subject: expected an object with an id"),
            (event(True), "event 2 is none: boolean id: subject.id"),
            (event(context={"at": "soon"}), "event 2 is none: no time: context.at is 'soon'"),
            (event(verb="ADDED_ITEM_TO_BASKET"), "event 2 is none: no item: object.item is no object"),
            (event(x=2**64), "event 2 is no JSON"),
            (event(x={1: 2}), "event 2 is no JSON"),
            (event(x="\ud800"), "event 2 is no JSON"),
            (event(x=object()), "event 2 is no JSON"),
            (event(x="y" * 1_048_576), "event 2 is too long; found 1048"),
        ],
    )
    def test_what_is_no_event_is_refused_before_anything_is_appended(
        self, store: Store, bad: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(UsageError) as raised:
            append_events(store, "events", [event(), bad])
        assert str(raised.value).startswith(reason)
        assert log_bytes(store.home, "events") == b""


class TestRefused:
    def test_a_line_stamped_too_far_ahead_goes_verbatim_to_the_log_refused(self, store: Store) -> None:
        ahead = now() + 301_000
        late = [
            raw(inserted_at=ahead),
            raw(inserted_at=ahead // 1000 + 1),
            raw(inserted_at=ahead / 1000),
            raw(inserted_at="2099-12-31T23:59:59+00:00") + b"\r",
            b'{"event": {"inserted_at": 4000000000}}',
        ]
        fine = [
            raw(),
            raw(inserted_at=ahead - 60_000),
            raw(inserted_at=5),
            raw(inserted_at=1e11),  # milliseconds, from there on
            b"{",
            b"[" * 100_000,
            b'{"event": 1}',
            b"\xff",
        ]
        told = append_lines(store, "events", [fine[0], *late, *fine[1:]])
        assert told.refused == [1, 2, 3, 4, 5]
        assert [position is None for position in told.positions] == [False] + [True] * 5 + [False] * 7
        assert log_bytes(store.home, "refused") == b"\n".join([*late, b""])
        assert log_bytes(store.home, "events") == b"\n".join([*fine, b""])
        assert told.positions[0] == (0, 0)
        assert told.positions[6] == (0, len(fine[0]) + 1)

    def test_a_line_is_judged_by_itself_whatever_lies_beside_it(self, store: Store) -> None:
        """Also where two of them make one JSON value, or one of them two."""
        ahead = b'{"event": {"inserted_at": 4000000000}}'
        beside = [b'{"event":', b'{"inserted_at": 4000000000}}', b"", b" ", b"{} " + ahead, b"[", raw()]
        for others in itertools.permutations(beside, 3):
            lines = [others[0], ahead, *others[1:]]
            assert append_lines(store, "events", lines).refused == [1], lines

    def test_how_far_ahead_is_a_setting_and_only_the_clock_counts(self, make_store: MakeStore) -> None:
        store, ahead = make_store(ahead="2h"), now() + 3_600_000
        happened = json.dumps(event(context={"at": ahead * 2}, event={"inserted_at": ahead})).encode()
        assert append_lines(store, "events", [raw(inserted_at=ahead), happened]).refused == []
        told = append_lines(store, "events", [raw(inserted_at=ahead + 3_700_000)])
        assert (told.refused, told.positions) == ([0], [None])
        assert append_lines(store, "events", [happened, raw(), raw(inserted_at=ahead + 3_700_000)]).refused == [2]

    @pytest.mark.parametrize("at", [4_000_000_000_000, 4_000_000_000, 4e9, "2096-10-02T07:06:40Z"])
    def test_without_a_stamp_the_clock_is_when_it_happened(self, store: Store, at: Any) -> None:
        """One such line, and until then everything in its partition came too late to count."""
        fine = [json.dumps({**event(), "context": {"at": when}}).encode() for when in (5, True, None, [4e12], "4e12")]
        line = json.dumps({**event(), "context": {"at": at}}).encode()
        assert append_lines(store, "events", [fine[0], line]).refused == [1]
        assert append_lines(store, "events", [*fine, line]).refused == [5]
        assert append_lines(store, "events", [line]).refused == [0]

    @pytest.mark.parametrize("context", [b"null", b'"x"', b"[]", b"5", b'{"at": []}', b'{"at": true}'])
    def test_what_is_stamped_ahead_is_refused_whatever_else_it_says(self, store: Store, context: bytes) -> None:
        line = b'{"context": %b, "event": {"inserted_at": 4000000000}}' % context
        assert append_lines(store, "events", [line]).refused == [0]
        assert append_lines(store, "events", [raw(), line]).refused == [1]

    @pytest.mark.parametrize("place", range(3))
    def test_one_among_many_that_end_alike_is_found(self, store: Store, place: int) -> None:
        lines = [raw(inserted_at=now() - 5) for _ in range(3)]
        lines[place] = raw(inserted_at=now() + 400_000)
        assert append_lines(store, "events", lines).refused == [place]

    def test_the_command_line_tells_which_lines_are_refused(self, tmp_path: Path) -> None:
        done = afterlog(
            tmp_path, "append", "events", stdin=raw(1) + b"\n" + raw(2, inserted_at=4_000_000_000) + b"\n" + raw(3)
        )
        assert (done.returncode, done.stdout) == (0, b"")
        assert done.stderr == (
            b"line 2 is refused: its clock lies ahead of now; it is in the log refused\n"
            b"2 lines appended to events, 1 refused\n"
        )
        assert log_bytes(tmp_path, "events") == raw(1) + b"\n" + raw(3) + b"\n"
        assert log_bytes(tmp_path, "refused") == raw(2, inserted_at=4_000_000_000) + b"\n"


class TestPartitions:
    @pytest.mark.parametrize(
        ("key", "hash32"),
        [
            (b"21", -973932308),
            (b"foobar", -790332482),
            (b"a-little-bit-long-string", -985981536),
            (b"a-little-bit-longer-string", -1486304829),
            (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
            (b"abc", 479470107),
        ],
    )
    def test_the_hash_is_kafkas(self, key: bytes, hash32: int) -> None:
        assert murmur2(key) == hash32 % 2**32
        assert partition_of(key.decode(), 7) == (hash32 & 0x7FFFFFFF) % 7

    def test_events_of_one_subject_share_a_partition_in_their_order(self, make_store: MakeStore) -> None:
        store = make_store(partitions=4)
        lines = [raw(ident, n=number) for number in range(30) for ident in (number % 11, str(number % 11))]
        told = append_lines(store, "events", [*lines, b"no event"])
        assert told.positions[-1] is not None
        assert told.positions[-1][0] == 0
        assert store.partitions("events") == [0, 1, 2, 3]
        found = {part: log_bytes(store.home, "events", part).splitlines() for part in range(4)}
        for part, texts in found.items():
            mine = [text for text in lines if partition_of(str(json.loads(text)["subject"]["id"]), 4) == part]
            assert [text for text in texts if text != b"no event"] == mine
        for text, position in zip(lines, told.positions, strict=False):
            assert position is not None
            assert log_bytes(store.home, "events", position[0])[position[1] :].startswith(text + b"\n")

    def test_stamped_events_go_where_raw_ones_go(self, make_store: MakeStore) -> None:
        store = make_store(partitions=5)
        positions = append_events(store, "events", [event(ident) for ident in (15, "15", "a", 2**63)])
        assert [part for part, _ in positions] == [partition_of(key, 5) for key in ("15", "15", "a", str(2**63))]

    def test_a_log_keeps_the_number_of_partitions_that_it_was_begun_with(self, make_store: MakeStore) -> None:
        """Else one shell with another setting would send a customer's events where nobody knows what was there before."""
        ids = list(range(20))
        append_lines(make_store(partitions=3), "events", [raw(ident) for ident in ids])
        for other in (1, 8):
            store = make_store(partitions=other)
            assert append_lines(store, "events", []).positions == []
            lines = append_lines(store, "events", [raw(ident) for ident in ids]).positions
            stamped = append_events(store, "events", [event(ident) for ident in ids])
            expected = [partition_of(str(ident), 3) for ident in ids]
            assert [position[0] for position in lines if position is not None] == expected
            assert [position[0] for position in stamped] == expected
            assert store.partitions("events") == [0, 1, 2]
            append_lines(store, "others", [raw()])
            assert store.partitions("others") == list(range(other))
            (store.home / "logs" / "others" / "0" / "partitions").unlink()
        assert (store.home / "logs" / "events" / "0" / "partitions").read_bytes() == b"3\n"

    def test_a_log_that_was_begun_by_hand_has_the_partitions_that_are_there_or_were_set(
        self, make_store: MakeStore
    ) -> None:
        for least, setting, count in ((4, 1, 5), (0, 3, 3), (0, 1, 1)):
            store = make_store(partitions=setting)
            log = f"by-hand-{count}"
            (store.home / "logs" / log / str(least)).mkdir(parents=True)
            assert store.partitions(log) == sorted({least, *range(setting)})
            append_lines(store, log, [raw()])
            assert store.partitions(log) == list(range(count))

    def test_a_folder_that_a_day_is_the_name_of_is_no_partition_of_a_log_that_begins(
        self, make_store: MakeStore
    ) -> None:
        store = make_store(partitions=2)
        (store.home / "logs" / "events" / "20261128").mkdir(parents=True)
        assert [make_store(partitions=2).begin("events") for _ in range(2)] == [2, 2]
        assert make_store(partitions=2).partitions("events") == [0, 1]

    def test_a_number_of_partitions_that_was_torn_is_written_anew(self, make_store: MakeStore) -> None:
        store = make_store(partitions=16)
        (store.home / "logs" / "events" / "0").mkdir(parents=True)
        for torn in (b"", b"1", b"\0\0", b"\0\n", b"999999"):
            (store.home / "logs" / "events" / "0" / "partitions").write_bytes(torn)
            assert make_store(partitions=16).partitions("events") == list(range(16))
            assert make_store(partitions=16).begin("events") == 16
            assert (store.home / "logs" / "events" / "0" / "partitions").read_bytes() == b"16\n"

    @pytest.mark.parametrize(
        "damaged", [b"0\n", b"1025\n", b"two\n", b"-1\n", b"1\n2\n", b"\xb2\n", b"9" * 5000 + b"\n"]
    )
    def test_a_number_of_partitions_that_is_none_is_told_and_nothing_is_appended(
        self, make_store: MakeStore, damaged: bytes
    ) -> None:
        store = make_store()
        append_lines(store, "events", [raw()])
        (store.home / "logs" / "events" / "0" / "partitions").write_bytes(damaged)
        store = make_store()
        with pytest.raises(CorruptLogError, match="events/0/partitions: the number of partitions is none; found "):
            append_lines(store, "events", [raw()])
        with pytest.raises(CorruptLogError, match=r"expected 1 to 1024\. Copy the file"):
            store.partitions("events")
        assert log_bytes(store.home, "events").count(b"\n") == 1

    def test_where_the_number_of_partitions_cannot_be_written_all_lines_are_missing(
        self, make_store: MakeStore
    ) -> None:
        store = make_store()
        (store.home / "logs" / "events").write_bytes(b"")  # no folder
        with pytest.raises(AppendError, match="cannot write: ") as raised:
            append_lines(store, "events", [raw(), raw()])
        assert (raised.value.offsets, raised.value.missing) == ([], [0, 1])
        with pytest.raises(AppendError, match="cannot write: ") as raised:
            append_events(store, "events", [event()])
        assert (raised.value.offsets, raised.value.missing) == ([], [0])

    def test_two_that_begin_a_log_at_once_agree(self, make_store: MakeStore) -> None:
        stores = [make_store(partitions=count) for count in (2, 5, 7, 9)]
        for turn in range(20):
            found: list[int] = []
            in_threads(lambda at, log=f"log-{turn}", found=found: found.append(stores[int(at)].begin(log)), "0123")  # type: ignore[misc]  # a default binds this turn's
            assert len(set(found)) == 1

    @pytest.mark.parametrize(
        "name",
        ["..", "../up", "a/b", "", ".hidden", "Events", "x" * 65, "a..b", "é", "clock@2", "events\n", "/tmp", "a\x00"],  # noqa: S108  # a name, no path
    )
    def test_a_name_that_could_lead_out_of_home_is_refused(self, store: Store, tmp_path: Path, name: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UsageError, match="no name for a log; found "):
            append_lines(store, name, [raw()])
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("log", ["reactions", "baskets", "quarantine", "deliveries", "clock", "refused"])
    def test_a_log_that_afterlog_writes_itself_is_refused_at_the_command_line(self, log: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=f"{log} is written by Afterlog itself"):
            append(log, str(tmp_path / "none"))


def in_threads(work: Callable[[str], None], names: str) -> None:
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


APPENDER = """
import sys
from storage.door import append_lines
from storage.settings import load_settings
from storage.segment import list_segments
from storage.store import Store

store, name = Store(load_settings()), sys.argv[1].encode()
for number in range(0, 300, 3):
    append_lines(store, "events", [b'{"w": "%s", "n": %d}' % (name, number + i) for i in range(3)])
"""


def environment(home: Path, **settings: object) -> dict[str, str]:
    return {**os.environ, "AFTERLOG_HOME": str(home)} | {f"AFTERLOG_{k.upper()}": str(v) for k, v in settings.items()}


class TestManyWriters:
    def test_two_appending_processes_and_a_following_reader_lose_and_double_nothing(self, tmp_path: Path) -> None:
        env = environment(tmp_path, segment_bytes=2_000)
        follow = [sys.executable, "-m", "deployments.cli", "read", "events", "--follow"]
        with subprocess.Popen(follow, env=env, cwd=ROOT, stdout=subprocess.PIPE) as reader:
            writers = [
                subprocess.Popen([sys.executable, "-c", APPENDER, name], env=env, cwd=ROOT)
                for name in ("left", "right")
            ]
            assert [process.wait(PATIENCE) for process in writers] == [0, 0]
            assert reader.stdout is not None
            lines = [reader.stdout.readline() for _ in range(600)]
            reader.terminate()
            rest = reader.stdout.read()
        assert (b"".join(lines), rest) == (log_bytes(tmp_path, "events"), b"")
        seen = [json.loads(text) for text in lines]
        assert [e["n"] for e in seen if e["w"] == "left"] == list(range(300))
        assert [e["n"] for e in seen if e["w"] == "right"] == list(range(300))
        assert len(list((tmp_path / "logs/events/0").glob("*.jsonl"))) > 4

    def test_lines_appended_by_hand_under_the_lock_mix_with_ours(self, make_store: MakeStore) -> None:
        store = make_store(segment_bytes=400)
        append_lines(store, "events", [b"0"])
        folder = store.directory("events", 0)
        by_hand = "for n in $(seq 1 40); do echo hand$n | flock .lock sh -c 'cat >> $(ls *.jsonl | tail -1)'; done"
        with subprocess.Popen(["sh", "-c", by_hand], cwd=folder) as shell:
            number = 0
            while shell.poll() is None or number < 40:
                number += 1
                append_lines(store, "events", [b"ours%d" % number])
        lines = read_all(folder)
        assert [text for text in lines if text.startswith(b"hand")] == [b"hand%d" % n for n in range(1, 41)]
        assert [text for text in lines if text.startswith(b"ours")] == [b"ours%d" % n for n in range(1, number + 1)]
        assert len(lines) == number + 41

    def test_appends_return_after_an_fsync_that_covers_them_and_share_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, real, durable, calls = writer(tmp_path), os.fsync, [0], Counter[str]()

        def slow_fsync(handle: int) -> None:
            size = os.fstat(handle).st_size
            time.sleep(0.004)
            real(handle)
            durable[0], calls["fsync"] = max(durable[0], size), calls["fsync"] + 1

        uncovered: list[int] = []

        def work(name: str) -> None:
            for number in range(25):
                text = f"{name}{number}".encode()
                [offset] = one.append([text])
                if durable[0] < offset + len(text) + 1:
                    uncovered.append(offset)

        one.append([b"the segment is there"])
        monkeypatch.setattr(os, "fsync", slow_fsync)
        in_threads(work, "abcdefgh")
        assert uncovered == []
        assert 25 <= calls["fsync"] <= 180  # of 200 appends; fewer where the machine has nothing else to do
        assert sorted(read_all(tmp_path)[1:]) == sorted(f"{a}{n}".encode() for a in "abcdefgh" for n in range(25))


class Disk:
    """A small file system of its own, to be filled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        """Leave not one byte of space."""
        with (self.path / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                return

    def leave(self, space: int) -> None:
        """Leave `space` bytes, in whole pages."""
        self.fill()
        os.truncate(self.path / "filler", (self.path / "filler").stat().st_size - space)

    def clear(self) -> None:
        """Make space."""
        (self.path / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip("a small file system cannot be mounted here: that needs root")
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_on_a_full_disk_the_error_names_what_is_in_and_a_retry_passes_only_the_rest(disk: Disk) -> None:
    one, lines = writer(disk.path / "p"), [b"%06d" % n + b"x" * 93 for n in range(200)]
    one.append(lines[:10])
    disk.leave(8192)
    with pytest.raises(AppendError) as raised:
        one.append(lines[10:])
    told = raised.value
    assert told.offsets == [100 * n for n in range(10, 10 + len(told.offsets))]
    assert 60 < len(told.offsets) < 190
    assert told.missing == list(range(len(told.offsets), 190))
    assert str(told) == (
        f"{disk.path}/p: cannot write: No space left on device. {len(told.offsets)} lines are in; append the rest again, nothing else"
    )
    with pytest.raises(AppendError, match="0 lines are in"):
        one.append(lines[:1])
    disk.clear()
    one.append(lines[10 + len(told.offsets) :])
    whole = [text for text in read_all(disk.path / "p") if len(text) == 99]
    assert whole == lines


def test_on_a_full_disk_an_empty_line_is_in_with_its_newline_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, real, space = writer(tmp_path), os.write, [2]

    def write(handle: int, data: bytes) -> int:
        if not space[0]:
            raise OSError(28, "No space left on device")
        done = real(handle, data[: space[0]])
        space[0] -= done
        return done

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(AppendError) as raised:
        one.append([b"a", b"", b"b"])
    assert (raised.value.offsets, raised.value.missing) == ([0], [1, 2])
    space[0] = 100
    one.append([b"", b"b"])
    assert read_all(tmp_path) == [b"a", b"", b"b"]


def test_what_a_full_disk_let_in_is_durable_when_the_error_comes(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    one, real, durable = writer(disk.path / "p"), os.fsync, [0]

    def fsync(handle: int) -> None:
        real(handle)
        durable[0] = os.fstat(handle).st_size

    one.append([b"first"])
    disk.leave(8192)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(AppendError) as raised:
        one.append([b"x" * 99] * 200)
    assert durable[0] >= raised.value.offsets[-1] + 99


def test_stamped_events_on_a_full_disk_are_an_append_error_too(make_store: MakeStore, disk: Disk) -> None:
    store = make_store("disk/home")
    append_events(store, "events", [event(0)])
    disk.fill()
    with pytest.raises(AppendError):
        append_events(store, "events", [event(1, x="y" * 9000)])
    with pytest.raises(AppendError):
        append_events(store, "other", [event(1)])
    disk.clear()
    append_events(store, "events", [event(2)])
    assert [json.loads(text)["subject"]["id"] for text in log_bytes(store.home, "events").splitlines()[::2]] == [0, 2]


def _retried(store: Store, lines: list[bytes], disk: Disk) -> None:
    """Append lines as a caller does: where the disk is full, make space and pass only the rest."""
    with pytest.raises(AppendError) as raised:
        append_lines(store, "events", lines)
    disk.clear()
    append_lines(store, "events", [lines[i] for i in raised.value.missing])


def test_a_retry_after_a_full_disk_doubles_nothing_where_a_line_was_refused(make_store: MakeStore, disk: Disk) -> None:
    store = make_store("disk/home")
    lines = [raw(n, x="y" * 50) for n in range(300)]
    append_lines(store, "events", [raw(-1)])
    append_lines(store, "refused", [raw(-1)])
    disk.leave(12288)
    _retried(store, [raw(1, inserted_at=4_000_000_000), *lines], disk)
    found = Counter(read_all(store.directory("events", 0)))
    assert [found[text] for text in lines] == [1] * 300
    assert log_bytes(store.home, "refused").count(b"4000000000") == 1


def test_a_retry_after_a_full_disk_doubles_nothing_with_several_partitions(make_store: MakeStore, disk: Disk) -> None:
    store = make_store("disk/home", partitions=3)
    lines = [raw(n, x="y" * 50) for n in range(300)]
    append_lines(store, "events", [raw(n) for n in range(-20, 0)])
    disk.leave(20480)
    _retried(store, lines, disk)
    found = Counter(text for part in range(3) for text in read_all(store.directory("events", part)))
    assert {found[text] for text in lines} == {1}


def test_a_retry_of_stamped_events_doubles_nothing_with_several_partitions(make_store: MakeStore, disk: Disk) -> None:
    store = make_store("disk/home", partitions=3)
    events = [event(n, x="y" * 50) for n in range(300)]
    append_events(store, "events", [event(n) for n in range(-20, 0)])
    disk.leave(20480)
    with pytest.raises(AppendError) as raised:
        append_events(store, "events", events)
    told = raised.value
    assert len(told.offsets) + len(told.missing) == 300
    assert 0 < len(told.missing) < 300
    for number, offset in zip(sorted({*range(300)} - {*told.missing}), told.offsets, strict=True):
        with store.reader("events", partition_of(str(number), 3)) as reader:
            assert json.loads(reader.line(offset))["subject"]["id"] == number
    disk.clear()
    append_events(store, "events", [events[i] for i in told.missing])
    texts = [text for part in range(3) for text in read_all(store.directory("events", part)) if text.endswith(b"}}")]
    found = [event for event in map(json.loads, texts) if "x" in event]  # those that are whole
    assert Counter(event["subject"]["id"] for event in found) == dict.fromkeys(range(300), 1)


def test_the_command_line_says_from_which_line_to_go_on_after_a_full_disk(disk: Disk, tmp_path: Path) -> None:
    lines = [raw(n, x=hashlib.sha256(b"%d" % n).hexdigest()) for n in range(500)]
    source = tmp_path / "lines"
    source.write_bytes(b"\n".join([*lines, b""]))
    home = disk.path / "home"
    assert afterlog(home, "append", "events", stdin=lines[0] + b"\n").returncode == 0
    disk.leave(40960)
    done = afterlog(home, "append", "events", str(source))
    told, failed = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert failed.startswith("afterlog: ")
    assert "No space left on device" in failed
    count = int(told.partition(" lines are in; go on from line ")[2]) - 1
    assert told == f"{count} lines are in; go on from line {count + 1}"
    assert 0 < count < 500
    disk.clear()
    rest = b"\n".join([*lines[count:], b""])
    assert afterlog(home, "append", "events", stdin=rest).returncode == 0
    whole = [text for text in log_bytes(home, "events").splitlines() if text in lines]
    assert whole == [lines[0], *lines]


def _process(store: Store) -> dict[str, Exception]:
    """All processors on raw logs to the end; gives what failed."""
    run, final = Run(store, build_topology(store.settings), "a test"), FinalTick("log-end")
    return side_by_side(run, run.topology.on_raw_logs(), lambda r, name: process_to_end(r, name, final)).failures


def _tax_events(count: int) -> list[bytes]:
    return [
        json.dumps(event(object={"id": n}, verb="SUBMIT_TAX", context={"at": 1598616201410})).encode()
        for n in range(count)
    ]


def _undisturbed(store: Store, lines: list[bytes]) -> bytes:
    append_lines(store, "events", lines)
    assert _process(store) == {}
    return log_bytes(store.home, "reactions")


def test_a_derived_log_on_a_full_disk_fails_in_one_sentence_and_goes_on_once_there_is_space(
    make_store: MakeStore, disk: Disk, tmp_path: Path
) -> None:
    lines = _tax_events(300)
    store = make_store("disk/home", database_url=f"sqlite:///{tmp_path}/apart.db")
    append_lines(store, "events", lines)
    disk.leave(40_960)
    failures = _process(store)
    assert {name: str(error) for name, error in failures.items()} == {
        "derive": f"{disk.path}/home/logs/reactions/0: cannot write: No space left on device"
    }
    assert _process(store).keys() == {"derive"}
    disk.clear()
    assert _process(store) == {}
    assert log_bytes(store.home, "reactions") == _undisturbed(make_store("whole"), lines)


@pytest.mark.parametrize("opened", [True, False], ids=["while it is open", "before it is opened"])
def test_a_database_on_a_full_disk_fails_in_one_sentence_and_goes_on_once_there_is_space(
    make_store: MakeStore, disk: Disk, opened: bool
) -> None:
    lines = _tax_events(300)
    settings = {"database_url": f"sqlite:///{disk.path}/small.db"}
    store = make_store("apart", **settings)
    append_lines(store, "events", lines[:100])
    assert _process(store) == {}
    if not opened:
        store.database.dispose()
        store = make_store("apart", **settings)
    disk.fill()
    append_lines(store, "events", lines[100:])
    failures = _process(store)
    assert failures.keys() == {"quarantine", "derive", "abandonment", "anomalies", "normalise"}
    for failure in failures.values():
        assert isinstance(failure, AfterlogError)
        assert "full" in str(failure)
        assert len(str(failure).splitlines()) == 1
    disk.clear()
    assert _process(store) == {}
    assert log_bytes(store.home, "reactions") == _undisturbed(make_store("whole"), lines)
