"""The runner: registers the deployments with the server and runs them. `python -m deployments.serve`."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from datetime import UTC, datetime
from typing import Self
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.runner import Runner

from deployments.automations import apply_automations
from deployments.console import say
from deployments.definitions import DEFINITIONS, build
from storage.settings import Settings, load_settings

QUERY_SECONDS = 5
_LOOK_SECONDS = 0.2


class _Runner(Runner):
    """A runner that hears of a click on Cancel after its server was away, and ends the runs that it is just starting."""

    async def __aenter__(self) -> Self:
        """Begin to listen.

        Prefect's tries a request again only over a client that was once connected; the one that asks for cancelled runs
        when the stream of events breaks never was, gives up after three tries, and is deaf from then on (seen with 3.9.1).
        """
        await super().__aenter__()
        client = getattr(getattr(self, "_cancelling_observer", None), "_client", None)
        if client is not None:
            await client.hello()
        return self

    async def astop(self) -> None:
        """Stop, and end every run.

        Prefect's ends the runs whose process it knows; one that is on its way has none yet, is missed, and is then waited
        for: a whole shift long (3.9.1).
        """
        await super().astop()
        while self._scheduled_run_poller._submitting_flow_run_ids:  # nothing public tells of them
            await asyncio.sleep(_LOOK_SECONDS)
            await self.cancel_all()


def new_runner(query_seconds: float = QUERY_SECONDS) -> Runner:
    """A runner that has nothing to run yet. One that ends leaves the schedules on: the next one goes on with them.

    It runs all that is due, whatever else runs: replays that ask a person live for days, and five of them, Prefect's limit,
    kept every shift from starting.
    """
    return _Runner(name="afterlog", query_seconds=query_seconds, pause_on_shutdown=False, limit=None)


async def register(runner: Runner, settings: Settings) -> list[UUID]:
    """Register every deployment; gives the ids of those of which a first shift is to start at once.

    A schedule that a person has paused stays so, and nothing of it starts: Prefect's own registration would go on with it.
    """
    to_start = []
    async with get_client() as client:
        for definition in DEFINITIONS:
            paused = await _is_paused(client, definition.full_name)
            ident = await runner.aadd_deployment(await build(definition, settings, paused=paused))
            if paused:
                say(f"the schedule of {definition.full_name} was paused, and stays so until a person resumes it")
            elif definition.is_shift:
                to_start.append(ident)
    return to_start


async def forget_late(client: PrefectClient, deployments: list[UUID]) -> int:
    """Take away the scheduled runs of shifts whose time came while nobody was here to run them; says how many.

    One shift does all that is left to do, and it is to start now: each of the others would take over from the one before.
    """
    missed = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        next_scheduled_start_time=FlowRunFilterNextScheduledStartTime(before_=datetime.now(UTC)),  # type: ignore[arg-type]  # pydantic takes it
    )
    of = DeploymentFilter(id=DeploymentFilterId(any_=deployments))
    late: list[FlowRun] = []
    looked_at = 0
    while page := await client.read_flow_runs(flow_run_filter=missed, deployment_filter=of, offset=looked_at):
        # One that has been at work waits to be run again: it is somebody's trace, and gives way by itself.
        late += [run for run in page if run.auto_scheduled and not run.run_count]
        looked_at += len(page)
    for run in late:
        with suppress(ObjectNotFound):
            await client.delete_flow_run(run.id)
    return len(late)


async def _is_paused(client: PrefectClient, name: str) -> bool:
    try:
        found = await client.read_deployment_by_name(name)
    except ObjectNotFound:
        return False  # it is registered for the first time
    return found.paused or (bool(found.schedules) and not any(schedule.active for schedule in found.schedules))


async def serve() -> None:
    """Register everything, start one shift of each flow at once, and run what is scheduled until told to stop."""
    settings = load_settings()
    os.environ["AFTERLOG_HOME"] = str(settings.home.resolve())  # for the runs, wherever they start
    runner = new_runner()
    to_start = await register(runner, settings)
    for line in await apply_automations(settings):
        say(line)
    async with get_client() as client:
        if late := await forget_late(client, to_start):
            say(f"{late} shifts were due while no runner was here: one of each flow starts now instead")
        for ident in to_start:
            await client.create_flow_run_from_deployment(ident, name="first shift")
    await runner.start()


if __name__ == "__main__":
    asyncio.run(serve())
