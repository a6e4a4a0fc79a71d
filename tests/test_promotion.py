"""Promotion and rollback: another generation becomes live, the schedule goes on, and nobody is mailed twice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage import steps
from storage.backup import ARCHIVE_LOCK
from storage.brake import PAUSED, put_on, read_brake, release, would_mail
from storage.commit import Position, load_position
from storage.contacts import Entry, save_contacts
from storage.door import append_lines
from storage.errors import AfterlogError, ConflictError, UsageError
from storage.generations import LIVE, READY, discard, find_replay
from storage.locks import RunLock
from storage.mails import MAY_HAVE_BEEN_SENT, WITHDRAWN
from storage.restore import mark_restored
from storage.store import Store
from storage.times import DAY, now
from tasks.archive import archive_all
from tasks.deliver import Deliverer, deliver_to_end
from tasks.evidence import Evidence
from tasks.guards import Guards
from tasks.local import side_by_side
from tasks.process import follow, positions, process_to_end
from tasks.promote import promote, rollback
from tasks.replay import NICE, drop_replay, run_replay, start
from tasks.replay_plan import Request
from tasks.run import Run
from tasks.settle import resolve
from tasks.time_machine import basket_at
from tasks.topology import build_topology
from tasks.verify import verify_all
from tasks.verify_derived import report, verify_derived
from tasks.why_not import why_not
from tests.conftest import afterlog, log_bytes, settings_of
from tests.helpers import copy_raw_logs, process, rows_of
from tests.operations import PATIENCE, plain_environment
from tests.test_replay import MAILER, MINUTE, START, line, use, write

BOTH_DATABASES = True
pytestmark = pytest.mark.only("sqlite")
EITHER = pytest.mark.only("sqlite", "postgresql")
"""For what the database does: the one transaction, the swap, the mails that are moved."""
LONGER = {"settings": {"timeout": "45m"}, "name": "longer"}


def replayed(store: Store, **wanted: Any) -> int:
    """Replay, and give the generation."""
    topology = build_topology(store.settings)
    planned, _ = start(store, topology, Request(**wanted), "test")
    run_replay(planned, store, topology, "test")
    return planned.generation


def live(store: Store, log: str) -> bytes:
    """The live generation of a log, up to its committed end."""
    generation = store.live_generation(log)
    name = log if generation == 1 else f"{log}@{generation}"
    return log_bytes(store.home, name)[: store.committed_end(log, 0)]


def check_as_ever(store: Store, **settings: Any) -> None:
    """What is live is what a HOME gives that had these settings from the beginning."""
    other = store.home.with_name(f"ever-{now()}-{os.urandom(2).hex()}")
    copy_raw_logs(store.home, other)
    process(other, **settings)
    for log in ("baskets", "reminders"):
        assert live(store, log) == log_bytes(other, log), log


def check_verified(store: Store) -> None:
    told: list[str] = []
    assert report(verify_derived(store, build_topology(store.settings)), told.append), told


def history(store: Store) -> None:
    """Pauses of 39 minutes, which are too long for half an hour and not for three quarters; then of 54, for both."""
    write(store, *[line(n % 6, n * 6.5) for n in range(60)], as_of=440)
    write(store, *[line(n % 6, 800 + n * 9) for n in range(60)], as_of=1400)


@EITHER
def test_promoted_it_is_what_it_would_have_been_and_goes_on_as_that(make_store: Callable[..., Store]) -> None:
    store = make_store()
    history(store)
    generation = replayed(store, **LONGER)
    write(store, *[line(n % 6, 1500 + n * 6.5) for n in range(60)], as_of=2100)
    topology = build_topology(store.settings)
    moved = promote(store, topology, "longer", "test")
    assert moved.live == {"baskets": generation, "reminders": generation}
    assert "abandonment was replayed with {'timeout': 2700000}, and goes on with {'timeout': 1800000}" in moved.notes[0]
    assert find_replay(store.database, "longer").state == LIVE
    check_as_ever(store, timeout="45m")
    append_lines(store, "events", [line(n % 6, 2200 + n * 6.5) for n in range(60)])
    process(store.home, timeout="45m", as_of=START + 3000 * MINUTE)
    check_as_ever(store, timeout="45m")
    check_verified(store)
    with pytest.raises(ConflictError, match="is live"):
        drop_replay(store, "longer", "test")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is a whole process that gives way")
def test_a_replay_gives_way_to_what_is_live_and_its_promotion_which_holds_that_up_does_not(store: Store) -> None:
    found: set[int] = set()
    usual = os.getpriority(os.PRIO_PROCESS, 0)  # of this thread
    steps.arm(lambda step: found.add(os.getpriority(os.PRIO_PROCESS, 0) - usual) if step == "commit-begun" else None)
    try:
        history(store)
        assert found == {0}
        found.clear()
        replayed(store, **LONGER)
        assert found == {NICE}
        write(store, *[line(n % 6, 1500 + n * 6.5) for n in range(60)], as_of=2100)
        found.clear()
        promote(store, build_topology(store.settings), "longer", "test")
        assert found == {0}
    finally:
        steps.arm(None)


def test_a_basket_is_told_by_the_settings_of_the_generation_that_is_live(store: Store) -> None:
    write(store, line(1, 0), line(1, 5, "ORDERED"), as_of=60)
    topology = build_topology(store.settings)
    replayed(store, processors=("abandonment",), settings={"excluded_verbs": ["ORDERED"]}, name="no-orders")
    assert basket_at(store, topology, "1").items == []
    promote(store, topology, "no-orders", "test")
    assert [item["id"] for item in basket_at(store, topology, "1").items] == [3]
    evidence = Evidence(store, topology)
    assert why_not(evidence, "1").checks[0].detail == "1 item in it"
    evidence.close()
    rollback(store, topology, "no-orders", "test")
    assert basket_at(store, topology, "1").items == []


def test_a_generation_that_was_longer_than_the_first_is_no_cut_of_the_first(store: Store) -> None:
    """Checkpoints stand in the longer one, and `verify` must not hold the shorter one against them."""
    write(store, *[line(n % 6, n * 4) for n in range(12)], as_of=440)
    generation = replayed(store, settings={"timeout": "10m"}, name="shorter pauses")
    promote(store, build_topology(store.settings), "shorter pauses", "test")
    first, second = (store.reader("baskets", 0, each).end() for each in (1, generation))
    assert first < second
    assert max(each.offset for each in positions(store) if each.log == "baskets") == second
    assert verify_all(store, store.settings)[1] == []
    path = store.directory("baskets", 0, generation) / f"{0:020d}.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    [problem] = verify_all(store, store.settings)[1]
    assert problem.startswith(
        f"baskets@{generation}/0:{second - 9}: the log was cut: it ends there, and up to {second}"
    )


def test_what_a_discarded_replay_had_in_the_archive_goes_too(make_store: Callable[..., Store]) -> None:
    store = make_store(segment_bytes=300, live_window="1ms", batch_bytes=300, commit_bytes=300)
    for n in range(12):
        append_lines(store, "events", [line(n % 6, n * 4)])
    process(store.home, as_of=START + 440 * MINUTE)
    generation = replayed(store, settings={"timeout": "10m"}, name="shorter pauses")
    topology = build_topology(store.settings)
    archive_all(store, topology, "test")
    place = store.home / "archive" / f"baskets@{generation}" / "0"
    others = sorted((store.home / "archive" / "events").rglob("*.zst"))
    assert len(others) > 1
    assert len(list(place.iterdir())) > 1
    held = RunLock(store.lock_path(ARCHIVE_LOCK), "an archive")
    assert held.try_acquire()
    dropping = threading.Thread(target=drop_replay, args=(store, generation, "test"), daemon=True)
    dropping.start()
    dropping.join(0.1)
    assert dropping.is_alive()
    assert len(list(place.iterdir())) > 1
    held.release()
    dropping.join(60)
    assert list(place.iterdir()) == []
    assert sorted((store.home / "archive" / "events").rglob("*.zst")) == others
    assert not list((store.home / "logs").glob("*@*"))


def test_an_archive_that_is_away_keeps_nobody_from_a_replay(make_store: Callable[..., Store]) -> None:
    store = make_store(segment_bytes=300, batch_bytes=300, commit_bytes=300)
    write(store, *[line(n % 6, n * 9) for n in range(40)], as_of=1000)
    first, topology = replayed(store, **LONGER), build_topology(store.settings)
    archive_all(store, topology, "test")
    place, away = store.home / "archive", store.home / "away"
    place.rename(away)
    place.write_text("no folder")
    with pytest.raises(AfterlogError, match="archive"):
        drop_replay(store, first, "test")
    planned, _ = start(store, topology, Request(name="another"), "test")
    done = run_replay(planned, store, topology, "test")
    assert [note.partition(":")[0] for note in done.notes] == [
        f"what is left of generation {first}, which was discarded, could not be dropped yet"
    ]
    place.unlink()
    away.rename(place)
    planned, _ = start(store, topology, Request(name="a third"), "test")
    assert planned.notes == []
    assert not list((store.home / "logs").glob(f"*@{first}"))
    assert not list(place.glob(f"*@{first}/*/*"))


@EITHER
def test_rolled_back_it_is_what_it_was_and_can_be_promoted_again(store: Store, database: str) -> None:
    history(store)
    replayed(store, **LONGER)
    topology = build_topology(store.settings)
    for minutes in (1500, 2500) if database == "sqlite" else (1500,):
        promote(store, topology, "longer", "test")
        check_as_ever(store, timeout="45m")
        append_lines(store, "events", [line(n % 6, minutes + n * 6.5) for n in range(50)])
        process(store.home, timeout="45m", as_of=START + (minutes + 460) * MINUTE)
        check_as_ever(store, timeout="45m")
        moved = rollback(store, topology, "longer", "test")
        assert moved.live == {"baskets": 1, "reminders": 1}
        assert find_replay(store.database, "longer").state == READY
        check_as_ever(store, timeout="30m")
        check_verified(store)
    write(store, line(1, 3000), as_of=3100)
    check_as_ever(store, timeout="30m")
    drop_replay(store, "longer", "test")
    assert not list((store.home / "logs").glob("*@*"))


def test_what_is_not_ready_or_of_another_past_is_not_promoted(store: Store) -> None:
    history(store)
    topology = build_topology(store.settings)
    replayed(store, processors=("abandonment",), as_of="log-end", name="own-ticks")
    with pytest.raises(UsageError, match="for comparing only"):
        promote(store, topology, "own-ticks", "test")
    start(store, topology, Request(name="begun"), "test")
    with pytest.raises(UsageError, match="is RUNNING"):
        promote(store, topology, "begun", "test")
    with pytest.raises(UsageError, match="nothing to roll back"):
        rollback(store, topology, "begun", "test")
    replayed(store, **LONGER)
    replayed(store, settings={"timeout": "50m"}, name="other")
    promote(store, topology, "longer", "test")
    with pytest.raises(UsageError, match="another generation of baskets is live by now"):
        promote(store, topology, "other", "test")


@EITHER
@EITHER
@pytest.mark.parametrize("what", ["promoted", "rolled back"])
def test_what_another_has_moved_meanwhile_is_seen_under_the_locks(
    store: Store, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Before them it may have looked, and caught up for minutes: two generations of one processor would be live."""
    history(store)
    topology = build_topology(store.settings)
    replayed(store, settings={"timeout": "35m"}, name="first")
    if what == "rolled back":
        promote(store, topology, "first", "test")
    replayed(store, **LONGER)

    def late(step: str) -> None:
        if step == "commit-begun" and late_once:  # it catches up
            late_once.clear()
            promote(store, topology, "first", "test") if what == "promoted" else rollback(
                store, topology, "first", "test"
            )

    late_once = [True]
    append_lines(store, "events", [line(1, 1500)])
    process(store.home, as_of=START + 1600 * MINUTE)
    steps.arm(late)
    try:
        with pytest.raises(UsageError, match="another generation of baskets is live by now"):
            promote(store, topology, "longer", "test")
    finally:
        steps.arm(None)
    assert not late_once
    assert len([each for each in positions(store) if each.processor == "abandonment"]) == 1
    assert find_replay(store.database, "longer").state == READY


