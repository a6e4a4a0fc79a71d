"""`afterlog up` when nobody looks: what dies is started again, what crashed is run again, a click on cancel is obeyed.

All tests share one `afterlog up`, behind a password, with a mail server that asks for another. Each leaves it at work.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deployments.server import free_port
from storage.contacts import Entry, save_contacts
from storage.door import append_events
from storage.settings import load_settings
from storage.store import Store
from storage.times import now
from tasks.process import positions
from tests.conftest import afterlog, log_bytes
from tests.helpers import open_store
from tests.operations import AUTH, ProcessList, Up, command_of, wait_for
from tests.smtp_server import SmtpServer

PROCESSORS = {"quarantine", "derive", "abandonment", "anomalies", "normalise"}
MAIL_SECRET = "hunter2marked"
CRASHED_AFTER = "75s"
"""Two heartbeats of Prefect's (30 s), and what they take to arrive on a machine that is busy with other tests."""


@pytest.fixture(scope="module")
def mailbox() -> Iterator[SmtpServer]:
    with SmtpServer(tls="implicit", login=("ann", MAIL_SECRET)) as server:
        yield server


@pytest.fixture(scope="module")
def watching() -> Iterator[ProcessList]:
    """The command lines of all that runs from then on, until somebody asks."""
    processes = ProcessList()
    with processes.watched():
        yield processes


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, mailbox: SmtpServer, watching: ProcessList) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("up")
    store = open_store(folder / "home")
    save_contacts(store.database, [Entry("CLIENT", "1", "c1@example.com", False)])
    store.database.dispose()
    mail_url = mailbox.url.replace("://", f"://ann:{MAIL_SECRET}@")
    started = Up(folder, crashed_after=CRASHED_AFTER, mail_url=mail_url)
    try:
        wait_for(lambda: (started.home / "prefect" / "api-url").is_file())
        wait_for(
            lambda: started.api.runs("process/shift", "RUNNING") and started.api.runs("react/shift", "RUNNING"),
            every=0.5,
        )
        yield started
    finally:
        started.stop()
    assert started.process.returncode == 0  # to systemd, anything else would be a failure
    assert (
        sorted(
            path.name
            for path in (started.home / "prefect").iterdir()
            if path.suffix == ".pid" or path.name == "api-url"
        )
        == []
    )
    assert [
        pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if str(started.home) in command_of(pid)
    ] == []


@pytest.fixture
def store(up: Up) -> Store:
    return Store(load_settings(home=up.home))


def processed(store: Store) -> int:
    """How many lines every processor of raw logs has read."""
    read = {p.processor: p.lines for p in positions(store) if p.processor in PROCESSORS}
    return min(read.values()) if len(read) == len(PROCESSORS) else 0


def goes_on(store: Store, seconds: float) -> float:
    """Append an event, and give the seconds until everybody has read it."""
    event = {
        "subject": {"id": 1, "type": "CUSTOMER"},
        "verb": "STARTED_BROWSING",
        "object": {},
        "context": {"at": now()},
    }
    wanted, begun = processed(store) + 1, time.monotonic()
    append_events(store, "events", [event])
    wait_for(lambda: processed(store) >= wanted, seconds)
    return time.monotonic() - begun


def test_it_listens_on_this_machine_only(up: Up) -> None:
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.split(":")[1], 16) == up.port:
                listening.add(address.split(":")[0])
    assert listening == {"0100007F"}


def test_another_on_the_same_home_and_a_port_of_its_own_leaves_it_alone(up: Up) -> None:
    done = afterlog(up.home, "up", "--port", str(free_port()))
    assert (done.returncode, f"found process {up.process.pid}" in done.stderr.decode()) == (1, True)
    assert (up.home / "prefect" / "api-url").read_text() == up.api.url
    pids = [int((up.home / "prefect" / f"{name}.pid").read_text()) for name in ("server", "runner")]
    assert pids == [up.pid_of("server start"), up.pid_of("deployments.serve")]


