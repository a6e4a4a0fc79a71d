"""`afterlog up`: server, UI, deployments and runner in one command."""

from __future__ import annotations

import signal
import time

from deployments.alone import alone
from deployments.cli_arguments import check_port
from deployments.console import say
from deployments.server import Processes
from storage.errors import UsageError
from storage.remote import Remote
from storage.settings import Settings, load_settings
from storage.store import Store
from tasks.mail_url import parse_mail_url
from tasks.topology import build_topology
from tasks.transport import check_sender

_LOOK_SECONDS = 0.2
_CHECK_SECONDS = 1.0


def run_until_stopped(port: int) -> None:
    """Start everything, keep it going, and end it in order when this process is told to end.

    Raises:
        UsageError: nobody can listen on `port`, or a setting can never work.
        AfterlogError: another does so on this HOME.
        KeyboardInterrupt: it was Ctrl-C; any other signal to end is no failure.
    """
    check_port(port)
    settings = load_settings()
    _check(settings)
    store = Store(settings)
    with alone(store.home):
        store.database.engine  # noqa: B018  # migrated before anything runs on it
        told = _listen()
        _run(Processes(settings, port), told)
        if told[0] == signal.SIGINT:
            raise KeyboardInterrupt


def _run(processes: Processes, told: list[int]) -> None:
    """Until a signal was told, and everything has ended."""

    def starting(took: float) -> None:
        if told:
            raise KeyboardInterrupt
        if int(took * 2) % 10 == 9:
            say(f"  {took:.0f} s")

    try:
        say("Starting Prefect's server ...")
        processes.start_server(starting)
        processes.start_runner()
        say(f"UI: {processes.ui}   HOME: {processes.settings.home.resolve()}   Ctrl-C ends it.")
        checked = time.monotonic()
        while not told:
            time.sleep(_LOOK_SECONDS)
            if time.monotonic() - checked >= _CHECK_SECONDS:
                checked = time.monotonic()
                for sentence in processes.check():
                    say(sentence)
    except KeyboardInterrupt:
        pass  # told while it was starting
    finally:
        processes.stop()


def _listen() -> list[int]:
    """The signals to end, as they come. None of them interrupts anything: neither a start, nor the clean-up."""
    told: list[int] = []
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(kind) is not signal.SIG_IGN:  # nohup, say
            signal.signal(kind, lambda number, _: told.append(number))
    return told


def _check(settings: Settings) -> None:
    """Refuse a setting that can never work: every shift would fail, and nobody would be told why.

    Raises:
        UsageError: which, and why.
    """
    build_topology(settings)
    parse_mail_url(settings.mail_url.reveal())
    check_sender(settings.mail_from)
    if settings.archive_url is not None:
        _check_archive(settings.archive_url.reveal())


def _check_archive(url: str) -> None:
    if Remote(url).folder is not None:
        return
    from fsspec import get_filesystem_class  # type: ignore[import-untyped]  # it brings no types; a folder needs none of it

    try:
        # Its kind is looked at only: the place may be away for a while.
        for kind in url.partition("://")[0].split("::"):
            get_filesystem_class(kind)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"setting AFTERLOG_ARCHIVE_URL: this kind of URL cannot be used: {error}", where=Remote(url).shown,
            do="For s3:// install afterlog[s3]; for others what fsspec asks for",
        ) from error  # fmt: skip
