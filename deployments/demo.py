"""`afterlog demo`: the whole way from raw log to inbox on an example log, with everything real."""

from __future__ import annotations

import email
import email.policy
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from rich.console import Console

from deployments import example
from deployments.alone import alone
from deployments.console import show_table
from deployments.demo_replay import show_replay
from deployments.incident import SETTINGS, Pager, fill_in_block, pager, show_incidents
from deployments.server import Processes, free_port
from storage.contacts import Entry, save_contacts
from storage.door import append_events, append_lines
from storage.settings import Settings, load_settings
from storage.store import DELIVERIES, Store
from storage.times import now, show, show_duration
from tasks.status import ProcessorStatus, read_status
from tasks.topology import Topology, build_topology

MARK = ".afterlog-demo"
_CONSOLE = Console(stderr=False, highlight=False, soft_wrap=True)


class Inbox:
    """A real SMTP server's handler that keeps what it accepts."""

    def __init__(self) -> None:
        self.mails: list[bytes] = []

    async def handle_DATA(self, _server: object, _session: object, envelope: Any) -> str:
        """Accept one message."""
        self.mails.append(bytes(envelope.content))
        return "250 OK"


def run_demo(*, once: bool, port: int | None) -> None:
    """Show it all: history, server, shifts, derived logs, one mail; then live events until Ctrl-C, unless `once`."""
    with _mail_server() as (inbox, mail_port), pager() as rung, _prepared(mail_port) as settings:
        store, topology = Store(settings), build_topology(settings)
        _write_history(store)
        processes = Processes(settings, free_port() if port is None else port)
        try:
            _start(processes, rung)
            _wait_until_processed(store, topology)
            _show_findings(store, topology, inbox)
            show_incidents(store, processes, rung, inbox.mails, lambda text: _CONSOLE.print(text))
            show_replay(store, topology, _CONSOLE.print)
            _print_addresses(processes, settings)
            stop = threading.Event()
            if once:
                stop_timer = threading.Timer(10, stop.set)
                stop_timer.start()
            _live(store, inbox, stop)
            _CONSOLE.print(
                f"[bold]Done.[/] {len(inbox.mails)} emails arrived. The logs are plain files in {store.home}/logs"
            )
        finally:
            with _uninterrupted():
                _CONSOLE.print("Stopping the server and the runner ...")
                processes.stop()


@contextmanager
def _prepared(mail_port: int) -> Iterator[Settings]:
    """A fresh HOME of the demo's own, with the settings that show most, and nobody else at work on it."""
    home = Path(os.environ.get("AFTERLOG_HOME", "demo")).resolve()
    if home.exists() and any(home.iterdir()):
        if not (home / MARK).exists():
            raise SystemExit(f"afterlog: {home} holds other things than a demo. Set AFTERLOG_HOME to a new folder.")
        with alone(home):
            shutil.rmtree(home)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    (home / MARK).touch()
    os.environ.update(
        AFTERLOG_HOME=str(home),
        AFTERLOG_MAIL_URL=f"smtp://127.0.0.1:{mail_port}",
        AFTERLOG_MAIL_FROM="Corner Shop <shop@example.com>",
        AFTERLOG_SHIFT_EVERY=os.environ.get("AFTERLOG_SHIFT_EVERY", "60s"),
        **SETTINGS,
    )
    with alone(home):
        yield load_settings()


@contextmanager
def _mail_server() -> Iterator[tuple[Inbox, int]]:
    inbox = Inbox()
    controller = Controller(inbox, hostname="127.0.0.1", port=free_port())
    controller.start()
    try:
        yield inbox, int(controller.port)
    finally:
        controller.stop()


def _write_history(store: Store) -> None:
    lines = list(example.history(now()))
    with _progress("Writing an example log, two days of a small shop") as tell:
        for start in range(0, len(lines), 1000):
            append_lines(store, "events", lines[start : start + 1000])
            tell(f"{min(start + 1000, len(lines)):,} events")
    entries = [Entry(*contact) for contact in example.contacts()]
    _CONSOLE.print(f"  {save_contacts(store.database, entries)} contacts in the address book")


def _start(processes: Processes, rung: Pager) -> None:
    with _progress("Starting Prefect's server (the first start makes its database)") as tell:
        processes.start_server(lambda took: tell(f"{took:.0f} s"))
    fill_in_block(processes.api, rung.url)
    processes.start_runner()


def _wait_until_processed(store: Store, topology: Topology, limit: float = 240) -> None:
    with _progress("Registering the deployments, and the first shifts come on") as tell:
        begun = time.monotonic()
        while time.monotonic() - begun < limit:
            status = read_status(store, topology)
            lag = sum(row.lag_bytes for row in status.processors)
            ran = all(row.commit for row in status.processors)
            waiting = status.mails.get("WAITING", 0) + status.mails.get("CLAIMED", 0)
            if ran and not lag and not waiting and status.mails and store.committed_end("baskets", 0):
                return
            tell(f"{time.monotonic() - begun:.0f} s, {lag:,} bytes to go, {sum(status.mails.values())} mails decided")
            time.sleep(0.5)
    raise SystemExit(f"afterlog: the shifts did not finish; see {store.home}/prefect/runner.log")


def _show_findings(store: Store, topology: Topology, inbox: Inbox) -> None:
    _show_baskets(store)
    _show_anomalies(store)
    _show_mail(inbox)
    rows = [_count_row(row) for row in read_status(store, topology).processors]
    show_table(
        "read = processed + quarantined + ignored by rule",
        ("processor", "log", "read", "processed", "quarantined", "ignored", "derived"),
        rows,
    )
    for state, count in sorted(read_status(store, topology).mails.items()):
        _CONSOLE.print(f"  {count:>5} mails {state}")


