"""Backfill: a processor that is added today has all of history, and a HOME may be built anew before its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from storage.door import append_lines
from storage.store import Store
from tasks.process import positions
from tests.conftest import log_bytes
from tests.helpers import parsed, process
from tests.test_replay import MINUTE, START, line

TICKING = """
import msgspec
from tasks.processors import contract

class Seen(msgspec.Struct):
    at: int

class Processor(contract.Processor):
    name, reads, writes, ticks = "quiet", "events", "silences", True
    state = Seen

    def event(self, event, state, out):
        out.emit(self, event, {"id": event.id}, "SEEN", {"type": "NONE"}, name="seen")
        state.put(event.key, Seen(event.at), (event.at, event.offset))

    def tick(self, as_of, due, state, out):
        for key, seen in due:
            out.write({"subject": {"id": key}, "verb": "SILENT", "event": {"id": f"quiet/{key}/{seen.at}", "inserted_at": as_of}})
            state.drop(key)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A processor of one's own that hangs on ticks as well."""
    (tmp_path / "quiet_ones.py").write_text(TICKING)
    monkeypatch.syspath_prepend(str(tmp_path))
    return ("quiet_ones",)


def test_a_processor_that_is_added_today_gives_what_it_would_have_given_from_the_beginning(
    make_store: Callable[..., Store], own: tuple[str, ...]
) -> None:
    late, early = make_store("late"), make_store("early", processors=own)
    for store, processors in ((late, ()), (early, own)):
        for n in range(5):  # the late one knows nothing of it until the last of these
            append_lines(store, "events", [line(k % 3, n * 50 + k) for k in range(20)])
            process(store.home, as_of=START + (n * 50 + 45) * MINUTE, processors=own if n == 4 else processors)
    assert log_bytes(late.home, "silences") == log_bytes(early.home, "silences")
    assert {e["verb"] for e in parsed(log_bytes(late.home, "silences"))} == {"SEEN", "SILENT"}
    append_lines(late, "events", [line(7, 400)])
    process(late.home, processors=own, as_of=START + 500 * MINUTE)
    found = {p.processor: p for p in positions(late)}["quiet"]
    assert (found.lines, found.offset) == (101, late.reader("events", 0).end())


def test_history_is_loaded_into_a_home_of_its_own_before_the_rest(make_store: Callable[..., Store]) -> None:
    """As docs/replay.md tells it; an old basket is judged as of then."""
    old, new = make_store("old"), make_store("new")
    append_lines(old, "events", [line(1, 100_000), line(2, 100_010)])
    process(old.home, as_of=START + 100_100 * MINUTE)
    append_lines(new, "events", [line(1, 0), line(1, 50)])
    append_lines(new, "events", log_bytes(old.home, "events").splitlines())
    process(new.home, as_of="log-end")
    baskets = [(e["subject"]["id"], e["context"]["at"]) for e in parsed(log_bytes(new.home, "baskets"))]
    assert baskets == [(1, START), (1, START + 50 * MINUTE)]
    process(new.home, as_of=START + 100_100 * MINUTE)
    baskets = [(e["subject"]["id"], e["context"]["at"]) for e in parsed(log_bytes(new.home, "baskets"))][2:]
    assert baskets == [(e["subject"]["id"], e["context"]["at"]) for e in parsed(log_bytes(old.home, "baskets"))]
