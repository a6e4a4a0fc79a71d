"""A processor's state: rows of the database, a bounded part of them in memory, written where they changed."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import msgspec
import sqlalchemy as sa

from storage.database import Database
from storage.statements import execute_many, mark

S = TypeVar("S")
Due = tuple[int, int]
"""What `Processor.due` is compared with, and a rank among equals."""

_UPSERT = (
    "INSERT INTO state (checkpoint, key, value, due, rank) VALUES (:checkpoint, :key, :value, :due, :rank) ON CONFLICT (checkpoint, key) "
    "DO UPDATE SET value = excluded.value, due = excluded.due, rank = excluded.rank"
)
_DELETE = "DELETE FROM state WHERE checkpoint = :checkpoint AND key = :key"
_ANY = sa.text("SELECT 1 FROM state WHERE checkpoint = :checkpoint LIMIT 1")
_EARLIEST = sa.text("SELECT MIN(due) FROM state WHERE checkpoint = :checkpoint")
_DUE = sa.text(
    "SELECT key, value, due, rank FROM state WHERE checkpoint = :checkpoint AND due < :bound AND (due, rank, key) > (:due, :rank, :key) "
    "ORDER BY due, rank, key LIMIT :at_once"
)
_CHUNKS = (1, 8, 64, 512)
"""How many keys are looked up at once: few numbers, since a connection keeps its last hundred statements, each with what it takes."""


class StateStore(Generic[S]):
    """The state of one processor in one partition, by its own keys.

    `get` gives the object itself: whoever changes it says so with `put`. What was put is in memory until `write`
    was part of a commit.
    """

    def __init__(
        self,
        database: Database,
        checkpoint: int,
        kind: type[S],
        cache_keys: int,
        due_of: Callable[[S], Due | None] = lambda _: None,
    ) -> None:
        self._due_of = due_of
        self._database, self._checkpoint, self._cache_keys = database, checkpoint, cache_keys
        self._encode: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
        self._decode: Callable[[bytes], S] = msgspec.msgpack.Decoder(kind).decode
        self._cache: dict[str, S | None] = {}  # as committed
        self._changed: dict[str, S | None] = {}  # since then: few, and at hand
        self._dues: dict[str, Due | None] = {}  # of those put one by one
        with database.read() as connection:
            self.complete = connection.execute(_ANY, {"checkpoint": checkpoint}).first() is None
        """Whether what is not in memory is nowhere: while nothing was there at the start, nor evicted since."""
        self._earliest, self._is_earliest = self._stored_earliest(), True
        self._ticked: list[str] | None = None  # whose states a tick took since the last commit, if there was one

    @property
    def earliest(self) -> int | None:
        """Nothing is due before this; None where nothing is due ever."""
        if not self._is_earliest:
            for key in self._changed:
                self._lower(self._due(key))
            self._is_earliest = True
        return self._earliest

    def get(self, key: str) -> S | None:
        """The state under `key`, None where there is none."""
        found = self._changed.get(key)
        if found is None and key not in self._changed:
            found = self._cache.get(key)
            if found is None and not self.complete and key not in self._cache:
                self.prefetch([key])
                found = self._cache[key]
        return found

    def put(self, key: str, value: S, due: Due | None = None) -> None:
        """Set the state under `key`; `due` and a rank among equals make it found by `due_before`."""
        self._changed[key] = value
        self._dues[key] = due
        self._lower(due)

    def put_all(self, values: Mapping[str, S]) -> None:
        """`put` for many at once, each with the due that `due_of` says: it is asked once, when it matters."""
        self._changed.update(values)
        self._is_earliest = False
        if self._dues:
            for key in values:
                self._dues.pop(key, None)

    def drop(self, key: str) -> None:
        """Forget the state under `key`."""
        self._changed[key] = self._dues[key] = None

    def prefetch(self, keys: Iterable[str]) -> None:
        """Read what is not in memory yet, many keys a statement."""
        if self.complete:
            return
        wanted = set(keys)
        missing = sorted(key for key in wanted if key not in self._changed and key not in self._cache)
        if not missing:
            return
        self._make_room(len(missing), wanted)
        with self._database.read() as connection:
            for start in range(0, len(missing), _CHUNKS[-1]):
                chunk = missing[start : start + _CHUNKS[-1]]
                self._cache.update(dict.fromkeys(chunk))
                chunk += chunk[-1:] * (next(size for size in _CHUNKS if size >= len(chunk)) - len(chunk))
                one = mark(connection)
                marks = ", ".join([one] * len(chunk))
                sql = f"SELECT key, value FROM state WHERE checkpoint = {one} AND key IN ({marks})"  # noqa: S608  # marks only
                for key, value in connection.exec_driver_sql(sql, (self._checkpoint, *chunk)):
                    self._cache[key] = self._decode(value)

    def due_before(self, bound: int, at_once: int) -> Iterator[list[tuple[str, S]]]:
        """The states due before `bound`, by due and rank, in lists of `at_once`.

        Whoever takes a list puts or drops each of its states, and may go on while nothing is committed.
        """
        self._ticked = ticked = self._ticked or []
        # What was put since the last commit has another due by now than its row says.
        as_there = self._database.sorted_as
        fresh = sorted(
            (*due, as_there(key), key)
            for key in self._changed
            if (due := self._due(key)) is not None and due[0] < bound
        )
        merged = heapq.merge(fresh, self._stored(bound, at_once))
        while found := [key for *_, key in itertools.islice(merged, at_once)]:
            ticked += found
            yield [(key, self.get(key)) for key in found]  # type: ignore[misc]  # what is due is there

    def _stored(self, bound: int, at_once: int) -> Iterator[tuple[int, int, str, str]]:
        """The rows due before `bound` that have not changed since the last commit, by due, rank and key; read into memory."""
        after = (-(2**63), 0, "")
        while True:
            with self._database.read() as connection:
                rows = connection.execute(_DUE, {"checkpoint": self._checkpoint, "bound": bound, "at_once": at_once,
                    "due": after[0], "rank": after[1], "key": after[2]}).all()  # fmt: skip
            for key, value, due, rank in rows:
                if key not in self._changed:
                    self._remember(key, value)
                    yield due, rank, self._database.sorted_as(key), key
            if len(rows) < at_once:
                return
            after = (rows[-1].due, rows[-1].rank, rows[-1].key)

    def is_still_due(self, key: str, bound: int) -> bool:
        """Whether a state that `due_before` gave is due still: neither dropped since, nor put with no due or one from `bound` on."""
        if key not in self._changed:
            return True
        due = self._dues[key] = self._due(key)
        return due is not None and due[0] < bound

    @property
    def dirty(self) -> int:
        """How many keys have changed since the last commit."""
        return len(self._changed)

    def write(self, connection: sa.Connection) -> None:
        """Write the changes since the last commit; part of the commit's transaction."""
        execute_many(connection, _UPSERT, self._rows())
        gone = ((self._checkpoint, key) for key, value in self._changed.items() if value is None)
        execute_many(connection, _DELETE, gone)
        self._is_earliest = True

    def committed(self) -> None:
        """The changes are in the database: memory may let go of them."""
        for key in self._changed.keys() & self._cache.keys():
            del self._cache[key]  # to stand at the end, as the most recent
        self._cache.update(self._changed)
        self._make_room(0, set())
        self._changed.clear()
        self._dues.clear()
        if self._ticked is not None:
            if not self.complete:
                for key in self._ticked:  # nothing was heard of it for long, and it may be one of very many
                    self._cache.pop(key, None)
            self._earliest, self._ticked = self._stored_earliest(), None

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        """The rows of what has changed, in the table's own order, so that neighbours share a page."""
        for key in sorted(self._changed):
            value = self._changed[key]
            if value is not None:
                due = self._due(key)
                self._lower(due)
                yield self._checkpoint, key, self._encode(value), *(due or (None, None))

    def _make_room(self, count: int, wanted: set[str]) -> None:
        """Have memory let go of those that were committed or read longest ago, for `count` others, but of none `wanted`."""
        excess = len(self._cache) + count - self._cache_keys
        if excess > 0:
            for key in list(itertools.islice((key for key in self._cache if key not in wanted), excess)):
                del self._cache[key]
            self.complete = False

    def _remember(self, key: str, value: bytes) -> None:
        if self._cache.get(key) is None:
            self._cache[key] = self._decode(value)

    def _due(self, key: str) -> Due | None:
        """The due of what has changed under `key`."""
        if key in self._dues:
            return self._dues[key]
        value = self._changed[key]
        return None if value is None else self._due_of(value)

    def _lower(self, due: Due | None) -> None:
        if due is not None and (self._earliest is None or due[0] < self._earliest):
            self._earliest = due[0]

    def _stored_earliest(self) -> int | None:
        with self._database.read() as connection:
            found = connection.scalar(_EARLIEST, {"checkpoint": self._checkpoint})
        return None if found is None else int(found)
