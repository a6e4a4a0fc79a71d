"""What people should be woken for: conditions of the logs and the mail, found from what is committed, each told at times."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from storage.locks import locked
from storage.mails import UNKNOWN, WAITING
from storage.store import Store
from storage.tables import Delivery
from storage.times import show
from tasks.brake import last_append
from tasks.latest import parse
from tasks.process import positions
from tasks.status import read_status
from tasks.topology import Topology

BLOCK = "afterlog-alerts"
"""The notification block that a person fills in, of any type: Slack, email, a webhook of their own."""
LAG, SILENT, QUARANTINE, UNKNOWN_MAIL, QUEUE = "lag", "silent", "quarantine", "unknown", "queue"
KINDS = {
    LAG: "a processor that lags",
    SILENT: "a log that is silent",
    QUARANTINE: "many bad lines",
    UNKNOWN_MAIL: "mails that may or may not have arrived",
    QUEUE: "mails that wait too long",
    "brake": "delivery that has stopped itself",
}
"""The name of the Prefect event, `afterlog.lag` say, and what it is about."""

_DELIVERY: sa.Table = Delivery.__table__  # type: ignore[attr-defined]  # SQLModel hides it from the types


@dataclass(frozen=True)
class Alert:
    """One condition that holds: its kind, what it is about (a processor, a log), the sentence, and its figures."""

    kind: str
    about: str
    sentence: str
    figures: dict[str, int | float | str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells one condition from another."""
        return f"{self.kind}/{self.about}"


class Watch:
    """Looks again and again, and gives what people have not been told of, or not for a while."""

    def __init__(self, store: Store, topology: Topology) -> None:
        self._store, self._topology = store, topology
        self._begun = self._lines()

    def look(self, wall: int) -> list[Alert]:
        """The alerts to be told now, at `wall` (milliseconds)."""
        return to_tell(self._store, self.holding(wall), wall)

    def holding(self, wall: int) -> list[Alert]:
        """Every condition that holds."""
        found = [*_lagging(self._store, self._topology), *_silent(self._store, wall)]
        return [*found, *self._quarantined(), *_undelivered(self._store, wall)]

    def _lines(self) -> dict[str, int]:
        """By raw log, how many lines were read and how many were bad, by the processor that has read the most."""
        counts: dict[str, int] = {}
        raw = self._topology.raw_logs()
        by_processor: dict[tuple[str, str], tuple[int, int]] = {}
        for p in positions(self._store):
            if p.log in raw:
                lines, bad = by_processor.get((p.log, p.processor), (0, 0))
                by_processor[p.log, p.processor] = lines + p.lines, bad + p.quarantined
        for log in raw:
            most = max((found for (of, _), found in by_processor.items() if of == log), default=(0, 0))
            counts[f"{log}/lines"], counts[f"{log}/bad"] = most
        return counts

    def _quarantined(self) -> list[Alert]:
        """Too many bad lines among those read since enough of them were looked at last.

        How far that was is one file in HOME: a shift is too short for enough lines of a log in which few come.
        """
        path, settings = self._store.home / "alerts-lines.json", self._store.settings
        found = []
        with locked(self._store.lock_path("alerts.lock")):
            noted, now_read = _read_notes(path), self._lines()
            counted = self._begun | noted
            for log in self._topology.raw_logs():
                here = (f"{log}/lines", f"{log}/bad")
                new, new_bad = (now_read[key] - counted.get(key, 0) for key in here)
                if new < 0 or new_bad < 0:  # an older database, or another generation: from here on anew
                    new = new_bad = 0
                elif new < settings.alert_quarantine_lines:
                    continue
                counted |= {key: now_read[key] for key in here}
                if new and new_bad / new > settings.alert_quarantine:
                    found.append(
                        Alert(
                            QUARANTINE, log, f"{new_bad} of the last {new} lines of log {log} are no events: "
                            "`afterlog read quarantine` has them with their reasons", {"bad": new_bad, "lines": new},
                        )
                    )  # fmt: skip
            _write_notes(path, noted, counted)
        return found


