"""The flow `replay` under a real server: the artifact, the pause with the difference in view, yes, no, and a cancel."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from storage.door import append_lines
from storage.generations import DISCARDED, LIVE, find_replay, list_replays
from storage.settings import load_settings
from storage.store import Store
from tasks.process import positions
from tests import processes
from tests.conftest import ROOT, afterlog
from tests.helpers import derived, followed
from tests.operations import Api, plain_environment, wait_for
from tests.test_promotion import check_as_ever, history
from tests.test_replay import line, write

FORTY_FIVE = {"timeout": "45m"}


@pytest.fixture
def store(home: Path) -> Store:
    return Store(load_settings())


def answer(promote: bool, shown: list[str]) -> threading.Thread:
    """A person who looks at the paused run, and answers."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    async def decide() -> None:
        async with get_client() as client:
            while True:
                paused = [
                    r for r in await client.read_flow_runs() if r.state and r.state.is_paused() and "replay" in r.name
                ]
                if paused:
                    break
                await asyncio.sleep(0.1)
            keyset = paused[0].state.state_details.run_input_keyset  # type: ignore[union-attr]  # it has a state
            while not shown:  # it is written a moment after the state
                with contextlib.suppress(PrefectHTTPStatusError):
                    shown.append(str(await client.read_flow_run_input(paused[0].id, keyset["description"])))
            await client.resume_flow_run(paused[0].id, run_input={"promote": promote})

    thread = threading.Thread(target=lambda: asyncio.run(decide()), daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("promote", [True, False])
def test_it_pauses_with_the_difference_in_view_and_yes_promotes_and_no_discards(
    store: Store, promote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.artifacts import Artifact

    from flows import replay as module

    history(store)
    shown: list[str] = []
    person = answer(promote, shown)
    monkeypatch.setattr(module, "LOOK_EVERY", 1)
    found = module.replay(settings=FORTY_FIVE, decide="ask", name="longer")
    person.join(10)
    assert found.logs[0].removed
    assert "Whose inbox that would change" in shown[0]
    assert "data:image/svg+xml" in shown[0]
    artifact = Artifact.get("replay")
    assert artifact is not None
    assert f"| baskets | {found.logs[0].old} | {found.logs[0].new} |" in str(artifact.data)
    assert find_replay(store.database, "longer").state == (LIVE if promote else DISCARDED)
    check_as_ever(store, timeout="45m" if promote else "30m")


def test_a_cancelled_run_leaves_nothing_and_a_stopped_one_can_be_gone_on_with(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import replay as module

    history(store)

    class Ended(BaseException):
        """What a signal, a cancel or a time limit comes as."""

    def told_to_end(*_: Any, **__: Any) -> None:
        raise Ended

    monkeypatch.setattr(module, "compare", told_to_end)
    for cancelled in (False, True):
        monkeypatch.setattr(module, "_is_cancelled", lambda cancelled=cancelled: cancelled)
        with pytest.raises(Ended):
            module.replay(settings=FORTY_FIVE, name="longer")
        assert (find_replay(store.database, "longer").state == DISCARDED) == cancelled
    assert len(list_replays(store.database)) == 1
    assert not list((store.home / "logs").glob("*@*"))


def serve() -> None:
    """The runner that `afterlog up` starts, with a replay's deployment alone."""
    from deployments.definitions import DEFINITIONS, build
    from deployments.serve import new_runner

    async def run() -> None:
        runner = new_runner(query_seconds=1)
        replays = next(each for each in DEFINITIONS if each.flow.name == "replay")
        await runner.aadd_deployment(await build(replays, load_settings()))
        await runner.start()

    asyncio.run(run())


@contextlib.contextmanager
def served(store: Store, server: str, folder: Path) -> Iterator[Api]:
    """A runner for replays over the HOME of a store, that commit after each line: slow enough to be looked at."""
    small = {"AFTERLOG_BATCH_BYTES": "1", "AFTERLOG_COMMIT_BYTES": "1"}
    env = plain_environment(store.home, PREFECT_API_URL=server, PYTHONPATH=str(ROOT), **small)
    said = folder / "runner.log"
    process = processes.start(serve, env=env, stdout=said, stderr=said, cwd=ROOT)
    api = Api(server)
    try:
        wait_for(lambda: "replay/by-hand" in api.deployments())
        yield api
    finally:
        process.terminate()
        processes.ended(process)
        httpx.delete(f"{server}/deployments/{api.deployments()['replay/by-hand']['id']}").raise_for_status()


def test_a_click_on_cancel_ends_it_leaves_nothing_and_what_is_live_goes_on(
    store: Store, server: str, tmp_path: Path
) -> None:
    write(store, *[line(n % 50, n * 0.5) for n in range(4000)], as_of=3000)
    before = derived(store.home)
    with served(store, server, tmp_path) as api, followed(store, "abandonment", "derive"):
        run = api.start("replay/by-hand", settings=FORTY_FIVE)
        wait_for(lambda: [p for p in positions(store, every=True) if p.generation == 2 and p.lines > 10])
        assert b"\tRUNNING\t" in afterlog(store.home, "replays", "list").stdout
        api.post(f"/flow_runs/{run}/set_state", state={"type": "CANCELLING"})
        assert api.finished(run)["state_type"] == "CANCELLED"
        append_lines(store, "events", [line(1, 4000)])
        end = store.reader("events", 0).end()
        wait_for(lambda: {p.offset for p in positions(store) if p.processor in ("abandonment", "derive")} == {end}, 5)
    assert find_replay(store.database, 2).state == DISCARDED
    assert b"\tDISCARDED\t" in afterlog(store.home, "replays", "list").stdout
    assert not list((store.home / "logs").glob("*@*"))
    assert {p.generation for p in positions(store, every=True)} == {1}
    assert derived(store.home) == before
