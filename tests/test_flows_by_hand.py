"""What a person starts from Prefect's UI, under a real server: the brake, a line in quarantine, the archive, and forms that refuse."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from storage.brake import read_brake
from storage.door import append_lines
from storage.errors import UsageError
from storage.settings import load_settings
from storage.store import Store
from storage.times import now
from tests.conftest import ROOT, afterlog, log_bytes
from tests.operations import PATIENCE, Api, wait_for
from tests.test_archive import SMALL
from tests.test_brake import states, submit
from tests.test_commit import process, tax

TORN = b'{"subject":{"id":2},"verb":'
FIXED = '{"subject":{"id":2},"verb":"FIXED","context":{"at":1650549837170}}'


@pytest.fixture
def store(home: Path) -> Store:
    return Store(load_settings())


def events_of(name: str) -> list[dict[str, Any]]:
    """The Prefect events of a name in the last minutes; they reach the server a moment after they were emitted."""
    from prefect.client.orchestration import get_client

    async def read() -> list[dict[str, Any]]:
        async with get_client() as client:
            answer = await client._client.post("/events/filter", json={"filter": {"event": {"name": [name]}}})
            found: list[dict[str, Any]] = answer.json()["events"]
            return found

    for _ in range(100):
        if found := asyncio.run(read()):
            return found
        time.sleep(0.2)
    return []


def test_the_brake_is_put_on_and_released_and_what_is_held_dropped(store: Store) -> None:
    from flows.brake import brake

    submit(store, 1, 2)
    brake("pause", "a wrong template")
    found = read_brake(store.database)
    assert (found.state, found.reason) == ("PAUSED", "a wrong template")
    afterlog(store.home, "deliver", "--no-prefect")
    assert brake("drop what is held") == "2 mails dropped; delivery is PAUSED"
    assert states(store) == {"SUPPRESSED": 2}
    assert brake("resume") == "RUNNING; 0 mails had been held"
    state = brake("drop what is held", return_state=True)
    assert state.is_failed()
    assert "delivery is running: nothing is held" in state.message


@pytest.fixture
def brake_by_hand(home: Path, server: str) -> Iterator[Api]:
    """The brake's deployment on a real server, without a runner: a test executes its runs in the order it wants."""
    from deployments.definitions import DEFINITIONS, build
    from deployments.serve import new_runner

    async def register() -> None:
        definition = next(d for d in DEFINITIONS if d.flow.name == "brake")
        await new_runner().aadd_deployment(await build(definition, load_settings()))

    asyncio.run(register())
    api = Api(server)
    yield api
    api.delete(f"/deployments/{api.deployments()['brake/by-hand']['id']}")


def carry_out(ident: str) -> None:
    """Execute a run in this process, as one of its own would."""
    from prefect import get_client
    from prefect.flow_engine import run_flow

    from flows.brake import brake

    with get_client(sync_client=True) as client:
        run_flow(brake, client.read_flow_run(UUID(ident)))


def test_the_last_word_on_the_brake_holds_whichever_run_begins_first(
    store: Store, server: str, brake_by_hand: Api
) -> None:
    def execute(ident: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "prefect", "flow-run", "execute", ident]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PREFECT_API_URL": server})

    first, last = (brake_by_hand.start("brake/by-hand", action=action) for action in ("resume", "pause"))
    ahead = execute(last)
    wait_for(lambda: read_brake(store.database).state == "PAUSED", instead=lambda: brake_by_hand.told(last))
    for run in (execute(first), ahead):
        assert run.wait(PATIENCE) == 0
    assert [brake_by_hand.finished(each)["state_type"] for each in (first, last)] == ["COMPLETED", "COMPLETED"]
    assert read_brake(store.database).state == "PAUSED"


