"""A processor's state: rows of the database, a bounded part of them in memory, written where they changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import msgspec
import sqlalchemy as sa

from storage.database import Database
from storage.tables import State

S = TypeVar("S")

_UPSERT = (
    "INSERT INTO state (checkpoint, key, value, due, rank) VALUES (?, ?, ?, ?, ?) ON CONFLICT (checkpoint, key) "
    "DO UPDATE SET value = excluded.value, due = excluded.due, rank = excluded.rank"
)
_DELETE = "DELETE FROM state WHERE checkpoint = ? AND key = ?"
_CHUNK = 500
_ROWS_AT_ONCE = 2_000


class StateStore(Generic[S]):
    """The state of one processor in one partition, by its own keys.

    `get` gives the object itself: whoever changes it says so with `put`. What was put is in memory until `write`
    was part of a commit; `due_before` finds only what is committed.
    """

    def __init__(self, database: Database, checkpoint: int, kind: type[S], cache_keys: int) -> None:
        self._database, self._checkpoint, self._cache_keys = database, checkpoint, cache_keys
        self._encode: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
        self._decode: Callable[[bytes], S] = msgspec.msgpack.Decoder(kind).decode
        self._cache: dict[str, S | None] = {}
        self._changed: dict[str, tuple[int, int] | None] = {}
        with database.read() as connection:
            mine = State.checkpoint == checkpoint
            # While nothing was ever evicted, what is not in memory is not in the database either.
            self._complete = connection.execute(sa.select(sa.literal(1)).where(mine).limit(1)).first() is None  # type: ignore[arg-type]  # SQLModel's columns are plain values to the types
        self.earliest = self._earliest()

    def get(self, key: str) -> S | None:
        """The state under `key`, None where there is none."""
        try:
            return self._cache[key]
        except KeyError:
            if self._complete:
                return None
            self.prefetch([key])
            return self._cache[key]

    def put(self, key: str, value: S, due: tuple[int, int] | None = None) -> None:
        """Set the state under `key`; `due` and a rank among equals make it found by `due_before`."""
        self._cache[key] = value
        self._changed[key] = due
        if due is not None and (self.earliest is None or due[0] < self.earliest):
            self.earliest = due[0]

    def drop(self, key: str) -> None:
        """Forget the state under `key`."""
        self._cache[key] = None
        self._changed[key] = None

    def prefetch(self, keys: Iterable[str]) -> None:
        """Read what is not in memory yet, many keys a statement."""
        if self._complete:
            return
        missing = [key for key in keys if key not in self._cache]
        if not missing:
            return
        with self._database.read() as connection:
            for start in range(0, len(missing), _CHUNK):
                chunk = missing[start : start + _CHUNK]
                self._cache.update(dict.fromkeys(chunk))
                mark = _mark(connection)
                marks = ", ".join([mark] * len(chunk))
                sql = f"SELECT key, value FROM state WHERE checkpoint = {mark} AND key IN ({marks})"  # noqa: S608  # marks only
                for key, value in connection.exec_driver_sql(sql, (self._checkpoint, *chunk)):
                    self._cache[key] = self._decode(value)

    def due_before(self, bound: int, limit: int) -> list[tuple[str, S]]:
        """The states due before `bound`, by due and rank, at most `limit`; what is not committed yet is not found."""
        with self._database.read() as connection:
            rows = connection.execute(
                sa.select(State.key, State.value)  # type: ignore[call-overload]  # SQLModel's columns are plain values to the types
                .where(State.checkpoint == self._checkpoint, State.due < bound)  # type: ignore[operator]  # SQLModel's columns are plain values to the types
                .order_by(State.due, State.rank)
                .limit(limit)
            ).all()
        return [(key, self._remember(key, value)) for key, value in rows]

    @property
    def dirty(self) -> int:
        """How many keys have changed since the last commit."""
        return len(self._changed)

    def write(self, connection: sa.Connection) -> None:
        """Write the changes since the last commit; part of the commit's transaction."""
        puts: list[tuple[Any, ...]] = []
        drops: list[tuple[Any, ...]] = []
        for key, due in sorted(self._changed.items()):  # in the table's own order, so that neighbours share a page
            value = self._cache[key]
            if value is None:
                drops.append((self._checkpoint, key))
            else:
                puts.append((self._checkpoint, key, self._encode(value), *(due or (None, None))))
            if len(puts) >= _ROWS_AT_ONCE:
                _execute(connection, _UPSERT, puts)
        _execute(connection, _UPSERT, puts)
        _execute(connection, _DELETE, drops)

    def committed(self) -> None:
        """The changes are in the database: memory may let go of them."""
        if len(self._cache) > self._cache_keys:
            recent = list(self._changed)[-self._cache_keys :]
            self._cache = {key: self._cache[key] for key in recent}
            self._complete = False
        self._changed.clear()

    def refresh_earliest(self) -> None:
        """Look up again what is due first; right only when nothing is dirty."""
        self.earliest = self._earliest()

    def _remember(self, key: str, value: bytes) -> S:
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = self._decode(value)
        return found

    def _earliest(self) -> int | None:
        wanted = sa.select(sa.func.min(State.due)).where(State.checkpoint == self._checkpoint)  # type: ignore[arg-type]  # SQLModel's columns are plain values to the types
        with self._database.read() as connection:
            found = connection.scalar(wanted)
        return None if found is None else int(found)


def _execute(connection: sa.Connection, sql: str, rows: list[tuple[Any, ...]]) -> None:
    """Run a statement for many rows, past SQLAlchemy's own handling of each, which costs more than the write."""
    if rows:
        connection.exec_driver_sql(sql.replace("?", _mark(connection)), rows)
        rows.clear()


def _mark(connection: sa.Connection) -> str:
    return "?" if connection.dialect.paramstyle == "qmark" else "%s"
