"""Verifying: every sealed byte against the chain, here and in the archive, and the place of whatever is wrong."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from storage.archive import Archive, into
from storage.errors import AfterlogError
from storage.manifest import ARCHIVED, MANIFEST, archived_end, digest_of, genesis, name_of, parse_entry, seal
from storage.segment import Entry, Segment, list_segments
from storage.span import span_of


@dataclass
class Verified:
    """One partition as it was found. `head` is the hash of its last entry; `problems` has a sentence for each wrong place."""

    name: str
    segments: int = 0
    archived: int = 0
    events: int = 0
    bytes: int = 0
    head: str = ""
    sealed_now: int = 0
    hashes: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


class Verifier:
    """Verifies partitions, with a thread for each processor of the machine."""

    def __init__(self, archive: Archive, workers: int | None = None) -> None:
        self._archive = archive
        self._pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def verify(self, directory: Path, committed: int | None, needed: int = 0) -> Verified:
        """Verify one partition; sealed segments that have no entry yet get theirs first.

        `committed`: up to where a derived log is certain. `needed`: the greatest offset that a checkpoint names.
        """
        found = Verified(name_of(directory))
        try:
            found.sealed_now = seal(directory, committed)
        except AfterlogError as error:
            found.problems.append(str(error))
        except OSError as error:
            found.problems.append(f"{error.filename or directory}: it cannot be sealed: {error.strerror}")
        noted = archived_end(directory)  # before the chain, which an archive that is at work goes on with
        entries = list(self._chain(directory, found))
        local = {segment.base: segment for segment in list_segments(directory)}
        last = local.get(entries[-1].base) if entries else None
        with (
            tempfile.NamedTemporaryFile(prefix="afterlog-verify-") if entries and not last else nullcontext() as fetched
        ):
            problems = self._check_each(directory, found, entries, local, fetched)
            if entries and not problems:
                problems = _check_last(
                    directory, entries, Path(fetched.name) if fetched else local[entries[-1].base].path
                )
        found.problems += problems
        found.problems += _loose_ends(found.name, directory, entries, local, noted, needed)
        return found

    def _check_each(
        self,
        directory: Path,
        found: Verified,
        entries: Sequence[Entry],
        local: dict[int, Segment],
        fetched: IO[bytes] | None,
    ) -> list[str]:
        """What is wrong with segments, here and in the archive; the last of them, where it is not here, is `fetched` by the way."""
        upto, problems, checks = archived_end(directory), list[str](), list[tuple[Entry, Future[str]]]()
        for entry in entries:
            here = local.get(entry.base)
            if here is not None:
                checks.append((entry, self._pool.submit(_check_file, here, entry, entries)))
            elif entry.end > upto:
                problems.append(
                    f"{_place(found.name, entry)}: the segment is missing, and not noted as archived "
                    "(`afterlog archive` notes what the archive has)"
                )
            if entry.end <= upto:
                found.archived += 1
                take = into(fetched, Path(fetched.name).parent) if fetched and entry is entries[-1] else _nowhere
                checks.append((entry, self._pool.submit(self._check_object, directory, entry, take)))
        return problems + [
            f"{_place(found.name, entry)}: {said}" for entry, check in checks if (said := check.result())
        ]

    def _chain(self, directory: Path, found: Verified) -> Iterator[Entry]:
        """The entries of a manifest, each held against the one before."""
        previous, end = genesis(directory), 0
        path = directory / MANIFEST
        lines = (path.read_bytes() if path.exists() else b"").split(b"\n")
        if lines.pop():
            found.problems.append(f"{path}: its last line was cut off")
        found.hashes.add(previous)
        for number, line in enumerate(lines, 1):
            entry = parse_entry(line)
            if entry is None:
                found.problems.append(f"{path}, line {number}: it is no entry: it was changed")
                return
            if entry.previous != previous:
                where = f"{path}, line {number}: it names another entry before it than line {number - 1}"
                found.problems.append(f"{where}: one of the two was changed, or lines are missing or swapped")
            elif entry.base != end:
                found.problems.append(f"{path}, line {number}: it begins at {entry.base}, the one before ends at {end}")
            previous, end = entry.hash, entry.end
            found.hashes.add(previous)
            found.segments += 1
            found.events += entry.events
            found.bytes += entry.length
            yield entry
        found.head = previous

    def _check_object(self, directory: Path, entry: Entry, take: Callable[[bytes], object]) -> str:
        """What is wrong with an archived segment, whose bytes `take` gets; nothing where it is as it was."""
        try:
            self._archive.unpack(directory, entry, take)
        except FileNotFoundError:
            return f"it is missing in the archive, {self._archive.remote.shown}"
        except AfterlogError as error:
            return str(error)
        return ""


def missing_heads(heads: Sequence[str], found: Sequence[Verified]) -> list[str]:
    """A sentence for each noted head that no chain has any more."""
    known = set().union(*(each.hashes for each in found))
    return [
        f"head {head}: no chain has an entry of this hash: the history before it was rewritten or cut off, or the head is no hash that `verify` gave"
        for head in heads
        if head.strip().lower() not in known
    ]


def _nowhere(_piece: bytes) -> None:
    """Keep nothing."""


def _check_last(directory: Path, entries: Sequence[Entry], path: Path) -> list[str]:
    """What is wrong with the last entry: none after it names its hash, so what it says is held against the bytes."""
    entry = entries[-1]
    try:
        span = span_of(path, entries[-2].last if len(entries) > 1 else 0)
    except FileNotFoundError:  # it has gone to the archive since it was listed, where its bytes are checked too
        return []
    said, true = (entry.events, entry.first, entry.last), (span.events, span.first, span.last)
    where = f"{directory / MANIFEST}, line {len(entries)}"
    told = f"{where}: it was changed: it gives {said} as lines, first and last clock; expected {true}"
    return [] if said == true else [told]


def _check_file(segment: Segment, entry: Entry, entries: Sequence[Entry]) -> str:
    """What is wrong with a sealed file; nothing where it is as it was."""
    try:
        size, digest = digest_of(segment.path)
    except FileNotFoundError:  # it has gone to the archive since it was listed, where it is checked too
        return ""
    except OSError as error:  # a bad disk is what this looks for
        return f"{segment.path} cannot be read: {error.strerror}"
    if size < entry.length:
        return f"{segment.path} was cut: {size} bytes, expected {entry.length}"
    if digest == entry.sha256:
        return ""
    other = next((each for each in entries if each.sha256 == digest), None)
    if other is not None:
        return f"{segment.path} holds the bytes of the segment at {other.base}: they were swapped"
    if size > entry.length:
        return f"{segment.path} has grown: {size} bytes, expected {entry.length}"
    return f"{segment.path} was changed: SHA-256 {digest}, expected {entry.sha256}"


def _loose_ends(
    name: str, directory: Path, entries: Sequence[Entry], local: dict[int, Segment], noted: int, needed: int
) -> Iterator[str]:
    """What the chain does not cover: files that are no part of it, the newest segment, and what the database has read."""
    known, end = {entry.base for entry in entries}, entries[-1].end if entries else 0
    for base, segment in sorted(local.items()):
        if base < end and base not in known:
            yield f"{name}:{base}: {segment.path} is no part of the chain"
        elif base >= end:
            if base != end:
                yield f"{name}:{end}: bytes are missing before {segment.path}, which begins at {base}"
            end = base + segment.path.stat().st_size
    if noted and noted not in {entry.end for entry in entries}:
        yield f"{directory / ARCHIVED}: it says {noted}, where no segment of the chain ends"
    if end < needed:
        yield f"{name}:{end}: the log was cut: it ends there, and up to {needed} was read from it"


def _place(name: str, entry: Entry) -> str:
    return f"{name}, offsets {entry.base} to {entry.end}"