def test_what_a_rollback_goes_back_to_is_not_discarded(store: Store) -> None:
    history(store)
    topology = build_topology(store.settings)
    first = replayed(store, settings={"timeout": "35m"}, name="first")
    promote(store, topology, "first", "test")
    replayed(store, settings={"timeout": "40m"}, name="second")  # of which nobody has made anything
    replayed(store, **LONGER)
    promote(store, topology, "longer", "test")
    with pytest.raises(ConflictError, match=r"4 \(longer\), LIVE: generation 2 is what a rollback would go back to"):
        drop_replay(store, "first", "test")
    rollback(store, topology, "longer", "test")
    assert store.live_generation("baskets") == first
    rollback(store, topology, "first", "test")
    drop_replay(store, "first", "test")
    assert not list((store.home / "logs").glob("*@2"))


def test_what_is_far_back_may_be_discarded(store: Store) -> None:
    history(store)
    topology = build_topology(store.settings)
    for minutes in (35, 40, 45):
        replayed(store, settings={"timeout": f"{minutes}m"}, name=f"for {minutes}")
        promote(store, topology, f"for {minutes}", "test")
    drop_replay(store, "for 35", "test")
    with pytest.raises(ConflictError, match="generation 3 is what a rollback would go back to"):
        drop_replay(store, "for 40", "test")
    rollback(store, topology, "for 45", "test")
    with pytest.raises(UsageError, match="generation 2, to which this would go back, was discarded"):
        rollback(store, topology, "for 40", "test")


