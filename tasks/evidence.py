"""Events at their places: what the logs, the clock and the database still tell of one, for those who ask why.

Imports neither Prefect nor SQLAlchemy: a question should be answered at once, also when Prefect's history is gone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from storage.errors import UsageError
from storage.look import Look, Row
from storage.lookup import lines_with
from storage.reader import PartitionReader
from storage.recorded import Ticks, Version, in_force, versions
from storage.store import DELIVERIES, Store
from tasks.topology import DELIVER, Topology

Event = dict[str, Any]
_EXPECTED: tuple[tuple[str, str, type, Any], ...] = (
    ("context", "at", int, -1), ("context", "source", dict, {}), ("event", "id", str, ""), ("event", "inserted_at", int, -1),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a line lies: in the generation that is live, where `generation` is 0."""

    log: str
    partition: int
    offset: int
    generation: int = 0

    def __str__(self) -> str:
        return f"{self.log}:{self.partition}:{self.offset}"


@dataclass(frozen=True)
class WrittenBy:
    """The run that wrote an event; `flow_run_id` and `link` are empty where Prefect did not know it."""

    run: str
    flow_run_id: str
    since: int
    link: str


class Evidence:
    """Reads what is there. `ui` is where Prefect's UI is served, without a slash at its end. Not for several threads."""

    def __init__(self, store: Store, topology: Topology, ui: str = "") -> None:
        self.store, self.topology, self.ui = store, topology, ui
        self.look = Look(store)
        self._readers: dict[tuple[str, int, int], PartitionReader] = {}
        self._writers = {p.writes: p.name for p in topology.all() if p.writes} | {DELIVERIES: DELIVER}
        self._versions: dict[tuple[str, str, int, int], list[Version]] = {}

    def close(self) -> None:
        """Close every file and connection."""
        self.look.close()
        for reader in self._readers.values():
            reader.close()

    def processor_of(self, log: str) -> str:
        """Who writes a log; empty for a raw one."""
        return self._writers.get(log, "")

    def log_of(self, processor: str) -> str:
        """The log that a processor, or `deliver`, writes.

        Raises:
            UsageError: there is none of that name, or it writes none.
        """
        log = next((log for log, name in self._writers.items() if name == processor), None)
        if log is None:
            known = ", ".join(sorted(self._writers.values()))
            raise UsageError("no such event", found=f"an id of {processor!r}", expected=f"one of {known}")
        return log

    def generation_of(self, log: str) -> int:
        """The generation of a log that is live."""
        return self.look.live_generation(log)

    def generation_at(self, place: Place) -> int:
        """The generation in which a place lies."""
        return place.generation or self.generation_of(place.log)

    def others(self, log: str) -> list[int]:
        """The generations of a derived log that are there and not live, newest first."""
        live = self.generation_of(log)
        return [g for g in reversed(self.look.generations()) if g != live and self._is_there(log, g)]

    def line(self, place: Place) -> bytes:
        """The line at a place.

        Raises:
            UsageError: there is none, or a line does not start there.
        """
        generation = self.generation_at(place)
        partitions = self.store.partitions(place.log, generation)
        if place.generation and not self._is_there(place.log, generation):
            raise UsageError(f"generation {generation} of {place.log} is gone: it was discarded", where=str(place))
        if place.partition not in partitions:
            known = ", ".join(map(str, partitions))
            raise UsageError("there is no such line", where=str(place), expected=f"one of the partitions {known}")
        reader = self._reader(place.log, place.partition, generation)
        end = self._end(place.log, place.partition, generation)
        if place.offset >= end:
            raise UsageError("there is no such line", where=str(place), expected=f"an offset below {end}")
        start = place.offset and reader.line_start(place.offset + 1)
        if start != place.offset:  # or it is an empty line, whose one byte ends it
            start = reader.line_start(place.offset)
        if start != place.offset:
            raise UsageError("not the start of a line", where=str(place), do=f"The line there starts at {start}")
        return reader.line(place.offset)

    def lines_with(
        self, log: str, needle: bytes, partition: int | None = None, generation: int = 0
    ) -> Iterator[tuple[Place, bytes]]:
        """The committed lines of a log that hold some bytes, oldest first; of the generation that is live where none is named."""
        of = generation or self.generation_of(log)
        for part in self.store.partitions(log, of):
            if partition not in (None, part):
                continue
            for offset, line in lines_with(self._reader(log, part, of), needle, self._end(log, part, of)):
                yield Place(log, part, offset, generation), line

    def version(self, processor: str, place: Place, generation: int, run: WrittenBy | None = None) -> Version | None:
        """Settings and code of a processor when it took the line at `place`, in `run`; None where none were written down."""
        key = processor, place.log, place.partition, generation
        if key not in self._versions:
            self._versions[key] = versions(self.store, processor, place.log, place.partition, generation)
        return in_force(self._versions[key], place.offset, run.since if run else None)

    def ticks(self, place: Place) -> Ticks:
        """The ticks that the partition of `place` saw."""
        return Ticks(self.store, place.log, place.partition)

    def written_by(self, place: Place) -> WrittenBy | None:
        """The run that wrote the line at `place` of a derived log; None where no note of it is left."""
        rows: list[Row] = self.look.rows(
            'SELECT run, flow_run_id, since FROM written_by WHERE log = :log AND generation = :generation '
            'AND "partition" = :partition AND start <= :offset ORDER BY start DESC LIMIT 1',
            log=place.log, generation=self.generation_at(place), partition=place.partition, offset=place.offset,
        )  # fmt: skip
        if not rows:
            return None
        run_id = rows[0]["flow_run_id"]
        return WrittenBy(
            rows[0]["run"], run_id, rows[0]["since"], f"{self.ui}/runs/flow-run/{run_id}" if run_id else ""
        )

    def _is_there(self, log: str, generation: int) -> bool:
        return self.store.directory(log, 0, generation).parent.is_dir()

    def _reader(self, log: str, partition: int, generation: int) -> PartitionReader:
        key = log, partition, generation
        if key not in self._readers:
            self._readers[key] = self.store.reader(*key)
        return self._readers[key]

    def _end(self, log: str, partition: int, generation: int) -> int:
        if self.processor_of(log):
            return self.look.committed_end(log, partition, generation)
        return self._reader(log, partition, generation).end()


