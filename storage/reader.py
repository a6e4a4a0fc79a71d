"""Reading one partition of a log: whole lines, from any offset, while others append; what is in the archive reads as the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import CorruptLogError, LostDataError
from storage.event import HEAD, Block
from storage.manifest import with_archived
from storage.segment import Segment, check_contiguous, fsync_directory, list_segments, terminated_end

if TYPE_CHECKING:
    from storage.archive import Archive


class PartitionReader:
    """Gives the lines of one partition, until it is closed; also by `with`. Not to be shared between threads."""

    def __init__(self, directory: Path, name: str, archive: Callable[[], Archive] | None = None) -> None:
        self.directory, self.name, self._archive = directory, name, archive
        self._listed: list[Segment] = []  # the files that are here
        self._segments: list[Segment] = []  # and those in the archive
        self._handle = -1
        self._open: Segment | None = None
        self._inode = (0, 0)  # of what is open
        self._named: Segment | None = None  # whose name is durable for sure

    def __enter__(self) -> PartitionReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file that is open."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle, self._open = -1, None

    def end(self) -> int:
        """The offset after the last terminated line; an unterminated last line is not there yet."""
        self._refresh()
        if not self._segments:
            return 0
        newest = self._segments[-1]
        handle = self._use(newest)
        end = terminated_end(handle, os.fstat(handle).st_size)
        return newest.base + end

    def read(self, start: int, end: int, size: int, max_line: int) -> Block | None:
        """Whole lines from byte offset `start`, about `size` bytes of them and at least one; None at `end`.

        `end` is the end of a line, and blocks end at the first line end at or after a multiple of `size`, so that
        readers that began elsewhere meet. Of a line longer than `max_line` that does not fit, the head is read only.

        Raises:
            CorruptLogError: `start` is not the start of a line.
            LostDataError: the files end before `end`.
        """
        if start >= end:
            return None
        segment = self._segment_of(start, end)
        handle = self._use(segment)
        length = os.fstat(handle).st_size
        self._check_line_start(handle, start, segment)
        goal = min(end, segment.base + length, (start // size + 1) * size)
        data = os.pread(handle, goal - start, start - segment.base)
        stop = min(end, segment.base + length)
        if not data.endswith(b"\n") and start + len(data) < stop:
            data = self._complete(handle, segment, start, data, max_line + 1, stop)
        cut = data.rfind(b"\n") + 1
        if cut == 0:
            return self._oversized(handle, segment, start, stop)
        text = data if cut == len(data) else data[:cut]
        lines = text.split(b"\n")
        lines.pop()  # what comes after the last newline: nothing
        return Block(start, start + cut, lines, {}, text)

    def fill(self, buffer: bytearray, start: int, end: int) -> int:
        """Read the bytes from `start` on into `buffer`, none from `end` on and none of the next file; gives how many.

        Raises:
            CorruptLogError: `start` is not the start of a line.
            LostDataError: the files end before `start`.
        """
        segment = self._segment_of(start, end)
        handle = self._use(segment)
        self._check_line_start(handle, start, segment)
        return os.preadv(handle, [memoryview(buffer)[: end - start]], start - segment.base)

    def segments(self) -> list[Segment]:
        """The segments that are here or in the archive, oldest first."""
        self._refresh()
        return list(self._segments)

    def line(self, offset: int) -> bytes:
        """The line at `offset`, without its newline.

        Raises:
            LostDataError: there is none.
        """
        self.check_in_place()
        return self.line_here(offset)

    def line_here(self, offset: int) -> bytes:
        """`line`, in the files that were there at the last `check_in_place`: for many lines at one moment."""
        if self._open is not None and self._open.base <= offset:  # most lines are short, and in the file that is open
            data = os.pread(self._handle, 1024, offset - self._open.base)
            end = data.find(b"\n")
            if end >= 0:
                return data[:end]
        segment = self._segment_of(offset, offset + 1)
        handle, size = self._use(segment), 8192
        while True:
            data = os.pread(handle, size, offset - segment.base)
            end = data.find(b"\n")
            if end >= 0 or len(data) < size:
                return data[:end] if end >= 0 else data
            size *= 8

    def check_in_place(self) -> None:
        """Let go of a file whose name another has by now: a tail was cut and written again, or a backup put back."""
        if self._open is None or self._open.entry is not None:
            return
        try:
            there = self._open.path.stat()
        except FileNotFoundError:
            return  # it has gone to the archive, and what is open has the same bytes; or nothing of it is committed
        if (there.st_dev, there.st_ino) != self._inode:
            self.close()
            self._named = None

    def raw(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`, in pieces, as they are."""
        while start < end:
            segment = self._segment_of(start, end)
            handle = self._use(segment)
            piece = os.pread(handle, min(end - start, 1 << 20), start - segment.base)
            if not piece:
                return
            yield piece
            start += len(piece)

    def sync(self, upto: int) -> None:
        """Make the segment that holds the bytes before `upto` durable; sealed ones were made so when they were sealed."""
        if upto == 0:
            return
        self._refresh()  # what was read may have come from another reader, by a cache
        for segment in reversed(self._segments):
            if segment.base < upto:
                if segment.entry is not None:
                    return  # the archive has it
                os.fdatasync(self._use(segment))
                if segment != self._named:  # who made it may have died, and who wrote by hand makes nothing durable
                    fsync_directory(self.directory)
                    self._named = segment
                return

    def line_start(self, offset: int) -> int:
        """The start of the line that `offset` lies in."""
        self._refresh()
        for segment in reversed(self._segments):
            if segment.base < offset or segment.base == offset == 0:
                handle = self._use(segment)
                return segment.base + terminated_end(
                    handle, min(offset, segment.base + os.fstat(handle).st_size) - segment.base
                )
        return 0

    def _complete(self, handle: int, segment: Segment, start: int, data: bytes, reach: int, stop: int) -> bytes:
        """`data` up to the end of the line that it breaks off in, if that end is within `reach` bytes."""
        pieces, position, step = [data], start + len(data), 65_536
        limit = min(stop, position + reach)
        while position < limit:
            more = os.pread(handle, min(step, limit - position), position - segment.base)
            found = more.find(b"\n")
            if found >= 0:
                return b"".join([*pieces, more[: found + 1]])
            pieces.append(more)
            position, step = position + len(more), min(step * 2, 4 << 20)
        return data

    def _oversized(self, handle: int, segment: Segment, start: int, stop: int) -> Block:
        position = start
        while position < stop:
            chunk = os.pread(handle, min(1 << 20, stop - position), position - segment.base)
            found = chunk.find(b"\n")
            if found >= 0:
                length = position + found - start
                head = os.pread(handle, min(HEAD, length), start - segment.base)
                return Block(start, start + length + 1, [head], {0: length})
            if not chunk:
                break
            position += len(chunk)
        raise CorruptLogError(
            "a line has no end before the log's end", where=f"{self.name}:{start}", expected=f"a newline before {stop}"
        )

    def _segment_of(self, start: int, end: int) -> Segment:
        self.check_in_place()
        if self._open is not None and self._open.base <= start:
            size = os.fstat(self._handle).st_size
            if start < self._open.base + size:
                return self._open
        self._refresh()
        last = self._segments[-1] if self._segments else None
        stop = last.base + last.size() if last else 0
        for segment in reversed(self._segments):
            if segment.base <= start:
                if start >= stop:
                    break
                return segment
            stop = segment.base
        raise lost_log(f"{self.name} in {self.directory}", last.base + last.size() if last else 0, end)

    def _check_line_start(self, handle: int, start: int, segment: Segment) -> None:
        if start > segment.base and os.pread(handle, 1, start - segment.base - 1) != b"\n":
            raise CorruptLogError(
                "an offset that is not the start of a line",
                where=f"{self.name}:{start}",
                do=f"The line there starts at {self.line_start(start)}",
            )

    def _refresh(self) -> None:
        self.check_in_place()
        while (listed := list_segments(self.directory)) != self._listed:
            segments = with_archived(self.directory, listed)
            try:
                check_contiguous(segments)
            except FileNotFoundError as error:
                if list_segments(self.directory) != listed:
                    continue  # it has gone to the archive since it was listed
                raise CorruptLogError(
                    "a segment is a link to a file that is not there", where=str(error.filename),
                    do="Have the file there again, on a disk that is not mounted say",
                ) from error  # fmt: skip
            self._listed, self._segments = listed, segments

    def _use(self, segment: Segment) -> int:
        if self._open is None or self._open.base != segment.base:
            self.close()
            self._handle, self._open = self._opened(segment), segment
            opened = os.fstat(self._handle)
            self._inode = (opened.st_dev, opened.st_ino)
        return self._handle

    def _opened(self, segment: Segment) -> int:
        if segment.entry is None:
            try:
                return os.open(segment.path, os.O_RDONLY)
            except FileNotFoundError:
                self._refresh()
                gone = Segment(segment.base, segment.path)
                segment = next((each for each in self._segments if each.base == gone.base), gone)
                if segment.entry is None:
                    raise
        if self._archive is None:
            raise LostDataError("a segment is in the archive, and this reader knows none", where=self.name)
        return self._archive().open(self.directory, segment.entry)


def lost_log(where: str, found: int, expected: int) -> LostDataError:
    """A log that is shorter than a checkpoint says: a lost disk, or an older copy of one of the two."""
    return LostDataError(
        "the log is shorter than what was read from it",
        where=where,
        found=f"{found} bytes",
        expected=f"at least {expected}",
        do="Restore the newer copy of the log, or restore Afterlog's database to the same moment as this one",
    )
