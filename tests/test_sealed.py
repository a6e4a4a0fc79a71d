"""A derived log whose unconfirmed bytes begin where a sealed segment ends: that segment never grows, whatever is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from storage.archive import Archive
from storage.backup import copy_segments
from storage.derived import DerivedWriter
from storage.errors import LostDataError
from storage.manifest import archived_end, note_archived, read_manifest, seal
from storage.reader import PartitionReader
from storage.remote import Remote
from storage.segment import list_segments

ONE, TWO, OTHER = b"the first line\n", b"two\n", b"other\n"
END = len(ONE)


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(Remote(str(tmp_path / "archive")), tmp_path / "cache")


@pytest.fixture
def writer(tmp_path: Path, archive: Archive) -> DerivedWriter:
    """A log that is committed up to `END` and sealed there; what lies beyond is in a segment of its own."""
    made = DerivedWriter(tmp_path / "logs/reactions/0", "reactions/0", limit=10, daily=False, archive=lambda: archive)
    made.extend(0, ONE, may_differ=False)
    made.extend(END, TWO, may_differ=False)
    assert bases(made) == [0, END]
    assert seal(made.directory, END) == 1
    return made


def bases(writer: DerivedWriter) -> list[int]:
    return [segment.base for segment in list_segments(writer.directory)]


def put_away(writer: DerivedWriter, archive: Archive) -> None:
    """Have the sealed segment in the archive only."""
    [entry] = read_manifest(writer.directory)
    archive.put(writer.directory, entry)
    note_archived(writer.directory, entry.end)
    list_segments(writer.directory)[0].path.unlink()


def read(writer: DerivedWriter, archive: Archive) -> bytes:
    reader = PartitionReader(writer.directory, "reactions/0", lambda: archive)
    try:
        return b"".join(reader.raw(0, reader.end()))
    finally:
        reader.close()


def with_nuls(writer: DerivedWriter) -> None:
    list_segments(writer.directory)[-1].path.write_bytes(b"\0" * 9)  # what a power loss leaves
    writer.extend(END, OTHER, may_differ=False)


CUTS: dict[str, Callable[[DerivedWriter], object]] = {
    "other code": lambda writer: writer.extend(END, OTHER, may_differ=True),
    "NULs": with_nuls,
    "half an outcome": lambda writer: (writer.cut(END), writer.extend(END, OTHER, may_differ=False)),
}


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("away", [False, True])
def test_a_cut_where_a_sealed_segment_ends(writer: DerivedWriter, archive: Archive, how: str, away: bool) -> None:
    first = list_segments(writer.directory)[0].path
    before = first.stat().st_mtime_ns
    if away:
        put_away(writer, archive)
    CUTS[how](writer)
    assert bases(writer) == ([END] if away else [0, END])
    assert read(writer, archive) == ONE + OTHER
    if not away:
        assert (first.read_bytes(), first.stat().st_mtime_ns) == (ONE, before)


def test_several_segments_are_cut_but_for_the_one_at_the_end(writer: DerivedWriter, archive: Archive) -> None:
    writer.extend(END + len(TWO), ONE, may_differ=False)
    writer.extend(END + len(TWO) + len(ONE), TWO, may_differ=False)
    assert len(bases(writer)) == 3
    writer.cut(END)
    assert bases(writer) == [0, END]
    assert read(writer, archive) == ONE


def test_a_sealed_segment_whose_successor_has_gone_does_not_grow(writer: DerivedWriter, archive: Archive) -> None:
    again = DerivedWriter(writer.directory, "reactions/0", limit=1 << 20, daily=False, archive=lambda: archive)
    list_segments(writer.directory)[1].path.unlink()
    again.extend(END, OTHER, may_differ=False)
    again.extend(END + len(OTHER), TWO, may_differ=False)
    assert bases(again) == [0, END]
    assert read(again, archive) == ONE + OTHER + TWO


def test_where_no_file_is_here_the_log_goes_on_where_the_archive_ends(writer: DerivedWriter, archive: Archive) -> None:
    put_away(writer, archive)
    list_segments(writer.directory)[0].path.unlink()
    assert writer.tail(END) == b""
    writer.extend(END, OTHER, may_differ=False)
    assert bases(writer) == [END]
    assert read(writer, archive) == ONE + OTHER


@pytest.mark.parametrize("end", [0, END])
def test_where_the_archive_does_not_have_it_either_nothing_is_written(writer: DerivedWriter, end: int) -> None:
    for segment in list_segments(writer.directory):
        segment.path.unlink()
    with pytest.raises(LostDataError, match="neither here nor in the archive; found archived up to 0, expected up to"):
        writer.extend(end, OTHER, may_differ=True)
    assert bases(writer) == []


def test_a_backup_has_the_empty_segment_at_the_end(writer: DerivedWriter, archive: Archive, tmp_path: Path) -> None:
    put_away(writer, archive)
    writer.cut(END)
    copied = tmp_path / "backup/reactions/0"
    copy_segments(writer.directory, copied, END)
    assert archived_end(copied) == END
    assert [segment.base for segment in list_segments(copied)] == [END]
