"""Which settings and code a processor worked with, from where on: as the log `clock` recorded it, for a replay to repeat."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import orjson

from storage.batches import BatchCache
from storage.clock import Clock
from storage.commit import Position
from storage.errors import UsageError
from storage.event import MAX_DERIVED_DEPTH
from storage.reader import PartitionReader
from tasks.processors import contract
from tasks.topology import Topology


@dataclass(frozen=True)
class Place:
    """A moment of one processor in one partition: what lies before `offset` is taken, and so are the ticks before `tick_offset`."""

    offset: int
    tick_offset: int = 0

    def is_reached(self, position: Position | Place) -> bool:
        """Whether `position` is at this place or beyond it."""
        return position.offset >= self.offset and position.tick_offset >= self.tick_offset


@dataclass(frozen=True)
class Version:
    """From `place` on: these settings, this code. `clock` is the log's greatest clock before it, `at_clock` where it is recorded."""

    place: Place
    settings: dict[str, Any]
    code: str
    clock: int = 0
    at_clock: int = 0
    max_line: int = 0
    """The longest line; 0 of a derived log, which has no limit, and where the clock does not say."""


def recorded(lines: Iterable[Mapping[str, Any]], processor: str, generation: int, source: str) -> list[Version]:
    """The versions of a generation of a processor over `source` (`events/0`), in order.

    A processor that went back (after a crash, or a backup put back) recorded anew what it went on with from there; what
    had been recorded for later places never came to be.
    """
    found: list[Version] = []
    for line in lines:
        if (line["processor"], line["generation"]) != (processor, generation) or source not in line["from"]:
            continue
        offset = line["from"][source]
        place = Place(offset, line.get("tick_offset", line["at_clock"] if offset else 0))
        while found and (found[-1].place == place or not found[-1].place.is_reached(place)):
            found.pop()
        version = Version(place, line["settings"], line["code"], line.get("clock", 0), line["at_clock"])
        found.append(replace(version, max_line=line.get("max_line", 0)))
    first = next((version.max_line for version in found if version.max_line), 0)  # an older Afterlog did not record it
    return [replace(version, max_line=version.max_line or first) for version in found]


def lesser(one: Place, other: Place) -> Place:
    """The one that comes first."""
    return one if one.is_reached(other) else other


def in_force(versions: Sequence[Version], position: Position | Place) -> Version:
    """The version that holds at a position; the first one, where none begins before it."""
    return next((v for v in reversed(versions) if v.place.is_reached(position)), versions[0])


def without_ticks(versions: Iterable[Version]) -> list[Version]:
    """The same by offsets alone, for a replay that takes no recorded ticks."""
    return [replace(version, place=Place(version.place.offset)) for version in versions]


def by_clock(
    versions: Sequence[Version], reader: PartitionReader, log: str, partition: int, end: int, same: int = 0
) -> list[Version]:
    """The same in another generation of the log that is read, where offsets are others: each from the first later clock on.

    Up to the offset `same` they are not: of events with one clock only their place tells which settings they met.
    """
    count = max(1, sum(version.place.offset <= same for version in versions))
    found, rest = list(versions[:count]), list(versions[count:])
    cache, offset, clock = BatchCache(1 << 20, 1 << 40, MAX_DERIVED_DEPTH, kept=1), 0, 0
    while rest and (batch := cache.get(reader, log, partition, offset, end, clock)):
        for event in batch.events:
            while rest and event.clock > rest[0].clock:
                found.append(replace(rest.pop(0), place=Place(event.offset)))
        offset, clock = batch.end, batch.clock
    return found + [replace(version, place=Place(end)) for version in rest]


def make_processor(
    topology: Topology, name: str, settings: Mapping[str, Any], changed: Mapping[str, Any]
) -> contract.Processor[Any]:
    """A processor with recorded settings, but for those that are `changed`.

    Raises:
        UsageError: the code of today does not take the settings of then.
    """
    made = topology.make(name)
    wanted = {**settings, **changed}
    if same_json(msgspec.to_builtins(made.settings, str_keys=True), wanted):
        return made
    try:
        return type(made)(msgspec.convert(wanted, type(made.settings), str_keys=True))
    except msgspec.ValidationError as error:
        raise UsageError(
            f"the code of {name} does not take the settings that were recorded: {error}",
            found=orjson.dumps(wanted).decode(),
            do="Replay with the code of then",
        ) from error


def digest_of(settings: Mapping[str, Any], code: str, max_line: int) -> str:
    """The digest by which a checkpoint knows what is in force."""
    version = {"settings": settings, "code": code} | ({"max_line": max_line} if max_line else {})
    return hashlib.sha256(orjson.dumps(version, option=orjson.OPT_SORT_KEYS)).hexdigest()


def recorded_beyond(clock: Clock, topology: Topology, position: Position) -> list[Version]:
    """Every version of whoever is at `position`, if the clock has any beyond it; as a rule there is none, and little is read."""
    whose = position.processor, position.generation, f"{position.log}/{position.partition}"
    beyond = recorded(clock.versions(position.tick_offset), *whose)
    if not beyond or is_last(beyond, position):
        return []
    found = recorded(clock.versions(), *whose)
    try:
        for version in found:
            make_processor(topology, position.processor, version.settings, {})
    except UsageError:
        return []  # what it was then cannot be had any more
    return found


def is_last(versions: Sequence[Version], position: Position) -> bool:
    """Whether the last one is in force, and the checkpoint knows it."""
    last = versions[-1]
    return last.place.is_reached(position) and position.version == digest_of(last.settings, last.code, last.max_line)


def going_on(versions: Sequence[Version], position: Position, today: Version) -> tuple[Version, str]:
    """How to go on from `position`, and the digest of what the clock says made what is there already.

    Only where that is other than what goes on, the bytes may be others, and it is to be recorded; "" says that it is to be
    recorded, and the bytes are the same. Of code that is gone the settings alone count, as long as today's gives the same.
    """
    version = in_force(versions, position)

    def by_this_code(of: Version) -> str:
        return digest_of(of.settings, today.code, of.max_line or today.max_line)

    # Nobody knows what came before, or this code gave it, with settings that were recorded.
    strict = position.version in {"", *map(by_this_code, versions)}
    if version is not versions[-1] and (strict or version.code == today.code):
        return version, by_this_code(version)
    if strict and version.code != today.code and by_this_code(version) == by_this_code(today):
        return today, ""
    return today, digest_of(version.settings, version.code, version.max_line)


def same_json(one: object, other: object) -> bool:
    """Whether two values are the same once written as JSON."""
    return orjson.dumps(one, option=orjson.OPT_SORT_KEYS) == orjson.dumps(other, option=orjson.OPT_SORT_KEYS)
