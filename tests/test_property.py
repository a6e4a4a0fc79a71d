"""Any history, cut and run in any way: the same derived bytes, the ones that the contract asks for, nothing twice."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import steps
from storage.clock import Clock
from storage.door import append_lines
from tasks.follow import PartitionFollower
from tasks.local import side_by_side
from tasks.process import positions, process_to_end
from tasks.run import Run
from tasks.topology import build_topology
from tests import oracle
from tests.conftest import log_bytes
from tests.helpers import DERIVED, TABLES, copy_raw_logs, derived, open_store, parsed, rows_of

# Threads of other tests (Prefect's, the mail server's) draw random numbers while a strategy is drawn; ours draws none.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

PROCESSORS = ("quarantine", "derive", "abandonment", "anomalies", "normalise", "remind")

START = 1_000_000_000_000  # 2001: nothing is ever ahead of the wall clock
MINUTE, DAY = 60_000, 86_400_000
TIMEOUT, FORGET = 30 * MINUTE, 30 * DAY
MAX_LINE = 1024
THEN = ["-", "-", "-", "-", "-", "-", "append", "tick", "tick", "process", "follow", "crash"]

CUSTOMERS: list[list[Any]] = [[1, "1"], [2], ["ä"], [2**70]]
PASSED = [0, 0, 1, 999, MINUTE, 10 * MINUTE, 10 * MINUTE, TIMEOUT, TIMEOUT + 1, 2 * TIMEOUT, DAY]
SINCE = [1, MINUTE, 10 * MINUTE, TIMEOUT - 1, TIMEOUT, TIMEOUT, TIMEOUT + 1, TIMEOUT + 1, 0, -1, -MINUTE]
LONG_SINCE = [7 * DAY, 7 * DAY, 7 * DAY + 1, FORGET, FORGET + 1]
VERBS = [
    "ADDED_ITEM_TO_BASKET", "ADDED_ITEM_TO_BASKET", "ADDED_ITEM_TO_BASKET", "CHANGED_ITEM_COUNT_IN_BASKET",
    "REMOVED_ITEM_FROM_BASKET", "VIEWED_ITEM", "ORDERED", "ORDERED", "ORDER_COMPLETED", "SUBMIT_TAX",
]  # fmt: skip
COUNTS = [None, None, "1", "2", "2.50", "0", "-1", "1e2"]
PRICES = [None, "5", "0.10", "1.220", "1e1", "0", "-3", "null", '"5"', "1e400"]
VALUES = [None, None, "12.720", "0", "null", "true", '"1"', "1e999"]
BODIES = ['"some free text, 3 words"', '""', "[[1], {}]", "1e999", "null", '"ü"']
BAD = [
    b"", b"{", b"null", b"[" * 600, b'"\xff"', b'{"subject":{"id":true},"verb":"X","context":{"at":5}}',
    b'{"subject":{"id":1},"verb":"X"}', b'{"subject":{"id":1},"verb":"X","context":{"at":1},"event":{"inserted_at":-1}}',
    b'{"subject":{"id":1},"verb":"ADDED_ITEM_TO_BASKET","object":{"item":{"id":3,"count":"2"}},"context":{"at":1}}',
    b'{"subject":{"id":1},"verb":"ADDED_ITEM_TO_BASKET","context":{"at":1}}', b"x" * 3000,
    b'{"subject":{"id":1,"type":"CUSTOMER"},"verb":"ORDERED","context":{"at":1}}' + b" " * MAX_LINE,
]  # fmt: skip

EXAMPLES = int(os.environ.get("AFTERLOG_TEST_EXAMPLES", "60"))
thorough = settings(
    max_examples=EXAMPLES, deadline=None, derandomize="AFTERLOG_TEST_EXAMPLES" not in os.environ, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A line, and what is done once it is there: nothing, or an append of all lines so far and more."""

    line: bytes
    then: str
    as_of: int
    """When that is a tick."""
    chosen: int
    """Which processors run, a bit for each, and after how many steps of their commits a crash ends them."""


class CrashError(BaseException):
    """What a step raises where a process would be killed."""


