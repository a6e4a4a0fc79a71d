"""What a replay is to do: from what a person asks for, and from how things stand, to a plan that a crash does not lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from storage.batches import BatchCache
from storage.clock import Clock
from storage.errors import UsageError
from storage.event import MAX_DERIVED_DEPTH
from storage.generations import ReplayRow, read_ends
from storage.settings import Settings, load_settings
from storage.store import Store
from storage.times import parse_moment, parse_time, show, typed_number
from tasks.process import check_as_of, process_to_end
from tasks.run import Run
from tasks.timeline import Place
from tasks.topology import DECIDES, Topology, build_topology

Ticks = int | Literal["recorded", "log-end"]
ALL = "all"


class Request(msgspec.Struct, frozen=True):
    """What a person asks for. An offset stands for the clock of the line there; `from_` and `to` limit what is compared.

    `as_of`: the recorded ticks, or one tick at the end: of the log's greatest clock, or of a time.
    """

    processors: tuple[str, ...] = ()
    from_: str = ALL
    to: str = ALL
    settings: dict[str, Any] = {}
    as_of: Ticks = "recorded"
    name: str = ""


class Plan(msgspec.Struct):
    """What a generation is made of; kept with it."""

    request: Request
    processors: list[str]
    """Those asked for and all that read what they write, each after those it reads from."""
    logs: list[str]
    """What they write."""
    base: dict[str, int]
    """By log that they read or write: the generation that was live."""
    changed: dict[str, dict[str, Any]]
    """By processor: its settings that are other than the recorded ones."""
    since: int | None
    until: int | None
    """What is compared: events that came in from `since` on, before `until`, in log time."""
    goals: dict[str, tuple[int, int]]
    """By `processor/partition`: where to end. One that reads what another of them writes ends at its end."""
    ends: dict[str, int]
    """By `log/partition`: the live committed ends to compare with."""
    moved_at: int = 0
    """Once it was promoted: the end of the log `clock` then."""


@dataclass
class Planned:
    """A replay and its plan."""

    row: ReplayRow
    plan: Plan
    notes: list[str] = field(default_factory=list)
    """What a person should be told of how things stood before it."""

    @property
    def generation(self) -> int:
        """The number of the generation that it makes."""
        return self.row.generation


def read_plan(row: ReplayRow) -> Planned:
    """The plan of a replay, as it was kept."""
    return Planned(row, msgspec.json.decode(row.plan, type=Plan))


def write_plan(plan: Plan) -> str:
    """The plan as it is kept."""
    return msgspec.json.encode(plan).decode()


def make_plan(store: Store, topology: Topology, request: Request, holder: str) -> Plan:
    """Decide what a replay works on, and up to where: to the live checkpoints as they are now.

    What reads the logs that are replayed is brought to their live ends first, so that the same is compared with the same.

    Raises:
        UsageError: something in `request` cannot be.
    """
    processors = [n for n in topology.downstream(_chosen(topology, request)) if topology.writes(n) is not None]
    changed = changed_settings(topology, request.settings)
    _check_changed(changed, processors, request)
    if isinstance(request.as_of, int):
        check_as_of(request.as_of)
    live = Run(store, topology, holder)
    logs = [str(topology.writes(name)) for name in processors]
    reads = {topology.reads(name) for name in processors}
    base = {log: live.generation(log) for log in sorted({*logs, *reads})}
    positions, ends = read_ends(store.database, base)
    compare = {f"{log}/{part}": end for (log, part), end in ends.items() if log in logs}
    since, until = _time(live, reads, request.from_), _time(live, reads, request.to)
    if since is not None and until is not None and since >= until:
        raise UsageError(
            "a replay from a moment on that is not before its end",
            found=f"{show(since)} and {show(until)}", expected="from before to",
        )  # fmt: skip
    goals = {}
    for p in positions:
        if p.processor in processors and p.log not in logs:
            place = Place(p.offset, p.tick_offset)
            goals[f"{p.processor}/{p.partition}"] = _before(live, p.log, p.partition, place, until)
    for name in processors:
        if topology.reads(name) in logs:
            process_to_end(live, name, None)
            log = str(topology.writes(name))
            compare |= {f"{log}/{part}": store.committed_end(log, part) for part in store.partitions(log)}
    return Plan(request, processors, logs, base, changed, since, until, goals, compare)


def check_readers(topology: Topology, plan: Plan) -> None:
    """Make sure that whoever makes a log of what a replay would move was replayed with it: its log is made of what is live.

    Raises:
        UsageError: a processor was not, since it was named after the replay was made.
    """
    for name in topology.downstream(plan.processors):
        if name not in plan.processors and topology.writes(name) is not None:
            raise UsageError(
                f"{name} reads {topology.reads(name)}, and was not replayed with it", found=", ".join(plan.processors),
                do="Replay again",
            )  # fmt: skip


def changed_settings(topology: Topology, wanted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By processor, what of its settings is other, for settings as a person writes them (`timeout`: `45m`).

    Raises:
        UsageError: a setting is none, does not fit, or changes nothing of what processors give.
    """
    for name in wanted:
        if name not in DECIDES:
            known = name in Settings.__struct_fields__
            raise UsageError(
                f"setting {name} changes nothing of what a replay gives" if known else f"no such setting: {name}",
                expected=f"one of {', '.join(DECIDES)}",
            )
    other = build_topology(load_settings(**wanted)) if wanted else topology
    found: dict[str, dict[str, Any]] = {}
    for name in wanted:
        for processor, fields in DECIDES[name]:
            made = msgspec.to_builtins(other.make(processor).settings, str_keys=True)
            found.setdefault(processor, {}).update({field: made[field] for field in fields})
    return found


