"""Whatever comes in, through the real commands: no traceback, every line counted, no bad line at a good one's cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from email import message_from_bytes
from email.policy import default
from pathlib import Path

import pytest

from deployments import cli
from deployments.console import say, show_table
from storage.contacts import Entry, save_contacts
from storage.times import now
from tests.conftest import ROOT, afterlog, log_bytes
from tests.helpers import open_store, parsed

Asked = Callable[..., bytes]
HOUR = 3_600_000
NOW = now()
MIB = 1 << 20


def event(more: bytes = b"", at: str = str(NOW - HOUR), ident: str = "1") -> bytes:
    """A line of somebody looking around, with a time and an id of any spelling."""
    return b'{"subject":{"id":%s,"type":"CUSTOMER"},"verb":"VIEWED","context":{"at":%s}%s}' % (
        ident.encode(), at.encode(), more,
    )  # fmt: skip


def added(item: str, customer: str = "1") -> bytes:
    who = f'"subject":{{"id":{customer},"type":"CUSTOMER"}},"verb":"ADDED_ITEM_TO_BASKET"'
    return f'{{{who},"object":{{"type":"ITEM","item":{item}}},"context":{{"at":{NOW - HOUR}}}}}'.encode()


BAD = [
    b"", b" ", b"\t\r", b"\r", b"\0", event()[:-1] + b"\0}", b"\0" * 5000, b"\xef\xbb\xbf" + event(), b"\xff\xfe{\0}\0",
    event(b',"x":"\xff"'), event(b',"x":"\xc3"'), event(b',"x":"\xed\xa0\x80"'), event(b',"x":NaN'),
    event(b',"x":-Infinity'), event(b',"x":' + b"[" * 100_000 + b"]" * 100_000), b"[" * 100_000, b'{"a":' * 100_000,
    b'"' * 99_999, event(at="-1"), event(at="1e400"), event(at=str(2**70)), event(at='"9999-12-31T23:59:59Z"'),
    event(at="9999999999999"), event(at="null"), event(at="[]"), event(at='"0"'), event(ident="true"), event(ident="1.5"),
    added('{"id":3,"count":"2"}'), added('{"id":3,"count":null}'), added('{"id":3,"count":[1]}'), added("null"),
    event(b',"x":"\\ud800"'), event(ident='"\\ud800"'), added('{"id":3,"name":"\\udc00"}'),
    b"\x1b]0;title\x07\x1b[2J", b"x" * (MIB + 1), event(b',"x":"' + b"y" * MIB + b'"'),
]  # fmt: skip
"""Lines that are no event; the judge's own tests say why."""

GOOD = [
    event() + b"\r", b" \t" + event() + b" ", event(b',"x":1e400'), event(b',"x":-1e-400'),
    event(ident=str(2**70)), event(ident=f'"{"9" * 5000}"'), event(ident='""'),
    event(ident='"\\u0000"'), event(at="0"), event(at='"1970-01-01T00:00:00Z"'), event(at="9999"),
    event(b',"subject":{"id":2,"type":"CUSTOMER"}'), event(b',"x":1,"x":2,"verb":"VIEWED"'), event(b',"x":"\\u0000\\r\\n"'),
    event(b',"x":' + b"[" * 400 + b"]" * 400), event(b',"x":' + b"9" * 5000), event(b',"x":"' + b"y" * 900_000 + b'"'),
    added('{"id":3,"count":1e9}'), added('{"id":3,"count":-1}'), added('{"id":3,"count":1e400,"price":1e400}'),
    added(f'{{"id":{2**70},"price":{2**70}}}'), added('{"id":"../../x","name":null,"price":"free"}'),
    added('{"id":3,"id":4,"count":1,"count":2}'),
]  # fmt: skip
"""Lines that look no better, and are events all the same."""

NAMES = [
    "<script>alert(1)</script>",
    "x\r\nBcc: eve@example.com\r\n\r\nhi",
    "=?utf-8?q?=0D=0ABcc:_eve@example.com?=",
    "{{ 7*7 }}",
]
FIRST = 10_000  # the clients of the good lines in between