@st.composite
def histories(draw: st.DrawFn, *, ahead: bool = True) -> list[Step]:
    """A few customers' doings in the log's order; ticks may lie ahead of the log where `ahead` says so."""
    clock, last, found = START, dict.fromkeys(range(len(CUSTOMERS)), START), []
    for _ in range(draw(st.integers(1, 30))):
        who = draw(st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3]))
        line, taken, at = draw(lines(who, clock, last[who]))
        if draw(st.integers(0, 15)) == 0:
            line, taken, at = draw(st.sampled_from(BAD)), 0, 0
        clock = max(clock, taken)
        last[who] = max(last[who], min(at, clock))
        edge = last[who] + draw(st.sampled_from([TIMEOUT, TIMEOUT, TIMEOUT + 1, TIMEOUT + 1, FORGET + 1, 0]))
        as_of = draw(st.sampled_from([clock, clock - MINUTE, edge, edge]))
        if not ahead:
            as_of = min(as_of, clock)
        found.append(Step(line, draw(st.sampled_from(THEN)), as_of, draw(st.integers(0, 255))))
    return found


@st.composite
def lines(draw: st.DrawFn, who: int, clock: int, last: int) -> tuple[bytes, int, int]:
    """A good line in one of its many spellings, when the log took it, and when it happened."""
    pick = lambda options: draw(st.sampled_from(options))  # noqa: E731  # a word for what follows  # it reads better in what follows
    verb, how = pick(VERBS), pick(["now", "now", "edge", "edge", "late", "late", "long", "old", "skewed"])
    stamp = at = clock + pick(PASSED)
    if how == "edge":  # of what has been since this customer was last seen
        at = last + pick(SINCE)
        stamp = max(at, clock)
    elif how == "late":
        at = last + pick(SINCE)
    elif how == "long":
        at = last + pick(LONG_SINCE)
        stamp, verb = max(at, clock), pick([verb, "ORDERED"])
    elif how == "old":
        at = stamp - pick([FORGET, FORGET + 1, DAY])
    elif how == "skewed":
        stamp, at = pick([(stamp - DAY, at), (stamp, at + DAY), (stamp, at + TIMEOUT)])
    named = f'"{verb}"' if pick([True, False]) else f'{{"type": "{verb}"}}'
    times, taken, at = pick(
        [
            (f'"context":{{"at":{at}}},"event":{{"inserted_at":{stamp}}}', stamp, at),
            (f'"context":{{"at": {at}}},"event":{{"inserted_at": {stamp}}}', stamp, at),
            (f'"context":{{"at":{at / 1000!r}}},"event":{{"inserted_at":{stamp}}}', stamp, at),
            (f'"context":{{"at":{at}}},"event":{{"id":"mine"}}', at, at),
            (f'"context":{{"by":1}},"event":{{"inserted_at":{stamp}}}', stamp, stamp),
        ]
    )
    type = pick(['"CUSTOMER"'] * 12 + ['"INTERNAL_ORDER_EVENT"', "null"])
    subject = f'{{"id":{json.dumps(pick(CUSTOMERS[who]))},"type":{type}}}'
    if verb == "ORDERED":
        carried = pick([None, None, "[]", "[7]", "0", f"[{draw(items())},{draw(items())}]"])
        object = _object(type='"BASKET"', value=pick(VALUES), basket=carried)
    elif verb == "SUBMIT_TAX":
        object = _object(id=pick(["901", '"x"', "true", None]), body=pick(BODIES))
    else:
        object = _object(type='"ITEM"', item=draw(items()))
    return f'{{"subject":{subject},"verb":{named},"object":{object},{times}}}'.encode(), taken, at


@st.composite
def items(draw: st.DrawFn) -> str:
    """An item with some of its fields."""
    pick = lambda options: draw(st.sampled_from(options))  # noqa: E731  # a word for what follows
    return _object(
        id=pick(["3", "3", '"3"', "4", '"a b"']), name=pick([None, '"Pear"', '"<é>"']), price=pick(PRICES),
        count=pick(COUNTS), color=pick([None, None, "[1.0, 2]"]),
    )  # fmt: skip


