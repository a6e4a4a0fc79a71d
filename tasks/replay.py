"""Replay: the same processors over the past, into a new generation beside the live one. Nothing here can send a mail.

A replay keeps its plan with its generation, so that one that died is gone on with by its name. It takes none of the
locks of what is live, and commits in small parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from storage.commit import Position
from storage.errors import AfterlogError, ConflictError, Stopped, UsageError
from storage.generations import (
    DISCARDED,
    LIVE,
    READY,
    RUNNING,
    ReplayRow,
    create_replay,
    discard,
    find_replay,
    list_replays,
    set_state,
    sweep,
)
from storage.locks import RunLock
from storage.segment import make_directory
from storage.store import Store
from tasks.local import side_by_side
from tasks.process import Summary
from tasks.replay_follow import ReplayFollower, ReplayRun, versions_of
from tasks.replay_plan import Plan, Planned, Request, make_plan, read_plan, write_plan
from tasks.run import Run
from tasks.timeline import Place, Version
from tasks.topology import Topology

NICE = 10
"""How much a replay gives way to what is live."""
Goals = Mapping[tuple[str, int], Place]
Versions = Callable[[str, int], list[Version]]


@dataclass
class Replayed:
    """A generation that is there, and what was done for it in this run."""

    planned: Planned
    summaries: list[Summary] = field(default_factory=list)
    resumed: bool = False
    notes: list[str] = field(default_factory=list)


def start(store: Store, topology: Topology, request: Request, holder: str) -> tuple[Planned, bool]:
    """The replay that `request` asks for: a new one, or the one of its name that did not get to its end.

    Raises:
        UsageError: something in `request` cannot be, or another replay has its name.
    """
    notes = sweep(store)
    for row in list_replays(store.database) if request.name else ():
        if row.name == request.name and row.state != DISCARDED:
            planned = read_plan(row)
            if planned.plan.request != request:
                raise UsageError(
                    f"a replay called {request.name} is there, and it is another one",
                    where=f"generation {row.generation}, {row.state}",
                    do=f"Give another name, or drop it: afterlog replays discard {request.name}",
                )
            planned.notes = notes
            return planned, True
    if request.name.isdigit() or len(request.name) > 100 or request.name != request.name.strip():
        raise UsageError(
            "no name for a replay", found=repr(request.name[:120]),
            expected="at most 100 characters, not only digits, no blanks around them",
        )  # fmt: skip
    plan = make_plan(store, topology, request, holder)
    row = create_replay(store, request.name, write_plan(plan))
    return Planned(row, plan, notes), False


def run_replay(
    planned: Planned,
    store: Store,
    topology: Topology,
    holder: str,
    begun: Callable[[ReplayRun], None] = lambda _run: None,
) -> Replayed:
    """Bring a replay's generation to its goals, giving way to what is live; `begun` gets the run, whose `stop` ends it at a
    batch boundary.

    Raises:
        Stopped: it was told to stop; what it committed stands, and it goes on from there by its name.
        AfterlogError: a processor failed.
    """
    plan = planned.plan
    with held(store, planned.generation, holder):
        run = open_replay(planned, store, topology, holder)
        begun(run)
        goals = {
            (name, int(part)): Place(*place) for key, place in plan.goals.items() for name, part in [key.split("/")]
        }
        summaries = bring(run, plan, goals, nice=NICE)
        if planned.row.state == RUNNING:
            set_state(store.database, planned.generation, READY)
    return Replayed(
        Planned(find_replay(store.database, planned.generation), plan), summaries, notes=[*planned.notes, *run.notes]
    )


def drop_replay(store: Store, which: int | str, holder: str) -> int:
    """Discard a replay and everything that it made; gives its generation.

    Raises:
        UsageError: there is none.
        ConflictError: it is live, what is live goes back to it, or somebody is at work on it.
    """
    row = find_replay(store.database, which)
    with held(store, row.generation, holder):
        for other in list_replays(store.database):
            if other.state == LIVE and row.generation in _goes_back_to(store, other):
                raise ConflictError(
                    f"generation {row.generation} is what a rollback would go back to",
                    where=f"generation {other.generation} ({other.name}), {other.state}",
                    do=f"Roll that one back, or promote another one, first: afterlog replays rollback {other.generation}",
                )
        discard(store, row.generation)
    return row.generation


def _goes_back_to(store: Store, row: ReplayRow) -> set[int]:
    """Which generations would be live again after a rollback of a replay; none, where another was promoted since."""
    plan = read_plan(row).plan
    return {plan.base[log] for log in plan.logs if store.live_generation(log) == row.generation}


@contextmanager
def held(store: Store, generation: int, holder: str) -> Iterator[None]:
    """Hold the lock of a generation.

    Raises:
        ConflictError: another run holds it.
    """
    lock = RunLock(store.lock_path(f"replay-{generation}.lock"), holder)
    if not lock.try_acquire():
        raise ConflictError(
            f"generation {generation} is being worked on by another run", found=lock.held_by(), do="Wait for it to end"
        )
    try:
        yield
    finally:
        lock.release()


def open_replay(planned: Planned, store: Store, topology: Topology, holder: str) -> ReplayRun:
    """A run that writes a replay's generation, and reads what was live when it was planned."""
    generations = {**planned.plan.base, **dict.fromkeys(planned.plan.logs, planned.generation)}
    return ReplayRun(store, topology, holder, generations)


