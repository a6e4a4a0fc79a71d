"""The command line: what each command writes where, with which exit code, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from deployments.cli import main
from storage.door import append_lines
from storage.locks import locked
from storage.store import Store
from tests.conftest import ROOT, afterlog, log_bytes
from tests.operations import PATIENCE, wait_for
from tests.smtp_server import refusing_port

T0 = 1_700_000_000_000  # 2023-11-14T22:13:20Z


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: bytes
    err: str


Command = Callable[..., Done]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def command(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Iterator[Command]:
    """Run a command in this process, in a folder of the test's own; a real process takes a second to start."""
    monkeypatch.setenv("AFTERLOG_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments: str, **settings: str) -> Done:
        for name, value in settings.items():
            monkeypatch.setenv(f"AFTERLOG_{name.upper()}", value)
        capfdbinary.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = capfdbinary.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, out, err.decode())

    yield run
    for kind, handler in before.items():
        signal.signal(kind, handler)


def tax(number: int, at: int = T0) -> bytes:
    event = {"subject": {"id": number}, "verb": "SUBMIT_TAX", "object": {"id": number}, "context": {"at": at}}
    return json.dumps(event).encode()


def refused(done: Done, *parts: str) -> None:
    """The command did nothing, and said why in one sentence."""
    assert (done.code, done.out) == (2, b""), done.err
    first = done.err.splitlines()[0]
    assert first.startswith("afterlog: ")
    for part in parts:
        assert part in first
    assert "Traceback" not in done.err
    assert re.fullmatch(r"|Try: afterlog [a-z -]*--help", "\n".join(done.err.splitlines()[1:]))


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            (["nonsense"], "nonsense"),
            (["read"], "log"),
            (["append"], "log"),
            (["read", "events", "--sideways"], "--sideways"),
            (["read", "events", "--partition", "many"], "many"),
            (["process", "--as-of"], "as-of"),
            (["process", "--follow-for", "long"], "long"),
            (["status", "--json", "more"], "more"),
            (["contacts", "import"], "file"),
            (["contacts", "nonsense"], "nonsense"),
            (["deliver", "--limit", "many"], "many"),
        ],
    )
    def test_wrong_arguments_are_told_in_one_sentence(self, command: Command, arguments: list[str], part: str) -> None:
        refused(command(*arguments), part)

    @pytest.mark.parametrize(
        "arguments",
        [
            ["pause", "deliver", "--reason", "\udcff"], ["deliveries", "resolve", "\udcff", "sent"],
            ["contacts", "forget", "CUSTOMER", "\udcff"], ["replay", "\udcff"], ["replay", "--no-prefect", "--name", "\udcff"],
            ["replay", "--set", "timeout=\udcff"], ["replays", "show", "\udcff"],
        ],
    )  # fmt: skip
    def test_a_text_that_is_not_utf_8_is_refused(self, command: Command, arguments: list[str]) -> None:
        refused(command(*arguments), "an argument is not UTF-8; found '", "\\udcff'. Write it in UTF-8")

    def test_a_file_s_name_may_be_of_any_bytes(self, command: Command, tmp_path: Path) -> None:
        (tmp_path / "caf\udce9.jsonl").write_bytes(tax(1) + b"\n")
        assert command("append", "events", "caf\udce9.jsonl").err == "1 lines appended to events\n"
        assert command("backup", "caf\udce9").code == 0

    def test_what_is_no_use_is_told_where_its_help_is(self, command: Command) -> None:
        assert command("deliveries", "list", "--limt", "3").err.endswith("\nTry: afterlog deliveries list --help\n")

    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            (["append", "events", "none.jsonl"], ["none.jsonl: cannot read the file: No such file or directory"]),
            (["append", "events", "."], ["cannot read the file: Is a directory"]),
            (["append", "../x", "none.jsonl"], ["no name for a log; found '../x', expected lower-case letters"]),
            (["append", "baskets", "none.jsonl"], ["baskets is written by Afterlog itself. Append to a raw log, such as events"]),
            (["read", "a/b"], ["no name for a log; found 'a/b'"]),
            (["read", "events", "--from", "yesterday"], ["neither an offset nor a time; found 'yesterday', expected digits, or RFC 3339"]),
            (["read", "events", "--to", "2023-11-14"], ["neither an offset nor a time; found '2023-11-14'"]),
            (["process", "--no-prefect", "--as-of", "soon"], ["--as-of is no time; found 'soon', expected now, log-end, RFC 3339"]),
            (["process", "--no-prefect", "--as-of", "2099-12-31T00:00:00Z"], ["as-of lies ahead; found 2099-12-31T00:00:00.000Z, expected at most now"]),
            (["process", "--no-prefect", "--as-of", "99999999999999999"], ["--as-of is no time"]),
            (["process", "--follow-for", "1", "--as-of", "log-end"], ["--follow-for goes with --as-of now only"]),
            (["process", "--no-prefect", "--as-of", "9" * 5000], ["--as-of is no time"]),
            (["append", "events", ""], ["no name of a file; found '', expected a file, or - for standard input"]),
            (["status", "more", "of it"], ["nothing here takes more 'of it'"]),
            (["up", "--port", "22.5"], ["--port is no whole number; found '22.5', expected digits"]),
            (["demo", "--port", "70000"], ["--port is no port; found 70000, expected 1 to 65535"]),
            (["read", "events", "--partition", "1.5"], ["--partition is no whole number; found '1.5'"]),
            (["read", "baskets", "--generation", "1e0"], ["--generation is no whole number; found '1e0'"]),
            (["deliveries", "list", "--limit", "1.5"], ["--limit is no whole number; found '1.5'"]),
            (["deliver", "--limit", "9" * 19], ["--limit is too large; found 999", "expected at most 1,000,000,000"]),
            (["verify", "--head", "abc"], ["--head is no head; found 'abc', expected 64 digits 0 to f"]),
            (["verify", "--head", "a" * 64, "--derived"], ["--head does not go with --derived"]),
            (["replay", "--set", "timeot=45m"], ["no such setting: timeot; expected one of timeout"]),
            (["replay", "--set", "timeout=45x"], ["expected a length of time such as 90s, 30m, 24h or 7d; found '45x'"]),
            (["replay", "abandonmnt"], ["no such processor; found 'abandonmnt', expected one of quarantine"]),
            (["replay", "--from", "2026-11-01"], ["--from is neither an offset nor a time; found '2026-11-01', expected all"]),
            (["replay", "--as-of", "soon"], ["as-of is no time; found 'soon'"]),
            (["process", "--follow-for", "nan"], ["--follow-for is no length of time; found nan, expected seconds, up to 1,000,000"]),
            (["process", "--follow-for=-1"], ["--follow-for is no length of time; found -1.0"]),
            (["process", "--follow-for", "inf"], ["--follow-for is no length of time; found inf"]),
            (["deliveries", "list", "--limit", "9" * 23], ["--limit is no number of mails; found 999", "expected 1 to 1,000,000,000, or 0 for all"]),
            (["deliveries", "list", "--limit", "-1"], ["--limit is no number of mails; found -1"]),
            (["pause", "deliver", "--reason", " "], ["--reason is empty. Say why, or leave it out"]),
            (["deliver", "--no-prefect", "--limit", "0"], ["--limit is too small; found 0, expected at least 1"]),
            (["replay", "--no-prefect", "--from", "9" * 5000], ["neither an offset nor a time; found '9999"]),
            (["replay", "--no-prefect", "--to", "9" * 20], ["neither an offset nor a time; found '99999999999999999999'"]),
            (["up", "--port", "99999"], ["--port is no port; found 99999, expected 1 to 65535"]),
            (["up", "--port", "0"], ["--port is no port; found 0"]),
            (["contacts", "import", "none.csv"], ["none.csv: cannot read the file: No such file or directory"]),
        ],
    )  # fmt: skip
    def test_what_cannot_be_done_is_told_with_what_was_found_and_expected(
        self, command: Command, arguments: list[str], parts: list[str]
    ) -> None:
        refused(command(*arguments), *parts)

    @pytest.mark.parametrize("name", ["append", "read", "process", "deliver", "contacts", "status", "up", "demo"])
    def test_every_command_has_help_that_reads_well(self, command: Command, name: str) -> None:
        whole, mine = command("--help"), command(name, "--help")
        assert (whole.code, mine.code, whole.err, mine.err) == (0, 0, "", "")
        assert re.search(rf"\b{name}\b +\S", whole.out.decode())
        assert len(mine.out.splitlines()) > 5

    def test_the_version_is_told(self, command: Command) -> None:
        assert re.fullmatch(rb"\d+\.\d+\.\d+\n", command("--version").out)


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "parts"),
        [
            ({"timeout": "soon"}, ["AFTERLOG_TIMEOUT", "expected a length of time such as 90s, 30m, 24h or 7d", "'soon'"]),
            ({"timeout": "0"}, ["AFTERLOG_TIMEOUT", "greater than 0"]),
            ({"timeout": "9" * 400 + "d"}, ["AFTERLOG_TIMEOUT", "expected a length of time of 100 years at most"]),
            ({"not_after": "36526d"}, ["AFTERLOG_NOT_AFTER", "expected a length of time of 100 years at most"]),
            ({"home": ""}, ["AFTERLOG_HOME", "expected a folder"]),
            ({"timeuot": "30m"}, ["no such setting: AFTERLOG_TIMEUOT", "Did you mean AFTERLOG_TIMEOUT?"]),
            ({"partitions": "0"}, ["AFTERLOG_PARTITIONS", "expected a whole number >= 1", "'0'"]),
            ({"partitions": "many"}, ["AFTERLOG_PARTITIONS", "'many'"]),
            ({"excluded_verbs": "BROWSED"}, ["AFTERLOG_EXCLUDED_VERBS", "expected JSON, such as"]),
            ({"processors": '["nowhere_at_all"]'}, ["AFTERLOG_PROCESSORS: nowhere_at_all: cannot import the module"]),
            ({"anomalies": '{"sampels": 3}'}, ["AFTERLOG_ANOMALIES__SAMPELS", "no such setting"]),
            ({"anomalies__deviations": "-1"}, ["AFTERLOG_ANOMALIES__DEVIATIONS", "expected a number > 0"]),
            ({"anomalies__measures": '["subject.id"]'}, ["AFTERLOG_ANOMALIES__MEASURES", "found 'subject.id'"]),
            ({"database_url": "nonsense"}, ["AFTERLOG_DATABASE_URL"]),
            ({"database_url": "marsdb://u:hunter2@h/x"}, ["AFTERLOG_DATABASE_URL"]),
            ({"home": "/dev/null/x"}, ["/dev/null/x: cannot make HOME: Not a directory. Set AFTERLOG_HOME to a folder of yours"]),
            ({"config": "nowhere.toml"}, ["nowhere.toml"]),
        ],
        ids=str,
    )  # fmt: skip
    def test_a_bad_setting_is_named_with_what_fits(
        self, command: Command, settings: dict[str, str], parts: list[str]
    ) -> None:
        done = command("status", **settings)
        refused(done, *parts)
        assert "hunter2" not in done.err

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            (b"timeout = ", ["afterlog.toml: no TOML"]),
            (b'timeout = "soon"', ["`timeout` in afterlog.toml", "'soon'"]),
            (b'timeuot = "30m"', ["`timeuot` in afterlog.toml", "no such setting"]),
            (b"[anomalies]\nsamples = 1", ["ANOMALIES__SAMPLES", "expected a whole number >= 2"]),
            (b'mail_from = "\xff"', ["afterlog.toml"]),
        ],
    )
    def test_a_bad_settings_file_is_named_with_what_is_wrong(
        self, command: Command, tmp_path: Path, text: bytes, parts: list[str]
    ) -> None:
        (tmp_path / "afterlog.toml").write_bytes(text)
        refused(command("status"), *parts)

    @pytest.mark.parametrize(
        ("url", "part"),
        [
            ("smpt://ann:hunter2@h", "setting AFTERLOG_MAIL_URL: scheme of the mail URL"),
            ("smtp://ann:hunter2@h:99999", "setting AFTERLOG_MAIL_URL: port of the smtp mail URL"),
            ("smtp://h?cafile=none.pem", "none.pem"),
        ],
    )
    def test_a_bad_mail_url_is_told_before_anything_is_sent_and_without_its_password(
        self, command: Command, url: str, part: str
    ) -> None:
        done = command("deliver", "--no-prefect", mail_url=url)
        assert (done.code, part in done.err) == (2, True), done.err
        assert (done.out == b"") == ("setting" in part), "the URL is looked at first, its files when they are needed"
        assert "hunter2" not in done.err
        assert "Traceback" not in done.err

    @pytest.mark.parametrize("name", ["what?now", "a%20b"])
    def test_a_home_that_no_url_can_name_is_refused_before_anything_is_in_it(
        self, command: Command, tmp_path: Path, name: str
    ) -> None:
        home, lines = tmp_path / name, tmp_path / "lines"
        lines.write_bytes(b'{"a":1}\n')
        refused(
            command("append", "events", str(lines), home=str(home)),
            f"{home}: setting AFTERLOG_HOME: a ? or % in its name",
        )
        assert not home.exists()
        assert (
            command("append", "events", str(lines), home=str(home), database_url=f"sqlite:///{tmp_path}/x.db").code == 0
        )

    def test_the_environment_is_stronger_than_the_file(self, command: Command, home: Path, tmp_path: Path) -> None:
        (tmp_path / "afterlog.toml").write_text('timeout = "45m"\npartitions = 3\n[anomalies]\nsamples = 7\n')
        command("process", "--no-prefect", "--as-of", "log-end", timeout="50m")
        versions = [json.loads(line)["object"] for line in log_bytes(home, "clock").splitlines()]
        settings = {v["processor"]: v["settings"] for v in versions if v["type"] == "VERSION"}
        assert settings["abandonment"]["timeout"] == 3_000_000
        assert settings["anomalies"]["samples"] == 7

    def test_the_first_command_makes_home_for_its_owner_only(self, command: Command, home: Path) -> None:
        assert command("status").code == 0
        assert (home / "afterlog.db").is_file()
        assert {path.stat().st_mode & 0o077 for path in (home, home / "logs", home / "locks")} == {0}


