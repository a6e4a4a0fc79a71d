"""Writing a derived log: its bytes go in at its committed end, and what a crash left there is compared, not cut."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from storage.append import LOCK
from storage.errors import AfterlogError, LostDataError, NondeterminismError
from storage.locks import locked
from storage.manifest import archived_end, read_manifest
from storage.reader import PartitionReader
from storage.segment import (
    Segment,
    create_segment,
    file_end,
    fsync_directory,
    fsync_file,
    is_full,
    list_segments,
    make_directory,
    write_all,
)
from storage.steps import reached
from storage.times import now

if TYPE_CHECKING:
    from storage.archive import Archive


class DerivedWriter:
    """The one writer of a partition of a derived log; it works under its processor's lock."""

    def __init__(
        self, directory: Path, name: str, *, limit: int, daily: bool, archive: Callable[[], Archive] | None = None
    ) -> None:
        self.directory, self.name, self.limit, self.daily, self._archive = directory, name, limit, daily, archive
        self._growing: Path | None = None  # the newest segment, once it was seen that it is not sealed
        make_directory(directory)

    def extend(self, end: int, data: bytes, *, may_differ: bool, durable: bool = True) -> str:
        """Have `data` at offset `end`, all before it committed or given; says what was cut of a tail and why, if anything.

        Where it is to be `durable`, so is all that was written before it.

        Bytes that are there already must be the same. A tail that differs is cut instead only where `may_differ` (code
        or settings changed in between), and from where a power loss has left NULs, which no derived event has.

        Raises:
            NondeterminismError: what is there differs.
            LostDataError: the files end before `end`.
        """
        with locked(self.directory / LOCK):
            there = self._there()
            self._check_end(end, there)
            same, left = self._common(end, data, there), there - end
            kept = left
            if same < min(len(data), left):
                if may_differ:
                    kept = same = 0
                elif self._is_unwritten(end + same):
                    kept = same
                else:
                    raise self._difference(end + same, data[same:])
            elif may_differ:
                kept = min(left, len(data))  # the version before went further; what comes next may be other than that
            if kept < left:
                self._cut(end + kept)
            try:
                self._write(end + same, data[same:], durable=durable)
            except OSError as error:
                raise AfterlogError(f"cannot write: {error.strerror}", where=str(self.directory)) from error
        if kept == left:
            return ""
        why = "since its code or settings changed" if may_differ else "since a power loss had left NULs in them"
        return f"{left - kept} bytes that a crash had left unconfirmed were cut, {why}"

    def tail(self, end: int) -> bytes:
        """What lies beyond the committed end, made durable: whoever wrote it may have died before it was."""
        with locked(self.directory / LOCK):
            there = self._there()
            self._check_end(end, there)
            segments = list_segments(self.directory)
            if segments and there > end:
                fsync_file(segments[-1].path)  # the ones before it were made durable when they were sealed
                fsync_directory(self.directory)
            return b"".join(self._bytes(end, there))

    def cut(self, end: int) -> None:
        """Drop what lies beyond `end`; for bytes that nobody was ever told of."""
        with locked(self.directory / LOCK):
            self._cut(end)

    def _there(self) -> int:
        """The offset after the last byte; where no file is here, the archive has everything before it.

        Raises:
            LostDataError: no file is here, and not all that was sealed is in the archive.
        """
        if list_segments(self.directory):
            return file_end(self.directory)
        end, sealed = archived_end(self.directory), read_manifest(self.directory)
        if sealed and sealed[-1].end > end:
            raise self._lost(
                "sealed segments of a derived log are neither here nor in the archive", found=f"archived up to {end}",
                expected=f"up to {sealed[-1].end}", do="Put the partition's files back from a backup",
            )  # fmt: skip
        return end

    def _check_end(self, end: int, there: int) -> None:
        if there < end:
            raise self._lost(
                "the derived log is shorter than its committed end", found=f"{there} bytes", expected=f"at least {end}",
                do="Restore the newer copy of the log, or an older copy of Afterlog's database",
            )  # fmt: skip

    def _lost(self, what: str, *, found: str, expected: str, do: str) -> LostDataError:
        return LostDataError(what, where=f"{self.name} in {self.directory}", found=found, expected=expected, do=do)

    def _common(self, end: int, data: bytes, there: int) -> int:
        """How many bytes of `data` are at `end` already."""
        view, done = memoryview(data), 0
        for piece in self._bytes(end, min(there, end + len(data))):
            if piece != view[done : done + len(piece)]:
                return done + next(i for i, byte in enumerate(piece) if byte != data[done + i])
            done += len(piece)
        return done

    def _is_unwritten(self, at: int) -> bool:
        """Whether a NUL is there: the file had grown when the power was lost, and its bytes had not reached the disk."""
        return b"".join(self._bytes(at, at + 1)) == b"\0"

    def _write(self, at: int, data: bytes, *, durable: bool) -> None:
        segments = list_segments(self.directory)
        newest = segments[-1] if segments else create_segment(self.directory, self._there())
        state = newest.path.stat()
        whole_lines = at == newest.base + state.st_size and (at == newest.base or _ends_line(newest.path))
        full = is_full(state.st_size, state.st_mtime, now(), self.limit, self.daily)
        if data and whole_lines and (full or self._is_sealed(newest)):
            fsync_file(newest.path)  # a crash may have left its last bytes only in memory
            newest = create_segment(self.directory, at)
        handle = os.open(newest.path, os.O_WRONLY | os.O_APPEND)
        try:
            write_all(handle, data)
            reached("derived-written")
            if durable:
                os.fsync(handle)
                fsync_directory(self.directory)
                reached("derived-synced")
        finally:
            os.close(handle)

    def _is_sealed(self, newest: Segment) -> bool:
        """Whether the newest segment is sealed all the same, since the one after it has gone: it must not grow."""
        if newest.path == self._growing:
            return False
        sealed = read_manifest(self.directory)
        if sealed and sealed[-1].base >= newest.base:
            return True
        self._growing = newest.path
        return False

    def _bytes(self, start: int, end: int) -> Iterator[bytes]:
        """What is there, in pieces, wherever it lies."""
        reader = PartitionReader(self.directory, self.name, self._archive)
        try:
            yield from reader.raw(start, end)
        finally:
            reader.close()

    def _cut(self, end: int) -> None:
        sealed = read_manifest(self.directory)
        if sealed and sealed[-1].end > end:
            raise AfterlogError(
                "an older database would have sealed lines of a derived log replaced", where=f"{self.name}:{end}",
                found=f"sealed up to {sealed[-1].end}",
                do="Restore a newer database, or run with the code and settings of then until it is past them",
            )  # fmt: skip
        for segment in reversed(list_segments(self.directory)):
            # What was removed, also by one who died then, is gone for sure: else a power loss may give it back, behind a gap.
            fsync_directory(self.directory)
            if segment.base > end:
                segment.path.unlink()
                continue
            # One that begins at `end` stays, empty: without it the sealed one before it would be the newest, and grow.
            handle = os.open(segment.path, os.O_WRONLY)
            try:
                os.ftruncate(handle, end - segment.base)
                os.fsync(handle)
            finally:
                os.close(handle)
            break

    def _difference(self, at: int, data: bytes) -> NondeterminismError:
        found = b"".join(self._bytes(at, min(at + 80, self._there())))
        return NondeterminismError(
            "the processor gave other bytes than before, for the same input, code and settings",
            where=f"{self.name}:{at}",
            found=f"in the file {found[:80]!r}",
            expected=f"as given now {data[:80]!r}",
            do="Find what in the processor depends on more than its input; nothing was changed",
        )


def whole_lines(tail: bytes) -> int:
    """How many bytes of an unconfirmed tail are lines: up to half a line, or to where a power loss has left NULs."""
    return tail.partition(b"\0")[0].rfind(b"\n") + 1


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