def submission(client: int) -> bytes:
    return b'{"subject":{"id":"UK"},"verb":"SUBMIT_TAX","object":{"id":%d},"context":{"at":%d}}' % (client, NOW - HOUR)


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    """Each hostile line between two good ones; baskets of customers who get a mail at the end."""
    found = [submission(FIRST)]
    for index, line in enumerate([*BAD, *GOOD]):
        found += [line, submission(FIRST + 1 + index)]
    for index, name in enumerate(NAMES):
        found.append(added(json.dumps({"id": 3, "name": name, "price": 5, "count": 2}), customer=str(500 + index)))
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> Path:
    """A HOME where all of it went through the commands; none of them failed, and none had more to say than it should."""
    home = tmp_path_factory.mktemp("hostile") / "home"
    store = open_store(home)
    clients = range(FIRST, FIRST + len(BAD) + len(GOOD) + 1)
    book = [Entry("CLIENT", str(id), f"c{id}@example.com", False) for id in clients]
    book += [Entry("CUSTOMER", str(500 + index), f"u{index}@example.com", False) for index in range(len(NAMES))]
    save_contacts(store.database, book)
    store.database.dispose()
    for command in (("append", "events"), ("process", "--no-prefect"), ("deliver", "--no-prefect")):
        done = afterlog(home, *command, stdin=b"\n".join(lines))
        assert done.returncode == 0, done.stderr.decode()
        assert b"Traceback" not in done.stderr
        assert b"Exception" not in done.stderr
    return home


def test_every_byte_is_kept_as_it_came(home: Path, lines: list[bytes]) -> None:
    assert log_bytes(home, "events") == b"\n".join(lines) + b"\n"


def test_every_line_is_counted_by_every_processor(home: Path, lines: list[bytes]) -> None:
    status = json.loads(afterlog(home, "status", "--json").stdout)
    rows = [row for row in status["processors"] if row["log"] == "events"]
    assert len(rows) == 5
    for row in rows:
        assert row["lag_bytes"] == 0
        assert row["read"] == len(lines)
        assert row["quarantined"] == len(BAD), row["processor"]
        assert row["read"] == row["processed"] + row["quarantined"] + row["ignored"]


def test_each_bad_line_is_in_quarantine_with_its_place_and_its_bytes(home: Path, lines: list[bytes]) -> None:
    log = log_bytes(home, "events")
    found = parsed(log_bytes(home, "quarantine"))
    for entry, line in zip(found, BAD, strict=True):
        offset = entry["context"]["source"]["offset"]
        assert log[offset : offset + len(line) + 1] == line + b"\n"
        assert entry["object"]["length"] == len(line)


def test_no_good_line_pays_for_its_neighbours(home: Path) -> None:
    clients = [entry["object"]["id"] for entry in parsed(log_bytes(home, "reactions"))]
    assert clients == [*range(FIRST, FIRST + len(BAD) + len(GOOD) + 1)]
    outcomes = {e["object"]["id"]: e["verb"] for e in parsed(log_bytes(home, "deliveries"))}
    assert list(outcomes.values()).count("SENT") == len(clients) + len(NAMES)


def test_what_an_item_is_called_stays_a_text_in_its_mail(home: Path) -> None:
    mails = [message_from_bytes(path.read_bytes(), policy=default) for path in (home / "outbox").glob("*.eml")]
    reminders = {str(mail["To"]): mail for mail in mails if str(mail["To"]).startswith("u")}
    assert sorted(reminders) == [f"u{index}@example.com" for index in range(len(NAMES))]
    for mail in mails:
        assert mail["Bcc"] is None
        assert mail["Cc"] is None
        assert not mail.defects
    html = reminders["u0@example.com"].get_body(("html",))
    assert html is not None
    assert "&lt;script&gt;" in html.get_content()
    assert "<script" not in html.get_content()
    assert "49" not in str(reminders["u3@example.com"]["Subject"])