class TestAppendAndRead:
    def test_bytes_come_back_as_they_went_in(self, command: Command, tmp_path: Path) -> None:
        whole = tax(1) + b"\r\n" + b"\xff\x00 no event\n" + b"\n" + tax(2)
        (tmp_path / "lines").write_bytes(whole)
        assert command("append", "events", "lines") == (0, b"", "4 lines appended to events\n")
        assert command("read", "events") == (0, whole + b"\n", "")

    @pytest.mark.parametrize("arguments", [("events",), ("events", "-")])
    def test_lines_come_from_standard_input_also_where_it_is_named(
        self, tmp_path: Path, arguments: tuple[str, ...]
    ) -> None:
        line = b'{"subject":{"id":1},"verb":"X","context":{"at":1650549837169}}\n'
        done = afterlog(tmp_path, "append", *arguments, stdin=line)
        assert (done.returncode, done.stderr) == (0, b"1 lines appended to events\n")
        assert log_bytes(tmp_path, "events") == line

    def test_an_empty_file_is_appended_without_a_word_of_complaint(self, command: Command, tmp_path: Path) -> None:
        (tmp_path / "lines").write_bytes(b"")
        assert command("append", "events", "lines") == (0, b"", "0 lines appended to events\n")

    @pytest.mark.parametrize("log", ["events", "baskets", "deliveries", "refused", "clock", "never-heard-of"])
    def test_a_log_that_was_never_written_reads_as_empty(self, command: Command, log: str) -> None:
        assert command("read", log) == (0, b"", "")
        assert command("read", log, "--from", "2023-11-14T22:13:20Z", "--partition", "3") == (0, b"", "")

    def test_a_part_of_a_log_is_read_by_offsets(self, command: Command, tmp_path: Path) -> None:
        (tmp_path / "lines").write_bytes(b"one\ntwo\nthree\n")
        command("append", "events", "lines")
        assert command("read", "events", "--from", "4").out == b"two\nthree\n"
        assert command("read", "events", "--from", "4", "--to", "8").out == b"two\n"
        assert command("read", "events", "--to", "0").out == b""
        assert command("read", "events", "--from", "14").out == b""
        refused(
            command("read", "events", "--from", "5"), "events:0:5: not the start of a line. The line there starts at 4"
        )

    @pytest.mark.parametrize("to", ["1", "5", "13"])
    def test_no_half_line_is_ever_written(self, command: Command, tmp_path: Path, to: str) -> None:
        (tmp_path / "lines").write_bytes(b"one\ntwo\nthree\n")
        command("append", "events", "lines")
        done = command("read", "events", "--to", to)
        assert done.out == b"" or done.out.endswith(b"\n")

    def test_from_a_time_is_from_where_the_greatest_clock_reaches_it(self, command: Command, tmp_path: Path) -> None:
        lines = [tax(0, T0), b"bad", tax(1, T0 + 5_000), tax(2, T0 + 1_000), tax(3, T0 + 5_000), tax(4, T0 + 9_000)]
        (tmp_path / "lines").write_bytes(b"\n".join([*lines, b""]))
        command("append", "events", "lines")

        def since(time: str, *more: str) -> list[bytes]:
            return command("read", "events", "--from", time, *more).out.splitlines()

        assert since("2023-11-14T22:13:20Z") == lines
        assert since("2023-11-14T22:13:20.001Z") == lines[2:]
        assert since("2023-11-15T00:13:22+02:00") == lines[2:]
        assert since("2023-11-14T22:13:25.001Z") == lines[5:]
        assert since("2023-11-14T22:14:00Z") == []
        assert since("2023-11-14T22:13:21Z", "--to", "2023-11-14T22:13:29Z") == lines[2:5]

    def test_a_derived_line_that_nests_deeper_than_its_cause_has_a_clock(
        self, command: Command, tmp_path: Path
    ) -> None:
        deep = b'{"subject":{"id":"UK"},"verb":"SUBMIT_TAX","object":{"id":1,"body":%s},"context":{"at":%d}}'
        nested = b"[" * 497 + b"]" * 497
        (tmp_path / "lines").write_bytes(b"".join(deep % (nested, T0 + n * 1000) + b"\n" for n in range(2)))
        command("append", "events", "lines")
        command("process", "--no-prefect", "--as-of", "log-end")
        both = command("read", "reactions").out.splitlines()
        assert len(both) == 2
        assert command("read", "reactions", "--from", "2023-11-14T22:13:21Z").out.splitlines() == both[1:]

    def test_a_derived_log_that_was_cut_is_no_wrong_usage(self, command: Command, tmp_path: Path, home: Path) -> None:
        (tmp_path / "lines").write_bytes(b"".join(tax(n) + b"\n" for n in range(2)))
        command("append", "events", "lines")
        command("process", "--no-prefect", "--as-of", "log-end")
        first, second = log_bytes(home, "reactions").splitlines(keepends=True)
        [file] = (home / "logs" / "reactions" / "0").glob("*.jsonl")
        file.write_bytes(first + second[:-9])
        done = command("read", "reactions")
        assert (done.code, done.out) == (1, b"")
        assert "the log is shorter than what was read from it; found" in done.err
        assert "Restore the newer copy of the log" in done.err
        assert command("read", "reactions", "--to", str(len(first))).out == first

    def test_partitions_are_read_one_after_another_or_one_alone(
        self, command: Command, tmp_path: Path, home: Path
    ) -> None:
        (tmp_path / "lines").write_bytes(b"\n".join([*(tax(n) for n in range(20)), b""]))
        command("append", "events", "lines", partitions="3")
        parts = [log_bytes(home, "events", part) for part in range(3)]
        assert all(parts)
        assert command("read", "events").out == b"".join(parts)
        assert command("read", "events", "--partition", "1").out == parts[1]

    def test_a_partition_or_generation_that_there_never_was_is_refused(self, command: Command, tmp_path: Path) -> None:
        (tmp_path / "lines").write_bytes(b"\n".join([*(tax(n) for n in range(20)), b""]))
        command("append", "events", "lines", partitions="3")
        command("process", "--no-prefect", "--as-of", "log-end")
        refused(command("read", "events", "--partition", "-1"), "events: no such partition; found -1, expected 0 to 2")
        refused(command("read", "events", "--partition", "3"), "events: no such partition; found 3, expected 0 to 2")
        refused(command("read", "events", "--generation", "2"), "events: no such generation; found 2, expected 1")
        for none in ("99", "0", "-1", str(10**20)):
            refused(command("read", "reactions", "--generation", none), f"reactions: no such generation; found {none}")
        assert command("read", "reactions", "--generation", "1").out
        assert command("read", "baskets", "--partition", "2") == (0, b"", "")  # it is there, and has no line
        assert command("replay", "derive", "--no-prefect", "--name", "one").code == 0
        assert command("read", "reactions", "--generation", "2").out == command("read", "reactions").out
        assert command("replays", "discard", "one").code == 0
        assert command("read", "reactions", "--generation", "2") == (0, b"", "")
        refused(
            command("read", "reactions", "--generation", "3"), "found 3, expected 1 or 2. See: afterlog replays list"
        )


