"""The quarantine, for people: the list, and a line tried again as a new event of its log, once, if the judge takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from storage.door import append_lines
from storage.store import Store
from tasks.process import process_to_end
from tasks.processors import contract
from tasks.processors.quarantine import Processor
from tests.conftest import afterlog, log_bytes
from tests.test_brake import run_of

GOOD = b'{"subject":{"id":1},"verb":"X","context":{"at":1650549837170}}'
TORN = b'{"subject":{"id":2},"verb":'
LONG = b'{"subject":{"id":3},"verb":"X","context":{"at":1650549837170},"x":"' + b"y" * 2000 + b'"}'
FIXED = b'{"subject":{"id":2},"verb":"FIXED","context":{"at":1650549837170}}'
BAD_AT, LONG_AT = len(GOOD) + 1, len(GOOD) + len(TORN) + 2


@pytest.fixture
def home(store: Store) -> Path:
    """A HOME with a good line, a torn one, and one that was too long for the setting at that time."""
    append_lines(store, "events", [GOOD, TORN, LONG])
    done = afterlog(store.home, "process", "--no-prefect", "--as-of", "log-end", max_line="1024")
    assert done.returncode == 0, done.stderr
    return store.home


def listed(home: Path, *arguments: str) -> list[dict[str, Any]]:
    done = afterlog(home, "quarantine", "list", "--json", *arguments)
    assert (done.returncode, done.stderr) == (0, b"")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


class TestList:
    def test_it_shows_place_reason_length_and_the_beginning_of_each_line(self, home: Path) -> None:
        torn, long = listed(home)
        assert (torn["id"], torn["length"], torn["head"]) == (f"events:0:{BAD_AT}", len(TORN), TORN.decode())
        assert torn["reason"].startswith("no JSON")
        assert (long["id"], long["reason"]) == (f"events:0:{LONG_AT}", f"too long: {len(LONG)} bytes, at most 1024")
        assert (torn["retried"], len(long["head"])) == ("", 80)
        assert listed(home, "--reason", "too long") == [long]
        plain = afterlog(home, "quarantine", "list").stdout.decode().splitlines()
        assert [len(line.split("\t")) for line in plain] == [5, 5, 5]

    def test_an_empty_quarantine_is_an_empty_list(self, store: Store) -> None:
        assert listed(store.home) == []


def test_other_reasons_are_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `verify --derived` would take what an older Afterlog wrote for a difference, without a word of the code that is gone."""
    before, source = Processor().version()["code"], contract._source
    monkeypatch.setattr(
        contract, "_source", lambda module: source(module) + (b"#" if module.__name__ == "storage.slow_judge" else b"")
    )
    assert Processor().version()["code"] != before


class TestRetry:
    @pytest.mark.parametrize("ident", [str(BAD_AT), f"events:0:{BAD_AT}", f"quarantine/events:0:{BAD_AT}/rejected"])
    def test_a_corrected_line_is_a_new_event_of_its_log(self, home: Path, ident: str) -> None:
        before = log_bytes(home, "events")
        done = afterlog(home, "quarantine", "retry", ident, "--line", FIXED.decode())
        assert done.returncode == 0, done.stderr
        assert f"events:0:{BAD_AT} is in events again, at events:0:{len(before)}" in done.stderr.decode()
        assert log_bytes(home, "events") == before + FIXED + b"\n"
        assert listed(home)[0]["retried"] == f"events:0:{len(before)}"

    def test_it_may_come_from_a_file(self, home: Path, tmp_path: Path) -> None:
        (tmp_path / "line").write_bytes(FIXED + b"\n")
        assert afterlog(home, "quarantine", "retry", str(BAD_AT), "--file", str(tmp_path / "line")).returncode == 0
        assert log_bytes(home, "events").endswith(b"\n" + FIXED + b"\n")

    def test_the_same_bytes_go_in_once_the_judge_takes_them(self, home: Path, store: Store) -> None:
        before = log_bytes(home, "events")
        refused = afterlog(home, "quarantine", "retry", str(LONG_AT), max_line="1024")
        assert refused.returncode == 2
        assert f"the judge refuses the line: too long: {len(LONG)} bytes, at most 1024" in refused.stderr.decode()
        assert log_bytes(home, "events") == before
        assert afterlog(home, "quarantine", "retry", str(LONG_AT)).returncode == 0
        assert log_bytes(home, "events") == before + LONG + b"\n"
        process_to_end(run_of(store), "quarantine", None)
        assert len(listed(home)) == 2

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ((), "the judge refuses the line: no JSON"),
            (("--line", "{}"), "the judge refuses the line: no subject"),
            (("--line", FIXED.decode() + "\n" + FIXED.decode()), "more than one line"),
            (("--line", FIXED.decode()[:-1] + ',"event":{"inserted_at":4102444800000}}'), "lies ahead of now"),
            (("--line", "{}", "--file", "x"), "--line and --file are two lines"),
            (("--file", "/no/such/file"), "cannot read the file"),
        ],
    )
    def test_what_the_judge_refuses_goes_nowhere(self, home: Path, arguments: tuple[str, ...], said: str) -> None:
        before = log_bytes(home, "events")
        done = afterlog(home, "quarantine", "retry", str(BAD_AT), *arguments)
        assert (done.returncode, done.stdout) == (2, b"")
        assert said in done.stderr.decode()
        assert log_bytes(home, "events") == before
        assert not (home / "logs" / "refused").exists()
        assert afterlog(home, "quarantine", "retry", str(BAD_AT), "--line", FIXED.decode()).returncode == 0

    @pytest.mark.parametrize("ident", ["0", "events:0:0", "nonsense", "events:1:63"])
    def test_what_is_not_in_quarantine_is_not_retried(self, home: Path, ident: str) -> None:
        done = afterlog(home, "quarantine", "retry", ident, "--line", FIXED.decode())
        assert done.returncode == 2
        assert f"not in the quarantine; found '{ident}'" in done.stderr.decode()

    def test_a_second_time_is_refused_unless_it_is_meant(self, home: Path) -> None:
        retry = ("quarantine", "retry", str(BAD_AT), "--line", FIXED.decode())
        assert afterlog(home, *retry).returncode == 0
        before = log_bytes(home, "events")
        again = afterlog(home, *retry)
        assert again.returncode == 2
        assert "this line was tried again before; found events:0:" in again.stderr.decode()
        assert log_bytes(home, "events") == before
        assert afterlog(home, *retry, "--force").returncode == 0
        assert log_bytes(home, "events") == before + FIXED + b"\n"

    def test_killed_in_between_it_is_not_appended_twice_unasked(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        retry = ("quarantine", "retry", str(BAD_AT), "--line", FIXED.decode())
        monkeypatch.setenv("AFTERLOG_TEST_KILL", "append-synced:1")
        assert afterlog(home, *retry).returncode == -9
        monkeypatch.delenv("AFTERLOG_TEST_KILL")
        again = afterlog(home, *retry)
        assert again.returncode == 2
        assert "a try whose end is not known" in again.stderr.decode()
        assert log_bytes(home, "events").count(FIXED) == 1
        assert listed(home)[0]["retried"] == "not known"
