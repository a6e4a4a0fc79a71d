"""A soak: `afterlog up` under steady traffic for long, something of it killed -9 every two minutes; what is lost, twice, or grows.

    python -m benchmarks.soak [--minutes 40] [--rate 500] [--kill-every 120] [--plot docs/images/soak.svg]

20,000 customers browse, fill baskets, leave or order; one order a second is a probe with an address, so that it gives a mail.
At the end the work is finished, and derived logs and rows are held against an undisturbed run's over the same log and
ticks, the raw log against what was appended, the mails against what the server took.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from benchmarks.soak_plot import Line, draw
from deployments.server import free_port
from storage.contacts import Entry, save_contacts
from storage.door import append_events
from storage.settings import load_settings
from storage.store import Store
from tasks.process import positions
from tests.conftest import log_bytes
from tests.helpers import check_undisturbed, parsed
from tests.operations import children, command_of, plain_environment, wait_for
from tests.smtp_server import SmtpServer
from tests.test_crash import Inbox, check_mails

CUSTOMERS = 20_000
SETTINGS = {"AFTERLOG_SHIFT_EVERY": "60s", "AFTERLOG_TIMEOUT": "5m", "AFTERLOG_BRAKE_FLOOR": "100000000"}
SAMPLE_EVERY = 10.0


@dataclass
class Seen:
    """What was seen: seconds from the begin with a value each."""

    begun: float = field(default_factory=time.time)
    appended: dict[str, float] = field(default_factory=dict)
    """When each probe was appended."""
    readable: dict[str, float] = field(default_factory=dict)
    kills: list[tuple[float, str]] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    databases: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    events: int = 0

    def latencies(self, at: dict[str, float]) -> list[tuple[float, float]]:
        """Of each probe that arrived, when it was appended and how many seconds it took."""
        return [(t - self.begun, at[name] - t) for name, t in self.appended.items() if name in at]


def main() -> None:
    """Soak, check, show."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--rate", type=int, default=500, help="events a second")
    parser.add_argument("--kill-every", type=float, default=120, help="seconds")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/soak.svg"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="afterlog-soak-") as folder, SmtpServer() as server:
        inbox = server.inbox = Inbox()
        home, seconds = Path(folder) / "home", arguments.minutes * 60
        env = plain_environment(home, AFTERLOG_MAIL_URL=server.url, **SETTINGS)
        for name in [name for name in os.environ if name.startswith(("AFTERLOG_", "PREFECT_"))]:
            del os.environ[name]
        os.environ.update({name: value for name, value in env.items() if name.startswith("AFTERLOG_")})
        store = Store(load_settings())
        save_contacts(
            store.database, [Entry("CUSTOMER", f"p{i}", f"p{i}@example.com", False) for i in range(int(seconds) + 60)]
        )
        seen = _live(store, env, arguments, seconds)
        assert seen.events > 0.98 * seconds * arguments.rate, "the traffic was less than what was wanted"
        _finish(home, env, inbox, seen)
        mails = {mail.envelope.rcpt_tos[0].partition("@")[0]: mail.accepted for mail in inbox}
        _tell(seen, mails, home)
        arguments.plot.write_text(draw("A soak", seconds, _lines(seen, mails), [at for at, _ in seen.kills]))


def _live(store: Store, env: dict[str, str], arguments: argparse.Namespace, seconds: float) -> Seen:
    """Run `afterlog up` with everything beside it; ends once it has caught up with the last event."""
    output = (store.home.parent / "up.log").open("ab")
    command = [sys.executable, "-m", "deployments.cli", "up", "--port", str(free_port())]
    up = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
    stop = threading.Event()
    try:
        append_events(store, "events", [_event("STARTED_BROWSING", "first", {})])
        wait_for(lambda: store.committed_end("baskets", 0) or _read(store), 300)
        seen = Seen(events=1)
        work = (
            (_append, store, seen, arguments.rate), (_watch, store, seen), (_sample, store.home, up.pid, seen),
            (_kill, up.pid, seen, arguments.kill_every),
        )  # fmt: skip
        threads = [threading.Thread(target=each[0], args=(*each[1:], stop), name=each[0].__name__) for each in work]
        for thread in threads:
            thread.start()
        stop.wait(seconds)
        stop.set()
        for thread in threads:
            thread.join()
        assert up.poll() is None, "afterlog up has ended"
        end = store.reader("events", 0).end()
        wait_for(lambda: _read(store) == end, 300)
        return seen
    finally:
        stop.set()
        up.send_signal(signal.SIGTERM)
        up.wait(90)
        output.close()


