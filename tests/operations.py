"""For tests of what runs unattended: `afterlog up` and Prefect's server as processes, and Prefect's API as its UI uses it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from deployments.server import Processes, free_port
from storage.locks import locked
from storage.settings import Settings, load_settings
from tests.conftest import ROOT, settings_of

PATIENCE = 300.0
"""Seconds that a test waits for what must come, where how soon is not its question: a run took 30 s to start on two cores that
others wanted too."""
AUTH = "operator:a-Secret-of-0urs"


def wait_for(
    what: Callable[[], Any],
    seconds: float = PATIENCE,
    every: float = 0.1,
    instead: Callable[[], str] = lambda: "nothing",
) -> Any:
    """What `what` gives, as soon as that is something.

    The test fails where it takes longer than `seconds`, and says what `instead` found then.
    """
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"it did not happen within {seconds} s; instead: {instead()}"
        time.sleep(every)
    return found


def plain_environment(home: Path, **more: str) -> dict[str, str]:
    """No setting of the person who runs the tests, and HOME."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "AFTERLOG_"))}
    return {**env, "AFTERLOG_HOME": str(home), **more}


class Api:
    """Prefect's API: what the UI calls when a person clicks."""

    def __init__(self, url: str, auth: str | None = None) -> None:
        self.url = url
        self._client = httpx.Client(base_url=url, auth=tuple(auth.split(":")) if auth else None, timeout=PATIENCE)  # type: ignore[arg-type]  # a user and a password

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        for _ in range(20):
            answer = self._client.request(method, path, json=body)
            if answer.status_code != 503:  # its database was busy; Prefect's own client tries again too
                break
            time.sleep(0.5)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def post(self, path: str, **body: Any) -> Any:
        return self._send("POST", path, body)

    def get(self, path: str) -> Any:
        return self._send("GET", path)

    def delete(self, path: str) -> None:
        self._send("DELETE", path)

    def patch(self, path: str, **body: Any) -> None:
        self._send("PATCH", path, body)

    def deployments(self) -> dict[str, dict[str, Any]]:
        """By `flow/name`."""
        found = self.post("/deployments/filter")  # first: who is registering them makes a flow before its deployments
        flows = {flow["id"]: flow["name"] for flow in self.post("/flows/filter")}
        return {f"{flows[d['flow_id']]}/{d['name']}": d for d in found}

    def runs(self, name: str, *states: str) -> list[dict[str, Any]]:
        """The runs of a deployment, newest first, in any of `states`."""
        ids = [d["id"] for known, d in self.deployments().items() if known == name]
        found = self.post("/flow_runs/filter", sort="START_TIME_DESC", flow_runs={"deployment_id": {"any_": ids}})
        return [run for run in found if not states or run["state_type"] in states]

    def run(self, ident: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/flow_runs/{ident}")
        return found

    def start(self, name: str, **parameters: Any) -> str:
        """Run a deployment, as its form does; gives the run's id."""
        ident = self.deployments()[name]["id"]
        run = self.post(
            f"/deployments/{ident}/create_flow_run",
            parameters=parameters,
            state={"type": "SCHEDULED", "message": "form"},
        )
        return str(run["id"])

    def finished(self, ident: str, seconds: float = PATIENCE) -> dict[str, Any]:
        """A run once it has ended."""
        ends = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        wait_for(lambda: self.run(ident)["state_type"] in ends, seconds, 0.3, lambda: self.told(ident))
        return self.run(ident)

    def told(self, ident: str) -> str:
        """What the server knows of a run, and what the newest runs are: a line each, with its time."""
        states = self.get(f"/flow_run_states/?flow_run_id={ident}")
        logs = self.post("/logs/filter", logs={"flow_run_id": {"any_": [ident]}}, sort="TIMESTAMP_ASC")
        others = self.post("/flow_runs/filter", sort="START_TIME_DESC")
        lines = [(s["timestamp"], f"{s['name']}: {s['message']}") for s in states]
        lines += [(log["timestamp"], log["message"]) for log in logs]
        lines += [(str(o["expected_start_time"]), f"{o['name']} is {o['state_name']}") for o in others]
        return "\n".join(" ".join(line) for line in sorted(lines))


def prefect_ready(home: Path) -> None:
    """Have Prefect's database at a HOME, as its server has made it: that takes two thirds of a first start.

    That server is the test of a first start, too: it is made again where what starts it is another.
    """
    starts = hashlib.sha256((ROOT / "deployments" / "server.py").read_bytes()).hexdigest()[:16]
    kept = ROOT / ".pytest_cache" / f"prefect-{version('prefect')}-{starts}"
    kept.mkdir(parents=True, exist_ok=True)
    with locked(kept / "lock"):
        if not (kept / "prefect.db").is_file():
            with tempfile.TemporaryDirectory() as folder:
                processes = Processes(load_settings(home=Path(folder)), free_port())
                processes.start_server(lambda _: None)
                processes.stop()
                # Not by its file: what a server that was told to end has left in the log beside it would be lost.
                with (
                    closing(sqlite3.connect(Path(folder) / "prefect" / "prefect.db")) as made,
                    closing(sqlite3.connect(kept / "new")) as copy,
                ):
                    made.backup(copy)
            (kept / "new").rename(kept / "prefect.db")
    settings_of(home)
    (home / "prefect").mkdir(mode=0o700)
    shutil.copy(kept / "prefect.db", home / "prefect")


@contextmanager
def prefect_server(settings: Settings) -> Iterator[str]:
    """Prefect's server as `afterlog up` starts it; gives its API's address."""
    prefect_ready(settings.home)
    processes = Processes(settings, free_port())
    try:
        processes.start_server(lambda _: None)
        yield processes.api
    finally:
        processes.stop()


class Up:
    """`afterlog up` as a process of its own, in another folder than the project's."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.home, self.port = folder / "home", free_port()
        self.output = folder / "up.log"
        prefect_ready(self.home)
        env = plain_environment(self.home, PREFECT_SERVER_API_AUTH_STRING=AUTH, PREFECT_LOGGING_LEVEL="DEBUG")
        env |= {f"AFTERLOG_{name.upper()}": value for name, value in settings.items()}
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deployments.cli", "up", "--port", str(self.port)], cwd=folder, env=env,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.api = Api(f"http://127.0.0.1:{self.port}/api", AUTH)

    def pid_of(self, part: str) -> int:
        """The process id of the server or the runner, a child of `up` whose command line holds `part`."""
        return wait_for(lambda: next((pid for pid in children(self.process.pid) if part in command_of(pid)), 0))

    def runs_of_runner(self) -> list[int]:
        """The process ids of the runs."""
        return [pid for pid in children(self.pid_of("deployments.serve")) if "prefect" in command_of(pid)]

    def stop(self) -> None:
        """End it as Ctrl-C or systemd does."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE)


class ProcessList:
    """What anybody on the machine can see of the processes that a test started: their command lines."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self.end()

    def end(self) -> set[bytes]:
        """Look no longer, which costs a tenth of a processor; gives what was seen."""
        self._stop.set()
        self._thread.join()
        return self.seen

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            parents, lines = {}, {}
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    status = (folder / "stat").read_text().rpartition(")")[2].split()
                    lines[folder.name] = (folder / "cmdline").read_bytes()
                except OSError:
                    continue  # it has ended meanwhile
                parents[folder.name] = status[1]
            ours = {str(os.getpid())}
            while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
                ours |= more
            self.seen |= {lines[pid] for pid in ours - {str(os.getpid())}}


def children(pid: int) -> list[int]:
    """The process ids of the children of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


def command_of(pid: int) -> str:
    """A process's command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An HTTP server that keeps what is posted to it; gives its address and the list."""
    posted: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", posted
    finally:
        server.shutdown()
        thread.join()


PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]
PREFECT_YAML = ROOT / "deployments" / "prefect.yaml"