def test_passwords_are_asked_for_and_stand_in_no_process_list_log_artifact_or_other_file(
    up: Up, store: Store, mailbox: SmtpServer, watching: ProcessList
) -> None:
    """That of Prefect's API and that of the mail server; Prefect logs all that it does."""
    assert httpx.post(f"{up.api.url}/flow_runs/filter", json={}).status_code == 401
    assert goes_on(store, 60) < 60  # the runner and its runs have it
    tax = {"subject": {"id": "UK"}, "verb": "SUBMIT_TAX", "object": {"id": 1}, "context": {"at": now()}}
    append_events(store, "events", [tax])
    wait_for(lambda: log_bytes(up.home, "deliveries").count(b'"SENT"') == 1)
    assert len(mailbox.inbox) == 1
    seen = watching.end()
    for part in (b"deployments.cli", b"prefect\0server", b"deployments.serve", b"prefect.engine"):
        assert any(part in line for line in seen)
    for secret in (AUTH.split(":")[1].encode(), MAIL_SECRET.encode()):
        assert [line for line in seen if secret in line] == []
        held = [path for path in up.home.parent.rglob("*") if path.is_file() and secret in path.read_bytes()]
        assert held == []
    assert b"| DEBUG " in up.output.read_bytes() + (up.home / "prefect" / "runner.log").read_bytes()
    assert (up.home / "prefect" / "prefect.db").stat().st_size > 0


def test_runner_and_run_killed_the_work_goes_on_and_the_dead_run_is_marked_crashed(up: Up, store: Store) -> None:
    goes_on(store, 60)
    running = up.api.runs("process/shift", "RUNNING")
    runner = up.pid_of("deployments.serve")
    runs = up.runs_of_runner()
    assert len(runs) >= 2
    begun = time.monotonic()
    for pid in (runner, *runs):
        os.kill(pid, signal.SIGKILL)
    assert goes_on(store, 150) < 150
    wait_for(lambda: _was(up, running[0]["id"], "Crashed"), 180 - (time.monotonic() - begun), 1)
    assert re.search("the runner has ended; it starts again in 1 s", up.output.read_text())
    # It is run again by an automation, finds that its successor follows, and gives way.
    wait_for(lambda: up.api.run(running[0]["id"])["state_type"] == "COMPLETED", 120, 1)
    assert goes_on(store, 10) < 10


def _was(up: Up, run: str, state: str) -> bool:
    return state in {s["name"] for s in up.api.get(f"/flow_run_states/?flow_run_id={run}")}


def test_the_server_killed_is_started_again_and_the_history_is_whole(up: Up, store: Store) -> None:
    goes_on(store, 60)
    running = up.api.runs("process/shift", "RUNNING")
    os.kill(up.pid_of("server start"), signal.SIGKILL)
    assert goes_on(store, 5) < 5
    wait_for(lambda: _healthy(up), 120, 0.5)
    assert goes_on(store, 5) < 5
    later = up.api.start("process/by-hand")
    assert up.api.finished(later)["state_type"] == "COMPLETED"
    assert up.api.run(running[0]["id"])["state_type"] == "RUNNING"
    assert not _was(up, running[0]["id"], "Crashed")  # its heartbeats had time to come through


def _healthy(up: Up) -> bool:
    try:
        return bool(up.api.get("/health"))
    except httpx.HTTPError:
        return False


def test_a_cancelled_run_stops_and_the_next_takes_over_what_it_left(up: Up, store: Store) -> None:
    goes_on(store, 60)
    run = wait_for(lambda: up.api.runs("process/shift", "RUNNING"))[0]["id"]
    clicked = time.monotonic()
    up.api.post(f"/flow_runs/{run}/set_state", state={"type": "CANCELLING", "message": "a person clicked"})
    assert up.api.finished(run, 60)["state_type"] == "CANCELLED"
    assert time.monotonic() - clicked < 15
    before = processed(store)
    append_events(store, "events", [{"subject": {"id": 2}, "verb": "X", "object": {}, "context": {"at": now()}}])
    time.sleep(2)
    assert processed(store) == before
    by_hand = up.api.finished(up.api.start("process/by-hand"))
    assert by_hand["state_type"] == "COMPLETED"
    assert processed(store) == before + 1
