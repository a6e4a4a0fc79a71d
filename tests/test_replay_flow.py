"""The flow `replay` under a real server: the artifact, the pause with the difference in view, yes, no, and a cancel."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

from storage.generations import DISCARDED, LIVE, find_replay, list_replays
from storage.settings import load_settings
from storage.store import Store
from tests.test_promotion import check_as_ever, history

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
