"""Kill -9 at every step that has a name: nothing lost, nothing twice, and the derived bytes of an undisturbed run.

Each command runs in a process of its own, forked from a server that has imported all of it, and is really killed.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from email import message_from_bytes
from multiprocessing import connection
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from deployments.example import history
from storage import steps
from storage.clock import Clock
from storage.contacts import Entry, save_contacts
from storage.door import append_lines
from storage.settings import load_settings
from storage.store import Store
from storage.times import now
from tasks.mail_headers import EVENT_ID_HEADER
from tests import processes
from tests.conftest import ROOT, log_bytes, settings_of
from tests.helpers import DERIVED, check_undisturbed, derived, open_store, parsed, process, rows
from tests.processes import ended
from tests.smtp_server import Received, SmtpServer

OPENED = {"derived-opened": DERIVED, "outcome-opened": ("deliveries",)}
"""No steps of Afterlog's own: a process also dies, told by Python's audit hook, when it opens a log to write to it."""
COMMIT = (
    "commit-begun", "source-synced", "derived-opened", "derived-written", "derived-synced", "transaction-ready", "committed",
)  # fmt: skip
BOTH_DATABASES = True
FILES_ONLY = pytest.mark.only("sqlite")
"""For what is about what a power loss leaves of a file, or copies a HOME together with its database."""
HITS = 5
NOW = 1_700_000_000_000  # 2023: nothing is ahead of the wall clock
HOUR = 3_600_000


def start(home: Path, *arguments: str, kill: str = "", **settings: object) -> Any:
    """Start a command of `afterlog` in a new process, which kills itself at the step and time that `kill` names."""
    named = {**settings_of(home), **settings}
    env = {**os.environ, "AFTERLOG_TEST_KILL": kill}
    env |= {f"AFTERLOG_{name.upper()}": str(value) for name, value in named.items()}
    output = Path(str(home) + ".out")
    return processes.start(_work, *arguments, env=env, stdout=output, stderr=output, cwd=ROOT)


def run(home: Path, *arguments: str, **options: Any) -> int:
    return ended(start(home, *arguments, **options))


def done(home: Path, *arguments: str, **settings: object) -> None:
    assert run(home, *arguments, **settings) == 0, Path(str(home) + ".out").read_text()


def _work(*arguments: str) -> None:
    step, _, nth = os.environ["AFTERLOG_TEST_KILL"].partition(":")
    if step in OPENED:
        _kill_when_opening(OPENED[step], int(nth))
    if arguments[0] == "produce":
        _produce(Path(arguments[1]), Path(arguments[2]))
    else:
        processes.command(*arguments)


def _kill_when_opening(logs: tuple[str, ...], nth: int) -> None:
    """Kill this process when it opens one of the logs to write for the nth time."""
    seen = itertools.count(1)
    folders = tuple(f"/logs/{log}/" for log in logs)

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event != "open" or not details[2] & os.O_WRONLY:
            return
        path = str(details[0])
        if path.endswith(".jsonl") and any(folder in path for folder in folders) and next(seen) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _produce(source: Path, acknowledged: Path) -> None:
    """Append the groups of `source`, one a line, from the first that is not acknowledged on."""
    steps.arm_from_environment()
    store = Store(load_settings())
    groups = source.read_bytes().splitlines()
    with acknowledged.open("ab", buffering=0) as file:
        for group in groups[len(acknowledged.read_bytes().splitlines()) :]:
            appended = append_lines(store, "events", group.split(b"\t"))
            file.write(b"%d\n" % (appended.positions[0] or (0, 0))[1])


def append(home: Path, lines: list[bytes]) -> None:
    append_lines(open_store(home), "events", lines)


def example(count: int, seed: int = 1) -> list[bytes]:
    """The last lines of an example log that ends at NOW."""
    return list(history(NOW, seed=seed, customers=60, hours=48))[-count:]


@pytest.fixture
def home(tmp_path: Path, database: str) -> Path:
    return tmp_path / "home"


@pytest.fixture
def hits(database: str) -> int:
    """How often a process is killed; fewer times where only the transaction is another."""
    return HITS if database == "sqlite" else 2


@pytest.mark.parametrize("step", COMMIT)
def test_a_kill_at_any_step_of_a_commit_changes_nothing_of_what_comes_out(home: Path, hits: int, step: str) -> None:
    append(home, example(1000))
    small = {"batch_bytes": 3000, "commit_bytes": 9000, "spill_bytes": 1500, "segment_bytes": 20_000}
    command = ("process", "--as-of", "log-end", "--no-prefect")
    before = []
    for nth in random.Random(step).sample(range(1, 1 + hits), hits):
        assert run(home, *command, kill=f"{step}:{nth}", **small) == -signal.SIGKILL
        before.append(derived(home))
    done(home, *command, **small)
    assert len(parsed(log_bytes(home, "baskets"))) > 10
    check_undisturbed(home, before)


@FILES_ONLY
@pytest.mark.parametrize("step", ["append-written", "append-synced"])
def test_a_kill_while_a_tick_is_noted_changes_nothing_of_what_comes_out(home: Path, step: str) -> None:
    lines = example(100 * (HITS + 1))
    append(home, lines[:100])
    done(home, "process", "--no-prefect")
    before = []
    for hit in range(HITS):
        append(home, lines[100 * (hit + 1) : 100 * (hit + 2)])
        nth = 1 + hit % 2  # the tick at a run's start, or the one at its end
        assert run(home, "process", "--no-prefect", kill=f"{step}:{nth}") == -signal.SIGKILL
        before.append(derived(home))
    done(home, "process", "--no-prefect")
    check_undisturbed(home, before)


@FILES_ONLY
@pytest.mark.parametrize("step", COMMIT)
def test_a_kill_while_a_tick_is_applied_changes_nothing_of_what_comes_out(home: Path, step: str) -> None:
    """Each tick flags somebody, and is applied by whoever comes next."""
    append(home, [basket_line(0, NOW)])
    process(home)
    before, nths = [], itertools.cycle([1] if step.startswith("derived") else [1, 2, 3, 4, 5])
    for hit in range(1, HITS + 1):
        at = NOW + hit * HOUR
        append(home, [basket_line(hit, at)])
        tick(home, at + HOUR // 2 + 1)
        command = ("process", "--as-of", str(at), "--no-prefect")
        assert run(home, *command, kill=f"{step}:{next(nths)}") == -signal.SIGKILL
        before.append(derived(home))
    done(home, *command)
    assert len(parsed(log_bytes(home, "baskets"))) == HITS + 1
    check_undisturbed(home, before)


def basket_line(customer: int, at: int) -> bytes:
    """Somebody puts a lemon into the basket."""
    event = {
        "subject": {"id": customer, "type": "CUSTOMER"},
        "verb": {"type": "ADDED_ITEM_TO_BASKET"},
        "object": {"type": "ITEM", "item": {"id": 3, "name": "Lemon", "price": 5, "count": 2}},
        "context": {"at": at},
        "event": {"inserted_at": at},
    }
    return json.dumps(event).encode()


@FILES_ONLY
@pytest.mark.parametrize("step", ["append-written", "append-synced", "segment-rolled"])
def test_a_kill_while_appending_loses_nothing_that_was_confirmed(home: Path, step: str) -> None:
    lines = example(1000)
    groups = [lines[at : at + 10] for at in range(0, len(lines), 10)]
    source, acknowledged = home.with_name("groups"), home.with_name("acknowledged")
    source.write_bytes(b"\n".join(b"\t".join(group) for group in groups))
    acknowledged.touch()
    texts = [b"".join(line + b"\n" for line in group) for group in groups]
    for nth in random.Random(step).sample(range(1, 1 + HITS), HITS):
        kill = f"{step}:{nth}"
        assert run(home, "produce", str(source), str(acknowledged), kill=kill, segment_bytes=5000) == -signal.SIGKILL
        confirmed = [int(offset) for offset in acknowledged.read_bytes().split()]
        log, known = log_bytes(home, "events"), len(confirmed)
        assert confirmed == list(itertools.accumulate(map(len, texts[: known - 1]), initial=0))[:known]
        assert log in (b"".join(texts[:known]), b"".join(texts[: known + 1]))
        if len(log) > sum(map(len, texts[:known])):  # it is in, and only nobody was told
            with acknowledged.open("ab") as file:
                file.write(b"%d\n" % sum(map(len, texts[:known])))
    done(home, "produce", str(source), str(acknowledged), segment_bytes=5000)
    assert log_bytes(home, "events") == b"".join(texts)
    assert len(list((home / "logs/events/0").glob("*.jsonl"))) > HITS


def test_a_process_killed_at_any_moment_of_its_first_run_leaves_a_home_that_works(home: Path, hits: int) -> None:
    lines, rng = example(300), random.Random(5)
    for attempt in range(hits):
        append(home, lines[30 * attempt : 30 * attempt + 30])
        process = start(home, "process", "--as-of", "log-end", "--no-prefect")
        process.join(rng.uniform(0, 0.3))
        process.kill()
        assert ended(process) in (0, -signal.SIGKILL)
    done(home, "process", "--as-of", "log-end", "--no-prefect")
    check_undisturbed(home, [])


def torn_home(home: Path, log: str, cut: int) -> None:
    """Cut a HOME's copy of a log within its last line, as a power loss may leave it."""
    path = max((home / "logs" / log / "0").glob("*.jsonl"))
    os.truncate(path, path.stat().st_size - cut)


