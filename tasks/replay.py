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


def _bring(run: ReplayRun, plan: Plan, name: str, goals: Goals, versions: Versions | None) -> Summary:
    log, summary = run.topology.reads(name), Summary(name)
    recorded = plan.request.as_of == "recorded"
    for partition in run.store.partitions(log, run.generation(log)):
        if log in plan.logs:
            goal = Place(run.store.committed_end(log, partition, run.generation(log)))
        elif (name, partition) in goals:
            goal = goals[name, partition]
        else:
            continue  # the live one has not begun with it
        if versions is None:
            known = versions_of(run, name, partition, plan.base, plan.changed.get(name, {}), ticks=recorded)
        else:
            known = versions(name, partition)
        follower = ReplayFollower(run, name, partition, known)
        if follower.target is not None:
            follower.target.author = run.author
        before = Position(**asdict(follower.position))
        try:
            if recorded or goal.tick_offset == 0:
                follower.run_to(goal)
            elif not goal.is_reached(follower.position):
                follower.run_to(Place(goal.offset))
                follower.tick_once(goal, plan.request.as_of)
        finally:
            follower.close()
            summary.add(before, follower.position)
    return summary
