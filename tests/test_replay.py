"""Replay: the past again, into a generation beside the live one, and how the two differ."""

from __future__ import annotations

import gzip
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from storage import steps
from storage.door import append_lines
from storage.errors import AfterlogError, Stopped, UsageError
from storage.generations import READY, find_replay
from storage.store import Store
from tasks.diff import Differ, Side
from tasks.impact import Comparison, compare
from tasks.process import process_to_end
from tasks.replay import Replayed, drop_replay, run_replay, start
from tasks.replay_follow import ReplayRun, versions_of
from tasks.replay_plan import Request
from tasks.run import Run
from tasks.timeline import make_processor
from tasks.topology import build_topology
from tests import oracle
from tests.conftest import ROOT, SHARED, afterlog, log_bytes, needs_shared
from tests.helpers import DERIVED, TABLES, derived, open_store, parsed, process, rows_of

BOTH_DATABASES = True
pytestmark = pytest.mark.only("sqlite")
EITHER = pytest.mark.only("sqlite", "postgresql")
"""For what the database does."""
MINUTE, HOUR = 60_000, 3_600_000
START = 1_000_000_000_000


def line(customer: int, minutes: float, verb: str = "ADDED_ITEM_TO_BASKET") -> bytes:
    """An event of a customer, so many minutes after the start."""
    at = START + round(minutes * MINUTE)
    return orjson.dumps(
        {
            "subject": {"id": customer, "type": "CUSTOMER"},
            "verb": verb,
            "object": {"type": "ITEM", "item": {"id": 3, "price": 5, "count": 2}},
            "context": {"at": at},
            "event": {"inserted_at": at},
        }
    )


def again(store: Store, **wanted: Any) -> tuple[Replayed, Comparison]:
    """Replay on a store, and compare."""
    topology = build_topology(store.settings)
    planned, _ = start(store, topology, Request(**wanted), "test")
    done = run_replay(planned, store, topology, "test")
    return done, compare(store, topology, done.planned)


def write(store: Store, *lines: bytes, as_of: float | None = None) -> None:
    """Append, and bring everything to the end; with a tick so many minutes after the start."""
    append_lines(store, "events", list(lines))
    process(store.home, as_of=None if as_of is None else START + round(as_of * MINUTE))


@EITHER
def test_a_replay_gives_what_is_live_byte_for_byte_and_changes_nothing(store: Store) -> None:
    write(store, line(1, 0), line(2, 5), line(1, 40), b"{", as_of=50)
    write(store, line(2, 90, "ORDERED"), line(1, 200), as_of=400)
    before, rows = derived(store.home), rows_of(store, (*TABLES, "delivery"))
    done, found = again(store)
    assert found.is_nothing
    assert {log.log: log.same for log in found.logs} == {
        log: log_bytes(store.home, log).count(b"\n") for log in DERIVED
    }
    assert {log: log_bytes(store.home, f"{log}@{done.planned.generation}") for log in DERIVED} == before
    assert derived(store.home) == before
    assert rows_of(store, (*TABLES, "delivery")) == rows


def test_other_settings_show_as_added_removed_and_changed_and_in_whose_inbox(store: Store) -> None:
    # 1 pauses for 40 minutes: abandoned at 30, not at 45. 2 leaves for good: flagged by his own next event, or by a tick.
    write(store, line(1, 0), line(2, 1), line(1, 40), as_of=42)
    write(store, line(2, 50), line(1, 51, "ORDERED"), as_of=2000)
    _, found = again(store, processors=("abandonment",), settings={"timeout": "45m"})
    baskets, reminders = found.logs
    assert [log.log for log in found.logs] == ["baskets", "reminders"]
    ids = {e.id.split("/")[1] + "/" + e.id.split("/")[2]: e.kind for e in baskets.examples}
    first, second = "events:0:0", f"events:0:{len(line(1, 0)) + 1}"
    assert ids[f"{first}/abandoned"] == "removed"
    assert ids[f"{second}/abandoned"] == "changed"
    assert reminders.removed == 1
    assert found.impact is not None
    assert found.impact.no_longer == ["CUSTOMER 1"]
    assert found.impact.newly == []
    assert found.impact.mails_removed == 1