def bring(
    run: ReplayRun, plan: Plan, goals: Goals, versions: Versions | None = None, *, nice: int = 0
) -> list[Summary]:
    """Bring every processor of a plan to its goal: side by side those that read the same, then those that read from them.

    `versions` says with which settings; where it is left out, the recorded ones, but for what the plan changes. With `nice`
    the work gives way to other processes: on Linux that work alone, so that whatever the caller does next does not.
    """

    def one(_run: Run, name: str) -> Summary:
        if nice:
            os.nice(nice)  # this thread's: nobody without privileges can take it back
        return _bring(run, plan, name, goals, versions)

    # Also where its processor has not begun: by its folder others see that there is another generation.
    for log in plan.logs:
        make_directory(run.store.directory(log, 0, run.generation(log)))
    first = [name for name in plan.processors if run.topology.reads(name) not in plan.logs]
    rest = [[name] for name in plan.processors if name not in first]
    return [summary for names in (first, *rest) for summary in _side_by_side(run, names, one)]


def _side_by_side(run: ReplayRun, names: list[str], one: Callable[[Run, str], Summary]) -> list[Summary]:
    outcome = side_by_side(run, names, one)
    if outcome.failures:
        name, error = next(iter(outcome.failures.items()))
        if len(outcome.failures) == 1:
            raise error
        raise AfterlogError(f"{len(outcome.failures)} processors failed, {name} among them: {error}") from error
    if len(outcome.summaries) < len(names):
        raise Stopped("stopped on its way")  # by something that is no error
    run.stop.clear()  # side by side, whoever ends tells the others
    return outcome.summaries


def _places(run: ReplayRun, plan: Plan, name: str, goals: Goals) -> dict[int, Place]:
    """Up to where to go in each partition, without those that the live one has not begun with."""
    log = run.topology.reads(name)
    partitions = run.store.partitions(log, run.generation(log))
    if log in plan.logs:
        return {part: Place(run.store.committed_end(log, part, run.generation(log))) for part in partitions}
    return {part: goals[name, part] for part in partitions if (name, part) in goals}


def _bring(run: ReplayRun, plan: Plan, name: str, goals: Goals, versions: Versions | None) -> Summary:
    summary, places, as_of = Summary(name), _places(run, plan, name, goals), plan.request.as_of
    recorded = as_of == "recorded"

    def each(work: Callable[[ReplayFollower, Place], None]) -> int:
        """Have a follower of each partition do its work; gives the greatest clock of all."""
        greatest = 0
        for partition, goal in places.items():
            if versions is None:
                known = versions_of(run, name, partition, plan.base, plan.changed.get(name, {}), ticks=recorded)
            else:
                known = versions(name, partition)
            follower = ReplayFollower(run, name, partition, known)
            if follower.target is not None:
                follower.target.author = run.author
            before = Position(**asdict(follower.position))
            try:
                work(follower, goal)
            finally:
                follower.close()
                summary.add(before, follower.position)
            greatest = max(greatest, follower.position.clock)
        return greatest

    if recorded:
        each(ReplayFollower.run_to)
    else:
        end = each(lambda follower, goal: follower.run_to(Place(goal.offset)))
        # Of all partitions: a quiet one is judged as of the log's end too.
        each(lambda follower, goal: follower.tick_once(goal, as_of if isinstance(as_of, int) else end))
    return summary
