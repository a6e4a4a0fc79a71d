"""MAX_LINE decides what is derived, so it is recorded as settings and code are, and a replay goes by what was recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from storage import steps
from storage.batches import BatchCache
from storage.door import append_lines
from storage.store import Store
from tasks.process import positions, process_to_end
from tasks.run import Run
from tasks.timeline import digest_of
from tasks.topology import build_topology
from tasks.verify_derived import report, verify_derived
from tests.conftest import log_bytes
from tests.helpers import parsed, process
from tests.test_replay import MINUTE, START, again, line

MakeStore = Callable[..., Store]
SHORT, LONG = 2_000, 1 << 20


def long_line(customer: int, minutes: float) -> bytes:
    """A line that only the greater limit takes: its stamp would raise the clock of those after it."""
    return json.dumps({**json.loads(line(customer, minutes)), "more": "x" * 3000}).encode()


def versions(store: Store, processor: str) -> list[dict[str, Any]]:
    events = [e["object"] for e in parsed(log_bytes(store.home, "clock")) if e["verb"] == "VERSION"]
    return [each for each in events if each["processor"] == processor]


def history(store: Store) -> Store:
    """The greater limit, then the smaller one for a while, and the greater one again; each takes a long line."""
    for part, limit in enumerate((LONG, SHORT, LONG)):
        append_lines(store, "events", [line(1, 100 * part), long_line(2, 100 * part + 50), line(3, 100 * part + 20)])
        process(store.home, max_line=limit, as_of=START + (100 * part + 90) * MINUTE)
    assert [e["object"]["length"] for e in parsed(log_bytes(store.home, "quarantine"))] == [len(long_line(2, 150))]
    return store


def verified(store: Store) -> bool:
    told: list[str] = []
    good = report(verify_derived(store, build_topology(store.settings)), told.append)
    assert good or told
    return good


def test_is_recorded_of_who_reads_a_raw_log(store: Store) -> None:
    history(store)
    assert [v["max_line"] for v in versions(store, "abandonment")] == [LONG, SHORT, LONG]
    assert ["max_line" in v for v in versions(store, "remind")] == [False]


def test_a_replay_and_the_proof_go_by_what_was_recorded(make_store: MakeStore) -> None:
    history(make_store())
    for limit in (SHORT, LONG):
        store = make_store(max_line=limit)
        assert verified(store)
        _, found = again(store)
        assert found.is_nothing


def test_a_crash_before_it_was_changed_stops_nobody(make_store: MakeStore) -> None:
    class Died(Exception): ...

    def die(step: str) -> None:
        if step == "derived-synced":
            raise Died

    store = make_store(max_line=SHORT)
    append_lines(store, "events", [b"bad", long_line(1, 0), line(1, 1), b"bad too"])
    steps.arm(die)
    try:
        with pytest.raises(Died):
            process_to_end(Run(store, build_topology(store.settings), "test"), "quarantine", None)
    finally:
        steps.arm(None)
    again = make_store(max_line=LONG)
    run = Run(again, build_topology(again.settings), "test")
    process_to_end(run, "quarantine", None)
    assert [e["object"]["length"] for e in parsed(log_bytes(store.home, "quarantine"))] == [3, 7]
    assert [note.rpartition(" were cut, ")[2] for note in run.notes][1:] == ["since its code or settings changed"]


def test_a_log_of_an_afterlog_that_did_not_record_it_goes_on(make_store: MakeStore) -> None:
    store = make_store(max_line=SHORT)
    append_lines(store, "events", [long_line(2, 50), line(1, 0)])
    process(store.home, max_line=SHORT, as_of=START + 60 * MINUTE)
    (clock,) = store.directory("clock", 0).glob("*.jsonl")
    clock.write_bytes(clock.read_bytes().replace(b'"max_line"', b'"not_said"'))  # as long as before
    with store.database.write() as connection:
        for name in build_topology(store.settings).on_raw_logs():
            old = digest_of(**build_topology(store.settings).make(name).version(), max_line=0)
            connection.execute(
                sa.text("UPDATE checkpoint SET version = :old WHERE processor = :name"), {"old": old, "name": name}
            )
    append_lines(store, "events", [long_line(2, 100), line(1, 70)])
    run = Run(store, build_topology(store.settings), "test")
    process_to_end(run, "quarantine", None)
    process(store.home, max_line=SHORT, as_of=START + 160 * MINUTE)
    assert run.notes == []
    assert [p.changed_at for p in positions(store)] == [-1] * len(positions(store))
    assert [v.get("max_line") for v in versions(store, "quarantine")] == [None, SHORT]
    raised = make_store(max_line=LONG)
    append_lines(raised, "events", [long_line(2, 200), line(1, 170)])
    process(raised.home, max_line=LONG, as_of=START + 260 * MINUTE)
    assert len(parsed(log_bytes(store.home, "quarantine"))) == 2
    assert verified(raised)  # what held before it was recorded is what was recorded first


def test_two_limits_share_no_batch(store: Store) -> None:
    append_lines(store, "events", [long_line(1, 0)])
    cache, bad = BatchCache(1 << 20, LONG), []
    with store.reader("events", 0) as reader:
        for limit in (0, SHORT, LONG):
            batch = cache.get(reader, "events", 0, 0, reader.end(), 0, limit)
            assert batch is not None
            bad.append(len(batch.bad))
    assert bad == [0, 1, 0]