def test_nobody_goes_back_to_what_an_earlier_version_let_be_discarded(store: Store) -> None:
    history(store)
    topology = build_topology(store.settings)
    replayed(store, settings={"timeout": "35m"}, name="first")
    promote(store, topology, "first", "test")
    replayed(store, **LONGER)
    promote(store, topology, "longer", "test")
    discard(store, 2)
    with pytest.raises(UsageError, match="generation 2, to which this would go back, was discarded"):
        rollback(store, topology, "longer", "test")


def test_a_position_of_a_generation_that_is_no_longer_live_is_refused(store: Store) -> None:
    history(store)
    topology = build_topology(store.settings)
    replayed(store, **LONGER)
    stale = Run(store, topology, "stale")
    from tasks.follow import PartitionFollower

    follower = PartitionFollower(stale, "abandonment", 0)
    promote(store, topology, "longer", "test")
    append_lines(store, "events", [line(1, 2000)])
    with pytest.raises(ConflictError):
        follower.advance(follower.snapshot())
    follower.close()
    with pytest.raises(ConflictError, match="is no longer live"):
        load_position(store.database, "abandonment", 1, "events", 0)
    check_as_ever(store, timeout="45m")


@pytest.mark.parametrize(
    ("step", "back"),
    [
        ("promotion-begun", False), ("promotion-ready", False), ("promotion-ready", True), ("promotion-committed", False),
        ("promotion-committed", True), ("derived-synced", False), ("committed", True),
    ],
)  # fmt: skip
def test_a_crash_at_any_step_loses_nothing(store: Store, step: str, back: bool) -> None:
    history(store)
    topology = build_topology(store.settings)
    replayed(store, **LONGER)
    if back:
        promote(store, topology, "longer", "test")
    append_lines(store, "events", [line(n % 6, 1500 + n * 6.5) for n in range(50)])
    process(store.home, timeout="45m" if back else "30m", as_of=START + 2000 * MINUTE)
    move = rollback if back else promote

    def crash(name: str) -> None:
        if name == step:
            steps.arm(None)
            raise RuntimeError("killed here")

    steps.arm(crash)
    try:
        with pytest.raises(RuntimeError):
            move(store, topology, "longer", "test")
    finally:
        steps.arm(None)
    done = find_replay(store.database, "longer").state == (READY if back else LIVE)
    assert done == (step == "promotion-committed")
    check_as_ever(store, timeout="45m" if done != back else "30m")
    if not done:
        move(store, topology, "longer", "test")
    check_as_ever(store, timeout="30m" if back else "45m")
    check_verified(store)