def _append(store: Store, seen: Seen, rate: int, stop: threading.Event) -> None:
    """Steady traffic, ten calls a second; behind the schedule it catches up."""
    events, second = _traffic(random.Random(1)), 0
    while not stop.wait(max(0.0, seen.begun + seen.events / rate - time.time())):
        batch = [next(events) for _ in range(rate // 10)]
        if time.time() - seen.begun >= second:
            name = f"p{second}"
            batch[-1] = _event("ORDER_COMPLETED", name, {})
            seen.appended[name] = time.time()
            second += 1
        append_events(store, "events", batch)
        seen.events += len(batch)


def _traffic(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Visits for ever, forty at a time."""
    visits: list[Iterator[dict[str, Any]]] = []
    while True:
        while len(visits) < 40:
            visits.append(_visit(rng, f"c{rng.randrange(CUSTOMERS)}"))
        visit = rng.choice(visits)
        event = next(visit, None)
        if event is None:
            visits.remove(visit)
        else:
            yield event


def _visit(rng: random.Random, customer: str) -> Iterator[dict[str, Any]]:
    yield _event("STARTED_BROWSING", customer, {})
    for _ in range(rng.randint(1, 12)):
        item = {"id": rng.randrange(2000), "name": "Lemon", "price": rng.randint(1, 90), "count": rng.randint(1, 3)}
        yield _event("ADDED_ITEM_TO_BASKET", customer, {"type": "ITEM", "item": item})
    if rng.random() < 0.6:
        yield _event("ORDERED", customer, {"type": "NONE"})
    elif rng.random() < 0.2:
        yield _event("REVIEWED", customer, {"type": "TEXT", "body": "Quite good, " * rng.randint(1, 6)})


def _event(verb: str, customer: str, obj: dict[str, Any]) -> dict[str, Any]:
    at = time.time_ns() // 1_000_000
    return {
        "subject": {"id": customer, "type": "CUSTOMER"}, "verb": {"type": verb}, "object": obj, "context": {"at": at},
    }  # fmt: skip


def _watch(store: Store, seen: Seen, stop: threading.Event) -> None:
    """When the email of each probe could be read; a minute longer than probes come."""
    reader, offset, until = store.reader("reactions", 0), 0, 0.0
    while not stop.wait(0.005) or (len(seen.readable) < len(seen.appended) and time.time() < until):
        if not stop.is_set():
            until = time.time() + 60
        end = store.committed_end("reactions", 0)
        if end > offset:
            wall = time.time()
            for line in b"".join(reader.raw(offset, end)).splitlines():
                seen.readable.setdefault(str(orjson.loads(line)["object"]["id"]), wall)
            offset = end


def _sample(home: Path, up: int, seen: Seen, stop: threading.Event) -> None:
    while not stop.wait(SAMPLE_EVERY):
        at = time.time() - seen.begun
        seen.memory.append((at, sum(map(_memory, _family(up)))))
        for name, path in (("Afterlog's", home / "afterlog.db"), ("Prefect's", home / "prefect" / "prefect.db")):
            files = [f for f in (path, path.with_name(f"{path.name}-wal")) if f.exists()]
            seen.databases.setdefault(name, []).append((at, sum(f.stat().st_size for f in files) / 1e6))


def _kill(up: int, seen: Seen, every: float, stop: threading.Event) -> None:
    """End the server, the runner or a run, whichever comes, as a machine out of memory would."""
    rng = random.Random(2)
    while not stop.wait(every):
        pid = rng.choice(_family(up)[1:])
        seen.kills.append((time.time() - seen.begun, command_of(pid)[-120:]))
        os.kill(pid, signal.SIGKILL)


def _family(pid: int) -> list[int]:
    """A process and all that came from it."""
    return [pid, *(each for child in children(pid) for each in _family(child))]


def _memory(pid: int) -> float:
    """MiB that a process has to itself, and its share of what it shares."""
    try:
        said = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0  # it has ended meanwhile
    return next((int(line.split()[1]) / 1024 for line in said.splitlines() if line.startswith("Pss:")), 0.0)


def _read(store: Store) -> int:
    """How far the processor that is furthest behind has read the raw log."""
    offsets = [p.offset for p in positions(store) if p.log == "events"]
    return min(offsets) if len(offsets) == 5 else 0


def _finish(home: Path, env: dict[str, str], inbox: Inbox, seen: Seen) -> None:
    """Do what is left, undisturbed, and hold everything against the promises."""
    for verb in ("process", "deliver"):
        command = [sys.executable, "-m", "deployments.cli", verb, "--no-prefect"]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    assert log_bytes(home, "events").count(b"\n") == seen.events, "the raw log is not what was appended"
    check_mails(home, inbox)
    check_undisturbed(home)


def _tell(seen: Seen, mails: dict[str, float], home: Path) -> None:
    states = Counter(event["verb"] for event in parsed(log_bytes(home, "deliveries")))
    print(f"{seen.events} events, {len(seen.kills)} kills; mails by outcome: {dict(states)}")
    for at, what in seen.kills:
        print(f"  killed after {at:6.0f} s: {what}")
    for line in _lines(seen, mails):
        for name, points in line.points.items():
            values = [value for _, value in points]
            print(f"{line.title}, {name}: first tenth {_median(values, 0, 0.1):.3g}, last {_median(values, 0.9, 1):.3g} {line.unit}, "
                  f"median {statistics.median(values):.3g}, greatest {max(values):.3g}")  # fmt: skip
    print(
        f"probes: {len(seen.appended)}, readable {len(seen.readable.keys() & seen.appended.keys())}, mailed {len(mails.keys() & seen.appended.keys())}"
    )
    print(
        "Derived logs and rows are those of an undisturbed run; the raw log is what was appended; no mail came twice, none was lost."
    )


def _median(values: list[float], start: float, end: float) -> float:
    return statistics.median(values[int(start * len(values)) : max(1, int(end * len(values)))] or values[-1:])


def _lines(seen: Seen, mails: dict[str, float]) -> list[Line]:
    return [
        Line("Memory of all processes", "MiB", {"all": seen.memory}),
        Line("Databases", "MB", seen.databases),
        Line("Latency, log scale", "s", {
            "to mail": seen.latencies(mails), "to derived event": seen.latencies(seen.readable),
        }, logarithmic=True),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
