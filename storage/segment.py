"""Segments: the files of one partition of a log, each named by the offset of its first byte.

Put together in order they are the log. Only the newest grows; a sealed one never changes.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from itertools import chain, takewhile
from pathlib import Path
from typing import NamedTuple

import msgspec

from storage.errors import CorruptLogError, UsageError
from storage.times import DAY

SUFFIX = ".jsonl"
_LISTED_AT_MOST = 500
_LOG_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_listed: dict[str, tuple[list[str], list[Segment]]] = {}
"""By directory, the names last found there and what they say: a path takes ten times as long to make as a name to compare."""


def check_log_name(name: str) -> str:
    """`name`, if a log may be called so.

    Raises:
        UsageError: it could not be a folder's name, or would lead out of HOME.
    """
    if not _LOG_NAME.fullmatch(name) or ".." in name:
        raise UsageError(
            "no name for a log",
            found=repr(name[:100]),
            expected="lower-case letters, digits, `_`, `.` and `-`, at most 64",
        )
    return name


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A sealed segment as the manifest has it: where it begins, its bytes and lines, first and last clock, and the hash of the entry before."""

    base: int
    length: int
    events: int
    first: int
    last: int
    sha256: str
    previous: str

    @property
    def end(self) -> int:
        """The offset after its last byte."""
        return self.base + self.length

    def line(self) -> bytes:
        """The entry as it stands in the manifest, without its newline."""
        return msgspec.json.encode(self)

    @property
    def hash(self) -> str:
        """The SHA-256 of its line: what the next entry names."""
        return hashlib.sha256(self.line()).hexdigest()


class Segment(NamedTuple):
    """One file: `base` is the offset of its first byte. Its `entry` in the manifest is given where only the archive has it."""

    base: int
    path: Path
    entry: Entry | None = None

    def size(self) -> int:
        """Its length in bytes, by now."""
        return self.path.stat().st_size if self.entry is None else self.entry.length


def segment_path(directory: Path, base: int) -> Path:
    """Where the segment that begins at offset `base` lies."""
    return directory / f"{base:020d}{SUFFIX}"


def list_segments(directory: Path) -> list[Segment]:
    """The segments of a partition, oldest first; none where it was never written."""
    place = str(directory)
    try:
        names = sorted(os.listdir(place))
    except FileNotFoundError:
        return []
    known = _listed.get(place)
    if known is None or known[0] != names:
        stems = [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]
        found = [
            Segment(int(stem), directory / (stem + SUFFIX)) for stem in stems if stem.isdigit() and len(stem) == 20
        ]
        if len(_listed) >= _LISTED_AT_MOST:
            _listed.clear()
        known = _listed[place] = names, found
    return known[1].copy()


def check_contiguous(segments: list[Segment]) -> None:
    """Make sure that each segment ends where the next one begins.

    Raises:
        CorruptLogError: a segment is missing, shorter or longer than its successor says.
    """
    expected = 0
    for segment, successor in zip(segments, [*segments[1:], None], strict=True):
        if segment.base != expected:
            raise CorruptLogError(
                "a segment is missing or has changed its length",
                where=str(segment.path),
                found=f"base offset {segment.base}",
                expected=expected,
                do="`afterlog archive` notes again what the archive has; else restore the partition's files from a backup",
            )
        if successor is not None:
            expected = segment.base + segment.size()


def file_end(directory: Path) -> int:
    """The offset after the last byte of a partition, terminated or not."""
    segments = list_segments(directory)
    return segments[-1].base + segments[-1].path.stat().st_size if segments else 0


def terminated_end(handle: int, size: int) -> int:
    """The position after the last newline among the first `size` bytes of a file; 0 where it has none."""
    step = 1
    while size > 0:
        start = max(0, size - step)
        found = os.pread(handle, size - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        size, step = start, 65_536
    return 0


def fsync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power loss."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Make the bytes of a file survive a power loss, whoever wrote them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(directory: Path) -> None:
    """Make a directory and its parents, for their owner only, each name made durable before one is made in it."""
    if directory.is_dir():
        return
    missing = list(takewhile(lambda path: not path.exists(), chain([directory], directory.parents)))
    if missing:  # else another was quicker
        _fsync_name(missing[-1].parent)
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
        fsync_directory(path.parent)


def _fsync_name(directory: Path) -> None:
    """Make the name of a directory durable: whoever made it may have died before it was."""
    with suppress(PermissionError):  # in a folder that we may not read we have made nothing
        fsync_directory(directory.parent)


def create_segment(directory: Path, base: int) -> Segment:
    """Make the empty file of a new segment, durably."""
    segment = Segment(base, segment_path(directory, base))
    if base == 0:
        _fsync_name(directory)
    os.close(os.open(segment.path, os.O_WRONLY | os.O_CREAT, 0o600))
    fsync_directory(directory)
    return segment


def write_all(handle: int, data: bytes) -> None:
    """Write all of it, however little the system takes at once."""
    done = 0
    while done < len(data):
        done += os.write(handle, data[done:] if done else data)


def is_full(size: int, modified: float, now: int, limit: int, daily: bool) -> bool:
    """Whether a segment is to be sealed before the next append: at its size, or at UTC midnight."""
    if size == 0:
        return False
    return size >= limit or (daily and int(modified * 1000) // DAY < now // DAY)
