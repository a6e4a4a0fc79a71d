"""Prefect's server and Afterlog's runner as processes: found, started, watched, and stopped by their ids."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployments.alone import pid_file
from deployments.console import say
from deployments.grace import give_grace
from storage.errors import AfterlogError
from storage.settings import CONFIG, Settings
from storage.store import Store

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # The default keeps leases in memory, and a server that restarts then refuses every later run.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    # Each wait is twice the one before, from 2 s on: a server that is gone for minutes costs no run.
    "PREFECT_CLIENT_MAX_RETRIES": "8",
    # Services that look every 5 s for what hardly ever happens here, half of the server's idle cost.
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_LOOP_SECONDS": "60",
    "PREFECT_SERVER_SERVICES_CLEANUP_RECONCILER_LOOP_SECONDS": "60",
    "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "30",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "20",
    "PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS": "30",
    # What docs/operating.md says of the size of Prefect's database rests on these.
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(7 * 86_400),
    "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": "P1D",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_EVENT_RETENTION_OVERRIDES": '{"prefect.flow-run.heartbeat": 7200}',
}
_STARTS_WITHIN = 60.0
"""Seconds that the server takes to start, at worst: 5 s mostly, 45 s on two cores that ten others want."""
_STEADY = 60.0
"""Seconds after which a process that was started again counts as well."""


def environment(settings: Settings) -> dict[str, str]:
    """This process's environment, with what Prefect and our own processes need; what a person has set stays."""
    env = {**QUIET, **os.environ}
    home = settings.home.resolve()
    env["AFTERLOG_HOME"] = str(home)
    if (config := Path(os.environ.get(CONFIG, "afterlog.toml"))).is_file():
        env[CONFIG] = str(config.resolve())  # a flow's process may have another working folder
    env.setdefault("PREFECT_HOME", str(home / "prefect"))
    if secret := env.get("PREFECT_SERVER_API_AUTH_STRING"):
        env.setdefault("PREFECT_API_AUTH_STRING", secret)  # who starts the server may use it; nothing else carries it
    return env


def client_environment(settings: Settings, url: str) -> dict[str, str]:
    """`environment` for who asks the server at `url`, with the key and the password of the person's profile that names it."""
    env, profile = environment(settings) | {"PREFECT_API_URL": url}, _profile()
    if profile.get("PREFECT_API_URL") == url:  # they are for nobody else
        secrets = {name: profile.get(name) for name in ("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING")}
        env |= {name: s for name, s in secrets.items() if isinstance(s, str) and name not in os.environ}
    return env


def find_server(settings: Settings) -> str | None:
    """The API address of the server to use: the one that is set, else the one that `afterlog up` runs on this HOME."""
    if url := os.environ.get("PREFECT_API_URL") or _profile().get("PREFECT_API_URL"):
        return str(url)
    try:
        url = _address_file(settings).read_text().strip()
    except FileNotFoundError:
        return None
    return url if is_healthy(url) else None


def use_prefect(settings: Settings) -> None:
    """Prepare this process for Prefect, before it is imported."""
    Store(settings)  # HOME is made, and Prefect's folder goes into it
    url = find_server(settings)
    if url is None:
        say("No Prefect server is set or found: starting a temporary one for this run (--no-prefect does without).")
        os.environ.update(environment(settings) | {"PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true"})
    else:
        os.environ.update(client_environment(settings, url))


