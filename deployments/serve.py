"""The runner: registers the deployments with the server and runs them. `python -m deployments.serve`."""

from __future__ import annotations

import asyncio
import os

from prefect.client.orchestration import get_client
from prefect.runner import Runner

from deployments.automations import apply_automations
from deployments.console import say
from deployments.definitions import DEFINITIONS, build
from storage.settings import load_settings

QUERY_SECONDS = 5


async def serve() -> None:
    """Register everything, start one shift of each flow at once, and run what is scheduled until told to stop."""
    settings = load_settings()
    os.environ["AFTERLOG_HOME"] = str(settings.home.resolve())  # for the runs, wherever they start
    # A runner that ends must leave the schedules on: the next one goes on with them.
    runner = Runner(name="afterlog", query_seconds=QUERY_SECONDS, pause_on_shutdown=False)
    ids = [await runner.aadd_deployment(await build(definition, settings)) for definition in DEFINITIONS]
    for line in await apply_automations(settings):
        say(line)
    async with get_client() as client:
        for definition, ident in zip(DEFINITIONS, ids, strict=True):
            if definition.is_shift:
                await client.create_flow_run_from_deployment(ident, name="first shift")
    await runner.start()


if __name__ == "__main__":
    asyncio.run(serve())
