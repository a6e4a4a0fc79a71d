"""`afterlog up`: server, UI, deployments and runner in one command."""

from __future__ import annotations

import time

from deployments.console import say
from deployments.server import Processes
from storage.errors import UsageError
from storage.settings import load_settings
from storage.store import Store


def run_until_stopped(port: int) -> None:
    """Start everything, keep it going, and end it in order when this process is told to end.

    Raises:
        UsageError: nobody can listen on `port`.
    """
    if not 1 <= port <= 65_535:
        raise UsageError("--port is no port", found=port, expected="1 to 65535")
    settings = load_settings()
    Store(settings).database.engine  # noqa: B018  # migrated before anything runs on it
    processes = Processes(settings, port)
    try:
        say("Starting Prefect's server ...")
        processes.start_server(lambda took: say(f"  {took:.0f} s") if int(took * 2) % 10 == 9 else None)
        processes.start_runner()
        say(f"UI: {processes.ui}   HOME: {settings.home.resolve()}   Ctrl-C ends it.")
        while True:
            time.sleep(1)
            for sentence in processes.check():
                say(sentence)
    finally:
        processes.stop()