def _object(**fields: str | None) -> str:
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields.items() if value is not None) + "}"


class Shop:
    """One HOME and whoever works on it."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.home = home
        self.store = open_store(home, max_line=MAX_LINE, **settings)
        self.topology = build_topology(self.store.settings)
        self._followers: dict[str, PartitionFollower] = {}

    def start(self) -> Run:
        """A new run, which knows nothing of those before."""
        for follower in self._followers.values():
            follower.close()
        self._followers.clear()
        return Run(self.store, self.topology, "test")

    def close(self) -> None:
        self.start()
        self.store.database.dispose()

    def tick(self, as_of: int) -> None:
        clock = Clock(self.store, ("events",))
        clock.tick(as_of)
        clock.close()

    def follow(self, chosen: int) -> None:
        """Let followers that live on take what is there."""
        for name in _chosen(chosen):
            if name not in self._followers:
                self._followers[name] = PartitionFollower(Run(self.store, self.topology, "test"), name, 0)
            follower = self._followers[name]
            while follower.advance(follower.snapshot()):
                pass

    def process(self, chosen: int = 255) -> None:
        """Bring processors to the end, side by side, as a run of its own does."""
        whole = self.start()
        raw = [name for name in _chosen(chosen) if name != "remind"]
        outcome = side_by_side(whole, raw, lambda run, name: process_to_end(run, name, None))
        assert outcome.failures == {}
        whole.stop.clear()
        if "remind" in _chosen(chosen):
            process_to_end(whole, "remind", None)

    def crash(self, chosen: int) -> None:
        """The same, one after the other, ended by a crash where it comes so far."""
        whole, left = self.start(), [chosen % 37]

        def hook(_step: str) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise CrashError

        steps.arm(hook)
        try:
            with contextlib.suppress(CrashError):
                for name in PROCESSORS:
                    process_to_end(whole, name, None)
        finally:
            steps.arm(None)

    def live(self, history: list[Step]) -> None:
        """Live through a history, and come to its end."""
        waiting: list[bytes] = []
        for step in history:
            waiting.append(step.line)
            if step.then == "-":
                continue
            append_lines(self.store, "events", waiting)
            waiting.clear()
            if step.then == "tick":
                self.tick(step.as_of)
            elif step.then != "append":
                getattr(self, step.then)(step.chosen)
        append_lines(self.store, "events", waiting)

    def undisturbed(self) -> Shop:
        """Another HOME with the same log and ticks, processed in one go."""
        other = Shop(self.home.with_name("undisturbed"))
        copy_raw_logs(self.home, other.home)
        other.process()
        return other

    def ticks(self) -> list[oracle.Tick]:
        noted = [json.loads(line) for line in log_bytes(self.home, "clock").splitlines()]
        return [
            oracle.Tick(e["object"]["as_of"], e["object"]["ends"]["events/0"]) for e in noted if e["verb"] == "TICK"
        ]

    def derived(self) -> dict[str, bytes]:
        return derived(self.home)

    def rows(self) -> dict[str, list[Any]]:
        return rows_of(self.store, TABLES)


def _chosen(bits: int) -> list[str]:
    return [name for index, name in enumerate(PROCESSORS) if bits >> index & 1]


@contextlib.contextmanager
def fresh(name: str = "home", **settings: Any) -> Iterator[Shop]:
    """A shop on a HOME in memory, where the system has such a place."""
    memory = "/dev/shm"  # noqa: S108  # each test makes a folder of its own there
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        shop = Shop(Path(folder) / name, **settings)
        try:
            yield shop
        finally:
            shop.close()


def spelt(event: dict[str, Any]) -> str:
    """An event with its keys in their order.

    Of a rejection's reason it takes what stands before the colon; an order's value may be spelt 10, 10.0 or 1E+1.
    """
    object = event["object"]
    if event["verb"] == "REJECTED":
        object["reason"] = object["reason"].split(":")[0]
    if object.get("type") == "ORDER" and object["value"] is not None:
        object["value"] = float(object["value"])
    return json.dumps(event)


@pytest.mark.long
@given(
    history=histories(),
    batch=st.sampled_from([1, 200, 1000, 4 << 20]),
    commit=st.sampled_from([1, 300, 2000, 64 << 20]),
    spill=st.sampled_from([1, 1000, 4 << 20]),
    segment=st.sampled_from([1, 500, 5000, 64 << 20]),
    keys=st.sampled_from([1, 2, 20_000]),
)
@thorough
def test_any_cuts_and_crashes_give_what_an_undisturbed_run_gives_and_the_contract_asks_for(
    history: list[Step], batch: int, commit: int, spill: int, segment: int, keys: int
) -> None:
    with fresh(
        batch_bytes=batch, commit_bytes=commit, spill_bytes=spill, segment_bytes=segment, cache_keys=keys
    ) as shop:
        shop.live(history)
        shop.tick(history[-1].as_of)
        shop.process()
        derived, rows = shop.derived(), shop.rows()
        other = shop.undisturbed()
        try:
            assert derived == other.derived()
            assert rows == other.rows()
        finally:
            other.close()
        _check_contract(shop, derived)
        _check_ids(derived)
        _check_counts(shop, [step.line for step in history], derived)


def _check_contract(shop: Shop, derived: dict[str, bytes]) -> None:
    """What the brute force gives for the same log and ticks."""
    expected = oracle.run(
        log_bytes(shop.home, "events"), shop.ticks(), oracle.Rules(max_line=MAX_LINE), derived["baskets"]
    )
    for log in ("quarantine", "reactions", "baskets", "reminders"):
        assert [spelt(e) for e in parsed(derived[log])] == [spelt(e) for e in getattr(expected, log)], log


def _check_ids(derived: dict[str, bytes]) -> None:
    ids = Counter(event["event"]["id"] for log in DERIVED for event in parsed(derived[log]))
    assert [id for id, times in ids.items() if times > 1] == []


def _check_counts(shop: Shop, history: list[bytes], derived: dict[str, bytes]) -> None:
    assert log_bytes(shop.home, "events") == b"".join(line + b"\n" for line in history)
    rejected = len(parsed(derived["quarantine"]))
    found = {p.processor: p for p in positions(shop.store)}
    assert sorted(found) == sorted(PROCESSORS)
    for name, position in found.items():
        assert position.lines == position.processed + position.quarantined + position.ignored, name
        read = len(parsed(derived["baskets"])) if name == "remind" else len(history)
        assert (position.lines, position.quarantined) == (read, 0 if name == "remind" else rejected), name
        writes = shop.topology.make(name).writes
        assert position.derived == (len(parsed(derived[writes])) if writes else 0), name


@pytest.mark.long
@given(
    history=histories(ahead=False), other=st.lists(st.integers(0, 3), min_size=1, max_size=24), end=st.integers(0, 2)
)
@thorough
def test_other_ticks_with_the_same_last_one_give_the_same_abandonments(
    history: list[Step], other: list[int], end: int
) -> None:
    log_end = oracle.log_end(b"".join(step.line + b"\n" for step in history))
    last = max(START, log_end) + (0, TIMEOUT, FORGET + 1)[end]  # a tick may lie at START, ahead of a log of old events
    found = []
    for schedule in (
        history,
        [
            Step(step.line, "tick" if other[i % len(other)] == 0 else "-", step.as_of, 0)
            for i, step in enumerate(history)
        ],
    ):
        with fresh() as shop:
            shop.live([Step(s.line, s.then if s.then == "tick" else "-", s.as_of, 0) for s in schedule])
            shop.tick(last)
            shop.process(0b100)
            found.append(parsed(log_bytes(shop.home, "baskets")))
    assert oracle.standing(found[0]) == oracle.standing(found[1])
    assert sorted(map(_undated, found[0])) == sorted(map(_undated, found[1]))


def _undated(event: dict[str, Any]) -> str:
    """An event without the moment at which it was found out."""
    del event["event"]["inserted_at"]
    return json.dumps(event)
