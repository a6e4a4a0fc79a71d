"""What every flow does around its tasks: open the run, tell all followers to stop whatever happens, collect what they did."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prefect import get_run_logger
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.artifacts import Report
from flows.naming import NOTHING_NEW, done_of, ended, lines_of, outcome, outcome_tags
from flows.run_name import rename, run_settings
from storage.errors import AfterlogError
from storage.store import Store
from tasks.prefect_tasks import CURRENT_END, CURRENT_RUN
from tasks.process import FinalTick
from tasks.run import Run
from tasks.topology import build_topology

SIDE_BY_SIDE: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=sys.maxsize)
"""All tasks of a run at once, whatever a person's Prefect is set to: a follower that waits for a thread waits a shift long."""


@contextmanager
def open_run(flow: str, final: FinalTick | None = None) -> Iterator[Run]:
    """A run over HOME as the settings say; its followers are told to stop however the flow ends.

    Raises:
        UsageError: a worker started it in a folder of its own, and HOME is relative to that.
    """
    settings = run_settings()
    store = Store(settings)
    run = Run(store, build_topology(settings), f"{flow} run {flow_run.name} ({flow_run.id})", str(flow_run.id))
    tokens = CURRENT_RUN.set(run), CURRENT_END.set(final)
    try:
        yield run
    except BaseException:
        run.grace = Run.grace  # a signal in the middle of a hand-over, say
        raise
    finally:
        # Signals, cancels and time limits come as exceptions of every kind; this must not depend on which.
        run.stop.set()
        CURRENT_RUN.reset(tokens[0])
        CURRENT_END.reset(tokens[1])


def collect(futures: Sequence[PrefectFuture[Any]], names: Sequence[str]) -> tuple[list[Any], dict[str, str]]:
    """The summaries of the tasks that ended well, and the reasons of those that failed."""
    wait(list(futures))
    good, bad = [], {}
    for name, future in zip(names, futures, strict=True):
        result = future.result(raise_on_failure=False)
        if isinstance(result, BaseException):
            bad[name] = str(result)
        else:
            good.append(result)
    return good, bad


def conclude(run: Run, report: Report, flow: str, names: Sequence[str], futures: Sequence[PrefectFuture[Any]]) -> Any:
    """End a run: wait for its tasks, tell what they did in log, artifacts, name and tags, and give its final state.

    Raises:
        AfterlogError: with the reason of each task that failed.
    """
    results, failures = collect(futures, names)
    done = done_of(results, failures)
    logger = get_run_logger()
    for note in run.notes:
        logger.warning(note)
    for line in lines_of(done):
        logger.info(line)
    name = ended(run, flow, done)
    report.publish(done, draw=not report.at_work)
    rename(name, outcome_tags(run, done))
    if failures:
        raise AfterlogError("; ".join(f"{name}: {reason}" for name, reason in failures.items()))
    logger.info(name[0].upper() + name[1:])
    return Completed(name=NOTHING_NEW if done.is_nothing() else None, message=outcome(run, done), data=done.summaries)


def not_needed(flow: str, reason: object) -> Any:
    """The final state of a run that came too late to be of use."""
    get_run_logger().info("Not needed: %s", reason)
    rename(f"{flow}: not needed")
    return Completed(name="Not needed", message=str(reason), data=[])
