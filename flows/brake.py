"""The flow `brake`: hold mails, let them go, or drop them, from the UI."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.runtime import deployment, flow_run
from prefect.states import Completed
from pydantic import Field

from flows.run_name import run_settings
from storage.brake import PAUSED, put_on, read_brake, release
from storage.store import Store
from tasks.settle import drop

Action = Literal["pause", "resume", "drop what is held"]
LOOK_EVERY, WAIT = 0.5, 120.0
"""How often is looked for what was asked for before, and how long it is waited for: a dead run is known as such by then."""
_AT_WORK = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]


@flow(name="brake", flow_run_name="{action}", log_prints=False)
def brake(action: Action, reason: Annotated[str, Field(pattern=r"\S", max_length=500)] = "by a person") -> Any:
    """Hold all mails, send them again, or drop those that are held.

    Args:
        action: `pause` holds all mails: none is claimed or sent. `resume` sends what was held, and all after it. `drop what
            is held` suppresses, for ever, what waits while delivery is paused or has stopped itself.
        reason: with `pause`: why, for whoever looks at the status.
    """
    store = Store(run_settings())
    if action == "pause":
        put_on(store.database, PAUSED, reason)  # at once; and again below, should one that is waited for let mails go
    _let_earlier_end()
    if action != "pause" and _is_overtaken():
        said = "Another run has been asked for since, and is done. Ask again, if this is still wanted"
        get_run_logger().warning("Not needed: %s", said)
        return Completed(name="Not needed", message=said)
    if action == "pause":
        found = put_on(store.database, PAUSED, reason)
        said = f"{found.state}: {found.reason}"
    elif action == "resume":
        said = f"RUNNING; {release(store.database)} mails had been held"
    else:
        count, holder = drop(store)
        later = f", to be carried out by {holder}" if holder else ""
        said = f"{count} mails dropped{later}; delivery is {read_brake(store.database).state}"
    get_run_logger().info("deliver: %s", said)
    return said


def _let_earlier_end() -> None:
    """Wait until what was asked for before this run is done: a runner starts what it finds at once, and the last word is to hold."""
    end = time.monotonic() + WAIT
    try:
        while deployment.id and _others(_AT_WORK, before=True):
            if time.monotonic() > end:
                get_run_logger().warning(
                    "An earlier run of this kind has not ended: what it was asked for may still come"
                )
                return
            time.sleep(LOOK_EVERY)
    except Exception as error:  # noqa: BLE001  # a server that is gone holds back no brake
        get_run_logger().warning("Whether an earlier run is at work is not known: %r", error)


def _is_overtaken() -> bool:
    """Whether what was asked for after this run is done: one that crashed is run again a while later, and has nothing more to say."""
    try:
        return bool(deployment.id and _others([StateType.COMPLETED], before=False))
    except Exception as error:  # noqa: BLE001  # as above
        get_run_logger().warning("Whether a later run is done is not known: %r", error)
        return False


def _others(states: list[StateType], *, before: bool) -> list[FlowRun]:
    """The runs of this deployment in these states that were asked for before this one, or after it."""
    with get_client(sync_client=True) as client:
        mine = client.read_flow_run(UUID(flow_run.id))
        at = mine.expected_start_time
        of = FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)),
            expected_start_time=FlowRunFilterExpectedStartTime(**{"before_" if before else "after_": at}),
        )
        here = DeploymentFilter(id=DeploymentFilterId(any_=[UUID(deployment.id)]))
        found = client.read_flow_runs(flow_run_filter=of, deployment_filter=here)
    return [run for run in found if run.id != mine.id and (_asked(run) < _asked(mine)) == before]


def _asked(run: FlowRun) -> tuple[Any, ...]:
    """When a run was asked for; those that were asked for by the minute have the same time."""
    return run.expected_start_time, run.created, run.id
