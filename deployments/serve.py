"""The runner: registers the deployments with the server and runs them. `python -m deployments.serve`."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import Flow
from prefect.runner import Runner
from prefect.types.entrypoint import EntrypointType

from flows.brake import brake
from flows.process import process
from flows.quarantine import quarantine_retry
from flows.react import react
from storage.settings import Settings, load_settings

QUERY_SECONDS = 5
# Two of a kind overlap while they hand over. More would be a pile: the newest of them goes.
AT_ONCE = ConcurrencyLimitConfig(limit=2, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)


async def build_deployments(settings: Settings) -> tuple[list[RunnerDeployment], list[RunnerDeployment]]:
    """The deployments on a schedule, which work in shifts, and those for runs by hand."""
    flows: tuple[Flow[Any, Any], ...] = (process, react)
    every = timedelta(milliseconds=settings.shift_every)
    shifts = [
        await flow.ato_deployment(
            "shift", interval=every, parameters={"shift": True}, concurrency_limit=AT_ONCE, tags=["afterlog", "shift"],
            description=f"Follows the logs until its successor takes over. {flow.description or ''}",
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        for flow in flows
    ]  # fmt: skip
    by_hand = [
        await flow.ato_deployment(
            "by-hand", tags=["afterlog", "by-hand"], description=flow.description,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        for flow in (*flows, brake, quarantine_retry)
    ]  # fmt: skip
    return shifts, by_hand


async def serve() -> None:
    """Register everything, start one shift of each flow at once, and run what is scheduled until told to stop."""
    shifts, by_hand = await build_deployments(load_settings())
    # A runner that ends must leave the schedules on: the next one goes on with them.
    runner = Runner(name="afterlog", query_seconds=QUERY_SECONDS, pause_on_shutdown=False)
    ids = [await runner.aadd_deployment(deployment) for deployment in [*shifts, *by_hand]]
    async with get_client() as client:
        for ident in ids[: len(shifts)]:
            await client.create_flow_run_from_deployment(ident, name="first shift")
    await runner.start()


if __name__ == "__main__":
    asyncio.run(serve())
