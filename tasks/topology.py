"""Which processors there are, with which settings, and which logs they read and write."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from storage.door import REFUSED
from storage.errors import UsageError
from storage.segment import check_log_name
from storage.settings import Settings
from storage.store import CLOCK, DELIVERIES
from tasks.processors import abandonment, anomalies, contract, derive, normalise, quarantine, remind

DELIVER = "deliver"
"""The name under which delivery keeps its checkpoints and its lock; it is no processor."""
_LOCKED = re.compile(r"promotion|archive|alerts|replay-\d+")
"""The names of locks that are no processor's."""

DECIDES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "timeout": (("abandonment", ("timeout",)),),
    "excluded_verbs": (("abandonment", ("excluded",)),),
    "not_after": (("derive", ("not_after",)), ("remind", ("not_after",))),
    "reminder_gap": (("remind", ("gap",)),),
    "anomalies": (("anomalies", ("measures", "deviations", "samples", "expected")),),
}
"""By setting: which processors' results hang on it, and by which of their own settings."""


@dataclass(frozen=True)
class Topology:
    """The processors of one set of settings, in the order in which they are shown.

    Each entry makes a new processor: there is one for each partition of a run.
    """

    processors: dict[str, Callable[[], contract.Processor[Any]]]

    def make(self, name: str) -> contract.Processor[Any]:
        """A new processor by its name.

        Raises:
            UsageError: there is none of that name.
        """
        if name not in self.processors:
            raise UsageError("no such processor", found=repr(name), expected=f"one of {', '.join(self.processors)}")
        return self.processors[name]()

    def all(self) -> list[contract.Processor[Any]]:
        """One of each, to be looked at only: those that work are made anew."""
        return self._each

    def reads(self, name: str) -> str:
        """The log that a processor reads.

        Raises:
            UsageError: there is no processor of that name.
        """
        return next((p.reads for p in self._each if p.name == name), None) or self.make(name).reads

    @cached_property
    def _each(self) -> list[contract.Processor[Any]]:
        return [make() for make in self.processors.values()]

    def on_raw_logs(self) -> list[str]:
        """The processors that `process` runs."""
        derived = self.derived_logs()
        return [p.name for p in self.all() if p.reads not in derived]

    def on_derived_logs(self) -> list[str]:
        """The processors that `deliver` runs, before the mail."""
        derived = self.derived_logs()
        return [p.name for p in self.all() if p.reads in derived]

    def downstream(self, names: Iterable[str]) -> list[str]:
        """`names` and every processor that reads, directly or not, what they write; each after those it reads from."""
        found = dict.fromkeys(names)
        for processor in self.all() * len(self.processors):  # as often as the longest chain could be long
            if processor.reads in {self.writes(name) for name in found}:
                found[processor.name] = None
        order: list[str] = []
        while rest := [name for name in self.processors if name in found and name not in order]:
            waiting = {self.writes(name) for name in rest}
            order += [name for name in rest if self.reads(name) not in waiting] or rest
        return order

    def writes(self, name: str) -> str | None:
        """The log that a processor writes; None where it writes rows only."""
        return self.make(name).writes if name not in self.processors else self._writes[name]

    @cached_property
    def _writes(self) -> dict[str, str | None]:
        return {processor.name: processor.writes for processor in self._each}

    def derived_logs(self) -> set[str]:
        """The logs that only a processor writes."""
        return {p.writes for p in self.all() if p.writes is not None}

    def mail_logs(self) -> list[str]:
        """The logs whose EMAIL events are delivered."""
        return [p.writes for p in self.all() if p.mails and p.writes is not None]

    def raw_logs(self) -> list[str]:
        """The logs that processors read and producers write."""
        derived = self.derived_logs()
        return sorted({p.reads for p in self.all()} - derived)

    def reserved_logs(self) -> set[str]:
        """The logs that nobody may append to by name."""
        return self.derived_logs() | {DELIVERIES, CLOCK, REFUSED}


def build_topology(settings: Settings) -> Topology:
    """The topology of `settings`, a processor of your own for each module that they name.

    Raises:
        UsageError: a module cannot be used as a processor; the sentence says why.
    """
    measures = settings.anomalies
    expected = {name: anomalies.Expected(e.mean, e.std) for name, e in measures.expected.items()}
    odd = anomalies.Settings(measures.measures, measures.deviations, measures.samples, expected)
    left = abandonment.Settings(settings.timeout, tuple(sorted(settings.excluded_verbs)))
    topology: dict[str, Callable[[], contract.Processor[Any]]] = {
        "quarantine": quarantine.Processor,
        "derive": lambda: derive.Processor(derive.Settings(settings.not_after)),
        "abandonment": lambda: abandonment.Processor(left),
        "anomalies": lambda: anomalies.Processor(odd),
        "normalise": normalise.Processor,
        "remind": lambda: remind.Processor(remind.Settings(settings.reminder_gap, settings.not_after)),
    }
    try:
        anomalies.Processor(odd)
    except ValueError as error:
        raise UsageError(f"setting AFTERLOG_ANOMALIES__MEASURES: {error}") from error
    for module in settings.processors:
        kind = _load(module)
        _check_free(kind, Topology(topology), f"setting AFTERLOG_PROCESSORS: {module}")
        topology[kind.name] = kind
    return Topology(topology)


def _check_free(kind: type[contract.Processor[Any]], others: Topology, where: str) -> None:
    """A name is one checkpoint and one lock, whose file it names, and a derived log has one writer."""
    try:
        check_log_name(kind.name)
    except UsageError as error:
        raise UsageError("no name for a processor", where=where, found=error.found, expected=error.expected) from error
    if _LOCKED.fullmatch(kind.name):
        raise UsageError(f"the name {kind.name!r} is taken", where=where, do="Give it another `name`")
    if kind.name in {*others.processors, DELIVER}:
        raise UsageError(f"a second processor called {kind.name!r}", where=where, do="Give it another `name`")
    if kind.writes is None:
        return
    check_log_name(kind.writes)
    if kind.writes in {*others.reserved_logs(), *others.raw_logs(), kind.reads}:
        raise UsageError(f"the log {kind.writes} is written already", where=where, do="Let it write one of its own")


def _load(module: str) -> type[contract.Processor[Any]]:
    where = f"setting AFTERLOG_PROCESSORS: {module}"
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"cannot import the module: {error}", where=where, do="Install it, or correct its name"
        ) from error
    except (Exception, SystemExit) as error:  # it is the person's own module: whatever it raises, they are told
        raise UsageError(f"the module fails when it is imported: {error!r}", where=where, do="Correct it") from error
    kind = getattr(found, "Processor", None)
    if not (isinstance(kind, type) and issubclass(kind, contract.Processor)):
        raise UsageError(
            "the module has no class Processor that inherits tasks.processors.contract.Processor", where=where
        )
    for name in ("name", "reads"):
        if not isinstance(getattr(kind, name, None), str):
            raise UsageError(f"its Processor has no `{name}`", where=where)
    try:
        kind()
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"its Processor cannot be made: {error!r}", where=where, do="Correct its `__init__`"
        ) from error
    return kind
