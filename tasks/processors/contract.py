"""The contract of a processor: events in, derived events out, and nothing else.

A processor is pure. It never looks at the wall clock, draws a random number, opens a file or asks a service; all that it
depends on are the events, the ticks, its own state and its settings. That is why a replay gives what the live runs gave.

The smallest one:

    class Processor(contract.Processor):
        name, reads, writes = "vip", "events", "vips"

        def event(self, event, state, out):
            if event.verb == "ORDERED":
                out.emit(self, event, {"id": event.id, "type": "CUSTOMER"}, "VIP", {"type": "NONE"}, name="vip")
            else:
                out.ignored += 1
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import msgspec
import orjson

from storage.event import HEAD, Batch, Event

S = TypeVar("S")


class NoSettings(msgspec.Struct, frozen=True):
    """The settings of a processor that has none."""


class States(Protocol[S]):
    """A processor's state, by keys of its own choice."""

    def get(self, key: str) -> S | None:
        """The state under `key`, None where there is none; say `put` after changing it."""

    def put(self, key: str, value: S, due: tuple[int, int] | None = None) -> None:
        """Set the state under `key`. `due` is what `Processor.due` is compared with, and a rank among equals."""

    def put_all(self, values: Mapping[str, S]) -> None:
        """`put` for many at once, each with the due that `Processor.due_of` says: cheaper than one by one."""

    def drop(self, key: str) -> None:
        """Forget the state under `key`."""


@dataclass
class Output:
    """What a processor gives for what it got."""

    log: str
    partition: int
    line: Callable[[int], bytes]
    """The bytes of an earlier line of the same partition, by its offset: the log is a processor's input, all of it."""
    from_derived: bool = False
    """Whether the log read is a derived one: only there is an `event.id` Afterlog's own."""
    writes: str | None = ""
    """The log that what is given goes to; a processor without one gives no event."""
    lines: list[bytes] = field(default_factory=list)
    statements: list[tuple[str, Iterable[Mapping[str, Any]]]] = field(default_factory=list)
    """SQL with named parameters, and its rows, which are gone over once."""
    ignored: int = 0
    """Good events that a rule of the processor leaves out; the rest of them count as processed."""
    size: int = 0
    """Bytes of `lines`."""

    def write(self, document: Mapping[str, Any]) -> None:
        """Give one derived event, its keys in the order of `document`."""
        self.write_line(orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE))

    def write_line(self, line: bytes) -> None:
        """Give one derived event as its bytes, newline included: what `write` would make of it."""
        if self.writes is None:
            raise TypeError("it gives an event, and its class names no log for it: `writes`")
        self.lines.append(line)
        self.size += len(line)

    def emit(
        self,
        processor: Processor[Any],
        cause: Event,
        subject: Mapping[str, Any],
        verb: Any,
        obj: Mapping[str, Any],
        *,
        name: str,
        **context: Any,
    ) -> None:
        """Give one derived event that `cause` brought forth, with the id, times and source that the contract asks for."""
        self.write(
            {
                "subject": subject,
                "verb": verb,
                "object": obj,
                "context": {
                    "at": context.pop("at", cause.at),
                    "caused_by": verbatim(cause.raw),
                    "source": self.source(cause.offset),
                    **context,
                },
                "event": {"id": f"{processor.name}/{self.cause_id(cause)}/{name}", "inserted_at": cause.clock},
            }
        )

    def cause_id(self, event: Event) -> str:
        """What a derived event's id says of its cause: the id that Afterlog gave it, or its first place in a raw log."""
        if self.from_derived and event.event_id is not None:
            return event.event_id
        return f"{self.log}:{self.partition}:{event.offset}"

    def source(self, offset: int) -> dict[str, Any]:
        """Where a cause lies."""
        return {"log": self.log, "partition": self.partition, "offset": offset}


class Processor(Generic[S]):
    """One processor; subclasses set the names and override `event`, or `process` where speed matters.

    There is one object for each partition of a run.
    """

    name: ClassVar[str]
    reads: ClassVar[str]
    writes: ClassVar[str | None] = None
    ticks: ClassVar[bool] = False
    mails: ClassVar[bool] = False
    """Whether what it writes are emails to be delivered."""
    tables: ClassVar[tuple[str, ...]] = ()
    """Afterlog's own tables whose rows its statements set; `afterlog verify --derived` makes them anew, and compares."""
    shared_tables: ClassVar[tuple[str, ...]] = ()
    """Those of `tables` whose rows belong to no subject, so that several partitions may set one."""
    state: ClassVar[type] = dict
    code: ClassVar[tuple[str, ...]] = ()
    """Other modules whose code decides what this processor gives."""

    def __init__(self, settings: msgspec.Struct | None = None) -> None:
        self.settings = settings if settings is not None else NoSettings()

    def keys(self, batch: Batch) -> Iterable[str]:
        """The state keys that `process` may ask for, to be read at once; those left out are read one by one."""
        return ()

    def process(self, batch: Batch, state: States[S], out: Output) -> None:
        """Take one batch, its good events in log order."""
        for event in batch.events:
            try:
                self.event(event, state, out)
            except Exception as error:
                error.add_note(f"{batch.log}:{batch.partition}:{event.offset}")
                raise

    def event(self, event: Event, state: States[S], out: Output) -> None:
        """Take one good event."""
        raise NotImplementedError(f"processor {self.name} has neither `event` nor `process`")

    def due(self, as_of: int) -> int:
        """At a tick of `as_of`, states whose `due` is below this are due."""
        return as_of

    def due_of(self, value: S) -> tuple[int, int] | None:
        """The due of a state that was put by `put_all`, and its rank among equals; the state and the settings decide it, nothing else."""
        return None

    def tick(self, as_of: int, due: list[tuple[str, S]], state: States[S], out: Output) -> None:
        """Take a tick: `due` are the states that are due, in order; each must be `put` or dropped, no longer due."""

    def waiting(self) -> int:
        """How many rows wait for `flush`, beside a row for each state: very many make a commit, for the memory that they take."""
        return 0

    def flush(self, out: Output) -> None:
        """Called before a commit: the moment to give statements for rows that many events have changed."""

    def version(self) -> dict[str, Any]:
        """Settings and code: what decides, beside the input, what this processor gives."""
        modules = (type(self).__module__, *self.code)
        digest = hashlib.sha256(b"\n".join(_source(sys.modules[m]) for m in modules))
        return {"settings": msgspec.to_builtins(self.settings, str_keys=True), "code": digest.hexdigest()}


@functools.cache
def _source(module: ModuleType) -> bytes:
    """The code of a module, as its file had it when it was first asked for: what runs does not change with the file."""
    return inspect.getsource(module).encode()


def verbatim(raw: bytes) -> Any:
    """A causing line as `context.caused_by` carries it: its own bytes, or their digest where they are many."""
    if len(raw) > HEAD:
        return {"sha256": hashlib.sha256(raw).hexdigest(), "length": len(raw)}
    return orjson.Fragment(raw)


def verbatim_json(raw: bytes) -> bytes:
    """`verbatim`, as its JSON."""
    return raw if len(raw) <= HEAD else orjson.dumps(verbatim(raw))


def json_id(ident: int | str) -> Any:
    """An id as its cause wrote it; orjson has no integers beyond 64 bits, so those go in as text."""
    if isinstance(ident, int) and not -(2**63) <= ident < 2**64:
        return orjson.Fragment(str(ident))
    return ident
