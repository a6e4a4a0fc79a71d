"""What a partition in HOME lacks of its copy in a backup: files that are not there, or go less far there."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from storage.errors import AfterlogError
from storage.manifest import MANIFEST, archived_end, name_of, with_archived
from storage.reader import PartitionReader
from storage.segment import SUFFIX, list_segments

_PIECE = 1 << 20


def lacking(there: Path, copy: Path) -> list[tuple[Path, Path]] | None:
    """The files of the folder `copy` that are to be put into the folder `there`, each with its place.

    None where `there` has every byte of it in other files: a log that was derived again begins them elsewhere, and one
    file more would make it no log any more.

    Raises:
        AfterlogError: the two have other bytes, or other files, and `there` has less.
    """

    def of(pattern: str) -> list[tuple[Path, Path]]:
        pairs = [(source, there / source.name) for source in sorted(copy.glob(pattern))]
        return [pair for pair in pairs if _is_lacking(*pair)]

    found = of(f"*{SUFFIX}")
    if not found or _fit_together(there, copy):
        return found + of(MANIFEST)  # only now: of files that begin elsewhere it says something else
    try:
        _check_covers(there, copy)
    except AfterlogError as error:
        raise AfterlogError(
            f"the log in HOME lacks some of the backup's, and begins its files at other places: {error}", where=str(there),
            do="Move this folder away and restore again, which puts the backup's in its place; it was not changed",
        ) from error  # fmt: skip
    return None


def _is_lacking(source: Path, target: Path) -> bool:
    if target.exists():
        return _is_longer(source, target)
    # Where the archive has it, its file need not be here.
    return not (target.stem.isdigit() and int(target.stem) < archived_end(target.parent))


def _is_longer(source: Path, target: Path) -> bool:
    """Whether a file goes further than another that it begins like.

    Raises:
        AfterlogError: they differ.
    """
    at = 0
    with source.open("rb") as one, target.open("rb") as two:
        while True:
            a, b = one.read(_PIECE), two.read(_PIECE)
            shared = min(len(a), len(b))
            if a[:shared] != b[:shared]:
                raise _other(target, at)
            if shared < _PIECE:
                return len(a) > len(b)
            at += shared


def _fit_together(there: Path, copy: Path) -> bool:
    """Whether the files of both, the longer one of each name, are one log."""
    ends: dict[int, int] = {}
    for directory in (there, copy):
        for segment in with_archived(directory, list_segments(directory)):
            ends[segment.base] = max(ends.get(segment.base, 0), segment.base + segment.size())
    return all(ends[base] == after for base, after in pairwise(sorted(ends)))


def _check_covers(there: Path, copy: Path) -> None:
    """Make sure that a partition has every byte of its copy.

    Raises:
        AfterlogError: it has not, or what the archive has of it would be needed to tell.
    """
    at = 0
    with PartitionReader(there, name_of(there)) as mine, PartitionReader(copy, name_of(copy)) as theirs:
        newest = theirs.segments()[-1]
        for piece in theirs.raw(0, newest.base + newest.size()):
            if piece != b"".join(mine.raw(at, at + len(piece))):
                raise _other(there, at)
            at += len(piece)


def _other(where: Path, at: int) -> AfterlogError:
    return AfterlogError(
        "the log in HOME is another one than the backup's: they differ", where=str(where),
        found=f"other bytes from {at} on, or within {_PIECE} after it",
        do="Restore into a new HOME, or move this log away if it is damaged; it was not changed",
    )  # fmt: skip
