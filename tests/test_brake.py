"""The brake: a person holds mails, delivery holds them itself, and what is held is released or dropped by a person."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from storage.brake import HOUR, PAUSED, mailed_since, put_on, read_brake, usual_mails, would_mail
from storage.contacts import Entry, save_contacts
from storage.door import append_lines
from storage.mails import is_allowed
from storage.restore import mark_restored
from storage.store import Store
from storage.times import now
from tasks.deliver import DeliverySummary, deliver_to_end, follow_mail
from tasks.process import FinalTick, process_to_end
from tasks.run import Run
from tasks.settle import resolve
from tasks.topology import build_topology
from tests.conftest import ROOT, afterlog, log_bytes
from tests.operations import wait_for
from tests.smtp_server import SmtpServer

MakeStore = Callable[..., Store]
MINUTE = 60_000


def run_of(store: Store) -> Run:
    return Run(store, build_topology(store.settings), "a test")


def submit(store: Store, *clients: int) -> None:
    """Tax submissions, processed: one EMAIL each, to a client that has an address."""
    save_contacts(store.database, [Entry("CLIENT", str(c), f"c{c}@example.com", False) for c in clients])
    at = now()
    lines = [
        json.dumps({"subject": {"id": "UK"}, "verb": "SUBMIT_TAX", "object": {"id": c}, "context": {"at": at}}).encode()
        for c in clients
    ]
    append_lines(store, "events", lines)
    process_to_end(run_of(store), "derive", None)


def deliver(store: Store, limit: int | None = None) -> DeliverySummary:
    summary = deliver_to_end(run_of(store), limit)
    summary.states = +summary.states
    return summary


def states(store: Store) -> dict[str, int]:
    with store.database.read() as connection:
        rows = connection.exec_driver_sql("SELECT state, COUNT(*) FROM delivery GROUP BY state").all()
    return {state: count for state, count in rows}  # noqa: C416  # rows are not pairs to the type checker


def sent_before(store: Store, hours_ago: float, count: int, state: str = "SENT") -> None:
    """Mails of the past, as the outbox keeps them."""
    with store.database.write() as connection:
        for n in range(count):
            connection.exec_driver_sql(
                "INSERT INTO delivery VALUES (?,?,'reactions',1,0,0,'CLIENT','1',0,0,1,'',?,0)",
                (f"past/{hours_ago}/{state}/{n}", state, now() - round(hours_ago * HOUR)),
            )


class TestByHand:
    def test_while_it_is_on_nothing_is_claimed_or_sent_and_the_status_says_so(self, make_store: MakeStore) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            submit(store, 1, 2)
            done = afterlog(store.home, "pause", "deliver", "--reason", "a wrong template")
            assert (done.returncode, done.stdout) == (0, b"")
            assert b"deliver is PAUSED since " in done.stderr
            assert b"a wrong template" in done.stderr
            told = afterlog(store.home, "deliver", "--no-prefect", mail_url=server.url)
            assert told.returncode == 0
            assert b"mails are held: a wrong template" in told.stderr
            assert (server.sessions, states(store), log_bytes(store.home, "deliveries")) == (0, {"WAITING": 2}, b"")
            checked = afterlog(store.home, "status", "--check")
            assert checked.returncode == 1
            assert b"delivery is paused since " in checked.stderr
            assert b"a wrong template; 2 mails are held" in checked.stderr
            found = json.loads(afterlog(store.home, "status", "--json").stdout)
            assert (found["delivery"]["brake"], found["delivery"]["due"]) == ("PAUSED", 2)
            assert {p["state"] for p in found["processors"] if p["processor"] == "deliver"} == {"paused"}

            resumed = afterlog(store.home, "resume", "deliver")
            assert b"deliver is RUNNING; 2 mails had been held" in resumed.stderr
            assert deliver(store).states == {"SENT": 2}
        assert len(server.inbox) == 2

    def test_a_second_pause_changes_nothing(self, store: Store) -> None:
        for reason in ("first", "second"):
            afterlog(store.home, "pause", "deliver", "--reason", reason)
        assert read_brake(store.database).reason == "first"

    def test_a_follower_stops_between_two_mails_and_goes_on_when_it_is_released(self, make_store: MakeStore) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            submit(store, *range(100))
            run = run_of(store)
            run.pulse.start()
            follower = threading.Thread(target=follow_mail, args=(run,))
            follower.start()
            try:
                wait_for(lambda: len(server.inbox) > 3, every=0.01)
                put_on(store.database, PAUSED, "a test")  # a command may take longer to start than the mails
                held = len(server.inbox) + 1  # the one that was claimed before may still be on its way
                time.sleep(1.5)
                assert len(server.inbox) <= held < 100
                assert "CLAIMED" not in states(store)
                afterlog(store.home, "resume", "deliver")
                wait_for(lambda: len(server.inbox) == 100)
            finally:
                run.stop.set()
                follower.join()
        assert states(store) == {"SENT": 100}

    def test_what_waits_too_long_under_the_brake_is_too_old_afterwards(self, make_store: MakeStore) -> None:
        store = make_store(not_after="1s")
        submit(store, 1)
        afterlog(store.home, "pause", "deliver")
        deliver(store)
        time.sleep(1.1)
        assert states(store) == {"WAITING": 1}
        afterlog(store.home, "resume", "deliver")
        assert deliver(store).reasons == {"too old: past its not_after": 1}


class TestFlood:
    def test_more_than_the_floor_is_held_before_the_first_of_them(self, make_store: MakeStore) -> None:
        store = make_store(brake_floor=10)
        submit(store, *range(10))
        assert deliver(store).states == {"SENT": 10}
        submit(store, 11)
        told: list[str] = []
        summary = deliver_to_end(run_of(store), told=told.append)
        assert +summary.states == {}
        assert states(store) == {"SENT": 10, "WAITING": 1}
        [reason] = told
        assert "mails surge: 10 within the last hour and at least 1 due now, at most 10 an hour" in reason
        assert summary.held == reason == read_brake(store.database).reason
        assert "delivery has stopped itself since" in (err := afterlog(store.home, "status", "--check").stderr.decode())
        assert "1 mails are held" in err
        deliver_to_end(run_of(store), told=told.append)
        assert len(told) == 1  # it is told once, not at every round

    def test_the_usual_is_the_median_of_the_hours_with_mails(self, make_store: MakeStore) -> None:
        store = make_store(brake_floor=1, brake_factor=3)
        for hours_ago, count in ((3, 4), (5, 4), (27, 4), (50, 400)):
            sent_before(store, hours_ago, count)
        submit(store, *range(12))
        assert deliver(store).states == {"SENT": 12}
        submit(store, 12)
        assert deliver(store).states == {}
        assert "the usual 4)" in read_brake(store.database).reason

    def test_mails_that_a_clock_which_was_ahead_has_sent_are_none_of_the_last_hour(self, make_store: MakeStore) -> None:
        """Else they would hold all others until that time has come, whatever a person releases."""
        store = make_store(brake_floor=2)
        sent_before(store, -0.5, 2)
        sent_before(store, -30, 3)
        assert mailed_since(store.database, now() - HOUR) == 2
        with store.database.write() as connection:
            connection.exec_driver_sql(f"DELETE FROM delivery WHERE changed_at < {now() + HOUR}")  # noqa: S608  # a number
        submit(store, 1)
        assert deliver(store).states == {"SENT": 1}

    def test_who_gets_no_mail_anyway_is_not_counted(self, make_store: MakeStore) -> None:
        store = make_store(brake_floor=2, mail_allow=("@example.org",))
        submit(store, *range(5))
        assert deliver(store).reasons == {"not on the list of allowed recipients": 5}
        assert not read_brake(store.database).is_on

    @pytest.mark.parametrize(
        ("allow", "email", "goes"),
        [
            ("@MÜNCHEN.de", "ann@MÜNCHEN.DE", True),
            ("@MÜNCHEN.de", "ann@münchen.de", False),
            ("Ärzte@example.com", "Ärzte@Example.com", True),
            ("Ärzte@example.com", "ärzte@example.com", False),
            ("@straße.de", "ann@strasse.de", False),
            ("@a_%/b.de", "ann@A_%/B.de", True),
            ("@a_b.de", "ann@axb.de", False),
        ],
    )
    def test_whom_the_list_of_allowed_recipients_takes_is_counted(
        self, make_store: MakeStore, allow: str, email: str, goes: bool
    ) -> None:
        store = make_store()
        submit(store, 1)
        save_contacts(store.database, [Entry("CLIENT", "1", email, False)])
        put_on(store.database, PAUSED, "a test")
        deliver(store)
        assert is_allowed(email, [allow]) is goes
        counted = would_mail(store.database, now(), [allow], 10)
        assert counted == goes or (counted and not allow.isascii())  # a database may know of more capitals

    def test_a_run_with_a_limit_counts_what_it_would_mail(self, make_store: MakeStore) -> None:
        store = make_store(brake_floor=3)
        submit(store, *range(5))
        assert deliver(store, limit=3).states == {"SENT": 3}
        assert deliver(store, limit=1).states == {}
        assert read_brake(store.database).state == "STOPPED"

    def test_a_person_releases_all_that_was_held_and_it_does_not_count_again(self, make_store: MakeStore) -> None:
        store = make_store(brake_floor=3)
        submit(store, *range(50))
        assert deliver(store).states == {}
        assert b"50 mails had been held" in afterlog(store.home, "resume", "deliver").stderr
        assert deliver(store).states == {"SENT": 50}
        submit(store, *range(100, 103))
        assert deliver(store).states == {"SENT": 3}
        submit(store, 104)
        assert deliver(store).states == {}

    def test_mails_that_may_have_been_sent_before_a_restore_are_none_of_the_last_hour(
        self, make_store: MakeStore
    ) -> None:
        store = make_store(brake_floor=5)
        submit(store, *range(9))
        mark_restored(store.database, store, run_of(store).topology.derived_logs())
        assert deliver(store).states == {"UNKNOWN": 9}
        time.sleep(0.01)  # what happens after the restore is new
        submit(store, 1)
        assert deliver(store).states == {"SENT": 1}

    def test_mails_that_a_person_settles_as_sent_are_none_of_the_last_hour(self, make_store: MakeStore) -> None:
        store = make_store(brake_floor=5)
        submit(store, *range(9))
        mark_restored(store.database, store, run_of(store).topology.derived_logs())
        assert deliver(store).states == {"UNKNOWN": 9}
        with store.database.read() as connection:
            ids = connection.exec_driver_sql("SELECT event_id FROM delivery").scalars().all()
        for event_id in ids:
            resolve(store, event_id, sent=True, again=False)
        time.sleep(0.01)  # what happens after the restore is new
        submit(store, 1)
        assert deliver(store).states == {"SENT": 1}
        assert usual_mails(store.database, now() + 2 * HOUR) == 1

    def test_mails_of_long_ago_that_a_restored_database_learns_of_are_none_of_the_last_hour(
        self, make_store: MakeStore
    ) -> None:
        store = make_store(brake_floor=5)
        at = now() // HOUR * HOUR - 3 * HOUR
        outcomes = [
            {"verb": "SENT", "object": {"type": "EMAIL", "id": f"past/{n}"}, "context": {"at": at + n}}
            for n in range(9)
        ]
        log = store.directory("deliveries", 0)
        log.mkdir(parents=True, exist_ok=True)
        (log / f"{0:020d}.jsonl").write_text("".join(json.dumps(event) + "\n" for event in outcomes))
        submit(store, 1)
        assert deliver(store).states == {"SENT": 1}
        assert usual_mails(store.database, now()) == 9

    def test_a_person_drops_what_was_held(self, make_store: MakeStore) -> None:
        store = make_store(brake_floor=3)
        submit(store, *range(5))
        refused = afterlog(store.home, "deliveries", "drop")
        assert (refused.returncode, b"delivery is running: nothing is held" in refused.stderr) == (2, True)
        deliver(store)
        done = afterlog(store.home, "deliveries", "drop")
        assert done.returncode == 0, done.stderr
        assert b"5 mails dropped. Delivery is still stopped" in done.stderr
        lines = [json.loads(line) for line in log_bytes(store.home, "deliveries").splitlines()]
        assert [(e["verb"], e["object"]["reason"]) for e in lines] == [("SUPPRESSED", "dropped by a person")] * 5
        assert store.committed_end("deliveries", 0) == len(log_bytes(store.home, "deliveries"))
        afterlog(store.home, "resume", "deliver")
        assert deliver(store).states == {}
        assert states(store) == {"SUPPRESSED": 5}

    def test_what_is_dropped_while_a_shift_holds_the_lock_is_carried_out_by_the_shift(
        self, make_store: MakeStore
    ) -> None:
        store = make_store(brake_floor=3)
        submit(store, *range(5))
        run = run_of(store)
        run.pulse.start()
        follower = threading.Thread(target=follow_mail, args=(run,))
        follower.start()
        try:
            wait_for(lambda: read_brake(store.database).is_on)
            done = afterlog(store.home, "deliveries", "drop")
            assert b"5 mails dropped. Delivery" in done.stderr
            assert states(store) == {"SUPPRESSED": 5}
        finally:
            run.stop.set()
            follower.join()


def left_baskets(store: Store, count: int) -> None:
    """So many customers left a basket 31 minutes ago, and nothing has come since: ticks flag them, reminders are due."""
    at = now() - 31 * MINUTE
    item = {"id": 3, "name": "Lemon", "price": 5, "count": 2}
    lines = [
        json.dumps({
            "subject": {"id": c, "type": "CUSTOMER"}, "verb": "ADDED_ITEM_TO_BASKET", "object": {"item": item},
            "context": {"at": at}, "event": {"inserted_at": at},
        }).encode()
        for c in range(count)
    ]  # fmt: skip
    append_lines(store, "events", lines)
    save_contacts(store.database, [Entry("CUSTOMER", str(c), f"c{c}@example.com", False) for c in range(count)])
    final = FinalTick("now")
    for name in ("abandonment", "normalise"):
        process_to_end(run_of(store), name, final)
    process_to_end(run_of(store), "remind", None)


def make_silent(store: Store, minutes: float) -> None:
    """As if the last line had been appended so long ago."""
    then = time.time() - minutes * 60
    for path in store.directory("events", 0).glob("*.jsonl"):
        os.utime(path, (then, then))


class TestSurge:
    def test_baskets_left_in_numbers_while_the_log_is_silent_are_no_lost_customers(self, make_store: MakeStore) -> None:
        store = make_store(brake_surge_floor=20)
        left_baskets(store, 21)
        make_silent(store, 31)
        assert deliver(store).states == {}
        reason = read_brake(store.database).reason
        assert "abandonments surge while the log is silent: 21 baskets, usual for as long 0" in reason
        assert "no new event for 31m" in reason
        afterlog(store.home, "resume", "deliver")
        assert deliver(store).states == {"SENT": 21}

    @pytest.mark.parametrize(("count", "silent"), [(20, 31), (21, 5)])
    def test_few_baskets_or_a_log_that_lives_are_reminded_of(
        self, make_store: MakeStore, count: int, silent: float
    ) -> None:
        store = make_store(brake_surge_floor=20)
        left_baskets(store, count)
        make_silent(store, silent)
        assert deliver(store).states == {"SENT": count}

    def test_what_is_usual_is_no_surge(self, make_store: MakeStore) -> None:
        store = make_store(brake_surge_floor=20)
        left_baskets(store, 21)
        make_silent(store, 31)
        with store.database.write() as connection:
            for hours in range(2, 9):
                bucket = (now() - hours * HOUR) // 600_000 * 600_000
                connection.exec_driver_sql("INSERT INTO tally VALUES ('ABANDONED_BASKET', ?, 30)", (bucket,))
        assert deliver(store).states == {"SENT": 21}


def test_a_claim_and_a_pause_exclude_each_other(store: Store) -> None:
    """A process dies right after its claim; a pause in between would have refused the claim."""
    submit(store, 1)
    code = (
        "from storage.outbox import Outbox; from storage.settings import load_settings; from storage.store import Store\n"
        "from storage.brake import PAUSED, put_on; s = Store(load_settings()); o = Outbox(s, 'deliveries')\n"
        "from tasks.deliver import Deliverer; from tasks.run import Run; from tasks.topology import build_topology\n"
        "d = Deliverer(Run(s, build_topology(s.settings), 'test'), print)\n"
        "d._take_in()\n"
        "[m] = o.waiting(9**15, 9)\n"
        "put_on(s.database, PAUSED, 'x'); print(o.claim(m))"
    )
    env = {**os.environ, "AFTERLOG_HOME": str(store.home)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, check=True)
    assert done.stdout == b"False\n"
    assert states(store) == {"WAITING": 1}