@FILES_ONLY
def test_a_derived_tail_torn_at_any_byte_is_completed(home: Path) -> None:
    append(home, [basket_line(id, at) for at in (NOW, NOW + HOUR) for id in (7, 8)])
    assert run(home, "process", "--no-prefect", kill="derived-written:1") == -signal.SIGKILL
    whole = log_bytes(home, "baskets")
    assert len(parsed(whole)) == 4
    for cut in [1, *range(2, len(whole), 101), len(whole)]:
        copy = home.with_name(f"copy-{cut}")
        shutil.copytree(home, copy)
        torn_home(copy, "baskets", cut)
        process(copy)
        assert log_bytes(copy, "baskets").startswith(whole)
        shutil.rmtree(copy)


@FILES_ONLY
def test_a_raw_line_torn_at_any_byte_is_not_read_before_it_is_closed(home: Path) -> None:
    good = basket_line(7, at=NOW)
    append(home, [good])
    process(home)
    path = home / "logs/events/0/00000000000000000000.jsonl"
    for cut in [*range(1, len(good) - 1, 30), len(good) - 1, len(good)]:
        copy = home.with_name(f"copy-{cut}")
        shutil.copytree(home, copy)
        with (copy / path.relative_to(home)).open("ab") as file:
            file.write(good[:cut])
        process(copy)
        assert log_bytes(copy, "quarantine") == b""
        append(copy, [good])
        process(copy)
        assert log_bytes(copy, "events") == b"\n".join([good, good[:cut], good, b""])
        assert len(parsed(log_bytes(copy, "quarantine"))) == (0 if cut == len(good) else 1)
        shutil.rmtree(copy)