def _chosen(topology: Topology, request: Request) -> list[str]:
    writers = [name for name in topology.processors if topology.writes(name) is not None]
    if not request.processors:
        changed = changed_settings(topology, request.settings)
        return [name for name in writers if name in changed] or writers
    for name in request.processors:
        if topology.make(name).writes is None:
            raise UsageError(
                f"{name} writes rows and no log, so there is nothing to compare",
                expected=f"one of {', '.join(writers)}",
            )
    return list(request.processors)


def _check_changed(changed: Mapping[str, object], processors: list[str], request: Request) -> None:
    for name, deciding in DECIDES.items():
        touched = [processor for processor, _ in deciding]
        if name in request.settings and not any(processor in processors for processor in touched):
            raise UsageError(
                f"setting {name} is of {' and '.join(touched)}, not of what is replayed", found=", ".join(processors)
            )


def check_place(option: str, text: str) -> None:
    """Make sure that a text says a place to begin or to end at.

    Raises:
        UsageError: it is neither `all`, an offset, nor a time.
    """
    if text != ALL and typed_number(text) is None and parse_time(text) is None:
        raise UsageError(
            f"{option} is neither an offset nor a time", found=repr(text),
            expected="all, digits, or RFC 3339 such as 2026-01-31T12:00:00Z",
        )  # fmt: skip


def _time(run: Run, reads: set[str], text: str) -> int | None:
    """The moment in log time that a person means by an offset or a time; None for all.

    Raises:
        UsageError: it is neither, or an offset beyond the log's end, or of one of several partitions.
    """
    check_place("the range", text)
    if text == ALL:
        return None
    offset = typed_number(text)
    if offset is None:
        return parse_time(text)
    raw = sorted(reads & set(run.topology.raw_logs()))
    places = [(log, part) for log in raw for part in run.store.partitions(log)]
    if len(places) != 1:
        raise UsageError(
            "an offset of which partition?", found=", ".join(f"{log}/{part}" for log, part in places) or "no raw log",
            do="Give a time instead",
        )  # fmt: skip
    with run.store.reader(*places[0]) as reader:
        if offset > reader.end():
            raise UsageError(
                f"{places[0][0]}/{places[0][1]} ends before that offset",
                found=offset,
                expected=f"{reader.end()} at most",
            )
    return _walk(run, *places[0], lambda event_offset, _clock: event_offset >= offset)[1]


def _before(run: Run, log: str, partition: int, live: Place, until: int | None) -> tuple[int, int]:
    """The place at which everything before `until` is taken, and no tick of it or later; the live one at most."""
    if until is None:
        return live.offset, live.tick_offset
    offset = min(live.offset, _walk(run, log, partition, lambda _offset, clock: clock >= until)[0])
    at = tick_offset = 0
    with Clock(run.store, run.topology.raw_logs()) as clock:
        while at < live.tick_offset:
            ticks, at = clock.ticks(at, live.tick_offset)
            for tick in ticks:
                if tick.as_of >= until or tick.ends.get(f"{log}/{partition}", 0) > offset:
                    return offset, tick_offset
                tick_offset = tick.next_offset
    return offset, tick_offset


def _walk(run: Run, log: str, partition: int, found: Any) -> tuple[int, int]:
    """Offset and clock of the first event of which `found` says so; the log's end, and a time beyond it, where there is none."""
    derived = log in run.topology.derived_logs()
    reader = run.store.reader(log, partition)
    cache = BatchCache(1 << 20, 1 << 40, MAX_DERIVED_DEPTH, kept=1)
    if not derived:
        cache = BatchCache(1 << 20, run.store.settings.max_line, kept=1)
    end, offset, clock = run.store.committed_end(log, partition) if derived else reader.end(), 0, 0
    try:
        while batch := cache.get(reader, log, partition, offset, end, clock):
            for event in batch.events:
                if found(event.offset, event.clock):
                    return event.offset, event.clock
            offset, clock = batch.end, batch.clock
    finally:
        reader.close()
    return end, clock + 1


def parse_ticks(text: str) -> Ticks:
    """What a person means by as of.

    Raises:
        UsageError: it is no time.
    """
    if text == "recorded" or text == "log-end":  # the type checker narrows this way
        return "recorded" if text == "recorded" else "log-end"
    return parse_moment(text, "as-of", "recorded", "log-end")


def describe(planned: Planned) -> str:
    """What a replay is, in one line."""
    plan, request = planned.plan, planned.plan.request
    words = [f"{', '.join(plan.processors)}"]
    words += [f"{name}={value}" for name, value in request.settings.items()]
    if plan.since is not None or plan.until is not None:
        words.append(f"from {'the beginning' if plan.since is None else show(plan.since)}")
        words.append(f"to {'the end' if plan.until is None else show(plan.until)}")
    if request.as_of != "recorded":
        words.append(f"as of {show(request.as_of) if isinstance(request.as_of, int) else request.as_of}")
    return " ".join(words)