def check_text(text: str) -> str:
    """`text`, if it can stand in a log: the command line gives bytes that are no UTF-8 as lone surrogates.

    Raises:
        UsageError: it cannot.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError("no such id: what stands in a log is UTF-8", found=ascii(text[:200]))
    return text


def as_json(text: str) -> bytes:
    """A text as derived lines have it, without its quotes."""
    return orjson.dumps(text)[1:-1]


def parse_event(line: bytes) -> Event:
    """A derived event. What a processor of one's own left out of it, or gave as another thing, is empty, a time -1."""
    found = parse_json(line)
    event: Event = found if isinstance(found, dict) else {}
    for part in ("subject", "object", "context", "event"):
        event[part] = event[part] if isinstance(event.get(part), dict) else {}
    for part, key, kind, empty in _EXPECTED:
        if not isinstance(event[part].get(key), kind):
            event[part][key] = empty
    source, verb = event["context"]["source"], event.get("verb")
    if not all(isinstance(source.get(key), kind) for key, kind in (("log", str), ("partition", int), ("offset", int))):
        event["context"]["source"] = {}
    if not isinstance(verb.get("type") if isinstance(verb, dict) else verb, str):
        event["verb"] = ""
    return event


def parse_json(data: bytes) -> Any:
    """Any JSON of a log; a number that no double holds, or of more than 4,000 digits, is given as its text."""
    return json.loads(data, parse_int=lambda text: int(text) if len(text) <= 4000 else text, parse_float=_float)


def _float(text: str) -> float | str:
    value = float(text)
    return value if math.isfinite(value) else text