@FILES_ONLY
def test_a_tick_torn_at_any_byte_does_not_stop_the_next_one(home: Path) -> None:
    append(home, [basket_line(7, at=NOW)])
    process(home)
    tick(home, NOW + 1)
    process(home)
    before = log_bytes(home, "clock")
    append(home, [basket_line(8, at=NOW + 1)])
    tick(home, NOW + 2)
    length = len(log_bytes(home, "clock")) - len(before)
    for cut in [1, 2, *range(3, length, 40)]:
        copy = home.with_name(f"copy-{cut}")
        shutil.copytree(home, copy)
        torn_home(copy, "clock", cut)
        append(copy, [basket_line(9, at=NOW + 2)])
        process(copy)
        tick(copy, NOW + HOUR)
        process(copy)
        assert [b["subject"]["id"] for b in parsed(log_bytes(copy, "baskets"))] == [7, 8, 9], cut
        shutil.rmtree(copy)


def tick(home: Path, as_of: int) -> None:
    clock = Clock(open_store(home), ("events",))
    clock.tick(as_of)
    clock.close()


CLIENTS = 18


class Inbox(list[Received]):
    """What the server has accepted; it may kill who has just handed something over, before the answer."""

    victim: Any = None

    def append(self, received: Received) -> None:
        super().append(received)
        if self.victim is not None:
            self.victim.kill()
            connection.wait([self.victim.sentinel], 10)  # it is dead before it could have got the answer

    def ids(self) -> list[str]:
        return [unquote(str(message_from_bytes(each.message)[EVENT_ID_HEADER])) for each in self]


@pytest.fixture
def server() -> Iterator[SmtpServer]:
    with SmtpServer() as server:
        server.inbox = Inbox()
        yield server


@pytest.fixture
def mailing(home: Path) -> Path:
    """A HOME with an address for everyone but client 3; customer 4 wants no mail."""
    store = open_store(home)
    known = [
        *(Entry("CLIENT", str(id), f"c{id}@example.com", False) for id in range(CLIENTS) if id != 3),
        *(Entry("CUSTOMER", str(id), f"u{id}@example.com", id == 4) for id in range(CLIENTS)),
    ]
    save_contacts(store.database, known)
    store.database.dispose()
    return home


