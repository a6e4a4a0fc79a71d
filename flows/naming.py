"""The names of runs: what a run follows while it works, and its range and outcome once it has ended."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from storage.commit import Position
from tasks.deliver import DeliverySummary
from tasks.process import Summary
from tasks.run import Run

NOTHING_NEW = "Nothing new"
_WHEN = re.compile(r":? at \d{4}-\d\d-\d\dT[\d:.]+Z")


@dataclass(frozen=True)
class Done:
    """What a run did, or has done so far: the counts of its processors, of its mails, and what failed with its reason."""

    summaries: list[Summary] = field(default_factory=list)
    mails: list[DeliverySummary] = field(default_factory=list)
    failures: Mapping[str, str] = field(default_factory=dict)

    def is_nothing(self) -> bool:
        """Whether nothing was read, derived, mailed, or went wrong."""
        moved = any(s.lines or s.derived for s in self.summaries)
        mailed = any(m.taken_in or m.retries or any(m.states.values()) for m in self.mails)
        return not (moved or mailed or self.failures)


def done_of(results: Iterable[Any], failures: Mapping[str, str]) -> Done:
    """What the tasks of a run gave, by kind."""
    given = list(results)
    return Done(
        [each for each in given if isinstance(each, Summary)],
        [each for each in given if isinstance(each, DeliverySummary)],
        failures,
    )


def following(run: Run, flow: str, names: Sequence[str], begun: Iterable[Position]) -> str:
    """The name of a run at work: which logs it follows, and from where; `begun` are the checkpoints that it began with."""
    known = {(p.processor, p.log, p.partition): p.offset for p in begun}
    parts = []
    for log, readers in _by_log(run, names).items():
        partitions = run.store.partitions(log)
        start = min(known.get((name, log, part), 0) for name in readers for part in partitions)
        parts.append(f"{log}/0 from {start}" if partitions == [0] else log)
    return f"{flow} following {', '.join(parts)}"


def ended(run: Run, flow: str, done: Done) -> str:
    """The name of a run that has ended: `process events/0 5130..9120: 40 read, 2 quarantined`, or that nothing was new."""
    if done.is_nothing():
        return f"{flow}: {NOTHING_NEW.lower()}"
    ranges = ", ".join(_range(run, log, readers) for log, readers in _read(run, done.summaries).items())
    return f"{flow} {ranges}: {outcome(run, done)}" if ranges else f"{flow}: {outcome(run, done)}"


def outcome(run: Run, done: Done) -> str:
    """A run's counts in a few words, the most important ones first."""
    words = [f"{', '.join(done.failures)} failed"] if done.failures else []
    if read := max((s.lines for s in done.summaries), default=0):
        words.append(f"{read:,} read")
    if quarantined := max((s.quarantined for s in done.summaries), default=0):
        words.append(f"{quarantined:,} quarantined")
    words += [f"{s.derived:,} to {run.topology.make(s.processor).writes}" for s in done.summaries if _is_finding(s)]
    for mails in done.mails:
        words += [f"{count:,} {state.lower()}" for state, count in sorted(mails.states.items()) if count]
        words += [f"{mails.waiting:,} waiting"] if mails.waiting else []
    return ", ".join(words) or NOTHING_NEW.lower()


def lines_of(done: Done) -> list[str]:
    """What a run's log says of it: a line for each processor that did something, and one for the mails."""
    lines = [
        f"{s.processor}: {s.lines:,} read = {s.processed:,} processed + {s.quarantined:,} quarantined + {s.ignored:,} "
        f"ignored; {s.derived:,} derived"
        for s in done.summaries
        if s.lines or s.derived
    ]
    for mails in done.mails:
        states = ", ".join(f"{count:,} {state}" for state, count in sorted(mails.states.items()) if count)
        if mails.taken_in or states:
            lines.append(f"deliver: {mails.taken_in:,} taken in, {states or 'none decided'}, {mails.waiting:,} waiting")
        lines += [f"deliver: {count:,} x {reason}" for reason, count in why_not(mails, 5)]
    return lines


def why_not(mails: DeliverySummary, most: int) -> list[tuple[str, int]]:
    """Why mails were not sent, the `most` frequent reasons and how many all others have; when it was tells no two of them apart."""
    reasons: Counter[str] = Counter()
    for reason, count in mails.reasons.items():
        reasons[_WHEN.sub("", reason)] += count
    found = reasons.most_common(most)
    rest = reasons.total() - sum(count for _, count in found)
    return [*found, ("other reasons", rest)] if rest else found


def outcome_tags(run: Run, done: Done) -> set[str]:
    """What runs can be filtered by in the UI: the logs that were read, and what came of it."""
    tags = set(_read(run, done.summaries)) | {state.lower() for m in done.mails for state, n in m.states.items() if n}
    tags |= {str(run.topology.make(s.processor).writes) for s in done.summaries if _is_finding(s)}
    tags |= {"nothing-new"} if done.is_nothing() else set()
    return tags | ({"quarantined"} if any(s.quarantined for s in done.summaries) else set())


def _by_log(run: Run, names: Iterable[str]) -> dict[str, list[str]]:
    logs: dict[str, list[str]] = {}
    for name in names:
        if name in run.topology.processors:
            logs.setdefault(run.topology.reads(name), []).append(name)
    return logs


def _read(run: Run, summaries: Iterable[Summary]) -> dict[str, list[Summary]]:
    """The summaries of processors that read something, by log."""
    logs: dict[str, list[Summary]] = {}
    for summary in summaries:
        if summary.lines or summary.derived:
            logs.setdefault(run.topology.reads(summary.processor), []).append(summary)
    return logs


def _range(run: Run, log: str, summaries: Sequence[Summary]) -> str:
    """Where a log was read; with more partitions than one an offset would not say where."""
    partitions = run.store.partitions(log)
    if partitions != [0]:
        return f"{log} in {len(partitions)} partitions"
    first, last = min(s.first or 0 for s in summaries), max(s.last for s in summaries)
    return f"{log}/0 {first}..{last}" if first < last else f"{log}/0 at {last}"


def _is_finding(summary: Summary) -> bool:
    """Whether a processor gave events that are not told of already, as the quarantined are."""
    return summary.derived > 0 and summary.processor != "quarantine"