def is_healthy(url: str) -> bool:
    """Whether a Prefect server answers at the API address."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:  # noqa: S310  # an http address of ours
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Process:
    """One process in a session of its own, started again when it has ended, later each time."""

    def __init__(
        self, name: str, arguments: list[str], log: Path, pid: Path, env: dict[str, str],
        before: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.name, self.log, self._pid, self._before = name, log, pid, before
        self._arguments, self._env = arguments, env
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._due = 0.0
        self._wait = 0.5
        self._ended: list[int] = []

    def start(self) -> None:
        """Start it."""
        self._before()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603  # our own modules
                [sys.executable, *self._arguments], env=self._env, stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        with contextlib.suppress(OSError):  # a full disk, say: it runs, noted down or not
            self._pid.write_text(str(self._process.pid))
        self._started, self._due = time.monotonic(), 0.0

    def has_ended(self) -> bool:
        """Whether it was started and is no more."""
        return self._process is not None and self._process.poll() is not None

    def revive(self, *, with_children: bool) -> str:
        """Start it again if it has ended and its turn has come; gives a sentence where something happened.

        `with_children` ends what it left behind first: a server's children hold its port, a runner's are runs, which go on.
        """
        if self._process is None or not self.has_ended():
            return ""
        now = time.monotonic()
        if not self._due:
            self._wait = 1.0 if now - self._started > _STEADY else min(self._wait * 2, _STEADY)
            self._due = now + self._wait
            self._ended.append(self._process.pid)
            if with_children:
                self._kill_group(self._process.pid, signal.SIGKILL)
            return f"{self.name} has ended; it starts again in {self._wait:.0f} s. See {self.log}"
        if now >= self._due:
            self.start()
        return ""

    def stop(self) -> None:
        """End it and what it has left behind, by force where it does not listen."""
        for pid in self._ended:
            self._kill_group(pid, signal.SIGTERM)
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._kill_group(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._pid.unlink(missing_ok=True)

    def kill(self) -> None:
        """kill -9 it and its children."""
        if self._process is not None:
            self._kill_group(self._process.pid, signal.SIGKILL)

    @staticmethod
    def _kill_group(pid: int, how: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, how)  # its own session: nobody else is in it


class Processes:
    """A server and a runner, started together, started again when they end, and ended together."""

    def __init__(self, settings: Settings, port: int) -> None:
        self.settings = settings
        self.ui = f"http://127.0.0.1:{port}"
        self.api = f"{self.ui}/api"
        env = {**environment(settings), "PREFECT_API_URL": self.api}
        command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        database = Path(env["PREFECT_HOME"]) / "prefect.db"
        home = settings.home.resolve()
        self._server = _Process(
            "Prefect's server", command, home / "prefect" / "server.log", pid_file(home, "server"), env,
            before=lambda: give_grace(database, settings.crashed_after / 1000 + _STARTS_WITHIN),
        )  # fmt: skip
        runner = home / "prefect" / "runner.log"
        self._runner = _Process("the runner", ["-m", "deployments.serve"], runner, pid_file(home, "runner"), env)
        self._announced = False

    def start_server(self, progress: Callable[[float], None], limit: float = 180) -> None:
        """Start the server and wait until it answers; `progress` is told the seconds that it took so far.

        Raises:
            AfterlogError: it ended, or did not answer within `limit` seconds.
        """
        if is_healthy(self.api):
            raise AfterlogError(
                "a Prefect server answers there already", where=self.api, do="Stop it, or choose another --port"
            )
        self._server.start()
        begun = time.monotonic()
        while not is_healthy(self.api):
            took = time.monotonic() - begun
            if self._server.has_ended() or took > limit:
                raise AfterlogError(f"Prefect's server did not start; see {self._server.log}")
            progress(took)
            time.sleep(0.5)
        _address_file(self.settings).write_text(self.api)
        self._announced = True

    def start_runner(self) -> None:
        """Start the process that registers the deployments and runs them."""
        self._runner.start()

    def kill_runner(self) -> None:
        """kill -9 the runner and all its runs, as a lost machine would; for demos and tests."""
        self._runner.kill()

    def check(self) -> list[str]:
        """Start again what has ended, each time after a longer wait; gives a sentence for each that has."""
        found = [self._server.revive(with_children=True), self._runner.revive(with_children=False)]
        return [sentence for sentence in found if sentence]

    def stop(self) -> None:
        """End the runner and its runs, then the server; each by its id, and by force where it does not listen."""
        self._runner.stop()
        self._server.stop()
        if self._announced:  # else it may be that of another, which still runs
            _address_file(self.settings).unlink(missing_ok=True)


def _address_file(settings: Settings) -> Path:
    return settings.home.resolve() / "prefect" / "api-url"


def _profile() -> dict[str, Any]:
    """The active profile of the person's own Prefect; empty where they have none."""
    profiles = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect")) / "profiles.toml"
    try:
        document = tomllib.loads(profiles.read_text())
    except (OSError, tomllib.TOMLDecodeError):
        return {}
    found: dict[str, Any] = document.get("profiles", {}).get(document.get("active", ""), {})
    return found
