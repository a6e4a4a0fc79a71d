"""The time machine: a basket at any moment is what an independent fold of the log makes of it, and is found at once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from deployments.console import show_json
from storage import candidates, clocks, subject
from storage.door import append_lines
from storage.errors import LostDataError
from storage.event import Event
from storage.judge import decode
from storage.recorded import Ticks
from storage.settings import load_settings
from storage.store import Store
from storage.subject import subject_events
from tasks.archive import archive_all
from tasks.evidence import Evidence
from tasks.time_machine import basket_at, fold, read_interactions
from tasks.topology import build_topology
from tasks.why_not import why_not
from tests.conftest import afterlog, log_bytes, needs_shared
from tests.test_shop import unzipped

DAYS_30 = 30 * 86_400_000
T = 1_700_000_000_000


# The independent fold: json and dicts, nothing of Afterlog.


def plain_fold(events: list[dict[str, Any]], at: int | None, known_at: int | None) -> list[dict[str, Any]]:
    """What is in the basket; `events` are those of one customer in log order, their stamps in order too."""
    known = [e for e in events if known_at is None or e["event"]["inserted_at"] <= known_at]
    if at is not None:
        known = sorted((e for e in known if e["context"]["at"] <= at), key=lambda e: int(e["context"]["at"]))
    items: dict[str, dict[str, Any]] = {}
    last = None
    for event in known:
        happened, taken = event["context"]["at"], event["event"]["inserted_at"]
        if taken - happened > DAYS_30:
            continue
        if last is not None and (taken if at is None else happened) > last + DAYS_30:
            items, last = {}, None
        item = event["object"].get("item") or {}
        key, verb = str(item.get("id")), event["verb"]["type"]
        if verb == "ORDERED":
            items = {}
        elif verb == "REMOVED_ITEM_FROM_BASKET" or (verb in SETS and item.get("count", 1) <= 0):
            items.pop(key, None)
        elif verb in SETS:
            items[key] = {**items.get(key, {}), **({"count": 1} if key in items else {}), **item}
        last = happened if last is None else max(last, happened)
    return list(items.values())


SETS = ("ADDED_ITEM_TO_BASKET", "CHANGED_ITEM_COUNT_IN_BASKET")
PAIRS = {
    "rees46_cosmetics_oct": (30, 100),
    "rees46_cosmetics_nov": (40, 100),
    "taobao_a_dev": (24, 100),
    "taobao_slice": (6, 100),
}


@needs_shared
@pytest.mark.parametrize("name", PAIRS)
def test_10_000_random_baskets_of_real_logs_are_what_an_independent_fold_makes(tmp_path: Path, name: str) -> None:
    assert sum(customers * moments for customers, moments in PAIRS.values()) == 10_000
    lines, rng = unzipped(name), random.Random(name)
    store = Store(load_settings(home=tmp_path / "home", segment_bytes=3_000_000))
    append_lines(store, "events", lines)
    topology = build_topology(store.settings)
    by_customer: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        event = orjson.loads(line)
        by_customer.setdefault(str(event["subject"]["id"]), []).append(event)
    customers, moments = PAIRS[name]
    bought = sorted(c for c, events in by_customer.items() if any(e["verb"]["type"] in SETS for e in events))
    filled = 0
    for customer in rng.sample(bought, customers):
        events = by_customer[customer]
        interactions = read_interactions(store, topology, customer)
        times = [e["context"]["at"] for e in events] + [e["event"]["inserted_at"] for e in events]
        for number in range(moments):
            moment = rng.randint(min(times) - 1000, max(times) + 1000) if number % 3 else rng.choice(times)
            at, known_at = rng.choice([(moment, None), (None, moment), (moment, rng.choice(times))])
            found = fold(customer, interactions, at, known_at)
            assert found.items == plain_fold(events, at, known_at), (customer, at, known_at)
            filled += bool(found.items)
        whole = basket_at(store, topology, customer, known_at=moment)
        assert whole.items == plain_fold(events, None, moment)
    assert filled > 100


def line(key: Any, at: int, stamp: Any = None, verb: str = "ADDED_ITEM_TO_BASKET", **item: Any) -> bytes:
    event = {
        "subject": {"id": key, "type": "CUSTOMER"}, "verb": verb, "object": {"item": {"id": 3, **item}}, "context": {"at": at},
        **({} if stamp is None else {"event": {"inserted_at": stamp}}),
    }  # fmt: skip
    return json.dumps(event).encode()


def odd_line(rng: random.Random, key: Any, at: int) -> bytes:
    """A line that says who and when in one of the ways that a line may."""
    stamp = at + rng.choice([0, 0, 5, 40, 400, 90_000, -20_000])
    text = line(key, at, stamp, price=rng.randint(1, 9), count=rng.randint(0, 2))
    kind = rng.randrange(18)
    if kind == 0:
        return text.replace(b": ", b":").replace(b", ", b",")
    if kind == 1:
        return text.replace(b'"subject": {"id": ', b'"\\u0073ubject": {"\\u0069d"\t:\r')
    if kind == 2:
        return line(key, at, stamp / 1000)
    if kind == 3:
        return line(key, at)
    if kind == 4:
        return b'{"event": {"inserted_at": %d}, ' % (stamp + 300) + text[1:].rpartition(b', "event"')[0] + b"}"
    if kind == 5:
        return text[:-2] + b', "inserted_by": "a{b", "id": "x"}}'
    if kind == 6:
        return text[:-2] + b', "inserted_at": %d}}' % (stamp + 90_000)
    if kind == 7:
        return text[:-1] + rng.choice([b"", b"}}", b"x"])
    if kind == 8:
        return text.replace(b'"verb"', b'"event": {"inserted_at": %d}, "verb"' % (stamp + 10**9))
    if kind == 9:
        return text[:-1] + b', "more": {"event": {"inserted_at": %d}}}' % (stamp + 10**9)
    if kind == 10:
        return text.replace(b'"object": {', b'"object": {"body": "%s", ' % (b"x" * rng.randrange(3000)))
    if kind == 11:
        other = rng.choice([b'"subject"', b'"\\u0073ubject"'])
        return text[:-1] + b', %s: {"id": %s, "type": "CUSTOMER"}}' % (
            other,
            rng.choice([b"15", b"3", b'"a\\/\\"b\\\\"']),
        )
    if kind == 12:
        return text.replace(b'"subject": {', b'"subject": {"id": 3, ')
    if kind == 13:
        return text.replace(b'"subject": {', b'"subject": {"near": [{"id": 3}, {"id": 15}], "item": {"id": 15}, ')
    if kind == 14:
        return text.replace(b'"object": {', b'"object": {"basket": [{"id": 15, "n": 1}, {"id": 15}], "id": 15, ')
    return text


KEYS = (1, 3, 15, "15", 0, "-0", 543462, "Ren\u00e9", 'a/"b\\', "", "caf\u00e9\n", -7)


@pytest.mark.parametrize("seed", range(6))
def test_the_events_of_a_subject_are_those_that_the_judge_finds_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(clocks, "_BLOCK", 2_000)
    monkeypatch.setattr(candidates, "_PIECE", 3_000)
    monkeypatch.setattr(subject, "_LOOK", 9_000)
    monkeypatch.setattr(subject, "_WORTH_A_PROCESS", 20_000)
    rng = random.Random(seed)
    store = Store(load_settings(home=tmp_path / "home", segment_bytes=12_000, max_line=2_048))
    expected, clock, offset, ends = [], 0, 0, []
    for number in range(400):
        append_lines(store, "events", [odd_line(rng, rng.choice(KEYS), T + number * 1_000)])
        if rng.random() < 0.05:
            tick(store, T + number * 1_000 + rng.choice([-5_000, 500, 20_000]), len(log_bytes(store.home, "events")))
            ends.append(True)
    ticks = Ticks(store, "events", 0)
    reader = store.reader("events", 0)
    while block := reader.read(offset, reader.end(), 1, 2_048):
        batch = decode(block, "events", 0, max(clock, ticks.before(offset)), 2_048)
        expected += batch.events
        clock, offset = batch.clock, block.end
    assert ends
    keys = sorted({str(key) for key in KEYS})
    # A third of them by several processes too, others with each seed: to fork them is what takes the time.
    for key, processes in [*((key, 1) for key in keys), *((key, 3) for key in keys[seed % 3 :: 3])]:
        mine = [event for event in expected if event.key == key]
        assert as_seen(subject_events(store, "events", 0, key, processes=processes)) == as_seen(mine)
        until = rng.choice(expected).clock
        some = subject_events(store, "events", 0, key, until=until, processes=processes)
        assert as_seen(some) == as_seen([event for event in mine if event.clock <= until])


def test_what_was_taken_before_the_start_counts_for_the_clocks_after_it(make_store: Callable[..., Store]) -> None:
    store = make_store()
    first = event_line(9, T + 7_200_000)
    append_lines(store, "events", [first, event_line(15, T)])
    [late] = subject_events(store, "events", 0, "15", start=len(first) + 1)
    assert late.clock == T + 7_200_000


def event_line(customer: int, at: int) -> bytes:
    return orjson.dumps({"subject": {"id": customer, "type": "CUSTOMER"}, "verb": "X", "context": {"at": at}})


def as_seen(events: list[Event]) -> list[tuple[Any, ...]]:
    return [(e.offset, e.raw, e.at, e.clock, e.verb) for e in events]


def tick(store: Store, as_of: int, end: int) -> None:
    obj = {"type": "TICK", "as_of": as_of, "ends": {"events/0": end}}
    append_lines(
        store,
        "clock",
        [orjson.dumps({"subject": {"id": "CLOCK"}, "verb": "TICK", "object": obj, "context": {"at": 1}})],
    )


def test_a_tick_counts_from_its_end_on_and_is_found_by_its_time(
    make_store: Callable[..., Store], monkeypatch: Any
) -> None:
    monkeypatch.setattr("storage.recorded._BLOCK", 300)
    store, times = make_store(), [*range(10, 100, 5)]
    for as_of in times:
        tick(store, as_of, as_of * 10)
        append_lines(store, "clock", [b'{"verb":"VERSION"}', b"~"] * 30)
    ticks = Ticks(store, "events", 0)
    for offset in range(0, 1100, 7):
        assert ticks.before(offset) == max((t for t in times if t * 10 <= offset), default=-1)
    found = [ticks.at(t) for t in range(110)]
    assert [t.as_of for t in found if t is not None] == times
    assert all(b"TICK" in store.reader("clock", 0).line(t.offset) for t in found if t is not None)
    assert Ticks(store, "other", 0).before(10**9) == -1


def test_of_an_archived_clock_only_that_is_fetched_where_it_looks(
    make_store: Callable[..., Store], monkeypatch: Any
) -> None:
    monkeypatch.setattr("storage.recorded._BLOCK", 300)
    store = make_store(segment_bytes=1_000)
    for as_of in range(10, 100, 5):
        tick(store, as_of, as_of * 10)
        append_lines(store, "clock", [b'{"verb":"VERSION"}'] * 30)
    archive_all(store, build_topology(store.settings), "test")
    for path in sorted(store.directory("clock", 0).glob("*.jsonl"))[:-1]:
        path.unlink()
    objects = sorted((store.home / "archive" / "clock" / "0").iterdir())
    for lost in objects[-3:]:
        lost.unlink()
    assert Ticks(store, "events", 0).before(159) == 15
    with pytest.raises(LostDataError):
        Ticks(store, "events", 0).before(940)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_by_when_it_happened_and_by_when_it_was_known_are_two_questions(home: Path) -> None:
    """The count that was set first comes to the log last."""
    store = Store(load_settings(home=home))
    append_lines(store, "events", [line(7, T + 60_000, T + 60_000, count=5, price=2), line(7, T, T + 120_000, count=1)])
    topology = build_topology(store.settings)

    def count(**when: int) -> list[Any]:
        return [item["count"] for item in basket_at(store, topology, "7", **when).items]

    assert count() == [1]
    assert count(at=T + 200_000) == [5]
    assert count(at=T) == [1]
    assert count(known_at=T + 119_999) == [5]
    assert count(at=T, known_at=T + 119_999) == []
    assert count(at=T - 1) == []


def test_the_command_shows_the_basket_and_what_made_it(home: Path) -> None:
    store = Store(load_settings(home=home))
    lines = [
        line(7, T, T, count=1, price=2.5, name="Lemon"), line(8, T, T), line(7, T + 10, T + 10, "ORDERED"),
        line(7, T + 20, T + 20, count=1, price=2.5, name="Lemon"), line(7, T + 30, T + 30, count=3),
        line(7, T + 40, T + 40, "REMOVED_ITEM_FROM_BASKET"),
    ]  # fmt: skip
    offsets = [
        offset for position in append_lines(store, "events", lines).positions if position for offset in position[1:]
    ]
    shown = afterlog(home, "basket", "7", "--known-at", "2023-11-14T22:13:20.035Z")
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert shown.stdout.decode() == (
        "item\tname\tcount\tprice\n3\tLemon\t3\t2.5\n\nplace\tverb\titem\tcount\thappened\tknown\n"
        f"events:0:{offsets[3]}\tADDED_ITEM_TO_BASKET\t3\t1\t2023-11-14T22:13:20.020Z\t2023-11-14T22:13:20.020Z\n"
        f"events:0:{offsets[4]}\tADDED_ITEM_TO_BASKET\t3\t3\t2023-11-14T22:13:20.030Z\t2023-11-14T22:13:20.030Z\n"
    )
    document = json.loads(afterlog(home, "basket", "7", "--at", str(T + 10), "--json").stdout)
    assert (document["items"], document["value"], document["last"]) == ([], None, T + 10)
    assert [made["verb"] for made in document["made_by"]] == ["ADDED_ITEM_TO_BASKET", "ORDERED"]


def test_who_was_never_heard_of_has_an_empty_basket_and_a_time_that_is_none_is_refused(home: Path) -> None:
    nobody = afterlog(home, "basket", "nobody")
    assert nobody.returncode == 0
    assert nobody.stderr == b"The basket is empty: nothing was put in it\n"
    first = afterlog(home, "basket", "nobody", "--at", "0")
    assert first.stderr == b"The basket is empty: nothing was put in it by then\n"
    wrong = afterlog(home, "basket", "7", "--at", "yesterday")
    assert wrong.returncode == 2
    assert wrong.stderr.decode() == (
        "afterlog: --at is no time; found 'yesterday', expected RFC 3339 such as 2026-01-31T12:00:00Z, or milliseconds since 1970\n"
    )


def test_numbers_beyond_a_double_and_deep_items_are_shown_as_they_were_written(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All of these are good lines."""
    store = Store(load_settings(home=home))
    deep = "[" * 490 + "]" * 490
    items = [
        b'{"id":1,"price":1e400,"count":1e400}', b'{"id":2,"price":%d,"count":%d}' % (2**70, 2**70),
        b'{"id":3,"price":%s}' % (b"9" * 5000), b'{"id":4,"price":1e99999999999999999999}', b'{"id":5,"x":%s}' % deep.encode(),
        b'{"id":"6","price":-1e400,"count":%s}' % (b"9" * 400),
    ]  # fmt: skip
    append_lines(store, "events", [line(7, T).replace(b'{"id": 3}', item) for item in items])
    found = basket_at(store, build_topology(store.settings), "7")
    assert [item.get("price") for item in found.items] == [
        "1e400", 2**70, "9" * 5000, "1e99999999999999999999", None, "-1e400",
    ]  # fmt: skip
    assert (found.value, found.made_by[0].count, found.made_by[1].count) == (None, None, 2**70)
    show_json(found)
    assert json.loads(capfd.readouterr().out, parse_constant=pytest.fail)["items"] == found.items
    answer = why_not(Evidence(store, build_topology(store.settings)), "7")
    assert answer.checks[0].detail == "6 items in it"


def test_a_basket_that_was_forgotten_was_not_always_empty(home: Path) -> None:
    lines = [line(7, T, id=1), line(7, T + DAYS_30 + 1, T + DAYS_30 + 1, "VIEWED")]
    append_lines(Store(load_settings(home=home)), "events", lines)
    shown = afterlog(home, "basket", "7").stderr.decode().splitlines()
    assert shown[0] == "The basket is empty"
    assert "was forgotten" in shown[1]


def test_of_a_log_that_was_lost_no_basket_is_said_to_be_empty(home: Path) -> None:
    store = Store(load_settings(home=home))
    append_lines(store, "events", [line(7, T, id=1)])
    assert afterlog(home, "process", "--no-prefect").returncode == 0
    for segment in (home / "logs" / "events" / "0").glob("*.jsonl"):
        segment.unlink()
    for command in ("basket", "why-not"):
        done = afterlog(home, command, "7")
        assert done.returncode == 1
        assert done.stderr.startswith(
            b"afterlog: events/0: the log is shorter than what was read from it; found 0 bytes"
        )
