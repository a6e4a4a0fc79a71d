"""The thin Prefect tasks: each opens nothing, calls one function of this package, and gives a small summary.

A task gets a processor's name and no more: events never pass through Prefect. What the followers of a run share comes
from the flow by a context variable, which Prefect's thread pool carries into each task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.events import emit_event
from prefect.runtime import task_run

from storage.errors import ConflictError, LostDataError, NondeterminismError, Stopped, UsageError
from storage.failures import note_failure
from tasks.deliver import DeliverySummary, deliver_to_end, follow_mail
from tasks.process import FinalTick, Summary, follow, process_to_end
from tasks.run import Run

CURRENT_RUN: ContextVar[Run] = ContextVar("CURRENT_RUN")
CURRENT_END: ContextVar[FinalTick | None] = ContextVar("CURRENT_END", default=None)
RETRIES = 5
_HOPELESS = (ConflictError, LostDataError, NondeterminismError, UsageError)


def _worth_retrying(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
    """A lost disk, a second writer or an impure processor does not get better by trying again."""
    try:
        state.result(raise_on_failure=True)
    except _HOPELESS:
        return False
    except Exception:  # noqa: BLE001  # whatever it was, Prefect has it in the state
        return True
    return True


def _retried(name: str) -> Callable[[Any], Any]:
    return task(
        name=name, retries=RETRIES, retry_condition_fn=_worth_retrying, cache_policy=NO_CACHE, persist_result=False,
        task_run_name="{name}", retry_delay_seconds=0,  # said, since a person's Prefect may have another default
    )  # fmt: skip


def _back_off(run: Run) -> None:
    """Wait before a retry; here and not by Prefect, so that a stop ends it."""
    tries = task_run.run_count or 1
    if tries > 1:
        run.stop.wait(run.store.settings.retry_delay / 1000 * 2 ** (tries - 2))


@contextmanager
def _noted(run: Run, name: str) -> Iterator[None]:
    """Write a failure down, so that `afterlog status` can tell it from a processor that nobody runs."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        note_failure(run.store.database, name, error)
        raise


def _tell_brake(reason: str) -> None:
    """Delivery has stopped itself: whoever is to be told hears it by this Prefect event, now and not when a shift ends."""
    resource = {"prefect.resource.id": "afterlog.deliver", "prefect.resource.name": "deliver"}
    emit_event("afterlog.brake", resource=resource, payload={"sentence": f"Delivery has stopped itself: {reason}"})
    get_run_logger().warning("Delivery has stopped itself: %s", reason)


@_retried("process to the end")
def process_task(name: str) -> Summary:
    """Bring processor `name` to the end of its log."""
    run = CURRENT_RUN.get()
    _back_off(run)
    with _noted(run, name):
        return process_to_end(run, name, CURRENT_END.get())


@_retried("follow")
def follow_task(name: str) -> Summary:
    """Follow with processor `name` until the shift is over."""
    run = CURRENT_RUN.get()
    _back_off(run)
    with _noted(run, name):
        return follow(run, name)


@_retried("deliver")
def deliver_task(name: str, limit: int | None = None) -> DeliverySummary:
    """Deliver what is due."""
    run = CURRENT_RUN.get()
    _back_off(run)
    with _noted(run, name):
        return deliver_to_end(run, limit, _tell_brake)


@_retried("follow mail")
def follow_mail_task(name: str) -> DeliverySummary:
    """Deliver as mails come until the shift is over."""
    run = CURRENT_RUN.get()
    _back_off(run)
    with _noted(run, name):
        return follow_mail(run, _tell_brake)