class TestWork:
    def test_process_and_deliver_tell_their_counts_as_plain_lines_in_a_pipe(
        self, command: Command, tmp_path: Path
    ) -> None:
        (tmp_path / "lines").write_bytes(tax(1) + b"\nbad\n")
        command("append", "events", "lines")
        done = command("process", "--no-prefect", "--as-of", "log-end")
        size = len(tax(1)) + 5
        assert (done.code, done.err) == (0, "")
        assert done.out.decode().splitlines() == [
            "processor\tread\tprocessed\tquarantined\tignored\tderived\tbytes",
            f"quarantine\t2\t1\t1\t0\t1\t{size}",
            f"derive\t2\t1\t1\t0\t1\t{size}",
            f"abandonment\t2\t0\t1\t1\t0\t{size}",
            f"anomalies\t2\t0\t1\t1\t0\t{size}",
            f"normalise\t2\t0\t1\t1\t0\t{size}",
        ]
        done = command("deliver", "--no-prefect")
        assert (done.code, done.err) == (0, "1 x too old: past its not_after\n")
        assert sorted(done.out.decode().splitlines()) == [
            "SUPPRESSED\t1",
            "processor\tread\tprocessed\tquarantined\tignored\tderived\tbytes",
            "remind\t0\t0\t0\t0\t0\t0",
            "state\tmails",
        ]

    def test_process_on_an_empty_home_is_done_at_once(self, command: Command) -> None:
        assert command("process", "--no-prefect").code == 0
        assert command("process", "--no-prefect", "--as-of", "log-end").code == 0
        assert command("deliver", "--no-prefect").code == 0

    @pytest.mark.parametrize("as_of", ["1700003600000", "2023-11-14T23:13:20Z", "2023-11-15T00:13:20+01:00"])
    def test_a_time_to_judge_by_is_given_in_milliseconds_or_in_words(
        self, command: Command, home: Path, as_of: str
    ) -> None:
        assert command("process", "--no-prefect", "--as-of", as_of).code == 0
        ticks = [json.loads(line)["object"] for line in log_bytes(home, "clock").splitlines()]
        assert [tick["as_of"] for tick in ticks if tick["type"] == "TICK"] == [T0 + 3_600_000]

    def test_follow_for_goes_on_as_the_log_grows(self, command: Command, home: Path, make_store: Any) -> None:
        store: Store = make_store()
        timer = threading.Timer(0.5, lambda: append_lines(store, "events", [tax(1)]))
        timer.start()
        done = command("process", "--follow-for", "1.5")
        timer.join()
        assert (done.code, done.err) == (0, "")
        assert log_bytes(home, "reactions").count(b"\n") == 1

    def test_status_counts_add_up_and_show_what_lags(self, command: Command, tmp_path: Path) -> None:
        (tmp_path / "lines").write_bytes(tax(1) + b"\nbad\n" + tax(2) + b"\n")
        command("append", "events", "lines")
        command("process", "--no-prefect", "--as-of", "log-end")
        (tmp_path / "more").write_bytes(tax(3) + b"\n")
        command("append", "events", "more")
        done = command("status", "--json")
        assert (done.code, done.err) == (0, "")
        found = json.loads(done.out)
        assert [p["processor"] for p in found["processors"]] == [
            "quarantine", "derive", "abandonment", "anomalies", "normalise", "remind",
        ]  # fmt: skip
        for row in found["processors"][:5]:
            assert row["read"] == row["processed"] + row["quarantined"] + row["ignored"] == 3
            assert row["lag_bytes"] == row["end"] - row["offset"] == len(tax(3)) + 1
            assert row["lag_ms"] > 0
        plain = command("status").out.decode().splitlines()
        assert plain[0].split("\t")[:5] == ["processor", "log", "state", "offset", "lag bytes"]
        sizes = [str(len(tax(1)) * 2 + 6), str(len(tax(3)) + 1)]
        assert plain[1].split("\t")[:5] == ["quarantine", "events/0", "working", *sizes]

    def test_status_shows_the_mails_by_state(self, command: Command, tmp_path: Path) -> None:
        with refusing_port() as port:
            (tmp_path / "book.csv").write_text("type,id,email\nCLIENT,1,ann@example.com\n")
            (tmp_path / "lines").write_bytes(b"\n".join([tax(1, int(time.time() * 1000)), tax(2), b""]))
            command("contacts", "import", "book.csv")
            command("append", "events", "lines")
            command("process", "--no-prefect")
            done = command("deliver", "--no-prefect", mail_url=f"smtp://127.0.0.1:{port}")
        assert "1 x will be tried again: 127.0.0.1" in done.err
        assert json.loads(command("status", "--json").out)["mails"] == {"SUPPRESSED": 1, "WAITING": 1}

    def test_a_second_pause_says_that_the_first_one_stands(self, command: Command) -> None:
        since, end = re.findall(
            "deliver is PAUSED since (.*): (.*)\n", command("pause", "deliver", "--reason", "one").err
        )[0]
        second = command("pause", "deliver", "--reason", "two")
        assert second == (
            0,
            b"",
            f"deliver is PAUSED already since {since}: one. Nothing has changed.{end.removeprefix('one.')}\n",
        )

    def test_the_version_is_that_of_the_package(self, command: Command) -> None:
        assert command("--version") == (0, f"{importlib.metadata.version('afterlog')}\n".encode(), "")
        assert command("--version").out != b"0.0.0\n"

    def test_contacts_are_imported_listed_and_forgotten(self, command: Command, tmp_path: Path) -> None:
        (tmp_path / "book.csv").write_text(
            "type,id,email,unsubscribed\nCUSTOMER,2,bob@example.com,yes\nCLIENT,1,ann@example.com,\n"
        )
        assert command("contacts", "import", "book.csv") == (0, b"", "2 contacts imported\n")
        assert command("contacts", "list").out == (
            b"type\tid\temail\tunsubscribed\nCLIENT\t1\tann@example.com\tfalse\nCUSTOMER\t2\tbob@example.com\ttrue\n"
        )
        assert command("contacts", "forget", "CLIENT", "1") == (0, b"", "CLIENT 1 is forgotten\n")
        assert command("contacts", "forget", "CLIENT", "1") == (
            2, b"", "afterlog: no such contact; found CLIENT 1. See: afterlog contacts list\n"
        )  # fmt: skip
        (tmp_path / "bad.csv").write_text("type,id,email\nCLIENT,5,x@example.com\nCLIENT,,y@example.com\n")
        refused(command("contacts", "import", "bad.csv"), "line 3: an entry without type, id or email")
        assert command("contacts", "list").out.count(b"\n") == 2

    @pytest.mark.parametrize(
        ("row", "sentence"),
        [
            ("CLIENT,6,notanaddress", "line 3: no mail can reach this email: expected one address such as ann@example.com, found none"),
            ("CLIENT,6,a@example.com b@example.com", "line 3: no mail can reach this email: expected one address"),
            ("CLIENT,6,a@example.com,yes,x", "line 3: more cells than there are columns"),
        ],
    )  # fmt: skip
    def test_contacts_that_cannot_be_used_are_refused_with_their_line_and_the_whole_file_with_them(
        self, command: Command, tmp_path: Path, row: str, sentence: str
    ) -> None:
        (tmp_path / "bad.csv").write_text(
            f"type,id,email,unsubscribed\nCLIENT,5,ann@example.com,\n{row}\nCLIENT,7,c@example.com\n"
        )
        refused(command("contacts", "import", "bad.csv"), sentence)
        assert command("contacts", "list").out.count(b"\n") == 1