@pytest.mark.parametrize("action", ["resume", "drop what is held"])
def test_a_crashed_run_that_is_run_again_takes_nothing_back_that_was_asked_for_since(
    store: Store, brake_by_hand: Api, action: str
) -> None:
    first, last = (brake_by_hand.start("brake/by-hand", action=each) for each in (action, "pause"))
    brake_by_hand.post(f"/flow_runs/{first}/set_state", state={"type": "CRASHED"}, force=True)
    carry_out(last)
    submit(store, 1)
    afterlog(store.home, "deliver", "--no-prefect")
    brake_by_hand.post(
        f"/flow_runs/{first}/set_state", state={"type": "SCHEDULED", "name": "AwaitingRetry"}, force=True
    )
    carry_out(first)  # as the automation has it, once the server knows that it is dead
    found = brake_by_hand.finished(first)["state"]
    assert (found["type"], found["name"]) == ("COMPLETED", "Not needed"), found
    assert read_brake(store.database).state == "PAUSED"
    assert states(store) == {"WAITING": 1}


def test_of_runs_that_are_asked_for_at_the_same_time_none_waits_for_the_others_in_vain(
    store: Store, brake_by_hand: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run may be asked for by the minute: two of one minute waited for each other, two minutes long."""
    monkeypatch.setattr("flows.brake.WAIT", 1.0)
    deployment = brake_by_hand.deployments()["brake/by-hand"]["id"]
    at = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2026-01-01T00:00:00Z"}}
    first, last = (
        brake_by_hand.post(f"/deployments/{deployment}/create_flow_run", parameters={"action": action}, state=at)["id"]
        for action in ("resume", "pause")
    )
    with caplog.at_level("WARNING", "prefect.flow_runs"):
        carry_out(first)
        carry_out(last)
    assert not [record for record in caplog.records if "has not ended" in record.getMessage()]
    assert read_brake(store.database).state == "PAUSED"


def test_when_delivery_stops_itself_a_prefect_event_says_why_and_the_artifact_too(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.react import react

    monkeypatch.setenv("AFTERLOG_BRAKE_FLOOR", "2")
    submit(store, 1, 2, 3)
    react()
    reason = read_brake(store.database).reason
    assert "mails surge: " in reason
    assert states(store) == {"WAITING": 3}
    [event] = events_of("afterlog.brake")
    assert event["payload"] == {"sentence": f"Delivery has stopped itself: {reason}"}
    assert event["resource"]["prefect.resource.id"] == "afterlog.deliver"
    assert [r for r in event["related"] if r["prefect.resource.id"].startswith("prefect.flow-run.")]
    from prefect.artifacts import Artifact

    from flows.markdown import escape

    artifact = asyncio.run(Artifact.aget("react"))  # type: ignore[arg-type]  # Prefect takes its own session from the context
    assert artifact is not None
    assert f"**Mails are held:** {escape(reason, 500)}" in str(artifact.data)


def test_a_line_in_quarantine_is_tried_again(store: Store) -> None:
    from flows.quarantine import quarantine_retry

    append_lines(store, "events", [TORN])
    afterlog(store.home, "process", "--no-prefect", "--as-of", "log-end")
    state = quarantine_retry("events:0:0", return_state=True)
    assert state.is_failed()
    assert "the judge refuses the line: no JSON" in state.message
    assert quarantine_retry("0", FIXED) == f"events:0:0 is in events again, at events:0:{len(TORN) + 1}"
    assert log_bytes(store.home, "events") == TORN + b"\n" + FIXED.encode() + b"\n"


def test_a_forced_line_is_not_appended_twice_where_its_run_crashed_and_is_run_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.quarantine import quarantine_retry

    append_lines(store, "events", [TORN])
    afterlog(store.home, "process", "--no-prefect", "--as-of", "log-end")
    for _ in range(2):  # a person may, whenever they say so
        quarantine_retry("0", FIXED, force=True)
    before = log_bytes(store.home, "events")
    assert before.count(FIXED.encode()) == 2
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__RUN_COUNT", "2")  # as Prefect tells a run that is run again
    state = quarantine_retry("0", FIXED, force=True, return_state=True)
    assert (state.is_failed(), log_bytes(store.home, "events")) == (True, before)


def test_a_processor_that_fails_in_a_flow_is_told_by_the_status(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.process import process
    from tests.test_status import FAILING

    (tmp_path / "picky_three.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("AFTERLOG_PROCESSORS", '["picky_three"]')
    event = {"subject": {"id": 1}, "verb": "X", "context": {"at": now()}}
    append_lines(store, "events", [json.dumps(event).encode()])
    assert process(return_state=True).is_failed()
    done = afterlog(store.home, "status", "--check", processors='["picky_three"]')
    assert done.returncode == 1
    assert b"picky (events/0) is stuck: it failed 6 times since its last commit" in done.stderr


@pytest.mark.parametrize(
    ("flow", "parameters", "said"),
    [
        ("react", {"limit": 0}, "limit"),
        ("react", {"limit": 1.5}, "limit"),
        ("process", {"as_of": "yesterday"}, "as_of"),
        ("process", {"as_of": 10**30}, "as_of"),
        ("brake", {"action": "stop"}, "action"),
        ("brake", {}, "action"),
        ("quarantine-retry", {"line_id": "the first one"}, "line_id"),
        ("quarantine-retry", {"line_id": "5", "line": "{\n}"}, "line"),
    ],
)
def test_the_server_refuses_a_form_before_anything_runs(
    home: Path,
    flow: str,
    parameters: dict[str, Any],
    said: str,
) -> None:
    """As the UI does it: a run is asked for, and the parameters are checked against the form."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    from deployments.definitions import BY_HAND, DEFINITIONS, build

    async def ask() -> str:
        [definition] = [d for d in DEFINITIONS if (d.flow.name, d.name) == (flow, BY_HAND)]
        ident = await (await build(definition, load_settings())).apply()
        async with get_client() as client:
            try:
                await client.create_flow_run_from_deployment(ident, parameters=parameters)
            except PrefectHTTPStatusError as error:
                return f"{error.response.status_code} {error.response.text}"
        return "accepted"

    answer = asyncio.run(ask())
    assert answer.startswith("409 ")
    assert "Validation failed" in answer
    assert said in answer


def test_a_schedule_that_a_person_has_paused_stays_so_when_the_runner_starts_again(home: Path, server: str) -> None:
    from deployments.definitions import DEFINITIONS
    from deployments.serve import new_runner, register

    api = Api(server)

    def registered() -> tuple[set[str], set[str]]:
        """Whose first shift is to start, and whose schedule is on."""
        to_start = {str(ident) for ident in asyncio.run(register(new_runner(), load_settings()))}
        found = api.deployments()
        on = {name for name, d in found.items() if d["schedules"] and all(s["active"] for s in d["schedules"])}
        return {name for name, d in found.items() if d["id"] in to_start}, on

    def switch(name: str, *, on: bool) -> None:
        [deployment] = [d for known, d in api.deployments().items() if known == name]
        [schedule] = deployment["schedules"]
        api.patch(f"/deployments/{deployment['id']}/schedules/{schedule['id']}", active=on)

    shifts = {"process/shift", "react/shift"}
    try:
        assert registered() == (shifts, {*shifts, "archive/daily"})
        switch("react/shift", on=False)
        switch("archive/daily", on=False)
        for _ in range(2):
            assert registered() == ({"process/shift"}, {"process/shift"})
        switch("react/shift", on=True)
        assert registered() == (shifts, shifts)
    finally:
        for definition in DEFINITIONS:
            api.delete(f"/deployments/{api.deployments()[definition.full_name]['id']}")


def test_shifts_that_were_due_while_no_runner_was_there_are_forgotten(home: Path, server: str) -> None:
    """After a night each of them would start a process, and take over from the one before."""
    from prefect.client.orchestration import get_client

    from deployments.definitions import DEFINITIONS
    from deployments.serve import forget_late, new_runner, register

    api = Api(server)

    async def late() -> int:
        async with get_client() as client:
            return await forget_late(client, to_start)

    try:
        to_start = asyncio.run(register(new_runner(), load_settings()))
        assert asyncio.run(late()) == 0
        by_hand = api.start("process/shift")
        for name, begin, end in (
            ("process/shift", "2026-01-01T00:00:00Z", "2026-01-01T08:20:00Z"),
            ("process/shift", "2026-01-02T00:00:00Z", "2026-01-02T08:20:00Z"),
            ("process/shift", "2026-01-03T00:00:00Z", "2026-01-03T08:20:00Z"),
            ("archive/daily", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z"),
        ):
            api.post(
                f"/deployments/{api.deployments()[name]['id']}/schedule", start_time=begin, end_time=end, min_runs=100
            )
        others = {run["id"] for run in api.runs("archive/daily")}
        assert others
        crashed = next(run["id"] for run in api.runs("process/shift") if run["expected_start_time"] < "2026-06")
        again = {
            "type": "SCHEDULED",
            "name": "AwaitingRetry",
            "state_details": {"scheduled_time": "2026-01-04T00:00:00Z"},
        }
        for state in ({"type": "RUNNING"}, {"type": "CRASHED"}, again):
            api.post(f"/flow_runs/{crashed}/set_state", state=state, force=True)
        assert asyncio.run(late()) > 200, "more than a page of them"
        left = [run["id"] for run in api.runs("process/shift") if run["expected_start_time"] < "2026-06"]
        assert left == [crashed], "which has a history, and is run again"
        assert by_hand in {run["id"] for run in api.runs("process/shift")}
        assert {run["id"] for run in api.runs("archive/daily")} >= others
    finally:
        for definition in DEFINITIONS:
            api.delete(f"/deployments/{api.deployments()[definition.full_name]['id']}")


def test_a_replay_that_asks_is_answered_by_a_person_and_by_nothing_else(
    home: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where the server took it for dead, as after a machine that slept, nor where it was resumed without an answer."""
    from flows import replay as module
    from storage.generations import LIVE, READY, find_replay
    from tests.test_promotion import history

    store, api, seen = Store(load_settings()), Api(server), []
    history(store)
    monkeypatch.setattr(module, "LOOK_EVERY", 0.5)
    monkeypatch.setattr(module, "DECIDE_WITHIN", 60)

    def paused() -> str:
        """The run, once it asks anew."""

        def found() -> str | None:
            for run in api.post("/flow_runs/filter", flow_runs={"state": {"type": {"any_": ["PAUSED"]}}}):
                if "timeout=45m" in run["name"] and run["state_id"] not in seen:
                    seen.append(run["state_id"])
                    return str(run["id"])
            return None

        return str(wait_for(found))

    def resume(run: str, **answer: Any) -> None:
        """As the UI does; what is to be answered is there a moment after the state, and until then it is refused."""
        wait_for(lambda: api.post(f"/flow_runs/{run}/resume", **answer)["status"] == "ACCEPT")

    def person() -> None:
        run = paused()
        for state in ({"type": "CRASHED"}, {"type": "SCHEDULED", "name": "AwaitingRetry"}):
            api.post(f"/flow_runs/{run}/set_state", state=state, force=True)
        resume(paused())
        assert find_replay(store.database, "longer").state == READY
        resume(paused(), run_input={"promote": True})

    thread = threading.Thread(target=person, daemon=True)
    thread.start()
    module.replay(settings={"timeout": "45m"}, decide="ask", name="longer")
    thread.join(10)
    assert (find_replay(store.database, "longer").state, len(seen)) == (LIVE, 3)


@pytest.mark.parametrize(
    ("given", "millis"),
    [
        (1_764_350_000, 1_764_350_000_000),
        (1_598_622_166_810, 1_598_622_166_810),
        ("2026-11-28T10:00", 1_795_860_000_000),
        ("2026-11-28 11:00:00+01:00", 1_795_860_000_000),
        ("2004-05-08T05:25:25.557Z", 1_083_993_925_557),
        ("2020-08-28T13:42:46.8105Z", 1_598_622_166_810),
        ("2020-08-28T13:42:46.8115Z", 1_598_622_166_812),
    ],
)
def test_a_time_in_the_form_is_the_time_that_the_command_line_makes_of_it(given: int | str, millis: int) -> None:
    from pydantic import TypeAdapter

    from flows.process import AsOfParameter, _as_of

    assert _as_of(TypeAdapter(AsOfParameter).validate_python(given)) == millis


def test_a_time_of_1972_is_the_same_for_the_command_line_and_its_flow(home: Path, server: str) -> None:
    event = b'{"subject":{"id":1},"verb":"X","event":{"inserted_at":"1972-01-01T00:00:00Z"}}'
    append_lines(Store(load_settings()), "events", [event])
    command = [sys.executable, "-m", "deployments.cli", "process", "--as-of", "1972-01-02T00:00:00Z"]
    env = {**os.environ, "PREFECT_API_URL": server}  # else it starts a server of its own
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert b'"as_of":63158400000,' in log_bytes(home, "clock")


@pytest.mark.parametrize(
    ("name", "parameters"), [("process", {"as_of": "log-end"}), ("process", {"as_of": 5}), ("react", {"limit": 5})]
)
def test_what_a_shift_cannot_heed_is_refused_and_nothing_runs(
    home: Path, name: str, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERLOG_SHIFT_LONGEST", "1s")
    state = getattr(importlib.import_module(f"flows.{name}"), name)(shift=True, **parameters, return_state=True)
    assert state.is_failed()
    assert f"found {next(iter(parameters))} " in state.message
    assert log_bytes(home, "clock") == b""


def test_the_log_of_a_run_tells_a_refusal_once_and_in_a_sentence(home: Path, server: str) -> None:
    from prefect import get_client
    from prefect.flow_engine import run_flow
    from prefect.logging.loggers import flow_run_logger

    from flows.process import process

    with get_client(sync_client=True) as client:
        run = client.create_flow_run(process, parameters={"as_of": "2090-01-01T00:00:00Z"})
    with pytest.raises(UsageError, match="as-of lies ahead"):
        run_flow(process, run, error_logger=flow_run_logger(run))  # as the process of a run does
    api = Api(server)

    def told() -> list[str]:
        logs = api.post("/logs/filter", logs={"flow_run_id": {"any_": [str(run.id)]}}, sort="TIMESTAMP_ASC")
        return [log["message"] for log in logs]

    found = wait_for(lambda: (lines := told()) and lines[-1].startswith("Finished in state Failed") and lines)
    assert [line.startswith("as-of lies ahead; found 2090-") for line in found] == [False, True, False]
    assert not [line for line in found if "Traceback" in line]


def test_every_field_of_a_form_is_described(home: Path) -> None:
    from deployments.definitions import BY_HAND, DEFINITIONS, build

    by_hand = [d for d in DEFINITIONS if d.name == BY_HAND]
    forms = {
        d.flow.name: asyncio.run(build(d, load_settings()))._parameter_openapi_schema.model_dump() for d in by_hand
    }
    assert set(forms) == {"process", "react", "brake", "quarantine-retry", "why", "replay"}
    for name, form in forms.items():
        for field, shape in form["properties"].items():
            assert shape.get("description"), f"{name}: {field}"
    assert set(forms["quarantine-retry"]["required"]) == {"line_id"}


def test_the_flow_archives_tells_what_it_did_and_keeps_the_password(
    home: Path, make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.artifacts import Artifact

    from flows.archive import archive as flow

    monkeypatch.setenv("AFTERLOG_SEGMENT_BYTES", "300")
    monkeypatch.setenv("AFTERLOG_LIVE_WINDOW", "1ms")
    store = make_store(**SMALL)
    for n in range(10):
        append_lines(store, "events", [tax(n)])
    process(store)
    state = flow(return_state=True)
    assert state.is_completed()
    done = {each.name: each for each in state.result()}["events/0"]
    assert done.put >= 3
    assert done.removed == done.put
    [shown] = [Artifact.get("archive")]
    assert shown is not None
    assert "| events/0 | " in str(shown.data)
    secret = "hunter2marked"
    monkeypatch.setenv("AFTERLOG_ARCHIVE_URL", f"ftp://ann:{secret}@127.0.0.1:9/x")
    for n in range(10):
        append_lines(store, "events", [tax(n)])
    state = flow.with_options(retries=0)(return_state=True)
    assert state.is_failed()
    assert "ftp://***@127.0.0.1:9/x: the archive refused: ConnectionRefused" in str(state.message)
    assert secret not in f"{state!r}"
