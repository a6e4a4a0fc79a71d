"""The demo's bad day: mails held by hand, a producer that breaks, a kill -9; each with what Afterlog makes of it."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from deployments.server import Processes
from storage.brake import PAUSED, put_on, read_brake, release
from storage.door import append_events, append_lines
from storage.store import Store
from storage.times import now
from tasks.alerts import BLOCK

Say = Callable[[str], None]
BAD, LINES = 8, 12
SETTINGS = {"AFTERLOG_ALERT_EVERY": "3s", "AFTERLOG_ALERT_QUARANTINE_LINES": str(LINES)}
"""What the demo sets so that nobody has to wait for an alert."""


class Pager:
    """A real webhook on this machine, where a team would have its chat; keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        pager = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                pager.told.append(f"{body['subject']}: {body['text'].strip()}")
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing: what was told is what counts."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, name="pager", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def pager() -> Iterator[Pager]:
    """A pager, until the block ends."""
    made = Pager()
    try:
        yield made
    finally:
        made.close()


def fill_in_block(api: str, url: str) -> None:
    """Fill in the notification block as a person does in the UI."""
    kind = _ask(f"{api}/block_types/slug/custom-webhook")
    wanted = {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}}
    schema = _ask(f"{api}/block_schemas/filter", wanted)[0]
    data = {"name": "pager", "url": url, "json_data": {"subject": "{{subject}}", "text": "{{body}}"}}
    _ask(
        f"{api}/block_documents/",
        {"name": BLOCK, "data": data, "block_type_id": kind["id"], "block_schema_id": schema["id"]},
    )


def show_incidents(store: Store, processes: Processes, pager: Pager, inbox: list[bytes], say: Say) -> None:
    """Show the brake, an alert and a kill -9, one after the other, on the running system."""
    _show_brake(store, inbox, say)
    _show_alert(store, pager, say)
    _show_kill(store, processes, say)


def _show_brake(store: Store, inbox: list[bytes], say: Say) -> None:
    say("\n[bold]The brake.[/] `afterlog pause deliver`, and a customer orders:")
    put_on(store.database, PAUSED, "the demo shows the brake")
    before = len(inbox)
    append_events(store, "events", [_order(1)])
    _wait(lambda: read_waiting(store) > 0, 20)
    say(
        f"  delivery is {read_brake(store.database).state}: {read_waiting(store)} mail waits, {len(inbox) - before} sent"
    )
    say(f"  `afterlog resume deliver`: {release(store.database)} mail had been held")
    _wait(lambda: len(inbox) > before, 20)
    say(f"  {len(inbox) - before} mail arrived")


def _show_alert(store: Store, pager: Pager, say: Say) -> None:
    say(f"\n[bold]An alert.[/] A producer breaks: {BAD} of its next {LINES} lines are no events.")
    good = b'{"subject": {"id": 1, "type": "CUSTOMER"}, "verb": "VISITED", "context": {"at": %d}}' % now()
    append_lines(store, "events", [good] * (LINES - BAD) + [b'{"subject": {"id": 1, "type": "CUST'] * BAD)
    before = len(pager.told)
    if _wait(lambda: len(pager.told) > before, 40):
        say(f"  the pager rings: {pager.told[before]}")
    else:
        say("  the pager was not rung within 40 s: see the run's log in the UI")


def _show_kill(store: Store, processes: Processes, say: Say) -> None:
    say("\n[bold]kill -9[/] of the runner and of every run at work, and an order right after it:")
    processes.kill_runner()
    end = store.committed_end("reactions", 0)
    begun = time.monotonic()
    append_events(store, "events", [_order(15)])

    def went_on() -> bool:
        for sentence in processes.check():
            say(f"  {sentence.split(';')[0]}")
        return store.committed_end("reactions", 0) > end

    if _wait(went_on, 90):
        say(
            f"  {time.monotonic() - begun:.0f} s later its email is in the log `reactions`: nothing lost, nothing twice"
        )
    else:
        say("  after 90 s nobody works yet: see runner.log")


def read_waiting(store: Store) -> int:
    """How many mails wait."""
    with store.database.read() as connection:
        return int(connection.exec_driver_sql("SELECT COUNT(*) FROM delivery WHERE state = 'WAITING'").scalar() or 0)


def _order(customer: int) -> dict[str, Any]:
    return {
        "subject": {"id": customer, "type": "INTERNAL_ORDER_EVENT"},
        "verb": {"type": "ORDER_COMPLETED"},
        "object": {"type": "BASKET", "basket": []},
        "context": {"at": now()},
    }


def _wait(until: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if until():
            return True
        time.sleep(0.2)
    return until()


def _ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310  # our own server
    for tries in range(20, -1, -1):
        try:
            with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310  # our own server
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code != 503 or not tries:  # its database is busy; Prefect's own client tries again too
                raise
        time.sleep(0.5)
    return None