def environment(home: Path, **more: str) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("AFTERLOG_")}
    return {**env, "AFTERLOG_HOME": str(home), **more}


def _heed_interrupts() -> None:
    """A shell that runs these tests in the background has its children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def started(home: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command that goes on by itself, ended at the latest when the test is."""
    with subprocess.Popen(
        [sys.executable, "-m", "deployments.cli", *arguments], env=environment(home), cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_heed_interrupts,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


class TestRealProcesses:
    def test_the_way_from_a_line_to_a_mail(self, home: Path, tmp_path: Path) -> None:
        (tmp_path / "book.csv").write_text("type,id,email\nCLIENT,901,ann@example.com\n")
        line = tax(901, int(time.time() * 1000))
        steps: list[tuple[list[str], bytes | None]] = [
            (["append", "events"], line + b"\n"),
            (["process", "--no-prefect"], None),
            (["contacts", "import", str(tmp_path / "book.csv")], None),
            (["deliver", "--no-prefect"], None),
        ]
        for arguments, stdin in steps:
            done = afterlog(home, *arguments, stdin=stdin)
            assert done.returncode == 0, done.stderr
        assert log_bytes(home, "events") == line + b"\n"
        [delivered] = afterlog(home, "read", "deliveries").stdout.splitlines()
        assert json.loads(delivered)["verb"] == "SENT"
        [file] = (home / "outbox").glob("*.eml")
        assert b"To: ann@example.com\r\n" in file.read_bytes()

    def test_follow_writes_lines_as_they_come_until_it_is_told_to_stop(self, home: Path, make_store: Any) -> None:
        store: Store = make_store()
        append_lines(store, "events", [tax(1), b"torn"])
        with (
            started(home, "read", "events", "--follow") as raw,
            started(home, "read", "reactions", "--follow") as derived,
        ):
            assert raw.stdout is not None
            assert derived.stdout is not None
            assert [raw.stdout.readline() for _ in range(2)] == [tax(1) + b"\n", b"torn\n"]
            append_lines(store, "events", [tax(2)])
            assert raw.stdout.readline() == tax(2) + b"\n"
            assert afterlog(home, "process", "--no-prefect", "--as-of", "log-end").returncode == 0
            lines = [derived.stdout.readline() for _ in range(2)]
            for process in (raw, derived):
                process.terminate()
                begun = time.monotonic()
                rest = process.communicate(timeout=PATIENCE)
                assert time.monotonic() - begun < 5  # at once, on a machine that is busy with other tests too
                assert rest == (b"", b"")
                assert process.returncode in (0, 130)
        assert b"".join(lines) == log_bytes(home, "reactions")

    def test_follow_sees_every_partition_of_a_log_that_begins_and_a_time_that_is_reached(
        self, home: Path, make_store: Any
    ) -> None:
        """Nobody knew how many it would have, nor where in it the time would be."""
        begin = int(time.time() * 1000) - 60_000
        until = datetime.fromtimestamp(begin / 1000, UTC).isoformat(timespec="milliseconds")
        with (
            started(home, "read", "events", "--follow") as every,
            started(home, "read", "events", "--follow", "--partition", "1", "--to", until) as some,
        ):
            time.sleep(1)
            store: Store = make_store(partitions=3)
            numbered = [tax(n, begin - 60_000) for n in range(12)]
            append_lines(store, "events", numbered)
            assert every.stdout is not None
            assert some.stdout is not None
            assert sorted(every.stdout.readline() for _ in range(12)) == sorted(line + b"\n" for line in numbered)
            before = log_bytes(home, "events", 1)
            assert some.stdout.read(len(before)) == before
            append_lines(store, "events", [tax(n, begin) for n in range(12)])
            assert len([every.stdout.readline() for _ in range(12)]) == 12
            time.sleep(1.5)
            some.terminate()
            assert some.communicate(timeout=PATIENCE)[0] == b""

    def test_follow_opens_no_more_files_the_longer_it_goes_on(self, home: Path, make_store: Any) -> None:
        store: Store = make_store()
        append_lines(store, "events", [tax(0)])
        with started(home, "read", "events", "--follow") as process:
            assert process.stdout is not None
            assert process.stdout.readline() == tax(0) + b"\n"
            count = []
            for number in range(1, 21):
                append_lines(store, "events", [tax(number)])
                assert process.stdout.readline() == tax(number) + b"\n"
                count.append(len(os.listdir(f"/proc/{process.pid}/fd")))
        assert max(count) < count[0] + 5

    @pytest.mark.parametrize("arguments", [["read", "events"], ["status"]])
    def test_a_reader_that_has_gone_is_no_news(self, make_store: Any, home: Path, arguments: list[str]) -> None:
        store: Store = make_store()
        append_lines(store, "events", [tax(n) for n in range(3_000)])
        with started(home, *arguments) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            told = process.stderr.read()
            assert (process.wait(PATIENCE), told) == (0, b"")

    def test_what_needs_no_prefect_never_imports_it(self, home: Path) -> None:
        code = (
            "import contextlib, sys\n"
            "from deployments.cli import main\n"
            "for command in sys.argv[1:]:\n"
            "    with contextlib.suppress(SystemExit):\n"
            "        main(command.split())\n"
            "    slow = {'prefect', 'pydantic'} if command in sys.argv[1:3] else {'prefect'}\n"  # a tenth of a second of a start
            "    assert not slow & {name.split('.')[0] for name in sys.modules}, command\n"
        )
        commands = [
            f"append events {os.devnull}",
            "read events",
            "status --json",
            "contacts list",
            "process --no-prefect",
            "deliver --no-prefect",
        ]
        done = subprocess.run(
            [sys.executable, "-c", code, *commands], env=environment(home), cwd=ROOT, capture_output=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"0 lines appended to events\n")

    def test_status_starts_quickly(self, home: Path) -> None:
        """In CPU seconds, since other tests may run beside this one."""
        took = []
        for _ in range(3):  # the first one makes the database
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [
                sys.executable,
                "-m",
                "deployments.cli",
                "status",
            ]  # a whole start, and of which the usage is told
            assert (
                subprocess.run(command, env=environment(home), cwd=ROOT, check=False, capture_output=True).returncode
                == 0
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert 0.05 < min(took[1:]) < 1.0, took

    def test_a_command_that_is_interrupted_says_nothing_and_leaves_all_in_order(
        self, home: Path, make_store: Any
    ) -> None:
        store: Store = make_store()
        append_lines(store, "events", [tax(1)])
        with started(home, "process", "--follow-for", "60") as process:
            until = time.monotonic() + 20
            while not log_bytes(home, "reactions") and time.monotonic() < until:
                time.sleep(0.05)
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=PATIENCE)
            assert time.monotonic() - begun < 5  # at once; much else may run beside it
        assert (process.returncode, told) == (130, b"")
        assert afterlog(home, "process", "--no-prefect", "--as-of", "log-end").returncode == 0
        assert log_bytes(home, "reactions").count(b"\n") == 1

    def test_an_append_that_is_interrupted_says_what_is_in(self, home: Path) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "deployments.cli", "append", "events"], env=environment(home), cwd=ROOT,
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_heed_interrupts,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            process.stdin.write(tax(1) + b"\n" + tax(2) + b"\n" + b"half a line")
            process.stdin.flush()
            until = time.monotonic() + 20
            while not log_bytes(home, "events") and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(0.5)  # its fsync is done, and it waits for more
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=PATIENCE)
        assert (process.returncode, told) == (130, b"interrupted: 2 lines are in\n")
        assert log_bytes(home, "events").splitlines() == [tax(1), tax(2)]

    def test_an_append_that_is_interrupted_at_its_work_says_what_is_in_doubt(self, home: Path, make_store: Any) -> None:
        store: Store = make_store()
        append_lines(store, "events", [tax(0)])
        with (
            locked(store.directory("events", 0) / ".lock"),
            subprocess.Popen(
                [sys.executable, "-m", "deployments.cli", "append", "events"], env=environment(home), cwd=ROOT,
                stdin=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_heed_interrupts,
            ) as process,
        ):  # fmt: skip
            assert process.stdin is not None
            process.stdin.write(tax(1) + b"\n" + tax(2) + b"\n")
            process.stdin.flush()
            wait_for(lambda: re.search(rf"-> FLOCK .* {process.pid} ", Path("/proc/locks").read_text()))
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=PATIENCE)
        words = b"interrupted: 0 lines are in; lines 1 to 2 may be, which the log's end tells\n"
        assert (process.returncode, told) == (130, words)


