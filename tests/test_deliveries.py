"""Deliveries, for people: the list, and settling mails in doubt: at most once, unless a person says it was not sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from email import message_from_bytes
from typing import Any

import pytest
import sqlalchemy as sa

from flows import tables
from storage.decisions import undecided
from storage.locks import RunLock
from storage.store import Store
from tasks.deliver import deliver_to_end, follow_mail
from tests.conftest import afterlog, log_bytes
from tests.operations import wait_for
from tests.smtp_server import DROP, Fault, SmtpServer
from tests.test_brake import deliver, run_of, states, submit

MakeStore = Callable[..., Store]
ID = "derive/events:0:0/tax-received"


@pytest.fixture
def server() -> Iterator[SmtpServer]:
    with SmtpServer() as server:
        yield server


@pytest.fixture
def doubtful(make_store: MakeStore, server: SmtpServer) -> Store:
    """A store with one mail of which nobody knows whether it was accepted; in truth it was not."""
    server.faults.append(Fault("body", DROP))
    store = make_store(mail_url=server.url)
    submit(store, 1)
    assert deliver(store).states == {"UNKNOWN": 1}
    return store


def outcomes(store: Store) -> list[tuple[str, str]]:
    events = [json.loads(line) for line in log_bytes(store.home, "deliveries").splitlines()]
    assert store.committed_end("deliveries", 0) == len(log_bytes(store.home, "deliveries"))
    return [(e["verb"], e["object"].get("reason", "")) for e in events]


def listed(store: Store, *arguments: str) -> list[dict[str, Any]]:
    done = afterlog(store.home, "deliveries", "list", "--json", *arguments)
    assert (done.returncode, done.stderr) == (0, b"")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


class TestList:
    def test_it_shows_each_mail_with_its_state_recipient_and_reason(self, doubtful: Store) -> None:
        [mail] = listed(doubtful)
        assert (mail["id"], mail["state"], mail["attempts"]) == (ID, "UNKNOWN", 1)
        assert (mail["recipient_type"], mail["recipient_id"]) == ("CLIENT", "1")
        assert mail["reason"]
        assert listed(doubtful, "--state", "UNKNOWN") == [mail]
        assert listed(doubtful, "--state", "SENT") == []
        plain = afterlog(doubtful.home, "deliveries", "list").stdout.decode().splitlines()
        assert plain[0] == "id\tstate\trecipient\tattempts\tchanged\treason"
        assert plain[1].startswith(f"{ID}\tUNKNOWN\tCLIENT 1\t1\t")

    def test_it_says_when_there_are_more(self, make_store: MakeStore) -> None:
        store = make_store()
        submit(store, 1, 2, 3)
        deliver(store)
        done = afterlog(store.home, "deliveries", "list", "--limit", "2")
        assert (len(done.stdout.splitlines()), b"more than these 2" in done.stderr) == (3, True)
        assert len(listed(store, "--limit", "0")) == 3

    def test_a_wrong_state_is_refused(self, store: Store) -> None:
        done = afterlog(store.home, "deliveries", "list", "--state", "LOST")
        assert (done.returncode, done.stdout) == (2, b"")
        assert b"LOST" in done.stderr

    def test_the_status_and_its_check_tell_of_doubt(self, doubtful: Store) -> None:
        done = afterlog(doubtful.home, "status", "--check")
        assert done.returncode == 1
        assert b"1 mails are in doubt: see `afterlog deliveries list --state UNKNOWN`" in done.stderr


class TestResolve:
    def test_sent_settles_it_and_nothing_is_sent_again(self, doubtful: Store, server: SmtpServer) -> None:
        done = afterlog(doubtful.home, "deliveries", "resolve", ID, "sent")
        assert done.returncode == 0, done.stderr
        assert outcomes(doubtful)[1:] == [("SENT", "sent, says a person")]
        assert deliver(doubtful).states == {}
        assert (states(doubtful), server.inbox) == ({"SENT": 1}, [])
        assert [row["state"] for row in tables.mails(doubtful)] == ["SENT"]  # not UNKNOWN as well, as it once was

    def test_not_sent_settles_it_as_failed(self, doubtful: Store, server: SmtpServer) -> None:
        assert afterlog(doubtful.home, "deliveries", "resolve", ID, "not-sent").returncode == 0
        assert outcomes(doubtful)[1:] == [("FAILED", "not sent, says a person")]
        assert deliver(doubtful).states == {}
        assert (states(doubtful), server.inbox) == ({"FAILED": 1}, [])

    def test_once_more_sends_it_under_the_same_message_id(self, make_store: MakeStore, server: SmtpServer) -> None:
        server.faults.append(Fault("body", DROP, accepted=True))
        store = make_store(mail_url=server.url)
        submit(store, 1)
        deliver(store)
        done = afterlog(store.home, "deliveries", "resolve", ID, "not-sent", "--again")
        assert done.returncode == 0
        assert b"to be tried once more" in done.stderr
        assert states(store) == {"WAITING": 1}
        assert deliver(store).states == {"SENT": 1}
        ids = [message_from_bytes(each.message)["Message-ID"] for each in server.inbox]
        assert len(ids) == 2
        assert ids[0] == ids[1]
        assert [verb for verb, _ in outcomes(store)] == ["UNKNOWN", "FAILED", "SENT"]
        assert deliver(store).states == {}

    def test_once_more_is_still_asked_whether_it_is_worth_sending(
        self, make_store: MakeStore, server: SmtpServer
    ) -> None:
        server.faults.append(Fault("body", DROP))
        store = make_store(mail_url=server.url)
        submit(store, 1)
        assert deliver(store).states == {"UNKNOWN": 1}
        with store.database.write() as connection:
            connection.exec_driver_sql("UPDATE delivery SET not_after = 1")
        afterlog(store.home, "deliveries", "resolve", ID, "not-sent", "--again")
        assert deliver(store).states == {"SUPPRESSED": 1}
        assert server.inbox == []

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ((ID, "perhaps"), "perhaps"),
            ((ID, "sent", "--again"), "--again goes with not-sent only"),
            (("no/such/mail", "sent"), "no such mail; found 'no/such/mail'"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, doubtful: Store, arguments: tuple[str, ...], said: str) -> None:
        done = afterlog(doubtful.home, "deliveries", "resolve", *arguments)
        assert (done.returncode, states(doubtful)) == (2, {"UNKNOWN": 1})
        assert said in done.stderr.decode()

    def test_what_is_not_in_doubt_cannot_be_resolved(self, make_store: MakeStore) -> None:
        store = make_store()
        submit(store, 1)
        deliver(store)
        done = afterlog(store.home, "deliveries", "resolve", ID, "not-sent", "--again")
        assert done.returncode == 2
        assert b"only a mail in doubt can be resolved; found SENT, expected UNKNOWN" in done.stderr
        assert states(store) == {"SENT": 1}

    def test_while_a_shift_delivers_it_is_the_shift_that_settles(self, doubtful: Store) -> None:
        run = run_of(doubtful)
        run.pulse.start()
        follower = threading.Thread(target=follow_mail, args=(run,))
        follower.start()
        try:
            wait_for(lambda: run.is_held("deliver"))
            assert afterlog(doubtful.home, "deliveries", "resolve", ID, "sent").returncode == 0
            assert outcomes(doubtful)[1:] == [("SENT", "sent, says a person")]
        finally:
            run.stop.set()
            follower.join()

    def test_a_shift_that_does_not_answer_leaves_it_noted_for_the_next(self, doubtful: Store) -> None:
        lock = RunLock(doubtful.lock_path("deliver.lock"), "a shift that hangs")
        assert lock.try_acquire()
        done = afterlog(doubtful.home, "deliveries", "resolve", ID, "sent")
        assert done.returncode == 0
        assert b"noted, and carried out by a shift that hangs" in done.stderr
        assert states(doubtful) == {"UNKNOWN": 1}
        lock.release()
        deliver_to_end(run_of(doubtful))
        assert states(doubtful) == {"SENT": 1}

    def test_what_was_decided_of_a_mail_that_is_gone_is_forgotten(self, doubtful: Store) -> None:
        with doubtful.database.write() as connection:
            connection.execute(sa.text("INSERT INTO decision (event_id, state, at) VALUES ('gone', 'SENT', 1)"))
        assert undecided(doubtful.database) == 1
        deliver_to_end(run_of(doubtful))
        assert undecided(doubtful.database) == 0
        assert states(doubtful) == {"UNKNOWN": 1}

    @pytest.mark.parametrize("step", ["outcome-logged:1", "outcome-committed:1"])
    @pytest.mark.parametrize(("outcome", "state"), [(("sent",), "SENT"), (("not-sent", "--again"), "WAITING")])
    def test_killed_while_it_settles_it_is_settled_once(
        self, doubtful: Store, monkeypatch: pytest.MonkeyPatch, step: str, outcome: tuple[str, ...], state: str
    ) -> None:
        monkeypatch.setenv("AFTERLOG_TEST_KILL", step)
        assert afterlog(doubtful.home, "deliveries", "resolve", ID, *outcome).returncode == -9
        monkeypatch.delenv("AFTERLOG_TEST_KILL")
        afterlog(doubtful.home, "pause", "deliver")
        deliver(doubtful)
        assert states(doubtful) == {state: 1}
        assert len(outcomes(doubtful)) == 2