def test_whom_both_generations_mail_is_in_neither_list(store: Store) -> None:
    """Also where the mail that both have is the very same, and another one is gone."""
    write(store, line(1, 0), as_of=100)
    write(store, line(1, 6000), line(1, 6040), line(2, 6041), as_of=6042)
    write(store, line(1, 6043, "ORDERED"), line(2, 6080), line(2, 6081, "ORDERED"), as_of=8000)
    _, found = again(store, settings={"timeout": "45m"})
    assert (found.logs[1].same, found.logs[1].removed) == (1, 2)
    assert found.impact is not None
    assert (found.impact.no_longer, found.impact.newly) == (["CUSTOMER 2"], [])
    assert (found.impact.no_longer_mailed, found.impact.mails_removed) == (1, 2)
    _, found = again(store, settings={"timeout": "45m"}, from_="2001-09-11T00:00:00Z")
    assert found.impact is not None
    assert sorted(found.impact.no_longer) == ["CUSTOMER 1", "CUSTOMER 2"], "the one before is not compared"


MAILER = """
from tasks.processors import contract
class Processor(contract.Processor):
    name, reads, writes, mails = "mailer", "events", "letters", True
    def event(self, event, state, out):
        for _ in range(1 + {twice}):
            out.emit(self, event, {{"id": "EMAIL_SYSTEM"}}, "EMAIL", {{"type": "CUSTOMER", "id": event.id + {other}, "template":
                     "basket-reminder"}}, name="mail", at=event.clock, not_after=event.clock + 86_400_000)
"""


