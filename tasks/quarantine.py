"""The quarantine, for people: what is in it, and trying a line again once it is corrected or the judge would take it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass

import orjson

from storage.door import append_lines, is_ahead
from storage.errors import AfterlogError, AppendError, UsageError
from storage.event import Rejected
from storage.judge import judge
from storage.look import Look
from storage.store import Store
from storage.times import now

QUARANTINE = "quarantine"
_PREFIX, _SUFFIX = "quarantine/", "/rejected"
_PIECE, _LONGEST = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Quarantined:
    """A bad line: `id` is its place, `log:partition:offset`; `retried` where it went when it was tried again."""

    id: str
    reason: str
    length: int
    head: str
    at: int
    retried: str


@dataclass(frozen=True)
class Retry:
    """A line that was tried again: from where, to where."""

    id: str
    log: str
    partition: int
    offset: int


def list_quarantine(store: Store, reason: str = "") -> Iterator[Quarantined]:
    """The quarantined lines in log order, those with `reason` in their reason; `head` is up to 80 characters of the line."""
    look = Look(store)
    try:
        done = {f"{r['log']}:{r['partition']}:{r['offset']}": r for r in look.rows("SELECT * FROM retried")}
        for partition in store.partitions(QUARANTINE):
            for line in _lines(store, partition, look.committed_end(QUARANTINE, partition)):
                event = orjson.loads(line)
                obj, ident = event["object"], event["event"]["id"].removeprefix(_PREFIX).removesuffix(_SUFFIX)
                if reason not in obj["reason"]:
                    continue
                head = base64.b64decode(obj["bytes"][:432]).decode("utf-8", "replace")[:80]
                retried = done.get(ident)
                to = f"{retried['log']}:{retried['to_partition']}:{retried['to_offset']}" if retried else ""
                to = "not known" if retried and retried["state"] != "DONE" else to
                yield Quarantined(ident, obj["reason"], obj["length"], head, event["context"]["at"], to)
    finally:
        look.close()


def retry(store: Store, ident: str, line: bytes | None = None, *, force: bool = False) -> Retry:
    """Append a quarantined line again to the log it came from: `line` where it was corrected, else the same bytes.

    Raises:
        UsageError: it is not in the quarantine, was tried again before, or the judge would refuse the line.
    """
    found = find(store, ident)
    log, partition, offset = found.id.rsplit(":", 2)
    reader = store.reader(log, int(partition))
    try:
        line = reader.line(int(offset)) if line is None else line
    finally:
        reader.close()
    check_line(store, line, found.id)
    from storage.retries import Place, begin_retry, finish_retry, forget_retry  # the list does without SQLAlchemy

    place = Place(log, int(partition), int(offset))
    begin_retry(store.database, place, force=force)
    try:
        [position] = append_lines(store, log, [line]).positions
    except AppendError:
        forget_retry(store.database, place)
        raise
    if position is None:  # the wall clock was set back since the check
        raise AfterlogError("the line went to the log refused: its clock lies ahead of now", where=found.id)
    finish_retry(store.database, place, *position)
    return Retry(found.id, log, *position)


def find(store: Store, ident: str) -> Quarantined:
    """The quarantined line that a person means by an id, by the event's own id, or by an offset.

    Raises:
        UsageError: there is none, or several.
    """
    wanted = ident.strip().removeprefix(_PREFIX).removesuffix(_SUFFIX)
    every = [each for each in list_quarantine(store) if wanted in (each.id, each.id.rpartition(":")[2])]
    if not every:
        raise UsageError(
            "not in the quarantine", found=repr(ident[:200]), expected="an id such as events:0:6400, or its offset 6400",
            do="See: afterlog quarantine list",
        )  # fmt: skip
    if len(every) > 1:
        raise UsageError(
            f"{len(every)} lines in quarantine are at offset {wanted}", do=f"Say which: {every[0].id}, ..."
        )
    return every[0]


def check_line(store: Store, line: bytes, where: str) -> None:
    """Make sure that the judge takes a line.

    Raises:
        UsageError: it does not, with its reason.
    """
    settings = store.settings
    try:
        if b"\n" in line:
            raise Rejected("more than one line")
        if len(line) > settings.max_line:
            raise Rejected(f"too long: {len(line)} bytes, at most {settings.max_line}")
        judge(line, 0, 0)
        if is_ahead(line, now() + settings.ahead):
            raise Rejected("its clock lies ahead of now")
    except Rejected as error:
        raise UsageError(
            f"the judge refuses the line: {error}", where=where, do="Nothing was appended; give a corrected line"
        ) from error


def _lines(store: Store, partition: int, end: int) -> Iterator[bytes]:
    reader, start = store.reader(QUARANTINE, partition), 0
    try:
        while block := reader.read(start, end, _PIECE, _LONGEST):
            yield from block.lines
            start = block.end
    finally:
        reader.close()