def recent(customer: int, minutes_ago: float, verb: str = "ADDED_ITEM_TO_BASKET") -> bytes:
    """An event of the last day."""
    return line(customer, (now() - START) / MINUTE - minutes_ago, verb)


def outbox(store: Store) -> list[tuple[str, str, str]]:
    """What became of each mail, and why, by recipient."""
    with store.database.read() as connection:
        rows = connection.exec_driver_sql("SELECT recipient_id, state, reason FROM delivery ORDER BY 1, 2").all()
    return [tuple(row) for row in rows]


def deliver(store: Store) -> None:
    """What `afterlog deliver` does, in this process."""
    run = Run(store, build_topology(store.settings), "test")
    process_to_end(run, "remind", None)
    deliver_to_end(run)


@EITHER
def test_what_was_delivered_is_never_delivered_again_and_what_is_added_is_queued_once(store: Store) -> None:
    entries = [Entry("CUSTOMER", str(n), f"{n}@example.com", False) for n in (1, 2, 3, 4)]
    save_contacts(store.database, entries)
    # 1 is abandoned either way. 2 came back after 40 minutes, and has left since: other causes, within a day of each other.
    # 3 was away for 40 minutes and is there: of 30 minutes alone. 4 ordered.
    append_lines(
        store, "events",
        sorted([recent(1, 300), recent(2, 200), recent(2, 160), recent(3, 41), recent(3, 1), recent(4, 290), recent(4, 200, "ORDERED")],
               key=lambda raw: raw.rsplit(b":", 1)[1]),
    )  # fmt: skip
    process(store.home, as_of=now() - 2000)
    topology = build_topology(store.settings)
    shorter = {"settings": {"timeout": "35m"}, "name": "shorter"}
    replayed(store, **shorter)
    replayed(store, **LONGER)
    deliver(store)
    assert [(who, state) for who, state, _ in outbox(store)] == [
        ("1", "SENT"), ("2", "SENT"), ("3", "SENT"), ("4", "SUPPRESSED"),
    ]  # fmt: skip
    mails = sorted((store.home / "outbox").rglob("*.eml"))
    assert len(mails) == 3
    moved = promote(store, topology, "longer", "test")
    assert (moved.queued, moved.too_soon) == (0, 1)  # the later one of 2
    deliver(store)
    rollback(store, topology, "longer", "test")
    deliver(store)
    promote(store, topology, "shorter", "test")
    deliver(store)
    assert sorted((store.home / "outbox").rglob("*.eml")) == mails