class TestRefusals:
    """What the system or Prefect's server refuses is one sentence; a bug keeps its traceback."""

    @pytest.mark.parametrize(
        ("command", "code", "told"),
        [
            ("read events > /dev/full", 1, "standard input or output: the system refuses: No space left on device"),
            ("status --json > /dev/full", 1, "standard input or output: the system refuses: No space left on device"),
            ("status >&-", 1, "standard input or output: the system refuses: Bad file descriptor"),
            ("append events <&-", 2, "standard input is closed. Name a file, or give it lines"),
        ],
    )
    def test_a_stream_that_is_full_or_closed(self, home: Path, command: str, code: int, told: str) -> None:
        afterlog(home, "append", "events", stdin=tax(1))
        done = shell(home, command)
        assert (done.returncode, done.stdout, done.stderr.decode()) == (code, b"", f"afterlog: {told}\n")

    def test_what_needs_no_stream_goes_on_without_and_no_log_is_taken_for_one(self, home: Path) -> None:
        (home.parent / "lines").write_bytes(tax(1) + b"\n")
        done = shell(home, f"append events {home.parent}/lines <&- >&- 2>&-")
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert log_bytes(home, "events") == tax(1) + b"\n"
        assert shell(home, "pause deliver 2>&-").stdout == b""

    @pytest.mark.parametrize("kind", [PermissionError, NotADirectoryError, FileExistsError])
    def test_a_file_that_the_system_refuses(
        self, command: Command, monkeypatch: pytest.MonkeyPatch, kind: type[OSError]
    ) -> None:
        def refuse(*_: object) -> None:
            raise kind(1, "No, thank you", "/some/where")

        monkeypatch.setattr("deployments.cli_status.read_status", refuse)
        assert command("status") == (1, b"", "afterlog: /some/where: the system refuses: No, thank you\n")

    def test_a_bug_keeps_its_traceback(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("deployments.cli_status.read_status", lambda *_: {}["a bug"])
        with pytest.raises(KeyError, match="a bug"):
            main(["status"])

    @pytest.mark.parametrize("arguments", ["process", "automations apply"])
    @pytest.mark.parametrize(
        ("url", "shown"), [("http://ann:hunter2@127.0.0.1:1/api", "http://***@127.0.0.1:1/api"), ("garbage", "garbage")]
    )
    def test_a_server_that_cannot_be_reached(self, home: Path, arguments: str, url: str, shown: str) -> None:
        done = shell(home, arguments, PREFECT_API_URL=url)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.decode().startswith(
            f"afterlog: {shown}: no Prefect server can be reached there. Start `afterlog up`"
        )
        assert done.stderr.count(b"\n") == 1

    @pytest.mark.parametrize(
        ("answer", "told"),
        [
            (401, "refuses the password, or asks for one. Set PREFECT_API_AUTH_STRING"),
            (404, "no Prefect server can be reached there"),
            (200, "no Prefect server can be reached there"),
        ],
    )
    @pytest.mark.parametrize("arguments", ["deliver", "automations apply"])
    def test_a_server_that_is_none_or_wants_another_password(
        self, home: Path, arguments: str, answer: int, told: str
    ) -> None:
        with answering(answer) as url:
            done = shell(home, arguments, PREFECT_API_URL=url, PREFECT_API_AUTH_STRING="ann:hunter2")
        assert (done.returncode, done.stdout) == (1, b"")
        assert told in done.stderr.decode()
        assert done.stderr.count(b"\n") == 1
        assert b"hunter2" not in done.stderr


def shell(home: Path, command: str, **more: str) -> subprocess.CompletedProcess[bytes]:
    """A command as a person types it, with what is done to its streams."""
    return subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m deployments.cli {command}"], env=environment(home, **more), cwd=ROOT,
        capture_output=True, check=False, timeout=PATIENCE,
    )  # fmt: skip


@contextlib.contextmanager
def answering(status: int) -> Iterator[str]:
    """A web server that answers everything with `status` and a page; gives an address of Prefect's kind."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", "6")
            self.end_headers()
            self.wfile.write(b"<html>")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()