def use(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have a processor of one's own, `own_mailer`."""
    (folder / "own_mailer.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "own_mailer", raising=False)
    importlib.invalidate_caches()


def mailed(make_store: Callable[..., Store]) -> Store:
    """The log of two customers, and what `own_mailer` made of it."""
    store = make_store(processors=("own_mailer",))
    append_lines(store, "events", [line(1, 0), line(2, 2)])
    process(store.home, processors=("own_mailer",))
    return store


def test_a_mail_that_goes_to_somebody_else_touches_two_inboxes(
    make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tmp_path, monkeypatch, MAILER.format(twice=0, other=0))
    store = mailed(make_store)
    use(tmp_path, monkeypatch, MAILER.format(twice=0, other=1))
    _, found = again(store, processors=("mailer",))
    assert found.logs[0].changed == 2
    assert found.impact is not None
    assert (found.impact.newly, found.impact.no_longer) == (["CUSTOMER 3"], ["CUSTOMER 1"])


def test_an_id_that_a_log_has_twice_is_compared_one_by_one(
    make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a log lost its end and gave its offsets again."""
    use(tmp_path, monkeypatch, MAILER.format(twice=1, other=0))
    store = mailed(make_store)
    _, found = again(store, processors=("mailer",))
    assert found.is_nothing
    use(tmp_path, monkeypatch, MAILER.format(twice=0, other="(event.id == 1)"))
    _, found = again(store, processors=("mailer",))
    diff = found.logs[0]
    assert (diff.old, diff.new, diff.same, diff.changed, diff.removed, diff.added) == (4, 2, 1, 1, 2, 0)


def test_what_is_no_mail_that_is_delivered_is_in_nobodys_inbox(
    make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tmp_path, monkeypatch, MAILER.format(twice=0, other=0).replace("mails = ", "kept = "))
    store = mailed(make_store)
    use(
        tmp_path,
        monkeypatch,
        MAILER.format(twice=0, other=1).replace("mails = ", "kept = ").replace('name="', 'name="a-'),
    )
    _, found = again(store, processors=("mailer", "derive"))
    assert {log.log: (log.added, log.removed) for log in found.logs} == {"letters": (2, 2), "reactions": (0, 0)}
    assert found.impact is not None
    assert (found.impact.mails_added, found.impact.mails_removed, found.impact.newly) == (0, 0, [])


@pytest.mark.parametrize(
    "spoilt",
    [
        ('"id": event.id + 0', '"id": 1.5'),
        ('"id": event.id + 0', '"id": None'),
        ('"type": "CUSTOMER"', '"type": None'),
        ("not_after=event.clock + 86_400_000", "not_after=2**63"),
    ],
)
def test_a_mail_that_nobody_can_get_is_in_nobodys_inbox(
    make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: tuple[str, str]
) -> None:
    code = MAILER.format(twice=0, other=0)
    use(tmp_path, monkeypatch, code)
    store = mailed(make_store)
    assert spoilt[0] in code
    use(tmp_path, monkeypatch, code.replace(*spoilt).replace('name="mail"', 'name="mail" if event.id > 1 else "other"'))
    _, found = again(store, processors=("mailer",))
    assert (found.logs[0].added, found.logs[0].removed, found.logs[0].changed) == (1, 1, 1)
    assert found.impact is not None
    assert (found.impact.newly, found.impact.no_longer) == ([], ["CUSTOMER 1", "CUSTOMER 2"])
    assert (found.impact.mails_added, found.impact.mails_removed, found.impact.too_late) == (0, 1, 0)


def test_recorded_settings_hold_again_from_where_they_held(make_store: Callable[..., Store]) -> None:
    store = make_store(timeout="30m")
    write(store, line(1, 0), as_of=20)
    process(store.home, timeout="10m")
    append_lines(store, "events", [line(2, 30), line(1, 45), line(2, 55)])
    process(store.home, timeout="10m", as_of=START + 80 * MINUTE)
    append_lines(store, "events", [line(3, 100), line(3, 125), line(3, 170)])
    process(store.home, timeout="30m", as_of=START + 400 * MINUTE)
    done, found = again(store)
    assert found.is_nothing
    assert log_bytes(store.home, "baskets") == log_bytes(store.home, f"baskets@{done.planned.generation}")
    lines = parsed(log_bytes(store.home, "baskets"))
    assert any(e["subject"]["id"] == 2 for e in lines), "the ten minutes left no trace"


def test_recorded_settings_of_who_reads_a_derived_log_hold_again_too(store: Store) -> None:
    """The log that is read is another by then, where the same offsets may say something else: the clock tells."""
    for gap, minutes in (("1d", 0), ("1d", 100), ("1h", 200), ("1d", 300)):
        append_lines(store, "events", [line(1, minutes)])
        process(store.home, reminder_gap=gap, as_of=START + (minutes + 45) * MINUTE)
    times = [mail["event"]["inserted_at"] for mail in parsed(log_bytes(store.home, "reminders"))]
    assert times == [START + 45 * MINUTE, START + 245 * MINUTE]
    _, found = again(store)
    assert found.is_nothing


@pytest.mark.parametrize("today", ["5m", "3h"])
def test_what_is_to_be_forgotten_goes_by_the_settings_of_then(make_store: Callable[..., Store], today: str) -> None:
    """Also while memory holds few of those that a tick finds: under today's settings they would be found for ever."""
    hours = START % (24 * HOUR) // HOUR
    orders = [line(number, (23 - hours) * 60, "ORDERED") for number in range(30)]
    store = make_store(cache_keys=10, timeout="30m")
    write(store, *orders, line(99, (23 - hours + 30 * 24) * 60 - 30, "VIEWED_ITEM"))
    process(store.home, as_of="log-end", cache_keys=10, timeout="30m")
    again(make_store(cache_keys=10, timeout=today), processors=("abandonment",))
    query = "SELECT generation, key, due, rank FROM state JOIN checkpoint ON id = checkpoint WHERE processor = 'abandonment'"
    with store.database.read() as connection:
        rows = sorted(connection.exec_driver_sql(query))
    assert [row[1:] for row in rows if row[0] == 1] == [row[1:] for row in rows if row[0] == 2]
    assert len(rows) == 2 * 31


def test_recorded_settings_hold_again_between_ticks_at_the_same_place(make_store: Callable[..., Store]) -> None:
    """Nothing was appended in between: only the ticks tell which settings held when."""
    store = make_store(timeout="60m")
    append_lines(store, "events", [line(1, 0)])
    for timeout, minutes in (("60m", 20), ("50m", 40), ("10m", 41)):
        process(store.home, timeout=timeout, as_of=START + minutes * MINUTE)
    [left] = parsed(log_bytes(store.home, "baskets"))
    assert left["event"]["inserted_at"] == START + 41 * MINUTE
    _, found = again(store)
    assert found.is_nothing


def test_settings_that_changed_between_two_events_of_one_clock_hold_again_from_the_second(store: Store) -> None:
    """A tick finds many at once, and who reads of them may be anywhere among them when its settings change."""
    append_lines(store, "events", [line(1, 0), line(2, 1)])
    process(store.home, as_of=START + 45 * MINUTE)
    append_lines(store, "events", [line(1, 100), line(2, 101)])
    process(store.home, "abandonment", as_of=START + 145 * MINUTE)
    small = open_store(store.home, batch_bytes=1, commit_bytes=1)
    run = Run(small, build_topology(small.settings), "test")
    steps.arm(lambda step: run.stop.set() if step == "committed" else None)
    try:
        with pytest.raises(Stopped):
            process_to_end(run, "remind", None)
    finally:
        steps.arm(None)
    process(store.home, reminder_gap="1h")
    mails = [
        (mail["object"]["id"], mail["event"]["inserted_at"]) for mail in parsed(log_bytes(store.home, "reminders"))
    ]
    assert mails == [(1, START + 45 * MINUTE), (2, START + 45 * MINUTE), (2, START + 145 * MINUTE)]
    _, found = again(store)
    assert found.is_nothing


def test_where_settings_never_changed_what_is_live_is_not_read_for_them(store: Store) -> None:
    """It may be long, and a promotion asks for them under its locks."""
    write(store, line(1, 0), line(2, 5), as_of=50)
    planned = again(store)[0].planned
    run = ReplayRun(store, build_topology(store.settings), "test", dict.fromkeys(planned.plan.logs, planned.generation))
    shutil.rmtree(store.home / "logs" / "baskets")
    assert [version.place.offset for version in versions_of(run, "remind", 0, planned.plan.base, {})] == [0]


def test_a_range_limits_what_is_compared(store: Store) -> None:
    write(store, *[line(n, n * 10) for n in range(10)], *[line(n, 100 + n * 10 + 40) for n in range(10)], as_of=1000)
    _, found = again(store, settings={"timeout": "120m"})
    hour = "2001-09-09T04:46:40Z"  # 180 minutes after the start
    _, late = again(store, settings={"timeout": "120m"}, from_=hour)
    _, early = again(store, settings={"timeout": "120m"}, to=hour)
    for one, two, three in zip(found.logs, late.logs, early.logs, strict=True):
        assert one.old == two.old + three.old
    assert early.logs[0].old
    assert late.logs[0].old
    offset = log_bytes(store.home, "events").index(line(4, 180))
    _, part = again(store, settings={"timeout": "120m"}, to=str(offset))
    assert part == early


def test_one_tick_instead_of_the_recorded_ones(store: Store) -> None:
    write(store, line(1, 0), line(2, 29), as_of=45)
    _, found = again(store, processors=("abandonment",), as_of=START + 60 * MINUTE)
    assert {e.kind for e in found.logs[0].examples} == {"added", "changed"}
    _, end = again(store, processors=("abandonment",), as_of="log-end")
    assert end.logs[0].removed == 1


def test_the_end_of_a_log_is_that_of_all_its_partitions(make_store: Callable[..., Store]) -> None:
    store = make_store(partitions=2)
    append_lines(store, "events", [*(line(customer, 0) for customer in range(8)), line(99, 60, "VIEWED")])
    process(store.home, as_of="log-end")
    _, found = again(store, processors=("abandonment",), as_of="log-end")
    assert found.is_nothing
    assert found.logs[0].same == 8


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"processors": ("normalise",)}, "writes rows"),
        ({"processors": ("nobody",)}, "no such processor"),
        ({"settings": {"timeot": "45m"}}, "no such setting"),
        ({"settings": {"poll": "45m"}}, "changes nothing"),
        ({"settings": {"timeout": "soon"}}, "TIMEOUT"),
        ({"processors": ("derive",), "settings": {"timeout": "45m"}}, "is of abandonment"),
        ({"from_": "yesterday"}, "neither an offset nor a time"),
        ({"as_of": 9_000_000_000_000}, "lies ahead"),
        (
            {"from_": "2023-01-02T00:00:00Z", "to": "2023-01-01T00:00:00Z"},
            "from a moment on that is not before its end",
        ),
        ({"from_": "2023-01-02T00:00:00Z", "to": "2023-01-02T00:00:00Z"}, "found 2023-01-02T00:00:00.000Z and 2023"),
        ({"from_": "1"}, "events/0 ends before that offset; found 1, expected 0 at most"),
        ({"to": "99999"}, "events/0 ends before that offset; found 99999"),
        ({"name": "12"}, "no name"),
        ({"name": "  "}, "no blanks around"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(store: Store, wanted: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        again(store, **wanted)


def test_settings_that_the_code_of_today_does_not_take_are_named(store: Store) -> None:
    with pytest.raises(UsageError, match=r"the code of remind does not take the settings that were recorded: .*gap"):
        make_processor(build_topology(store.settings), "remind", {"gap": "a day", "not_after": 5}, {})


@EITHER
def test_a_replay_that_died_goes_on_by_its_name_and_a_discarded_one_leaves_nothing(
    make_store: Callable[..., Store],
) -> None:
    store = make_store(batch_bytes=200, commit_bytes=200)
    write(store, *[line(n % 7, n * 9) for n in range(40)], as_of=1000)
    topology, before = build_topology(store.settings), derived(store.home)
    for nth in (1, 4, 9):
        planned, resumed = start(store, topology, Request(name="again"), "test")
        assert resumed == (nth > 1)
        seen = iter(range(nth))

        def crash(step: str, seen: Any = seen) -> None:
            if step == "derived-written" and next(seen, None) is None:
                raise OSError("died")

        steps.arm(crash)
        try:
            with pytest.raises(AfterlogError):
                run_replay(planned, store, topology, "test")
        finally:
            steps.arm(None)
    planned, _ = start(store, topology, Request(name="again"), "test")
    run_replay(planned, store, topology, "test")
    assert find_replay(store.database, "again").state == READY
    assert {log: log_bytes(store.home, f"{log}@{planned.generation}") for log in DERIVED} == before
    drop_replay(store, "again", "test")
    assert not list((store.home / "logs").glob("*@*"))
    assert rows_of(store, ("checkpoint", "committed_end"))["checkpoint"]
    assert all(row.generation == 1 for row in rows_of(store, ("checkpoint", "committed_end"))["checkpoint"])
    assert derived(store.home) == before


def test_nothing_in_a_replay_can_construct_a_mail_transport() -> None:
    code = (
        "import sys, deployments.cli_replay, tasks.replay, tasks.promote, tasks.verify_derived, flows.replay\n"
        "print([m for m in sys.modules if m in ('tasks.transport','tasks.smtp','tasks.mail_url','tasks.sending',"
        "'tasks.mail','tasks.deliver','smtplib')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_the_command_line_also_after_a_kill(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, line(1, 0), line(1, 40), as_of=100)
    arguments = ("replay", "--set", "timeout=45m", "--name", "longer", "--no-prefect")
    monkeypatch.setenv("AFTERLOG_TEST_KILL", "derived-synced:1")
    assert afterlog(store.home, *arguments).returncode == -9
    monkeypatch.delenv("AFTERLOG_TEST_KILL")
    done = afterlog(store.home, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"log\tlive\treplayed\tsame\tadded\tremoved\tchanged\nbaskets\t2\t1\t")
    assert b"going on with generation 2 (longer): abandonment, remind timeout=45m" in done.stderr
    listed = afterlog(store.home, "replays", "list")
    assert b"2\tlonger\tREADY\t" in listed.stdout
    assert afterlog(store.home, "replays", "discard", "nothing").returncode == 2


@needs_shared
def test_45_minutes_on_a_real_shop_is_what_brute_force_finds(store: Store) -> None:
    """The log of each timeout by the oracle, which knows nothing of replays, and the sets by event.id."""
    lines = gzip.decompress((SHARED / "shop" / "taobao_a_dev.jsonl.gz").read_bytes()).splitlines()
    append_lines(store, "events", lines)
    process(store.home, "abandonment", as_of="log-end")
    done, found = again(store, processors=("abandonment",), settings={"timeout": "45m"})
    noted = [e["object"] for e in parsed(log_bytes(store.home, "clock")) if e["verb"] == "TICK"]
    ticks = [oracle.Tick(tick["as_of"], tick["ends"]["events/0"]) for tick in noted]
    log = log_bytes(store.home, "events")
    old, new = (
        {e["event"]["id"]: json.dumps(e) for e in oracle.run(log, ticks, oracle.Rules(minutes * MINUTE), b"").baskets}
        for minutes in (30, 45)
    )
    sets = {
        "added": new.keys() - old.keys(),
        "removed": old.keys() - new.keys(),
        "changed": {i for i in old.keys() & new.keys() if old[i] != new[i]},
    }
    assert differing(store, done.planned.generation) == sets
    diff = found.logs[0]
    assert (diff.added, diff.removed, diff.changed) == tuple(map(len, sets.values())) == (39, 361, 307)
    assert (diff.old, diff.new, diff.same) == (len(old), len(new), 3743)


def differing(store: Store, generation: int) -> dict[str, set[str]]:
    """The ids of the events in which a generation of `baskets` differs from the first one, by kind."""
    differ = Differ(None, None)
    readers = [store.reader("baskets", 0, each) for each in (1, generation)]
    differ.compare("baskets", [(Side(readers[0], readers[0].end()), Side(readers[1], readers[1].end()))])
    found: dict[str, set[str]] = {}
    for kind, ident in differ.rows("SELECT kind, id FROM found"):
        found.setdefault(kind, set()).add(ident)
    differ.close()
    return found