@EITHER
def test_mails_that_wait_are_sent_from_where_they_lie_now_and_others_are_withdrawn(store: Store) -> None:
    save_contacts(store.database, [Entry("CUSTOMER", str(n), f"{n}@example.com", False) for n in (1, 2)])
    # 2 paused for 40 minutes: live she is reminded of what she left before that, and by 45 minutes of what she left after it.
    append_lines(store, "events", [recent(1, 120), recent(2, 100), recent(2, 60)])
    process(store.home, timeout="35m", as_of=now() - 2000)
    topology = build_topology(store.settings)
    replayed(store, **LONGER)
    put_on(store.database, PAUSED, "a test")
    deliver(store)
    assert promote(store, topology, "longer", "test").queued == 1
    release(store.database)
    deliver(store)
    assert outbox(store) == [("1", "SENT", ""), ("2", "SENT", ""), ("2", "SUPPRESSED", WITHDRAWN)]


@EITHER
def test_what_is_withdrawn_would_not_be_sent_and_does_not_put_the_brake_on(make_store: Callable[..., Store]) -> None:
    store = make_store(brake_floor=1, mail_url="smtp://127.0.0.1:1")  # where nobody listens
    save_contacts(store.database, [Entry("CUSTOMER", str(n), f"{n}@example.com", False) for n in (1, 2)])
    append_lines(store, "events", [recent(1, 51), recent(2, 50)])
    process(store.home, as_of=now() - 15 * MINUTE)
    put_on(store.database, PAUSED, "a test")
    deliver(store)
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE brake SET state = 'RUNNING'")  # nobody has looked at them
    assert would_mail(store.database, now(), [], 10) == 2
    replayed(store, **LONGER)
    promote(store, build_topology(store.settings), "longer", "test")
    assert would_mail(store.database, now(), [], 10) == 0
    deliver(store)
    assert [(state, reason) for _, state, reason in outbox(store)] == [("SUPPRESSED", WITHDRAWN)] * 2
    assert not read_brake(store.database).is_on


@pytest.mark.parametrize("what", ["waited", "withdrawn", "rolled back"])
def test_a_mail_that_what_is_live_has_after_all_is_sent(store: Store, what: str) -> None:
    save_contacts(store.database, [Entry("CUSTOMER", "1", "1@example.com", False)])
    append_lines(store, "events", [recent(1, 50)])
    process(store.home, as_of=now() - 15 * MINUTE)  # flagged after half an hour, and not after three quarters yet
    replayed(store, **LONGER)
    put_on(store.database, PAUSED, "a test")
    deliver(store)
    topology = build_topology(store.settings)
    assert promote(store, topology, "longer", "test").queued == 0
    release(store.database)
    if what != "waited":
        deliver(store)
        assert outbox(store) == [("1", "SUPPRESSED", WITHDRAWN)]
    if what == "rolled back":
        assert rollback(store, topology, "longer", "test").queued == 1
    else:
        process(store.home, timeout="45m", as_of=now() - 2000)
    deliver(store)
    assert outbox(store) == [("1", "SENT", "")]
    assert len(list((store.home / "outbox").rglob("*.eml"))) == 1


def test_a_mail_that_comes_while_another_is_sent_is_not_withdrawn(store: Store) -> None:
    save_contacts(store.database, [Entry("CUSTOMER", str(n), f"{n}@example.com", False) for n in (1, 2)])
    append_lines(store, "events", [recent(1, 120), recent(2, 50)])
    process(store.home, as_of=now() - 15 * MINUTE)
    replayed(store, **LONGER)
    put_on(store.database, PAUSED, "a test")
    deliver(store)
    promote(store, build_topology(store.settings), "longer", "test")
    release(store.database)

    def flag(name: str) -> None:
        if name == "mail-claimed":
            steps.arm(None)
            process(store.home, timeout="45m", as_of=now() - 2000)

    steps.arm(flag)
    try:
        deliver(store)
    finally:
        steps.arm(None)
    assert outbox(store) == [("1", "SENT", ""), ("2", "SENT", "")]


def test_nobody_is_mailed_again_within_the_gap_by_a_generation_that_does_not_know_of_the_mail(store: Store) -> None:
    save_contacts(store.database, [Entry("CUSTOMER", "1", "1@example.com", False)])
    append_lines(store, "events", [recent(1, 90), recent(1, 50)])  # back after 40 minutes: another cause by 45
    process(store.home, as_of=now() - 15 * MINUTE)
    deliver(store)
    replayed(store, **LONGER)
    moved = promote(store, build_topology(store.settings), "longer", "test")
    assert (moved.queued, moved.too_soon) == (0, 0)  # not flagged yet
    process(store.home, timeout="45m", as_of=now() - 2000)
    deliver(store)
    (_, sent, _), (_, state, reason) = outbox(store)
    assert (sent, state, reason.partition(":")[0]) == ("SENT", "SUPPRESSED", "too soon")
    assert len(list((store.home / "outbox").rglob("*.eml"))) == 1


