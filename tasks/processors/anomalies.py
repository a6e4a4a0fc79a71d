"""Anomalies: values far from what the log has shown before, by verb and measure.

Each value is scored against the mean and the standard deviation of those before it, and learnt after that. One sample at
a time, in log order, so any split into batches gives the same.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import msgspec
import orjson

from storage.event import Batch, Event
from tasks.processors import contract
from tasks.processors.measures import Measures

BEYOND = 1e15
_measures = functools.lru_cache(8)(Measures)
"""One for each list of names: to make its decoders takes longer than to process a few events."""


class Expected(msgspec.Struct, frozen=True):
    """A declared mean and standard deviation."""

    mean: float
    std: float


class Settings(msgspec.Struct, frozen=True):
    """`deviations`: how many standard deviations are too many; `expected` by measure, or by `VERB measure`."""

    measures: tuple[str, ...]
    deviations: float = 2.0
    samples: int = 30
    expected: dict[str, Expected] = {}


class Seen(msgspec.Struct, array_like=True):
    """The running count, mean and sum of squared distances of a measure (Welford)."""

    samples: int = 0
    mean: float = 0.0
    squares: float = 0.0


class Processor(contract.Processor[Seen]):
    """Gives UNEXPECTED_DATA."""

    name, reads, writes = "anomalies", "events", "anomalies"
    state = Seen
    code = ("tasks.processors.measures", "tasks.processors.basket")
    settings: Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._measures = _measures(settings.measures)
        # Of the last batch every fourth event and more: then looking for them costs more than it saves.
        self._most_have_some = False

    def process(self, batch: Batch, state: contract.States[Seen], out: contract.Output) -> None:
        """Score and learn every measure of every event; an event that has none of them is ignored."""
        measures_of, root, deviations, enough = (
            self._measures.of, math.sqrt, self.settings.deviations, self.settings.samples,
        )  # fmt: skip
        known: dict[tuple[str, str], tuple[Seen, Expected | None]] = {}  # of this batch
        candidates = batch.events if self._most_have_some else self._measures.among(batch)
        ignored = len(batch.events) - len(candidates)
        for event in candidates:
            values, verb = measures_of(event), event.verb
            if not values:
                ignored += 1
            for measure, value in values:
                seen, expected = known.get((verb, measure)) or self._know(verb, measure, known, state)
                samples = seen.samples
                if expected is None:
                    mean, std = seen.mean, root(seen.squares / samples) if samples else 0.0
                else:
                    mean, std = expected.mean, expected.std
                if value.__class__ is bool or not -BEYOND <= value <= BEYOND:  # an infinity is beyond everything
                    self._flag(event, measure, value, (mean, std, None), seen, out)
                    continue
                distance = abs(value - mean)
                if distance > deviations * std and (expected or samples >= enough):
                    self._flag(event, measure, value, (mean, std, distance / std if std else None), seen, out)
                # Welford's way: one sample at a time, nothing kept of those before.
                seen.samples = samples = samples + 1
                delta = value - seen.mean
                seen.mean = mean = seen.mean + delta / samples
                seen.squares += delta * (value - mean)
        for (verb, measure), (seen, _) in known.items():
            if seen.samples:
                state.put(f"{verb} {measure}", seen)
        out.ignored += ignored
        self._most_have_some = 4 * (len(batch.events) - ignored) > len(batch.events)

    def _know(
        self,
        verb: str,
        measure: str,
        known: dict[tuple[str, str], tuple[Seen, Expected | None]],
        state: contract.States[Seen],
    ) -> tuple[Seen, Expected | None]:
        """What was learnt of a verb's measure, and what is declared of it."""
        key, declared = f"{verb} {measure}", self.settings.expected
        found = known[verb, measure] = (state.get(key) or Seen(), declared.get(key) or declared.get(measure))
        return found

    def _flag(
        self,
        event: Event,
        measure: str,
        value: Any,
        score: tuple[float, float, float | None],
        seen: Seen,
        out: contract.Output,
    ) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            value = orjson.Fragment(b"-1e400" if value < 0 else b"1e400")  # the only infinity that JSON can write
        obj = {
            "type": "MEASURE", "measure": measure, "value": value, "mean": score[0], "std": score[1], "score": score[2],
            "samples": seen.samples,
        }  # fmt: skip
        out.emit(self, event, {"id": "ANOMALY_SYSTEM"}, "UNEXPECTED_DATA", obj, name=measure)
