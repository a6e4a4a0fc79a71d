"""The two examples whose answer is given: the golden log, and the original text's own event lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SHARED, afterlog, log_bytes, needs_shared, use_database

pytestmark = needs_shared

GOLDEN = SHARED / "golden"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def home(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A HOME in which the golden log was appended, processed and delivered."""
    home = tmp_path_factory.mktemp("golden") / "home"
    if request.param == "postgresql":
        use_database(home, request.getfixturevalue("postgres").create())
    done(home, "append", "events", str(GOLDEN / "events.jsonl"))
    done(home, "process", "--as-of", "log-end", "--no-prefect")
    done(home, "deliver", "--no-prefect")
    return home


def done(home: Path, *arguments: str) -> bytes:
    """What a command that succeeds writes to its standard output."""
    result = afterlog(home, *arguments)
    assert (result.returncode, b"Traceback" in result.stderr) == (0, False), result.stderr.decode()
    return result.stdout


def spelt(line: str | bytes) -> str:
    """A line's content with its keys in their order; of a rejection's reason, what stands before the colon."""
    event = json.loads(line)
    if "reason" in event["object"]:
        event["object"]["reason"] = event["object"]["reason"].split(":")[0]
    return json.dumps(event)


def read(home: Path, log: str) -> list[str]:
    return [spelt(line) for line in done(home, "read", log).splitlines()]


def test_the_raw_log_reads_back_byte_for_byte(home: Path) -> None:
    assert done(home, "read", "events") == (GOLDEN / "events.jsonl").read_bytes()


@pytest.mark.parametrize("log", ["baskets", "reactions", "quarantine", "reminders"])
def test_the_golden_log_gives_exactly_its_derived_log(home: Path, log: str) -> None:
    expected = [spelt(line) for line in (GOLDEN / f"{log}.jsonl").read_bytes().splitlines()]
    assert read(home, log) == expected


def test_mail_about_the_past_is_suppressed_as_too_old(home: Path) -> None:
    deliveries = [json.loads(line) for line in read(home, "deliveries")]
    assert [(d["verb"], d["object"]) for d in deliveries] == [
        ("SUPPRESSED", {"type": "EMAIL", "id": id, "reason": "too old"})
        for id in (
            "derive/events:0:1803/order-confirmed",
            "derive/events:0:3641/tax-received",
            "remind/abandonment/events:0:3186/abandoned/basket-reminder",
        )
    ]
    assert not list(home.rglob("*.eml"))


def test_doing_it_all_again_adds_nothing(home: Path) -> None:
    logs = ("baskets", "reactions", "quarantine", "reminders", "deliveries", "anomalies")
    before = {log: log_bytes(home, log) for log in logs}
    done(home, "process", "--as-of", "log-end", "--no-prefect")
    done(home, "deliver", "--no-prefect")
    assert {log: log_bytes(home, log) for log in logs} == before


def test_the_original_text_s_basket_is_abandoned_to_the_millisecond(tmp_path: Path) -> None:
    home = tmp_path / "home"
    done(home, "append", "events", str(SHARED / "seed" / "sample_events.jsonl"))
    done(home, "process", "--as-of", "1598622166810", "--no-prefect")
    baskets: list[dict[str, Any]] = [json.loads(line) for line in done(home, "read", "baskets").splitlines()]
    found = [(b["subject"]["id"], b["verb"]["type"], b["context"]["at"], b["event"]["inserted_at"]) for b in baskets]
    assert found == [(15, "ABANDONED_BASKET", 1598616204107, 1598622166810)]
