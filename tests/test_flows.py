"""The flows under a real Prefect server: tasks, retries, shifts that hand over, and signals."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from storage.door import append_events, append_lines
from storage.locks import RunLock
from storage.owner import owner_of, take_over
from storage.settings import load_settings
from storage.store import Store
from storage.times import now
from tasks.process import positions
from tests.conftest import ROOT, afterlog, log_bytes
from tests.operations import PATIENCE, Api, wait_for
from tests.smtp_server import SmtpServer

PROCESSORS = {"quarantine", "derive", "abandonment", "anomalies", "normalise"}

FAILING = """
from tasks.processors import contract


class Processor(contract.Processor):
    name, reads, writes = "picky", "events", "picked"

    def event(self, event, state, out):
        if event.key == "poison":
            raise ValueError("cannot take poison")
        out.emit(self, event, {"id": event.id}, "PICKED", {"type": "NONE"}, name="picked")
"""


def customer_event(ident: object, verb: str = "STARTED_BROWSING", **obj: Any) -> dict[str, Any]:
    return {
        "subject": {"id": ident, "type": "CUSTOMER"},
        "verb": {"type": verb},
        "object": {"type": "NONE", **obj},
        "context": {"at": now()},
    }


def task_runs(flow_run_id: object) -> list[Any]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    async def read() -> list[Any]:
        async with get_client() as client:
            return await client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))

    return asyncio.run(read())


def settled(state: Any, expected: int) -> list[Any]:
    """The task runs of a flow run; they, and what became of them, reach the server after the run has ended."""

    def all_ended() -> list[Any]:
        runs = task_runs(state.state_details.flow_run_id)
        ended = len(runs) >= expected and all(run.state is not None and run.state.is_final() for run in runs)
        return runs if ended else []

    found: list[Any] = wait_for(all_ended, every=0.2)
    return found


def start_shift(flow: str, server: str, log: Path, **more: str) -> subprocess.Popen[bytes]:
    code = f"from flows.{flow} import {flow}; {flow}(shift=True)"
    env = {**os.environ, "PREFECT_API_URL": server, **more}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=env, stdout=log.open("ab"), stderr=subprocess.STDOUT
    )


def test_the_number_of_task_runs_does_not_grow_with_the_number_of_events(home: Path) -> None:
    from flows.process import process

    store = Store(load_settings())
    counts = []
    for events in (1, 3000):
        append_events(store, "events", [customer_event(i) for i in range(events)])
        state = process(return_state=True)
        assert state.is_completed()
        counts.append(len(settled(state, len(PROCESSORS))))
    assert counts == [len(PROCESSORS), len(PROCESSORS)]


def test_one_processor_that_fails_is_retried_and_holds_back_no_other(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.process import process

    (tmp_path / "picky_one.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("AFTERLOG_PROCESSORS", '["picky_one"]')
    store = Store(load_settings())
    append_events(store, "events", [customer_event(1), customer_event("poison"), customer_event(2)])
    state = process(return_state=True)
    assert state.is_failed()
    assert "ValueError: cannot take poison. Correct it, at " in state.message
    runs = {run.name: run for run in settled(state, len(PROCESSORS) + 1)}
    assert runs["picky"].run_count == 6
    assert runs["picky"].state.is_failed()
    assert all(runs[name].state.is_completed() for name in PROCESSORS)
    assert {p.processor: p.lines for p in positions(store)} == {**dict.fromkeys(PROCESSORS, 3), "picky": 0}

    sys.modules.pop("picky_one")
    (tmp_path / "picky_one.py").write_text(FAILING.replace('"poison"', '"nobody"'))
    assert process(return_state=True).is_completed()
    assert log_bytes(home, "picked").count(b"\n") == 3


def test_every_processor_follows_however_few_threads_prefect_is_set_to(home: Path, server: str, tmp_path: Path) -> None:
    store = Store(load_settings())
    append_events(store, "events", [customer_event(1)])
    shift = start_shift("process", server, tmp_path / "shift.log", PREFECT_TASKS_RUNNER_THREAD_POOL_MAX_WORKERS="1")
    try:
        wait_for(lambda: {p.processor for p in positions(store) if p.lines} == PROCESSORS, 60)
    finally:
        shift.kill()
        shift.wait()


def test_a_retry_waits_where_a_stop_ends_it_whatever_prefect_is_set_to() -> None:
    code = "from tasks.prefect_tasks import *; print([t.retry_delay_seconds for t in (process_task, follow_task, deliver_task)])"
    env = {**os.environ, "PREFECT_TASKS_DEFAULT_RETRY_DELAY_SECONDS": "60"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "[0, 0, 0]\n"


def test_the_processor_of_the_docs_runs_in_the_flow_as_a_task_of_its_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.process import process

    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "processors.md").read_text(), re.DOTALL)[0]
    (tmp_path / "vip.py").write_text(code)
    monkeypatch.chdir(tmp_path)  # a flow's process may be in any folder
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("AFTERLOG_PROCESSORS", '["vip"]')
    append_events(Store(load_settings()), "events", [customer_event(7, "ORDERED")] * 3)
    state = process(return_state=True)
    assert state.is_completed()
    assert {run.name for run in settled(state, len(PROCESSORS) + 1)} == {*PROCESSORS, "vip"}
    assert log_bytes(home, "vips").count(b"BECAME_VIP") == 1
    assert b'"BECAME_VIP"' in afterlog(home, "read", "vips").stdout


def test_a_time_ahead_of_now_is_refused_before_anything_runs(home: Path) -> None:
    from flows.process import process

    state = process(as_of=now() + 3_600_000, return_state=True)
    assert state.is_failed()
    assert "as-of lies ahead" in state.message
    assert log_bytes(home, "clock") == b""


def test_a_shift_follows_hands_over_without_a_hole_and_stops_on_a_signal(
    home: Path, server: str, tmp_path: Path
) -> None:
    store = Store(load_settings())
    append_events(store, "events", [customer_event(0)])
    log = tmp_path / "shifts.log"
    first = start_shift("process", server, log)
    second = None
    try:
        wait_for(lambda: len([p for p in positions(store) if p.lines == 1]) == len(PROCESSORS))
        owner = wait_for(lambda: owner_of(store.database, "process"))  # its followers may be quicker than it
        second = start_shift("process", server, log)
        count, last, longest = 1, time.monotonic(), 0.0
        while first.poll() is None or count < 60:
            append_events(store, "events", [customer_event(count)])
            count += 1
            wanted = count
            wait_for(lambda wanted=wanted: _least_read(store) >= wanted, every=0.02)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert first.returncode == 0
        assert longest < 2.0
        after = owner_of(store.database, "process")
        assert after is not None
        assert after.run_id != owner.run_id

        second.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        before = [p.offset for p in positions(store)]
        append_events(store, "events", [customer_event("after the signal")])
        time.sleep(1.0)
        assert [p.offset for p in positions(store)] == before
        assert RunLock(store.lock_path("derive.lock"), "test").try_acquire()
        second.wait(PATIENCE)
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()


def test_a_run_whose_runner_is_killed_goes_on_and_ends_well(home: Path, server: str, tmp_path: Path) -> None:
    """The runner reads what its runs say; killed, it leaves them with pipes that nobody reads."""
    store = Store(load_settings())
    append_events(store, "events", [customer_event(0)])
    code = "from flows.process import process; process(shift=True)"
    shift = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PREFECT_API_URL": server},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        owner = wait_for(lambda: owner_of(store.database, "process"))
        assert shift.stdout is not None
        shift.stdout.close()
        append_lines(store, "events", [b"no event"] * 200)  # a warning in its log
        wait_for(lambda: _least_read(store) == 201)
        take_over(store.database, "process", "the successor", now() + 1)
        shift.wait(PATIENCE)
        run = Api(server).run(owner.run_id)
        assert (run["state_type"], ": 201 read, 200 quarantined" in run["name"]) == ("COMPLETED", True)
    finally:
        shift.kill()
        shift.wait()


def _least_read(store: Store) -> int:
    return min(p.lines for p in positions(store) if p.processor in PROCESSORS)


def test_a_shift_that_starts_late_gives_way_to_its_successor(home: Path) -> None:
    from flows.process import process

    store = Store(load_settings())
    take_over(store.database, "process", "the successor", now() + 600_000)
    lock = RunLock(store.lock_path("derive.lock"), "the successor")
    assert lock.try_acquire()
    begun = time.monotonic()
    state = process(shift=True, return_state=True)
    lock.release()
    assert state.is_completed()
    assert time.monotonic() - begun < 15
    owner = owner_of(store.database, "process")
    assert owner is not None
    assert owner.run_id == "the successor"


def one_basket_left(store: Store) -> None:
    """Customer 7, who has an address, left a basket 31 minutes ago."""
    import orjson

    from flows.process import process
    from storage.contacts import Entry, save_contacts

    save_contacts(store.database, [Entry("CUSTOMER", "7", "seven@example.com", False)])
    item = {"id": 3, "name": "Lemon", "price": 5, "count": 2}
    left = customer_event(7, "ADDED_ITEM_TO_BASKET", item=item)
    left["context"]["at"] -= 31 * 60_000
    left["event"] = {"inserted_at": left["context"]["at"]}
    append_lines(store, "events", [orjson.dumps(left)])
    process()


def test_react_turns_a_basket_into_one_mail_and_never_a_second(home: Path) -> None:
    from flows.react import react

    one_basket_left(Store(load_settings()))
    for _ in range(2):
        react()
    mails = list((home / "outbox").glob("*.eml"))
    assert len(mails) == 1
    assert b"seven@example.com" in mails[0].read_bytes()
    assert log_bytes(home, "deliveries").count(b'"SENT"') == 1


def test_a_shift_that_ends_lets_a_mail_on_its_way_arrive(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.react import react

    one_basket_left(Store(load_settings()))
    monkeypatch.setenv("AFTERLOG_SHIFT_LONGEST", "3s")
    with SmtpServer(takes=5) as server:
        monkeypatch.setenv("AFTERLOG_MAIL_URL", server.url)
        react(shift=True)
    assert log_bytes(home, "deliveries").count(b'"verb":"SENT"') == 1