@EITHER
def test_a_mail_that_is_worth_sending_for_weeks_is_found_however_far_back_it_lies(
    make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a processor of one's own, and of a setting of then; some wait, and some the new generation has alone."""
    use(tmp_path, monkeypatch, MAILER.format(twice=0, other=0).replace("+ 86_400_000", "+ 30 * 86_400_000"))
    store = make_store(processors=("own_mailer",), not_after="30d")
    many = range(1, 301)
    save_contacts(store.database, [Entry("CUSTOMER", str(n), f"{n}@example.com", False) for n in (*many, 1001)])
    append_lines(store, "events", [recent(n, 14_400 - n / 100) for n in many])  # ten days ago
    process(store.home, processors=("own_mailer",), not_after="30d", as_of=now() - 10 * DAY + 60 * MINUTE)
    put_on(store.database, PAUSED, "a test")
    deliver(store)
    assert Counter(state for _, state, _ in outbox(store)) == {"WAITING": 600}
    today = make_store(processors=("own_mailer",), not_after="1d")
    replayed(today, processors=("remind",), name="reminders")
    assert promote(today, build_topology(today.settings), "reminders", "test").queued == 0
    code = MAILER.format(twice=0, other="1000 * (event.id == 1)").replace("+ 86_400_000", "+ 30 * 86_400_000")
    use(tmp_path, monkeypatch, code.replace('name="mail"', 'name="mail" if event.id > 1 else "other"'))
    replayed(today, processors=("mailer",), name="letters")
    assert promote(today, build_topology(today.settings), "letters", "test").queued == 1
    release(store.database)
    deliver(today)
    assert Counter((state, reason) for _, state, reason in outbox(store)) == {
        ("SENT", ""): 600,
        ("SUPPRESSED", WITHDRAWN): 1,
    }


@EITHER
def test_a_mail_that_a_promotion_brings_and_that_can_never_be_sent_has_failed_with_its_reason(
    make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that delivery takes in by itself."""
    code = MAILER.format(twice=0, other=0)
    use(tmp_path, monkeypatch, code)
    store = make_store(processors=("own_mailer",))
    save_contacts(store.database, [Entry("CUSTOMER", str(n), f"{n}@example.com", False) for n in (1, 2)])
    append_lines(store, "events", [recent(1, 20), recent(2, 10)])
    process(store.home, processors=("own_mailer",), as_of=now() - 2000)
    deliver(store)
    use(
        tmp_path,
        monkeypatch,
        code.replace('"mail"', '"mail" if event.id > 1 else "other"').replace('"CUSTOMER"', "None"),
    )
    topology = build_topology(store.settings)
    replayed(store, processors=("mailer",), name="letters")
    moved = promote(store, topology, "letters", "test")
    why = "EMAIL events of log letters can never be sent; `afterlog deliveries list --state FAILED` says why"
    assert (moved.queued, moved.too_soon, moved.notes) == (0, 0, [f"1 {why}"])
    deliver(store)
    *_, (who, state, reason) = sorted(outbox(store), key=lambda row: row[1] == "FAILED")
    assert (who, state) == ("", "FAILED")
    assert reason.startswith("no mail, see letters:0:0: Expected `str`, got `null` - at `$.object.type`")
    assert Counter(state for _, state, _ in outbox(store)) == {"SENT": 2, "FAILED": 1}
    rollback(store, topology, "letters", "test")
    assert promote(store, topology, "letters", "test").notes == []


@EITHER
def test_a_mail_in_doubt_that_a_person_has_sent_once_more_is_sent_from_where_it_lies_by_then(store: Store) -> None:
    save_contacts(store.database, [Entry("CUSTOMER", "1", "1@example.com", False)])
    append_lines(store, "events", [recent(1, 120)])
    process(store.home, as_of=now() - 2000)
    replayed(store, **LONGER)
    run = Run(store, build_topology(store.settings), "test")
    deliverer = Deliverer(run, print)
    put_on(store.database, PAUSED, "not now")
    deliverer.round()
    release(store.database)
    [mail] = deliverer.outbox.waiting(now(), 10)
    assert deliverer.outbox.claim(mail)  # its sender dies
    deliverer.close()
    promote(store, build_topology(store.settings), "longer", "test")
    assert [state for _, state, _ in outbox(store)] == ["UNKNOWN"]
    resolve(store, mail.event_id, sent=False, again=True)
    deliver(store)
    assert [state for _, state, _ in outbox(store)] == ["SENT"]


def test_who_was_mailed_by_another_generation_is_mailed_once_the_gap_has_passed(
    make_store: Callable[..., Store],
) -> None:
    """Also by a run that has looked before."""
    store = make_store(reminder_gap="2s")
    save_contacts(store.database, [Entry("CUSTOMER", "1", "1@example.com", False)])
    append_lines(store, "events", [recent(1, 90), recent(1, 50)])
    process(store.home, as_of=now() - 15 * MINUTE)
    deliver(store)
    replayed(store, **LONGER)
    promote(store, build_topology(store.settings), "longer", "test")
    run = Run(store, build_topology(store.settings), "test")
    deliverer = Deliverer(run, print)
    process(store.home, timeout="45m", as_of=now() - 2000)
    put_on(store.database, PAUSED, "not now")
    deliverer.round()
    release(store.database)
    [mail] = deliverer.outbox.waiting(now(), 10)
    guards = Guards(run, deliverer.outbox)
    assert guards.plain_reason(mail).startswith("too soon: mailed at ")
    time.sleep(2)
    assert guards.plain_reason(mail) == ""
    deliverer.close()


def test_a_mail_that_may_have_been_sent_before_a_restore_is_in_doubt(store: Store) -> None:
    """Only a new generation had it, which was lost together with the row that says that it was sent."""
    save_contacts(store.database, [Entry("CUSTOMER", "1", "1@example.com", False)])
    append_lines(store, "events", [recent(1, 25)])
    process(store.home, as_of=now() - 2000)
    topology = build_topology(store.settings)
    mark_restored(store.database, store, topology.derived_logs())
    replayed(store, settings={"timeout": "20m"}, name="shorter")
    assert promote(store, topology, "shorter", "test").queued == 1
    assert outbox(store) == [("1", "UNKNOWN", MAY_HAVE_BEEN_SENT)]
    deliver(store)
    assert not list((store.home / "outbox").rglob("*.eml"))


def test_those_who_follow_let_go_and_go_on_with_the_new_generation(make_store: Callable[..., Store]) -> None:
    store = make_store(timeout="45m")
    history(store)
    replayed(store, **LONGER)
    topology = build_topology(store.settings)
    run = Run(store, topology, "shift")
    run.pulse.start()
    names = ("abandonment", "remind", "derive")
    thread = threading.Thread(target=lambda: side_by_side(run, names, follow))
    thread.start()
    try:
        while not run.is_held("remind"):
            run.stop.wait(0.01)
        moved = promote(store, topology, "longer", "test")
        at = _wait_for_the_end(store, run)
    finally:
        run.stop.set()
        thread.join()
    assert (at["abandonment"].generation, at["remind"].generation) == (2, 2)
    assert moved.seconds < 5
    check_as_ever(store, timeout="45m")


def test_who_reads_on_of_what_was_live_is_told_where_it_goes_on(make_store: Callable[..., Store]) -> None:
    store = make_store(timeout="45m")
    history(store)
    replayed(store, **LONGER)
    command = [sys.executable, "-m", "deployments.cli", "read", "baskets", "--follow"]
    before = log_bytes(store.home, "baskets")
    env = plain_environment(store.home) | {f"AFTERLOG_{k.upper()}": v for k, v in settings_of(store.home).items()}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert reader.stdout.read(len(before)) == before
        promote(store, build_topology(store.settings), "longer", "test")
        rest, told = reader.communicate(timeout=PATIENCE)
    assert (reader.returncode, rest) == (1, b"")
    assert told == (
        b"afterlog: baskets: generation 2 is live now, and this was generation 1. Go on with it: afterlog read baskets --follow\n"
    )


def _wait_for_the_end(store: Store, run: Run) -> dict[str, Position]:
    """Append, and have the followers take it; gives their checkpoints."""
    append_lines(store, "events", [line(n % 6, 2200 + n * 40) for n in range(12)])
    end = store.reader("events", 0).end()
    deadline = now() + 20_000
    while now() < deadline:
        at = {p.processor: p for p in positions(store)}
        baskets = store.committed_end("baskets", 0)
        if at["abandonment"].offset == at["derive"].offset == end and at["remind"].offset == baskets:
            return at
        run.stop.wait(0.02)
    raise AssertionError(f"they did not get to the end: {at}")


def test_a_processor_without_a_log_stands_at_the_new_end(
    make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "counting.py").write_text(
        "from tasks.processors import contract\n"
        "class Processor(contract.Processor):\n"
        "    name, reads = 'counting', 'baskets'\n"
        "    def event(self, event, state, out):\n"
        "        pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    store = make_store(processors=("counting",))
    append_lines(store, "events", [line(1, 0), line(1, 40), line(1, 100)])
    process(store.home, processors=("counting",), as_of=START + 200 * MINUTE)
    replayed(store, **LONGER)
    promote(store, build_topology(store.settings), "longer", "test")
    at = {p.processor: p for p in positions(store)}["counting"]
    assert at.offset == store.committed_end("baskets", 0) < len(log_bytes(store.home, "baskets"))
    assert at.lines == 3
    append_lines(store, "events", [line(2, 300)])
    process(store.home, processors=("counting",), as_of=START + 400 * MINUTE)
    assert {p.processor: p for p in positions(store)}["counting"].lines == 4


WINBACK = """
from tasks.processors import contract
class Processor(contract.Processor):
    name, reads, writes, mails = "winback", "baskets", "winbacks", True
    def event(self, event, state, out):
        if event.verb == "ABANDONED_BASKET":
            out.emit(self, event, {"id": "EMAIL_SYSTEM"}, "EMAIL", {"type": "CUSTOMER", "id": event.id, "template":
                     "basket-reminder"}, name="mail", at=event.clock, not_after=event.clock + 86_400_000)
        else:
            out.ignored += 1
"""


@pytest.mark.parametrize("restored", [False, True])
def test_who_reads_what_is_moved_and_was_named_since_keeps_nobody_from_their_mails(
    make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored: bool
) -> None:
    """Its log is made of one generation: a promotion takes a replay that has it, and of what a rollback leaves none is sent.

    Nor does it where a backup was put back some day, since which a mail's cause is looked for once more.
    """
    store = make_store()
    if restored:
        mark_restored(store.database, store, {"baskets", "reminders"})
        with store.database.write() as connection:
            connection.exec_driver_sql("UPDATE restored SET at = at - 86400000")
    save_contacts(store.database, [Entry("CUSTOMER", str(n), f"{n}@example.com", False) for n in (1, 2, 3)])
    append_lines(store, "events", [recent(3, 160), recent(3, 121), recent(2, 120), recent(2, 81), recent(1, 60)])
    process(store.home, timeout="35m", as_of=now() - 2000)
    replayed(store, **LONGER)
    use(tmp_path, monkeypatch, WINBACK)
    store = make_store(processors=("own_mailer",))
    topology = build_topology(store.settings)
    with pytest.raises(UsageError, match="winback reads baskets, and was not replayed with it"):
        promote(store, topology, "longer", "test")
    promote(store, build_topology(make_store().settings), "longer", "test")
    process(store.home, processors=("own_mailer",))
    put_on(store.database, PAUSED, "a test")
    deliver(store)
    rollback(store, topology, "longer", "test")
    release(store.database)
    deliver(store)
    assert Counter(reason.partition(" baskets:")[0] for *_, reason in outbox(store)) == {
        "": 3,  # the reminders
        WITHDRAWN: 2,  # those of the other generation
        "its cause is not at": 3,
    }
    drop_replay(store, "longer", "test")
    replayed(store, **LONGER)
    assert promote(store, topology, "longer", "test").live.keys() == {"baskets", "reminders", "winbacks"}


def test_a_log_that_nobody_has_written_yet_is_promoted_with_the_others(store: Store) -> None:
    """`deliver` was never run, so `remind` has not begun, neither live nor in the replay."""
    save_contacts(store.database, [Entry("CUSTOMER", "1", "1@example.com", False)])
    append_lines(store, "events", [recent(1, 120)])
    process(store.home, *build_topology(store.settings).on_raw_logs(), as_of=now() - 2000)
    generation = replayed(store, settings={"not_after": "2d"}, name="later")
    topology = build_topology(store.settings)
    for _ in range(2):
        promote(store, topology, "later", "test")
        assert store.live_generation("reminders") == store.live_generation("reactions") == generation
        deliver(store)
        assert outbox(store) == [("1", "SENT", "")]
        rollback(store, topology, "later", "test")
        assert store.live_generation("reminders") == 1
        deliver(store)
        assert outbox(store) == [("1", "SENT", "")]


def test_the_command_line_promotes_and_rolls_back(store: Store) -> None:
    history(store)
    replayed(store, **LONGER)
    done = afterlog(store.home, "replays", "promote", "longer", timeout="45m")
    assert done.returncode == 0, done.stderr
    assert b"live is now baskets generation 2, reminders generation 2" in done.stderr
    read = afterlog(store.home, "read", "baskets")
    assert read.stdout == live(store, "baskets")
    assert afterlog(store.home, "read", "baskets", "--generation", "1").stdout == log_bytes(store.home, "baskets")
    assert afterlog(store.home, "status").returncode == 0
    done = afterlog(store.home, "replays", "rollback", "longer")
    assert b"live is now baskets generation 1, reminders generation 1" in done.stderr
    assert rows_of(store, ("live_generation",))["live_generation"]
