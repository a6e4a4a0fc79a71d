"""The difference of two generations of a derived log, by `event.id`: added, removed, changed.

Both are read once, line beside line for as long as they are the same; what comes after that goes through a small database
of its own on the disk, so that memory does not grow with the logs.
"""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from storage.errors import CorruptLogError
from storage.reader import PartitionReader
from tasks.intake import recipient_of

HOUR = 3_600_000
EXAMPLES = 10
ADDED, REMOVED, CHANGED = "added", "removed", "changed"
_READ = 1 << 20


class _Verb(msgspec.Struct):
    type: str = ""


class _Named(msgspec.Struct):
    id: int | str | None = None


class _Place(msgspec.Struct, frozen=True):
    offset: int = 0


class _Context(msgspec.Struct):
    source: _Place = _Place()


class _Stamp(msgspec.Struct):
    id: str
    inserted_at: int


class _Wire(msgspec.Struct):
    verb: str | _Verb
    subject: _Named
    context: _Context
    event: _Stamp


_decode = msgspec.json.Decoder(_Wire).decode


@dataclass(frozen=True)
class Side:
    """One generation's partition: what of it is compared. `source_end` leaves out what later lines of its source brought."""

    reader: PartitionReader
    end: int
    source_end: int | None = None


@dataclass(frozen=True)
class Line:
    """One derived event, as far as a comparison needs it; `who` is whom it is about, or for: nobody where no mail can be made of it."""

    id: str
    digest: bytes
    at: int
    verb: str
    who: str
    offset: int
    not_after: int | None


@dataclass(frozen=True)
class Example:
    """One event that differs: when each generation has it, in log time, and where; None where it has it not."""

    kind: str
    id: str
    who: str
    verb: str
    old_at: int | None
    new_at: int | None


@dataclass
class LogDiff:
    """How two generations of a log differ. The hourly counts are of log time."""

    log: str
    old: int = 0
    new: int = 0
    same: int = 0
    added: int = 0
    removed: int = 0
    changed: int = 0
    examples: list[Example] = field(default_factory=list)
    old_hours: Counter[int] = field(default_factory=Counter)
    new_hours: Counter[int] = field(default_factory=Counter)

    @property
    def is_nothing(self) -> bool:
        """Whether both are the same."""
        return not (self.added or self.removed or self.changed)


