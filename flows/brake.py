"""The flow `brake`: hold mails, let them go, or drop them, from the UI."""

from __future__ import annotations

import time
from typing import Annotated, Literal
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
from prefect.client.schemas.objects import StateType
from prefect.runtime import deployment, flow_run
from pydantic import Field

from flows.run_name import run_settings
from storage.brake import PAUSED, put_on, read_brake, release
from storage.store import Store
from tasks.settle import drop

Action = Literal["pause", "resume", "drop what is held"]
LOOK_EVERY, WAIT = 0.5, 120.0
"""How often is looked for what was asked for before, and how long it is waited for: a dead run is known as such by then."""


@flow(name="brake", flow_run_name="{action}", log_prints=False)
def brake(action: Action, reason: Annotated[str, Field(pattern=r"\S", max_length=500)] = "by a person") -> str:
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
        while deployment.id and _earlier_at_work():
            if time.monotonic() > end:
                get_run_logger().warning(
                    "An earlier run of this kind has not ended: what it was asked for may still come"
                )
                return
            time.sleep(LOOK_EVERY)
    except Exception as error:  # noqa: BLE001  # a server that is gone holds back no brake
        get_run_logger().warning("Whether an earlier run is at work is not known: %r", error)


def _earlier_at_work() -> bool:
    going = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]
    due = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=going)),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=flow_run.scheduled_start_time),
    )
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_run_filter=due, deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[UUID(deployment.id)]))
        )
    return any(str(run.id) != flow_run.id for run in found)