def test_whoever_looks_back_gets_rows_and_never_a_traceback(home: Path, asked: Asked) -> None:
    reminder = parsed(log_bytes(home, "reminders"))[0]["event"]["id"]
    for index, name in enumerate(NAMES):
        customer = str(500 + index)
        found = json.loads(asked(0, "basket", customer, "--json"))
        assert [item["name"] for item in found["items"]] == [name]
        rows = asked(0, "basket", customer).splitlines()
        assert rows[1].split(b"\t")[:3] == [b"3", name.replace("\r", "\\r").replace("\n", "\\n").encode(), b"2"]
        assert len(rows) == 5
        assert b"SENT at" in asked(0, "why-not", customer, "--json")
    assert b"verbatim" in asked(0, "why", reminder)
    for customer in ("1", "9" * 5000, "x\r\nBcc: eve@example.com", "\x1b[2J"):
        for command in ("basket", "why-not"):
            json.loads(asked(0, command, customer, "--json"), parse_constant=pytest.fail)
    for command in ("basket", "why-not", "why"):
        asked(2, command, "\udcff")
    for ident in (
        "",
        "NaN",
        "<script>",
        "x\r\nBcc: eve@example.com",
        "/" * 5000,
        "a..b:0:0",
        "-1",
        f"baskets:{10**20}:{10**20}",
    ):
        asked(2, "why", "--", ident)
    asked(2, "read", "baskets", "--partition", str(10**20), "--generation", str(10**20))
    assert asked(0, "read", "never-heard-of", "--partition", str(10**20), "--generation", str(10**20)) == b""
    for wrong in (
        ["../x"],
        ["\udcff"],
        ["events", "--from", "9" * 5000],
        ["events", "--to", "NaN"],
        ["events", "--from", "\udcff"],
    ):
        asked(2, "read", *wrong)


@pytest.fixture
def asked(home: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Asked:
    """What a command answers, run in this process, where a traceback is a failed test."""
    monkeypatch.setenv("AFTERLOG_HOME", str(home))

    def ask(code: int, *command: str) -> bytes:
        ended = cli._run(list(command))
        shown = capfdbinary.readouterr()
        assert ended == code, (command, shown.err.decode())
        return shown.out

    return ask


def test_on_a_terminal_a_name_neither_steers_it_nor_is_markup() -> None:
    master, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stdout, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        show_table("Items", ("item", "name"), [(2**70, "[/b] [red]x"), (3, "\x1b]0;title\x07a\nb\u202e\ud800")])
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "[/b] [red]x" in shown
    assert "\\x1b]0;title\\x07a\\nb\\u202e\\ud800" in shown


def test_what_is_said_steers_no_terminal_either(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    say("two\nlines, \x1b]0;title\x07a\r\x9b31m\u202e\ud800ü")
    shown = capfdbinary.readouterr()
    assert (shown.out, shown.err.decode()) == (b"", "two\nlines, \\x1b]0;title\\x07a\\r\\x9b31m\\u202e\\ud800ü\n")


MEASURED = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, "-m", "deployments.cli", *sys.argv[2:]]).returncode
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


def peak(home: Path, *command: str, stdin: Path) -> tuple[int, bytes]:
    """The greatest memory of a command in MiB, and what it wrote; a process between, as a child begins at its parent's."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("AFTERLOG_")} | {"AFTERLOG_HOME": str(home)}
    report = home.with_name("peak")
    with stdin.open("rb") as source:
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(report), *command], cwd=ROOT, env=env, stdin=source,
            capture_output=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return int(report.read_text()) // 1024, done.stdout


def test_a_line_of_64_mib_costs_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    found = {}
    for size in (1, 64):
        home = tmp_path / f"home-{size}"
        home.mkdir()
        lines = tmp_path / "lines"
        lines.write_bytes(b"\n".join([submission(1), b'{"x":"' + b"x" * (size * MIB) + b'"}', submission(2), b""]))
        written = [peak(home, "append", "events", stdin=lines)]
        written.append(peak(home, "process", "--no-prefect", stdin=lines))
        written.append(peak(home, "read", "events", stdin=lines))
        assert written[2][1] == lines.read_bytes()
        assert [e["object"]["id"] for e in parsed(log_bytes(home, "reactions"))] == [1, 2]
        assert parsed(log_bytes(home, "quarantine"))[0]["object"]["length"] == size * MIB + 8
        found[size] = [memory for memory, _ in written]
    append, process, read = (large - small for small, large in zip(found[1], found[64], strict=True))
    assert process < 16, found
    assert read < 16, found
    assert append < 200, found
