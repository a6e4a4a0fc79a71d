"""The flow `replay`: processors over the past again, beside what is live, ending in the difference and a decision.

Neither it nor anything that it imports can construct a mail transport; a test imports it and looks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger, pause_flow_run
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput, read_flow_run_input
from prefect.runtime import flow_run
from prefect.states import Running
from pydantic import Field

from flows.replay_report import report
from flows.run_name import rename, run_settings
from storage.errors import AfterlogError
from storage.generations import READY, RUNNING, list_replays
from storage.store import Store
from tasks.impact import Comparison, compare
from tasks.promote import promote
from tasks.replay import drop_replay, run_replay, start
from tasks.replay_plan import Planned, Request, describe, parse_ticks, read_plan
from tasks.topology import Topology, build_topology

DECIDE_WITHIN = 7 * 86_400
"""Seconds that a person has; after that the generation stays, neither promoted nor discarded."""
LOOK_EVERY = 5
_PLACE = r"^(all|\d+|\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(:\d\d(\.\d+)?)?([Zz]|[+-]\d\d:?\d\d))$"
Where = Annotated[str, Field(pattern=_PLACE, examples=["all", "5130", "2026-01-31T12:00:00Z"])]
AsOf = Annotated[
    str, Field(pattern=r"^(recorded|log-end|\d{1,15}|\d{4}-\d\d-\d\d[Tt ].*)$", examples=["recorded", "log-end"])
]
Changed = Annotated[dict[str, Any], Field(title="Changed settings", examples=[{"timeout": "45m"}])]


class Verdict(RunInput):
    """What a person decides with the difference in view: yes makes the new generation live, no discards it."""

    promote: bool = Field(False, description="On: the new generation becomes live. Off: it is discarded.")


@flow(name="replay", flow_run_name="replay", log_prints=False, persist_result=False)
def replay(
    processors: list[str] | None = None,
    from_: Where = "all",
    to: Where = "all",
    settings: Changed = {},  # noqa: B006  # never changed; None would make the form ask which kind it is
    as_of: AsOf = "recorded",
    name: Annotated[str, Field(max_length=100)] = "",
    decide: Literal["compare", "ask"] = "compare",
) -> Comparison:
    """Run processors again over the past into a new generation beside the live one, and show how it differs.

    Nothing that is live changes, and nothing can be mailed. Who reads what they write is replayed with them.

    Args:
        processors: their names; those that the settings touch, or all, where they are left out.
        from_: compare from here on: an offset, a time, or all.
        to: compare up to here.
        settings: other settings for the whole of the past, `{"timeout": "45m"}` say.
        as_of: recorded (the recorded ticks), or one tick at the end instead: log-end, or a time.
        name: what to call it. The name of one that was interrupted goes on with it.
        decide: `compare` ends with the difference. `ask` waits for a person who has seen it: yes promotes, no discards.
    """
    loaded = run_settings()
    store, topology, holder = Store(loaded), build_topology(loaded), f"replay run {flow_run.name} ({flow_run.id})"
    called = name or f"run-{str(flow_run.id)[:13]}"  # so that a run which is tried again goes on with its own
    request = Request(tuple(processors or ()), from_, to, settings, parse_ticks(as_of), called)
    try:
        planned, resumed = start(store, topology, request, holder)
        rename(f"replay {describe(planned)}: generation {planned.generation}")
        get_run_logger().info("%s generation %s", "Going on with" if resumed else "Making", planned.generation)
        found = _replay(planned, store, topology, holder)
        if decide == "ask":
            _decide(planned, found, store, topology, holder)
    except BaseException as error:
        # A failure is gone on with by its name, and so is what a lost server or runner ended; a person wanted it away.
        if not isinstance(error, Exception) and _is_cancelled():
            _drop(store, request, holder)
        raise
    return found


def _drop(store: Store, request: Request, holder: str) -> None:
    """Drop what a cancelled run has made, if it got so far; another replay of that name, or one that is live by now, stays."""
    for row in list_replays(store.database):
        if row.name == request.name and row.state in (RUNNING, READY) and read_plan(row).plan.request == request:
            get_run_logger().info("Cancelled: generation %s is gone", drop_replay(store, row.generation, holder))


def _replay(planned: Planned, store: Store, topology: Topology, holder: str) -> Comparison:
    done = run_replay(planned, store, topology, holder)
    for note in done.notes:
        get_run_logger().warning(note)
    found = compare(store, topology, done.planned)
    create_markdown_artifact(report(done.planned, found), key="replay", description=f"Replay: {describe(planned)}")
    for log in found.logs:
        get_run_logger().info(
            "%s: %s the same, %s added, %s removed, %s changed", log.log, log.same, log.added, log.removed, log.changed
        )
    return found


def _decide(planned: Planned, found: Comparison, store: Store, topology: Topology, holder: str) -> None:
    """Pause with the difference in front of a person."""
    try:
        verdict = _ask(report(planned, found))
    except FlowPauseTimeout:
        get_run_logger().warning("Nobody decided: the generation stays as it is. See `afterlog replays`")
        return
    if not verdict.promote:
        get_run_logger().info("Discarded: generation %s is gone", drop_replay(store, planned.generation, holder))
        return
    moved = promote(store, topology, planned.generation, holder)
    get_run_logger().info(
        "Promoted: %s are live; %s mails queued; those who follow waited for %.2f s",
        ", ".join(f"{log} generation {generation}" for log, generation in moved.live.items()), moved.queued, moved.seconds,
    )  # fmt: skip
    for note in moved.notes:
        get_run_logger().warning(note)


def _ask(shown: str) -> Verdict:
    """What a person answers. A run that goes on without an answer asks again: nobody has said that it is to be discarded."""
    wanted = Verdict.with_initial_data(description=shown)
    while True:
        with _known_to_live():
            verdict = pause_flow_run(wait_for_input=wanted, timeout=DECIDE_WITHIN, poll_interval=LOOK_EVERY)
        if read_flow_run_input(verdict.metadata.key) is not None:
            return verdict
        get_run_logger().warning("The run went on without an answer: it asks again")


@contextmanager
def _known_to_live() -> Iterator[None]:
    """Until the block ends, take back what Prefect's server wrongly says: that this run has crashed.

    A machine that slept wakes up to a server that has not heard of its runs for too long. It has them run again, which their
    runner does not as long as they live; and nobody can answer a run that is not paused. Running, it goes on to ask again.
    """
    ident, over, log = flow_run.id, threading.Event(), get_run_logger()

    def look() -> None:
        before, away = None, False
        while not over.wait(LOOK_EVERY):
            try:
                with get_client(sync_client=True) as client:
                    state = client.read_flow_run(ident).state
                    dead = state is not None and (state.is_crashed() or state.name == "AwaitingRetry")
                    if dead and state == before:  # else the automation may be about to say the second after the first
                        client.set_flow_run_state(
                            ident, Running(message="It lives, and waits for an answer"), force=True
                        )
                    before, away = state, False
            except Exception as error:  # noqa: BLE001  # a server that is gone says nothing wrong
                if not away:  # once: it may be gone for days
                    log.warning("Prefect's server does not say what it takes the run for: %r", error)
                away = True

    thread = threading.Thread(target=look, name="known to live", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _is_cancelled() -> bool:
    """Whether a person cancels this run, and not a runner that is told to end."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run.id).state
    except Exception as error:  # a server that is gone cancels nothing
        raise AfterlogError("the run was told to end, and Prefect's server does not say why") from error
    return state is not None and (state.is_cancelling() or state.is_cancelled())
