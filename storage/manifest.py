"""The chain: one line for each sealed segment of a partition, each with the hash of the line before it.

The file `manifest` lies beside the segments, plain JSON that `cat` shows, oldest first. Whoever changes a sealed byte, or takes
a segment away, contradicts its line; whoever changes a line contradicts the next one; whoever writes all of them
anew contradicts a head that was noted elsewhere. The file `archived` says before which offset the archive has everything.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import msgspec

from storage.errors import AfterlogError, CorruptLogError
from storage.locks import locked
from storage.segment import Entry, Segment, fsync_directory, fsync_file, list_segments
from storage.span import span_of

MANIFEST, ARCHIVED = "manifest", "archived"
_LONGEST_LINE = 4096
_PIECE = 1 << 20


_entry = msgspec.json.Decoder(Entry)


def name_of(directory: Path) -> str:
    """What a partition's folder is called in sentences: `events/0`."""
    return f"{directory.parent.name}/{directory.name}"


def genesis(directory: Path) -> str:
    """What the first entry names as its predecessor: the hash of the partition's name, so that no two can be swapped."""
    return hashlib.sha256(name_of(directory).encode()).hexdigest()


def parse_entry(line: bytes) -> Entry | None:
    """The entry of a line; None where it is none, or spelt in another way than ours."""
    try:
        found = _entry.decode(line)
        return found if found.line() == line else None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def read_manifest(directory: Path) -> list[Entry]:
    """The entries of a partition, oldest first; none where nothing was ever sealed. A torn last line is not there yet.

    Raises:
        CorruptLogError: a line is no entry.
    """
    whole, newline, _ = _written(_read(directory, MANIFEST)).rpartition(b"\n")
    try:
        return _entry.decode_lines(whole) if newline else []
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptLogError(
            "a line of the manifest is no entry", where=str(directory / MANIFEST),
            do="`afterlog verify` tells which; restore the file from a backup",
        ) from error  # fmt: skip


def digest_of(path: Path) -> tuple[int, str]:
    """The length of a file and its SHA-256: what its entry must say."""
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(_PIECE)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
    return size, digest.hexdigest()


def archived_end(directory: Path) -> int:
    """Before which offset the archive has every byte of a partition."""
    text = _read(directory, ARCHIVED).strip()
    return int(text) if text.isdigit() else 0


def note_archived(directory: Path, end: int) -> None:
    """Write down, durably, that the archive has everything before `end`."""
    draft = directory / f".{ARCHIVED}.new"
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        _write_all(handle, b"%020d\n" % end, 0)
        os.fsync(handle)
    finally:
        os.close(handle)
    draft.rename(directory / ARCHIVED)
    fsync_directory(directory)


def with_archived(directory: Path, local: list[Segment]) -> list[Segment]:
    """`local` segments and those that only the archive has, oldest first; to be called after they were listed."""
    end = archived_end(directory)
    if not end:
        return local
    here = {segment.base for segment in local}
    away = [
        Segment(entry.base, directory, entry)
        for entry in read_manifest(directory)
        if entry.end <= end and entry.base not in here
    ]
    return sorted([*local, *away])


def seal(directory: Path, upto: int | None = None) -> int:
    """Write the entries of sealed segments that have none yet, durably; gives how many. `upto`: only before this offset.

    What a crash left of an entry, which nobody was told of, is written anew.

    Raises:
        CorruptLogError: the segments do not go on where the manifest ends.
    """
    sealed = list_segments(directory)[:-1]
    if not sealed:
        return 0
    with locked(directory / MANIFEST) as handle:
        last = _tail(handle, directory)
        end, written = last.end if last else 0, 0
        for segment in sealed:
            if segment.base < end:
                continue  # its file may have gone to the archive since it was listed
            size = segment.path.stat().st_size
            if upto is not None and segment.base + size > upto:
                break
            if segment.base > end:
                raise CorruptLogError(
                    "a segment is missing or has changed its length", where=str(segment.path),
                    found=f"base offset {segment.base}", expected=end, do="Restore the partition's files from a backup",
                )  # fmt: skip
            last = _add(handle, directory, segment, last)
            end, written = last.end, written + 1
        os.fsync(handle)  # also of what another has written and may have died before it was durable
        fsync_directory(directory)
    return written


def seal_if_possible(directory: Path) -> None:
    """`seal` after an append that has succeeded whatever becomes of this; `verify` and `archive` tell what is wrong."""
    with contextlib.suppress(OSError, AfterlogError):
        seal(directory)


def place_before(directory: Path, millis: int) -> tuple[int, int]:
    """An offset before which no clock reaches `millis`, as near as the manifest tells, and the greatest clock before it."""
    offset = clock = 0
    for entry in read_manifest(directory):
        if entry.last >= millis:
            break
        offset, clock = entry.end, entry.last
    return offset, clock


def _add(handle: int, directory: Path, segment: Segment, last: Entry | None) -> Entry:
    fsync_file(segment.path)  # a segment that was rolled by hand may not be durable, and its entry must not outlive it
    span = span_of(segment.path, last.last if last else 0)
    entry = Entry(segment.base, *span, last.hash if last else genesis(directory))
    _write_all(handle, entry.line() + b"\n", os.fstat(handle).st_size)
    return entry


def _write_all(handle: int, data: bytes, at: int) -> None:
    """Write all of it, or fail: a part, as of a disk that is nearly full, would be taken for a line of its own."""
    while data:
        count = os.pwrite(handle, data, at)
        data, at = data[count:], at + count


def _tail(handle: int, directory: Path) -> Entry | None:
    """The last entry of a manifest; what a crash left after it is cut off."""
    size = os.fstat(handle).st_size
    start = max(0, size - 2 * _LONGEST_LINE)
    text = _written(os.pread(handle, size - start, start))
    whole, newline, _ = text.rpartition(b"\n")
    if (end := start + len(whole) + len(newline)) < size:
        os.ftruncate(handle, end)
    if not newline:
        return None
    entry = parse_entry(whole.rpartition(b"\n")[2])
    if entry is None:
        raise CorruptLogError("the last line of the manifest is no entry", where=str(directory / MANIFEST))
    return entry


def _written(text: bytes) -> bytes:
    """What of a file's end was written: a power loss may have left NULs."""
    return text.partition(b"\0")[0]


def _read(directory: Path, name: str) -> bytes:
    try:
        with open(f"{directory}/{name}", "rb") as file:  # noqa: PTH123  # asked at each look at a log, and mostly not there
            return file.read()
    except FileNotFoundError:
        return b""
