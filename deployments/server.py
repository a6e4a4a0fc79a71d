"""Prefect's server and Afterlog's runner as processes: found, started, watched, and stopped by their ids."""

from __future__ import annotations

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

from storage.errors import AfterlogError
from storage.settings import CONFIG, Settings

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # The default keeps leases in memory, and a server that restarts then refuses every later run.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
}


def environment(settings: Settings) -> dict[str, str]:
    """This process's environment, with what Prefect and our own processes need; what a person has set stays."""
    env = {**QUIET, **os.environ}
    home = settings.home.resolve()
    env["AFTERLOG_HOME"] = str(home)
    if (config := Path(os.environ.get(CONFIG, "afterlog.toml"))).is_file():
        env[CONFIG] = str(config.resolve())  # a flow's process may have another working folder
    env.setdefault("PREFECT_HOME", str(home / "prefect"))
    return env


def find_server(settings: Settings) -> str | None:
    """The API address of the server to use: the one that is set, else the one that `afterlog up` runs on this HOME."""
    if url := os.environ.get("PREFECT_API_URL") or _profile_url():
        return url
    try:
        url = _address_file(settings).read_text().strip()
    except FileNotFoundError:
        return None
    return url if is_healthy(url) else None


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


class Processes:
    """A server and a runner, started together and ended together."""

    def __init__(self, settings: Settings, port: int) -> None:
        self.settings = settings
        self.ui = f"http://127.0.0.1:{port}"
        self.api = f"{self.ui}/api"
        self._env = {**environment(settings), "PREFECT_API_URL": self.api}
        self._port = port
        self._server: subprocess.Popen[bytes] | None = None
        self._runner: subprocess.Popen[bytes] | None = None

    def start_server(self, progress: Callable[[float], None], limit: float = 180) -> None:
        """Start the server and wait until it answers; `progress` is told the seconds that it took so far.

        Raises:
            AfterlogError: it ended, or did not answer within `limit` seconds.
        """
        if is_healthy(self.api):
            raise AfterlogError(
                "a Prefect server answers there already", where=self.api, do="Stop it, or choose another --port"
            )
        command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self._port)]
        self._server = self._start(command, "server.log")
        begun = time.monotonic()
        while not is_healthy(self.api):
            took = time.monotonic() - begun
            if self._server.poll() is not None or took > limit:
                raise AfterlogError(f"Prefect's server did not start; see {self._log('server.log')}")
            progress(took)
            time.sleep(0.5)
        _address_file(self.settings).write_text(self.api)

    def start_runner(self) -> None:
        """Start the process that registers the deployments and runs them."""
        self._runner = self._start(["-m", "deployments.serve"], "runner.log")

    def check(self) -> None:
        """Start the runner again if it has ended.

        Raises:
            AfterlogError: the server has ended.
        """
        if self._server is not None and self._server.poll() is not None:
            raise AfterlogError(f"Prefect's server has ended; see {self._log('server.log')}")
        if self._runner is not None and self._runner.poll() is not None:
            self.start_runner()

    def stop(self) -> None:
        """End the runner and its runs, then the server; each by its id, and by force where it does not listen."""
        for process in (self._runner, self._server):
            if process is None:
                continue
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else is in it
                process.wait()
        _address_file(self.settings).unlink(missing_ok=True)

    def _start(self, arguments: list[str], log: str) -> subprocess.Popen[bytes]:
        self._log(log).parent.mkdir(parents=True, exist_ok=True)
        with self._log(log).open("ab") as output:
            return subprocess.Popen(  # noqa: S603  # our own modules
                [sys.executable, *arguments], env=self._env, stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def _log(self, name: str) -> Path:
        return self.settings.home.resolve() / "prefect" / name


def _address_file(settings: Settings) -> Path:
    return settings.home.resolve() / "prefect" / "api-url"


def _profile_url() -> str | None:
    """The address in the active profile of the person's own Prefect, if they have one."""
    profiles = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect")) / "profiles.toml"
    try:
        document = tomllib.loads(profiles.read_text())
    except (OSError, tomllib.TOMLDecodeError):
        return None
    profile = document.get("profiles", {}).get(document.get("active", ""), {})
    url = profile.get("PREFECT_API_URL")
    return url if isinstance(url, str) else None