class Differ:
    """Compares logs partition by partition, and keeps what differs until it is closed."""

    def __init__(self, since: int | None, until: int | None) -> None:
        self._since, self._until = since, until
        self._mails = False
        self._folder = tempfile.TemporaryDirectory(prefix="afterlog-diff-")
        self._db = sqlite3.connect(Path(self._folder.name) / "diff.db", isolation_level=None, check_same_thread=False)
        self._db.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-16000;"
            # An id may be there twice: where a log lost its end, its offsets were given again.
            "CREATE TABLE old (id TEXT, digest BLOB, at, verb, who, offset, not_after, PRIMARY KEY (id, offset)) WITHOUT ROWID;"
            "CREATE TABLE found (log, kind, id, who, verb, old_at, new_at, not_after);"
            "CREATE TABLE mailed (who TEXT, side TEXT, PRIMARY KEY (who, side));"
        )

    def close(self) -> None:
        """Forget everything."""
        self._db.close()
        self._folder.cleanup()

    def compare(self, log: str, sides: list[tuple[Side, Side]], *, mails: bool = False) -> LogDiff:
        """Compare the live generation of a log with another, a pair of sides for each partition; `mails` where its EMAILs are
        delivered."""
        diff, self._mails = LogDiff(log), mails
        for old, new in sides:
            self._partition(diff, old, new)
        for kind in (ADDED, REMOVED, CHANGED):
            [(count,)] = self._db.execute("SELECT COUNT(*) FROM found WHERE log = ? AND kind = ?", (log, kind))
            setattr(diff, kind, count)
            rows = self._db.execute(
                "SELECT kind, id, who, verb, old_at, new_at FROM found WHERE log = ? AND kind = ? ORDER BY rowid LIMIT ?",
                (log, kind, EXAMPLES),
            )
            diff.examples += [Example(*row) for row in rows]
        return diff

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a SELECT gives over `found` (log, kind, id, who, verb, old_at, new_at, not_after), or over `mailed`: who is sent
        mails by which `side`, `old` or `new`, in log order."""
        return self._db.execute(sql, values).fetchall()

    def _partition(self, diff: LogDiff, old: Side, new: Side) -> None:
        before, after = self._lines(old), self._lines(new)
        one, other = next(before, None), next(after, None)
        self._db.execute("BEGIN")
        while one is not None and other is not None and one.id == other.id and one.digest == other.digest:
            self._count(diff, one, other)
            diff.same += 1
            one, other = next(before, None), next(after, None)
        self._db.execute("DELETE FROM old")
        while one is not None:
            self._count(diff, one, None)
            self._db.execute("INSERT INTO old VALUES (?, ?, ?, ?, ?, ?, ?)", _values(one))
            one = next(before, None)
        while other is not None:
            self._count(diff, None, other)
            self._match(diff, other)
            other = next(after, None)
        self._db.execute(
            "INSERT INTO found SELECT ?, ?, id, who, verb, at, NULL, not_after FROM old ORDER BY offset",
            (diff.log, REMOVED),
        )
        self._db.execute("COMMIT")

    def _match(self, diff: LogDiff, line: Line) -> None:
        known = self._db.execute(
            "SELECT digest, at, offset FROM old WHERE id = ? ORDER BY digest <> ?, offset LIMIT 1",
            (line.id, line.digest),
        ).fetchone()
        if known is not None:
            self._db.execute("DELETE FROM old WHERE id = ? AND offset = ?", (line.id, known[2]))
            if known[0] == line.digest:
                diff.same += 1
                return
        kind, at = (ADDED, None) if known is None else (CHANGED, known[1])
        row = (diff.log, kind, line.id, line.who, line.verb, at, line.at, line.not_after)
        self._db.execute("INSERT INTO found VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def _count(self, diff: LogDiff, old: Line | None, new: Line | None) -> None:
        if self._mails:
            lines = [(line, side) for line, side in ((old, "old"), (new, "new")) if line is not None]
            mailed = [(line.who, side) for line, side in lines if line.verb == "EMAIL" and line.who]
            self._db.executemany("INSERT OR IGNORE INTO mailed VALUES (?, ?)", mailed)
        if old is not None:
            diff.old += 1
            diff.old_hours[old.at // HOUR * HOUR] += 1
        if new is not None:
            diff.new += 1
            diff.new_hours[new.at // HOUR * HOUR] += 1

    def _lines(self, side: Side) -> Iterator[Line]:
        for offset, raw in lines_of(side.reader, 0, side.end):
            line = parse_line(raw, offset, derived_source=side.source_end is not None)
            if side.source_end is not None and _source(raw) >= side.source_end:
                return
            if self._since is not None and line.at < self._since:
                continue
            if self._until is not None and line.at >= self._until:
                return  # a derived log is in the order of its clock
            yield line


def lines_of(reader: PartitionReader, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The lines of a derived log, with their offsets."""
    while block := reader.read(start, end, _READ, 1 << 40):
        for raw in block.lines:
            yield start, raw
            start += len(raw) + 1


def parse_line(raw: bytes, offset: int, *, derived_source: bool) -> Line:
    """What a comparison needs of a derived event; where it lies in a log that is derived itself is none of it.

    Raises:
        CorruptLogError: it is no derived event.
    """
    try:
        wire = _decode(raw)
    except msgspec.DecodeError as error:
        raise CorruptLogError(f"no derived event: {error}", where=f"offset {offset}", found=repr(raw[:80])) from error
    verb = wire.verb if isinstance(wire.verb, str) else wire.verb.type
    who, not_after = recipient_of(raw) if verb == "EMAIL" else (str(wire.subject.id), None)
    compared = _without_source(raw) if derived_source else raw
    digest = hashlib.blake2b(compared, digest_size=16).digest()
    return Line(wire.event.id, digest, wire.event.inserted_at, verb, who, offset, not_after)


def _without_source(raw: bytes) -> bytes:
    """A line without its place in a derived log: another generation has the same event at another offset."""
    start = raw.rfind(b'"source":{"log":')
    return raw if start < 0 else raw[:start] + raw[raw.index(b"}", start) :]


def _source(raw: bytes) -> int:
    return _decode(raw).context.source.offset


def _values(line: Line) -> tuple[Any, ...]:
    return line.id, line.digest, line.at, line.verb, line.who, line.offset, line.not_after