def to_tell(store: Store, holding: Iterable[Alert], wall: int) -> list[Alert]:
    """Those of `holding` that begin now, or were told longest ago than `alert_again`; noted, so that nobody repeats them.

    The notes are one file in HOME, shared by all runs: a shift is a new process each few minutes.
    """
    path = store.home / "alerts.json"
    with locked(store.lock_path("alerts.lock")):
        told = _read_notes(path)
        now_holding = {alert.key: alert for alert in holding}
        again = store.settings.alert_again
        # Told long from now: the wall clock was wrong then, and must not keep anybody from hearing of it.
        told = {key: at for key, at in told.items() if at - wall < again}
        due = [alert for key, alert in now_holding.items() if wall - told.get(key, wall - again) >= again]
        # A lag that comes and goes is one condition: what ended is forgotten only when its turn to be told would come.
        notes = {key: at for key, at in told.items() if wall - at < again}
        notes |= {alert.key: wall for alert in due}
        _write_notes(path, told, notes)
    return due


def _read_notes(path: Path) -> dict[str, int]:
    with contextlib.suppress(FileNotFoundError, ValueError):
        notes = json.loads(path.read_text())
        if isinstance(notes, dict):
            return {key: at for key, at in notes.items() if isinstance(at, int)}
    return {}  # a torn file only means that somebody is told once more


def _write_notes(path: Path, before: dict[str, int], notes: dict[str, int]) -> None:
    if notes != before:
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(notes))
        fresh.replace(path)


def _lagging(store: Store, topology: Topology) -> Iterator[Alert]:
    limit = store.settings.alert_lag
    for row in read_status(store, topology).processors:
        if row.lag_ms > limit:
            yield Alert(
                LAG, f"{row.processor}/{row.log}/{row.partition}",
                f"{row.processor} lags {row.lag_ms // 1000} s ({row.lag_bytes:,} bytes) behind log {row.log}/{row.partition}; "
                f"the limit is {limit // 1000} s", {"seconds": row.lag_ms // 1000, "bytes": row.lag_bytes},
            )  # fmt: skip


def _silent(store: Store, wall: int) -> Iterator[Alert]:
    for log, limit in store.settings.alert_silent.items():
        newest = last_append(store, log)
        if abs(wall - newest) > limit:  # ahead: written under a wall clock that was
            since = f"since {show(newest)}" if newest else "ever"
            yield Alert(
                SILENT, log, f"nothing has come to log {log} {since}; it is never silent for more than {limit // 1000} s",
                {"since": newest},
            )  # fmt: skip


def _undelivered(store: Store, wall: int) -> Iterator[Alert]:
    unknown = sa.select(sa.func.count()).where(_DELIVERY.c.state == UNKNOWN)
    with store.database.read() as connection:
        mails = connection.scalar(unknown) or 0
        waiting = connection.scalar(sa.select(sa.func.count()).where(_DELIVERY.c.state == WAITING)) or 0
    if mails:
        yield Alert(
            UNKNOWN_MAIL, "deliver", f"{mails} mails were being sent when the sender died: a person must say whether "
            "they arrived", {"mails": mails},
        )  # fmt: skip
    limit = store.settings.alert_mail_age
    if waiting and (age := wall - _oldest_waiting(store, wall)) > limit:
        yield Alert(
            QUEUE, "deliver", f"{waiting} mails wait, the oldest for {age // 1000} s; the limit is {limit // 1000} s",
            {"mails": waiting, "seconds": age // 1000},
        )  # fmt: skip


def _oldest_waiting(store: Store, wall: int) -> int:
    """When the oldest mail that waits was written, by its own event: how long it is worth sending tells not, that may have changed."""
    places = (_DELIVERY.c.log, _DELIVERY.c.partition, _DELIVERY.c.generation)
    firsts = sa.select(*places, sa.func.min(_DELIVERY.c.offset)).where(_DELIVERY.c.state == WAITING).group_by(*places)
    with store.database.read() as connection:
        found = connection.execute(firsts).all()
    oldest = wall
    for log, partition, generation, offset in found:
        with store.reader(log, partition, generation) as reader:
            email = parse(reader.line(offset)) or {}
        oldest = min(oldest, email.get("event", {}).get("inserted_at", wall))
    return oldest
