"""Commands as processes of their own, forked from a server that has imported all of it: a start takes 20 ms, not half a second.

What is about the start itself (what is imported, how long it takes) or ended by a signal from outside starts a new
interpreter instead.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import alembic.command  # noqa: F401  # what commands import when they need it is imported once, in the server

from deployments import (  # noqa: F401  # the same
    cli,
    cli_backup,
    cli_brake,
    cli_contacts,
    cli_deliveries,
    cli_logs,
    cli_quarantine,
    cli_status,
    cli_work,
)
from storage import database, tables  # noqa: F401  # the same

Work = Callable[..., None]
NOWHERE = Path(os.devnull)

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.processes", "tests.test_crash"])


def begin() -> None:
    """Start the server that all are forked from, here and now.

    It imports by the folder that we are in. Started by a test that is in another one it would import nothing, say nothing, and
    leave a second of imports to each of its children.
    """
    forkserver.ensure_running()


def command(*arguments: str) -> None:
    """Run the command line in this process, and end it."""
    cli.main(list(arguments))


def start(
    work: Work, *arguments: str, env: Mapping[str, str], stdin: Path = NOWHERE, stdout: Path, stderr: Path, cwd: Path
) -> Any:
    """Start `work(*arguments)` in a new process, with nothing else in its environment than `env`, and with our umask."""
    os.umask(umask := os.umask(0o077))
    process = _server.Process(target=_begin, args=(work, arguments, dict(env), (stdin, stdout, stderr), cwd, umask))
    process.stderr = stderr  # type: ignore[attr-defined]  # for whoever waits for it
    process.start()
    return process


def ended(process: Any, seconds: float = 300) -> int:
    """A process's exit code: minus the signal's number where one killed it. One that hangs writes down where."""
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGABRT)
        process.join(5)
        raise AssertionError(f"the process hangs: {process.stderr.read_text()[-5000:]}")
    return int(process.exitcode)


def _begin(
    work: Work, arguments: tuple[str, ...], env: dict[str, str], files: tuple[Path, ...], cwd: Path, umask: int
) -> None:
    os.chdir(cwd)
    os.umask(umask)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    for target, path in enumerate(files):
        handle = os.open(path, os.O_RDONLY if target == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, target)
        os.close(handle)
    faulthandler.enable(open(2, "w", closefd=False))  # noqa: SIM115  # as long as the process lives
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # of the process as long as it lives
    work(*arguments)