def _count_row(row: ProcessorStatus) -> tuple[object, ...]:
    where = f"{row.log}/{row.partition}"
    return row.processor, where, row.read, row.processed, row.quarantined, row.ignored, row.derived


def _show_baskets(store: Store) -> None:
    events = _derived(store, "baskets")
    left = [event for event in events if event["verb"]["type"] == "ABANDONED_BASKET"]
    back = sum(event["verb"]["type"] == "RECOVERED_BASKET" for event in events)
    _CONSOLE.print(f"\n[bold]{len(left)} abandoned baskets[/], {back} of them recovered by an order. The latest:")
    rows = []
    for event in left[-5:]:
        names = ", ".join(str(item.get("name", item.get("id"))) for item in event["object"]["basket"])
        idle = show_duration(event["event"]["inserted_at"] - event["context"]["at"])
        rows.append((event["subject"]["id"], names[:60], show(event["context"]["at"]), idle))
    show_table("abandoned", ("customer", "basket", "left at", "idle for"), rows)


def _show_anomalies(store: Store) -> None:
    events = _derived(store, "anomalies")
    _CONSOLE.print(
        f"\n[bold]{len(events)} anomalies[/] in what customers wrote and bought. The latest, an anomaly a line:"
    )
    rows = []
    for event in events[-5:]:
        odd = event["object"]
        body = str(event["context"]["caused_by"].get("object", {}).get("body", ""))
        rows.append((odd["measure"], f"{odd['value']:.3g}", f"{odd['mean']:.3g} ± {odd['std']:.3g}", body[:50]))
    show_table("anomaly", ("measure", "value", "expected", "text"), rows)


def _show_mail(inbox: Inbox) -> None:
    messages = [email.message_from_bytes(raw, policy=email.policy.default) for raw in inbox.mails]
    reminders = [message for message in messages if "basket" in str(message["Subject"]).lower()] or messages
    if not reminders:
        return
    message = reminders[-1]
    body = message.get_body(("plain",))
    _CONSOLE.print(f"\n[bold]{len(messages)} emails arrived.[/] One of them, as its reader sees it:\n")
    for name in ("From", "To", "Subject", "Date"):
        _CONSOLE.print(f"  {name}: {message[name]}", markup=False)
    text = body.get_content() if body else ""
    _CONSOLE.print("\n" + "\n".join(f"  {line}" for line in text.splitlines()), markup=False)


def _print_addresses(processes: Processes, settings: Settings) -> None:
    _CONSOLE.print("\n[bold]Look at it:[/]")
    _CONSOLE.print(f"  {processes.ui}            Prefect's UI: runs, tasks, artifacts")
    _CONSOLE.print(f"  {processes.ui}/deployments    schedules, and forms for runs by hand")
    _CONSOLE.print(f"  AFTERLOG_HOME={settings.home} afterlog status")
    _CONSOLE.print(f"  tail -f {settings.home}/logs/baskets/0/*.jsonl\n")


def _live(store: Store, inbox: Inbox, stop: threading.Event) -> None:
    """Append live events at their own pace, and tell of what comes after, until `stop` or Ctrl-C."""
    _CONSOLE.print("Live events go on. [bold]Ctrl-C[/] ends the demo.")
    seen = {log: store.committed_end(log, 0) for log in ("baskets", "anomalies", DELIVERIES)}
    mails = len(inbox.mails)
    with suppress(KeyboardInterrupt):
        for at, event in example.live(now()):
            while (ahead := at - now()) > 0 and not stop.is_set():
                stop.wait(min(ahead / 1000, 1.0))
                seen, mails = _tell_news(store, inbox, seen, mails)
            if stop.is_set():
                return
            append_events(store, "events", [event])


def _tell_news(store: Store, inbox: Inbox, seen: dict[str, int], mails: int) -> tuple[dict[str, int], int]:
    for event in _derived(store, "baskets", seen["baskets"]):
        _CONSOLE.print(f"  {show(now())} {event['verb']['type']} customer {event['subject']['id']}", markup=False)
    for raw in inbox.mails[mails:]:
        message = email.message_from_bytes(raw, policy=email.policy.default)
        _CONSOLE.print(f"  {show(now())} mail to {message['To']}: {message['Subject']}", markup=False)
    return {log: store.committed_end(log, 0) for log in seen}, len(inbox.mails)


def _derived(store: Store, log: str, start: int = 0) -> list[dict[str, Any]]:
    end, reader = store.committed_end(log, 0), store.reader(log, 0)
    try:
        lines = b"".join(reader.raw(start, end)).splitlines()
    finally:
        reader.close()
    return [json.loads(line) for line in lines]


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str], None]]:
    """Show a long step as it goes: a spinner on a terminal, a line now and then in a pipe."""
    if _CONSOLE.is_terminal:
        with _CONSOLE.status(what) as status:
            yield lambda detail: status.update(f"{what}: {detail}")
    else:
        _CONSOLE.print(f"{what} ...")
        last = [time.monotonic()]

        def tell(detail: str) -> None:
            if time.monotonic() - last[0] > 5:
                last[0] = time.monotonic()
                _CONSOLE.print(f"  {detail}")

        yield tell
    _CONSOLE.print(f"[green]done[/]  {what}")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a second Ctrl-C, or whatever else tells us to end, wait until what was started has been stopped."""
    before = {kind: signal.signal(kind, signal.SIG_IGN) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
