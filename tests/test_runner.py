"""The runner as a process: what is told to end ends, whatever it is about to do, and what is due starts."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import httpx

from storage.settings import load_settings
from tests import processes
from tests.conftest import ROOT
from tests.operations import Api, plain_environment


def _ends_as_a_run_begins() -> None:
    """A runner that gets its signal when a run is on its way and has no process yet."""
    from prefect.client.orchestration import get_client

    from deployments.definitions import DEFINITIONS, build
    from deployments.serve import new_runner

    async def run() -> None:
        runner = new_runner(query_seconds=1)
        shift = next(each for each in DEFINITIONS if each.is_shift)
        ident = await runner.aadd_deployment(await build(shift, load_settings()))
        async with get_client() as client:
            await client.create_flow_run_from_deployment(ident, name="on its way")
        serving = asyncio.create_task(runner.start())
        while not (runner.started and runner._scheduled_run_poller._submitting_flow_run_ids):
            await asyncio.sleep(0.001)
        assert not runner._process_manager.flow_run_ids()
        os.kill(os.getpid(), signal.SIGTERM)
        await serving

    asyncio.run(run())


def test_a_run_that_is_on_its_way_is_ended_with_the_runner(server: str, tmp_path: Path) -> None:
    env = plain_environment(tmp_path / "home", PREFECT_API_URL=server, PYTHONPATH=str(ROOT))
    said, api = tmp_path / "runner.log", Api(server)
    process = processes.start(_ends_as_a_run_begins, env=env, stdout=said, stderr=said, cwd=ROOT)
    try:
        assert processes.ended(process, 120) == 0, said.read_text()  # a shift takes five minutes
    finally:
        httpx.delete(f"{server}/deployments/{api.deployments()['process/shift']['id']}").raise_for_status()


def _starts_both() -> None:
    """A runner that has two runs to start; it ends once both have a process."""
    from prefect.client.orchestration import get_client

    from deployments.definitions import DEFINITIONS, build
    from deployments.serve import new_runner

    async def run() -> None:
        runner = new_runner(query_seconds=1)
        async with get_client() as client:
            for shift in filter(lambda each: each.is_shift, DEFINITIONS):
                ident = await runner.aadd_deployment(await build(shift, load_settings()))
                await client.create_flow_run_from_deployment(ident, name="one of two")
        serving = asyncio.create_task(runner.start())
        while len(runner._process_manager.flow_run_ids() if runner.started else ()) < 2:
            await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        await serving

    asyncio.run(run())


def test_runs_that_live_long_keep_no_other_from_starting(server: str, tmp_path: Path) -> None:
    env = plain_environment(
        tmp_path / "home", PREFECT_API_URL=server, PYTHONPATH=str(ROOT), PREFECT_RUNNER_PROCESS_LIMIT="1"
    )
    said, api = tmp_path / "runner.log", Api(server)
    process = processes.start(_starts_both, env=env, stdout=said, stderr=said, cwd=ROOT)
    try:
        assert processes.ended(process, 120) == 0, said.read_text()
    finally:
        for name in ("process/shift", "react/shift"):
            httpx.delete(f"{server}/deployments/{api.deployments()[name]['id']}").raise_for_status()
