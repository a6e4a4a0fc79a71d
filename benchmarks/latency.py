"""Latency of a running `afterlog up`: append to derived event readable, and append to mail accepted by SMTP.

    python -m benchmarks.latency [--probes 600] [--seconds 300] [--background 0] [--port 4317]

Starts its own mail server and its own `afterlog up` with shifts every 60 s on a fresh HOME, appends probes at random
moments over at least four hand-overs, and prints the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from aiosmtpd.controller import Controller

from deployments.server import free_port
from storage.contacts import Entry, save_contacts
from storage.door import append_events
from storage.settings import load_settings
from storage.store import Store


class Inbox:
    """Notes when each mail was accepted."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}
        self.twice = 0

    async def handle_DATA(self, _server: object, _session: object, envelope: object) -> str:
        """Take one message."""
        wall = time.time()
        to = envelope.rcpt_tos[0]  # type: ignore[attr-defined]  # aiosmtpd has no types
        self.twice += to in self.at
        self.at.setdefault(to, wall)
        return "250 OK"


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--probes", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--background", type=float, default=0, help="events a second behind the probes")
    parser.add_argument("--port", type=int, default=4317)
    parser.add_argument("--customers", type=int, default=0, help="customers with open baskets before the start")
    arguments = parser.parse_args()
    inbox = Inbox()
    port = free_port()
    controller = Controller(inbox, hostname="127.0.0.1", port=port)
    controller.start()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(
            AFTERLOG_HOME=folder + "/home",
            AFTERLOG_MAIL_URL=f"smtp://127.0.0.1:{port}",
            AFTERLOG_SHIFT_EVERY="60s",
            AFTERLOG_BRAKE_FLOOR="1000000",  # so many mails in an hour are what is measured here
        )
        store = Store(load_settings())
        save_contacts(
            store.database, [Entry("CUSTOMER", f"p{i}", f"p{i}@example.com", False) for i in range(arguments.probes)]
        )
        for start in range(0, arguments.customers, 1000):
            append_events(store, "events", [_basket(f"c{i}") for i in range(start, start + 1000)])
        command = [sys.executable, "-m", "deployments.cli", "up", "--port", str(arguments.port)]
        up = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _measure(store, inbox, arguments)
        finally:
            up.send_signal(signal.SIGTERM)
            up.wait(60)
            controller.stop()


def _basket(customer: str) -> dict[str, object]:
    item = {"id": 1, "name": "Lemon", "price": 5, "count": 2}
    return {
        "subject": {"id": customer, "type": "CUSTOMER"}, "verb": {"type": "ADDED_ITEM_TO_BASKET"},
        "object": {"type": "ITEM", "item": item}, "context": {"at": time.time_ns() // 1_000_000},
    }  # fmt: skip


def _probe(name: str) -> dict[str, object]:
    return {
        "subject": {"id": name, "type": "INTERNAL_ORDER_EVENT"}, "verb": {"type": "ORDER_COMPLETED"},
        "object": {"type": "NONE"}, "context": {"at": time.time_ns() // 1_000_000},
    }  # fmt: skip


def _measure(store: Store, inbox: Inbox, arguments: argparse.Namespace) -> None:
    appended: dict[str, float] = {}
    readable: dict[str, float] = {}
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(store, readable, stop))
    watcher.start()
    append_events(store, "events", [_basket("warm-up")])
    while store.committed_end("reactions", 0) == 0 and not _has_run(store):
        time.sleep(0.5)
    noise = threading.Thread(target=_background, args=(store, arguments.background, stop))
    noise.start()
    rng = random.Random(1)
    moments = sorted(rng.uniform(5, arguments.seconds) for _ in range(arguments.probes))
    begun = time.monotonic()
    for index, moment in enumerate(moments):
        time.sleep(max(0.0, begun + moment - time.monotonic()))
        name = f"p{index}"
        appended[name] = time.time()
        append_events(store, "events", [_probe(name)])
    time.sleep(15)
    stop.set()
    watcher.join()
    noise.join()
    _show("append to derived readable", [readable[n] - appended[n] for n in appended if n in readable], len(appended))
    mails = [inbox.at[f"{n}@example.com"] - appended[n] for n in appended if f"{n}@example.com" in inbox.at]
    _show("append to mail accepted", mails, len(appended))
    print(f"mails twice: {inbox.twice}; hand-overs: {_hand_overs(store, arguments)}")


def _has_run(store: Store) -> bool:
    from tasks.process import positions

    return any(p.processor == "derive" and p.offset for p in positions(store))


def _watch(store: Store, readable: dict[str, float], stop: threading.Event) -> None:
    reader, offset = store.reader("reactions", 0), 0
    while not stop.wait(0.003):
        end = store.committed_end("reactions", 0)
        if end > offset:
            wall = time.time()
            data = b"".join(reader.raw(offset, end))
            offset = end
            for line in data.splitlines():
                readable.setdefault(str(json.loads(line)["object"]["id"]), wall)


def _background(store: Store, rate: float, stop: threading.Event) -> None:
    count = 0
    while rate and not stop.wait(0.1):
        events = [_basket(f"b{(count + i) % 5000}") for i in range(max(1, int(rate / 10)))]
        count += len(events)
        append_events(store, "events", events)


def _hand_overs(store: Store, arguments: argparse.Namespace) -> str:
    log = (Path(store.home) / "prefect" / "runner.log").read_text()
    return f"{log.count('handed over')} (both flows together)"


def _show(title: str, seconds: list[float], expected: int) -> None:
    values = sorted(seconds)
    ms = [round(1000 * v, 1) for v in (statistics.median(values), values[int(len(values) * 0.99)], values[-1])]
    print(f"{title}: {len(values)} of {expected}, median {ms[0]} ms, p99 {ms[1]} ms, max {ms[2]} ms")


if __name__ == "__main__":
    main()