def news(home: Path) -> None:
    """An hour ago everybody handed in a tax return and left a basket behind; one of five has ordered it."""
    lines, at = [], now() - HOUR
    for id in range(CLIENTS):
        tax = {"subject": {"id": "UK"}, "verb": "SUBMIT_TAX", "object": {"id": id}, "context": {"at": at + id}}
        lines += [json.dumps(tax).encode(), basket_line(id, at=at + id)]
        if id % 5 == 0:
            order = {"subject": {"id": id, "type": "CUSTOMER"}, "verb": "ORDERED", "context": {"at": at + 1000 + id}}
            lines.append(json.dumps(order).encode())
    append(home, lines)
    done(home, "process", "--no-prefect")


def check_mails(home: Path, inbox: Inbox, unknown: int | None = None) -> None:
    """Every mail has one outcome, the same in the log and in its row, and whatever is SENT arrived once."""
    outcomes = parsed(log_bytes(home, "deliveries"))
    state = {e["object"]["id"]: e["verb"] for e in outcomes}
    mails = [e["event"]["id"] for log in ("reactions", "reminders") for e in parsed(log_bytes(home, log))]
    assert sorted(e["object"]["id"] for e in outcomes) == sorted(mails)
    assert {row[0]: row[1] for row in rows(home, "delivery")["delivery"]} == state
    assert unknown is None or Counter(state.values())["UNKNOWN"] == unknown
    received = inbox.ids()
    assert len(received) == len(set(received))
    sent = {id for id, verb in state.items() if verb == "SENT"}
    assert sent <= set(received)
    assert {state[id] for id in received} <= {"SENT", "UNKNOWN"}
    assert set(state.values()) <= {"SENT", "SUPPRESSED", "UNKNOWN"}


@pytest.mark.parametrize(
    ("step", "unknown"),
    [("mail-claimed", None), ("outcome-opened", None), ("outcome-logged", 0), ("outcome-committed", 0)],
)
def test_a_kill_at_any_step_of_a_delivery_sends_no_mail_twice_and_loses_none(
    mailing: Path, server: SmtpServer, hits: int, step: str, unknown: int | None
) -> None:
    assert isinstance(server.inbox, Inbox)
    news(mailing)
    for hit in range(hits):
        kill = f"{step}:{1 + hit % 4}"
        assert run(mailing, "deliver", "--no-prefect", kill=kill, mail_url=server.url) == -signal.SIGKILL
    done(mailing, "deliver", "--no-prefect", mail_url=server.url)
    check_mails(mailing, server.inbox, hits if step == "mail-claimed" else unknown)
    states = {row[0]: row[1] for row in rows(mailing, "delivery")["delivery"]}
    in_doubt = {id for id in server.inbox.ids() if states[id] == "UNKNOWN"}
    assert bool(in_doubt) == (step == "outcome-opened")
    check_undisturbed(mailing, [])


@pytest.mark.parametrize("step", COMMIT)
def test_a_kill_at_any_commit_of_deliver_sends_no_mail_twice_and_loses_none(
    mailing: Path, server: SmtpServer, hits: int, step: str
) -> None:
    assert isinstance(server.inbox, Inbox)
    news(mailing)
    for nth in random.Random(step).sample([1, 2, 3] * hits, hits):
        small = {"batch_bytes": 400, "commit_bytes": 1, "mail_url": server.url}
        assert run(mailing, "deliver", "--no-prefect", kill=f"{step}:{nth}", **small) == -signal.SIGKILL
    done(mailing, "deliver", "--no-prefect", mail_url=server.url)
    check_mails(mailing, server.inbox, 0)
    check_undisturbed(mailing, [])


def test_a_kill_before_the_server_s_yes_leaves_the_mail_unknown_and_never_sends_it_again(
    mailing: Path, server: SmtpServer, hits: int
) -> None:
    inbox = server.inbox
    assert isinstance(inbox, Inbox)
    news(mailing)
    in_doubt = []
    for _ in range(hits):
        inbox.victim = start(mailing, "deliver", "--no-prefect", mail_url=server.url)
        assert ended(inbox.victim) == -signal.SIGKILL
        in_doubt.append(inbox.ids()[-1])
    inbox.victim = None
    done(mailing, "deliver", "--no-prefect", mail_url=server.url)
    check_mails(mailing, inbox, hits)
    states = {row[0]: row[1] for row in rows(mailing, "delivery")["delivery"]}
    assert [states[id] for id in in_doubt] == ["UNKNOWN"] * hits
