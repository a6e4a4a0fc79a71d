"""Delivery: at most one mail for each EMAIL event, to whom it should still reach, and never in doubt silently."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

import tasks.mail
from flows.shift import HAND_OVER
from storage import steps
from storage.brake import would_mail
from storage.contacts import Entry, forget_contact, list_contacts, read_contacts, save_contacts
from storage.door import append_events, append_lines
from storage.errors import Stopped, UsageError
from storage.locks import RunLock
from storage.mails import LONGEST_WAIT, Mail
from storage.outbox import Outbox
from storage.restore import mark_restored
from storage.settings_sources import Secret
from storage.store import DELIVERIES, Store
from storage.tables import Delivery
from storage.times import now
from tasks.deliver import DeliverySummary, deliver_to_end
from tasks.local import side_by_side
from tasks.mail import parse_address
from tasks.process import FinalTick, positions, process_to_end
from tasks.run import Run
from tasks.settle import resolve
from tasks.topology import build_topology
from tests.conftest import ROOT, log_bytes, settings_of
from tests.operations import PATIENCE, wait_for
from tests.smtp_server import DROP, HANG, Fault, Received, SmtpServer, refusing_port

BOTH_DATABASES = True
MakeStore = Callable[..., Store]
ANN = Entry("CLIENT", "1", "ann@example.com", False)
MINUTE = 60_000


def run_of(store: Store) -> Run:
    return Run(store, build_topology(store.settings), "a test")


def submitted(store: Store, *clients: int, ago: int = 0) -> None:
    """Tax submissions of clients, `ago` milliseconds ago, processed: one EMAIL event each."""
    at = now() - ago
    for client in clients:
        line = {"subject": {"id": "UK"}, "verb": "SUBMIT_TAX", "object": {"id": client}, "context": {"at": at}}
        append_lines(store, "events", [json.dumps(line).encode()])
    process_to_end(run_of(store), "derive", None)


def did(verb: str, ago: float, inserted: float | None = None, **obj: Any) -> bytes:
    """What customer 15 did so many minutes ago."""
    stamp = now() - round((ago if inserted is None else inserted) * MINUTE)
    event = {
        "subject": {"id": 15, "type": "CUSTOMER"},
        "verb": verb,
        "object": obj,
        "context": {"at": now() - round(ago * MINUTE)},
        "event": {"inserted_at": stamp},
    }
    return json.dumps(event).encode()


def left_behind(store: Store) -> None:
    """Customer 15 left a basket 40 minutes ago; its reminder is due."""
    item = {"id": 3, "name": "Lemon", "price": 5, "count": 2}
    append_lines(store, "events", [did("ADDED_ITEM_TO_BASKET", 40, item=item)])
    run, final = run_of(store), FinalTick("now")
    assert side_by_side(run, run.topology.on_raw_logs(), lambda r, n: process_to_end(r, n, final)).failures == {}
    save_contacts(store.database, [Entry("CUSTOMER", "15", "kim@example.com", False)])


def deliver(store: Store, limit: int | None = None) -> DeliverySummary:
    """What `afterlog deliver` does."""
    run = run_of(store)
    for name in run.topology.on_derived_logs():
        process_to_end(run, name, None)
    summary = deliver_to_end(run, limit)
    summary.states = +summary.states  # without those that are none
    return summary


def outcomes(store: Store) -> list[tuple[str, str]]:
    """What the log says became of mails, in its order."""
    events = [json.loads(line) for line in log_bytes(store.home, "deliveries").splitlines()]
    return [(e["verb"], e["object"].get("reason", "")) for e in events]


def row(store: Store) -> dict[str, Any]:
    """The one mail's row."""
    with store.database.read() as connection:
        return dict(connection.execute(sa.select(Delivery.__table__)).mappings().one())  # type: ignore[attr-defined]  # SQLModel hides it


def lose_rows(store: Store) -> None:
    """The database is lost, but for its address book."""
    with store.database.write() as connection:
        for table in ("delivery", "decision", "checkpoint", "committed_end", "state"):
            connection.exec_driver_sql(f"DELETE FROM {table}")  # noqa: S608  # names of our own


def make_due(store: Store) -> None:
    """Let the waiting time of every mail be over."""
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE delivery SET next_at = 0")


def parsed(received: Received) -> EmailMessage:
    return message_from_bytes(received.message, policy=default)


class TestSent:
    def test_a_mail_is_sent_once_and_the_log_says_so(self, make_store: MakeStore) -> None:
        with SmtpServer() as server:
            store, before = make_store(mail_url=server.url), now()
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            assert deliver(store).states == {"SENT": 1}
            assert deliver(store).states == {}
        [received] = server.inbox
        assert received.envelope.rcpt_tos == ["ann@example.com"]
        assert parsed(received)["Subject"] == "We have received your tax submission"
        line = json.loads(log_bytes(store.home, "deliveries"))
        wall = line["context"]["at"]
        assert before <= wall <= now()
        assert line == {
            "subject": {"id": "EMAIL_SYSTEM"},
            "verb": "SENT",
            "object": {"type": "EMAIL", "id": "derive/events:0:0/tax-received"},
            "context": {"at": wall, "source": {"log": "reactions", "partition": 0, "offset": 0}},
            "event": {"id": "deliver/derive/events:0:0/tax-received/sent", "inserted_at": wall},
        }
        assert store.committed_end("deliveries", 0) == len(log_bytes(store.home, "deliveries"))

    def test_a_reminder_shows_the_basket_to_its_customer(self, make_store: MakeStore) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url, mail_from="Lemon & Co <shop@example.com>")
            left_behind(store)
            assert deliver(store).states == {"SENT": 1}
        [received] = server.inbox
        body = parsed(received).get_body(("plain",))
        assert body is not None
        assert received.envelope.rcpt_tos == ["kim@example.com"]
        assert parsed(received)["From"] == "Lemon & Co <shop@example.com>"
        assert "- Lemon: 2 x 5.00 = 10.00" in body.get_content()

    def test_the_message_id_comes_from_the_event_id_whoever_sends_it(self, make_store: MakeStore) -> None:
        ids = []
        for folder in ("one", "two"):
            with SmtpServer() as server:
                store = make_store(folder, mail_url=server.url)
                save_contacts(store.database, [ANN._replace(email=f"{folder}@example.com")])
                submitted(store, 1)
                deliver(store)
            ids.append(parsed(server.inbox[0])["Message-ID"])
        digest = hashlib.sha256(b"derive/events:0:0/tax-received").hexdigest()
        assert ids == [f"<{digest}@localhost>"] * 2

    def test_without_a_setting_mails_become_files_in_home(self, store: Store) -> None:
        save_contacts(store.database, [ANN])
        submitted(store, 1)
        assert deliver(store).states == {"SENT": 1}
        assert deliver(store).states == {}
        [file] = (store.home / "outbox").iterdir()
        message = message_from_bytes(file.read_bytes(), policy=default)
        assert (message["To"], file.suffix) == ("ann@example.com", ".eml")

    def test_starttls_with_user_and_password(self, make_store: MakeStore) -> None:
        with SmtpServer(tls="starttls", login=("ann@x", "p/ w")) as server:
            store = make_store(mail_url=server.url.replace("://", "://ann%40x:p%2F%20w@"))
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            assert deliver(store).states == {"SENT": 1}
        assert len(server.inbox) == 1

    def test_a_limit_tries_so_many_and_leaves_the_rest(self, make_store: MakeStore) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, 1, 1, 1)
            first = deliver(store, limit=2)
            assert (first.states, first.waiting) == ({"SENT": 2}, 1)
            assert deliver(store).states == {"SENT": 1}
        assert len({parsed(received)["Message-ID"] for received in server.inbox}) == len(server.inbox) == 3

    def test_a_limit_is_kept_also_where_it_is_more_than_one_round_takes(self, make_store: MakeStore) -> None:
        store = make_store()
        submitted(store, *range(250))
        assert deliver(store, limit=230).states == {"SUPPRESSED": 230}
        assert deliver(store, limit=230).states == {"SUPPRESSED": 20}

    def test_many_mails_go_out_over_one_connection_in_the_order_of_the_log(self, make_store: MakeStore) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            entries = [Entry("CLIENT", str(n), f"c{n}@example.com", False) for n in range(30)]
            save_contacts(store.database, entries)
            submitted(store, *range(30))
            assert deliver(store).states == {"SENT": 30}
        assert [r.envelope.rcpt_tos for r in server.inbox] == [[entry.email] for entry in entries]
        assert server.sessions == 1

    @pytest.mark.parametrize(
        "odd",
        ["[" * 498 + "]" * 498, "1" * 5_000, "1e400", "1e99999999999999999999"],
        ids=["deep", "long", "vast", "beyond"],
    )
    def test_a_mail_goes_out_and_holds_nobody_back_whatever_else_its_cause_carries(
        self, make_store: MakeStore, odd: str
    ) -> None:
        line = '{"subject": {"id": "UK"}, "verb": "SUBMIT_TAX", "object": {"id": 1, "x": %s}, "context": {"at": %d}}'
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            append_lines(store, "events", [(line % (odd, now())).encode()])
            submitted(store, 1)
            assert deliver(store).states == {"SENT": 2}

    def test_a_reminder_goes_out_whatever_else_an_item_carries(self, make_store: MakeStore) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            left = did("ADDED_ITEM_TO_BASKET", 40, item={"id": 4, "x": "@"}).replace(b'"@"', b"[" * 497 + b"]" * 497)
            append_lines(store, "events", [left])
            left_behind(store)
            assert deliver(store).states == {"SENT": 1}


class TestSuppressed:
    @pytest.mark.parametrize(
        ("entry", "settings", "ago", "reason"),
        [
            (None, {}, 0, "no address"),
            (Entry("CUSTOMER", "1", "x@example.com", False), {}, 0, "no address"),
            (ANN._replace(unsubscribed=True), {}, 0, "unsubscribed"),
            (ANN, {"mail_allow": ["bob@example.com", "@example.org"]}, 0, "not on the list of allowed recipients"),
            (ANN._replace(email="ann@badexample.com"), {"mail_allow": ["@example.com"]}, 0, "not on the list of allowed recipients"),
            (ANN, {}, 24 * 60 * MINUTE + 1000, "too old: past its not_after"),
            (ANN, {"not_after": "1h"}, 61 * MINUTE, "too old: past its not_after"),
        ],
    )  # fmt: skip
    def test_who_should_not_get_it_does_not_and_no_connection_is_made(
        self, make_store: MakeStore, entry: Entry | None, settings: dict[str, Any], ago: int, reason: str
    ) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url, **settings)
            save_contacts(store.database, [entry] if entry else [])
            submitted(store, 1, ago=ago)
            assert deliver(store).reasons == {reason: 1}
            save_contacts(store.database, [ANN])
            assert deliver(store).states == {}
        assert server.sessions == 0
        assert outcomes(store) == [("SUPPRESSED", reason)]

    @pytest.mark.only("sqlite")
    @pytest.mark.parametrize("allow", [["ANN@example.com"], ["@Example.COM"], ["bob@x.org", "ann@example.com"], []])
    def test_who_is_on_the_list_gets_it(self, make_store: MakeStore, allow: list[str]) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url, mail_allow=allow)
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            assert deliver(store).states == {"SENT": 1}

    def test_what_delivery_has_read_is_all_accounted_for(self, store: Store) -> None:
        submitted(store, 1, 2)
        deliver(store)
        [there] = [p for p in positions(store) if (p.processor, p.log) == ("deliver", "reactions")]
        assert (there.lines, there.processed, there.quarantined, there.ignored) == (2, 2, 0, 0)

    def test_a_forgotten_person_gets_nothing(self, store: Store) -> None:
        save_contacts(store.database, [ANN])
        submitted(store, 1)
        assert forget_contact(store.database, "CLIENT", "1")
        assert deliver(store).reasons == {"no address": 1}
        assert b"ann@example.com" not in b"".join(p.read_bytes() for p in (store.home / "logs").rglob("*.jsonl"))

    def test_a_customer_who_was_there_after_all_gets_no_reminder_even_if_nobody_has_processed_it(
        self, make_store: MakeStore
    ) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            left_behind(store)
            process_to_end(run_of(store), "remind", None)
            append_lines(store, "events", [did("BROWSED", 20, 0)])
            assert deliver(store).reasons == {"retracted": 1}
        assert (server.sessions, outcomes(store)) == (0, [("SUPPRESSED", "retracted")])

    def test_the_one_that_tells_is_followed_also_where_all_others_are_at_the_end(self, make_store: MakeStore) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            left_behind(store)
            process_to_end(run_of(store), "remind", None)
            append_lines(store, "events", [did("BROWSED", 20, 0)])
            for name in ("quarantine", "derive", "anomalies", "normalise"):
                process_to_end(run_of(store), name, None)
            assert deliver(store).reasons == {"retracted": 1}
        assert (server.sessions, outcomes(store)) == (0, [("SUPPRESSED", "retracted")])

    @pytest.mark.parametrize(("grace", "state"), [(HAND_OVER, "SENT"), (0.2, "UNKNOWN")])
    def test_a_mail_on_its_way_is_finished_at_a_hand_over_and_cut_off_at_a_signal(
        self, make_store: MakeStore, grace: float, state: str
    ) -> None:
        with SmtpServer(takes=1) as server:
            store = make_store(mail_url=server.url)
            left_behind(store)
            process_to_end(run_of(store), "remind", None)
            run = run_of(store)
            run.grace = grace

            def work() -> None:
                with suppress(Stopped):
                    deliver_to_end(run)

            thread = threading.Thread(target=work)
            thread.start()
            wait_for(lambda: server.inbox)
            run.stop.set()
            thread.join()
        assert [found for found, _ in outcomes(store)] == [state]

    def test_a_customer_who_ordered_since_gets_no_reminder_even_if_nobody_has_processed_it(
        self, make_store: MakeStore
    ) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            left_behind(store)
            process_to_end(run_of(store), "remind", None)
            append_lines(store, "events", [did("ORDERED", 0)])
            [reason] = deliver(store).reasons
        assert reason.startswith("ordered since: at 20")
        assert server.sessions == 0

    def test_an_order_that_happened_before_the_last_visit_and_came_late_holds_its_reminder_back(
        self, make_store: MakeStore
    ) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            item = {"id": 3, "name": "Lemon", "price": 5, "count": 2}
            append_lines(store, "events", [did("ADDED_ITEM_TO_BASKET", 45, item=item)])
            left_behind(store)
            append_lines(store, "events", [did("ORDERED", 42, 0)])
            [reason] = deliver(store).reasons
        assert reason.startswith("ordered since: at 20")
        assert server.sessions == 0

    def test_an_order_from_before_the_abandonment_does_not_hold_a_reminder_back(self, make_store: MakeStore) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            append_lines(store, "events", [did("ORDERED", 50)])
            left_behind(store)
            append_lines(store, "events", [did("BROWSED", 0)])
            assert deliver(store).states == {"SENT": 1}

    def test_an_order_confirmation_goes_out_though_the_customer_has_ordered(self, make_store: MakeStore) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [Entry("CUSTOMER", "15", "kim@example.com", False)])
            append_lines(store, "events", [did("ORDERED", 0), did("ORDER_COMPLETED", 0)])
            process_to_end(run_of(store), "derive", None)
            assert deliver(store).states == {"SENT": 1}

    @pytest.mark.only("sqlite")
    @pytest.mark.parametrize(
        ("by_then", "reason"),
        [
            (None, "no address"),
            (Entry("CUSTOMER", "15", "kim@example.com", True), "unsubscribed"),
            (Entry("CUSTOMER", "15", "kim@example.org", False), "not on the list of allowed recipients"),
        ],
    )
    def test_the_address_book_counts_as_it_is_when_the_mail_is_sent(
        self, make_store: MakeStore, by_then: Entry | None, reason: str
    ) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url, mail_allow=["@example.com"])
            left_behind(store)

            @sa.event.listens_for(store.database.engine, "before_cursor_execute")
            def change(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
                if statement.startswith("SELECT verb FROM settled"):  # of all questions, one of the last
                    forget_contact(store.database, "CUSTOMER", "15")
                    save_contacts(store.database, [by_then] if by_then else [])

            assert deliver(store).reasons == {reason: 1}
        assert (server.sessions, outcomes(store)) == (0, [("SUPPRESSED", reason)])

    def test_while_a_processor_is_held_and_lags_the_mail_waits(self, make_store: MakeStore) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            left_behind(store)
            process_to_end(run_of(store), "remind", None)
            held = RunLock(store.lock_path("abandonment.lock"), "somebody slow")
            assert held.try_acquire()
            append_lines(store, "events", [did("BROWSED", 0)])
            done: list[DeliverySummary] = []
            thread = threading.Thread(target=lambda: done.append(deliver(store)))
            thread.start()
            thread.join(0.6)
            waited = thread.is_alive(), len(server.inbox)
            held.release()
            thread.join(20)
        assert waited == (True, 0)
        assert done[0].states == {"SENT": 1}


@pytest.mark.only("sqlite")  # about the mail server's answers
class TestTemporary:
    def _waits(self, store: Store, reason: str) -> None:
        summary = deliver(store)
        assert (summary.retries, summary.waiting, summary.states) == (1, 1, {})
        mail = row(store)
        assert (mail["state"], mail["attempts"]) == ("WAITING", 1)
        assert reason in mail["reason"]
        assert 2_000 < mail["next_at"] - now() <= 20_000
        assert deliver(store).retries == 0  # not before its time
        assert outcomes(store) == []
        make_due(store)

    @pytest.mark.parametrize("what", ["login", "busy", "away"])
    def test_one_mail_finds_out_for_all_that_the_server_lets_nobody_in(self, make_store: MakeStore, what: str) -> None:
        """A wrong password is not tried once for each of a thousand mails: that is how an account gets locked."""
        busy = [Fault("connect", "421 busy")] if what == "busy" else []
        with SmtpServer(busy, login=("ann", "right") if what == "login" else None) as server, refusing_port() as port:
            url = f"{server.url.replace('://', '://ann:wrong@')}&starttls=never" if what == "login" else server.url
            store = make_store(mail_url=url if what != "away" else f"smtp://127.0.0.1:{port}")
            save_contacts(store.database, [ANN])
            submitted(store, 1, 1, 1)
            summary = deliver(store)
            assert (summary.retries, summary.waiting, summary.states) == (1, 3, {})
            assert server.sessions == (0 if what == "away" else 1)
        with SmtpServer([Fault("rcpt", "451 later"), Fault("mail", "553 not yours")]) as server:
            make_due(store)
            summary = deliver(make_store(mail_url=server.url))
            assert (summary.retries, summary.states) == (
                2,
                {"SENT": 1},
            )  # what is said of a mail, or once in, is of that one

    @pytest.mark.parametrize(
        ("fault", "reason"),
        [
            (Fault("mail", "451 4.3.0 later"), "refused MAIL: 451 4.3.0 later"),
            (Fault("mail", "553 5.7.1 not yours"), "refused MAIL: 553 5.7.1 not yours"),
            (Fault("rcpt", "450 4.2.1 greylisted"), "refused RCPT: 450 4.2.1 greylisted"),
            (Fault("body", "452 4.3.1 full"), "refused the message: 452 4.3.1 full"),
            (Fault("connect", "421 busy"), "answered 421 busy"),
            (Fault("connect", HANG), "no answer within 0.3 s"),
            (Fault("rcpt", HANG), "no answer within 0.3 s"),
        ],
    )
    def test_a_server_that_says_later_or_nothing_is_tried_again_later(
        self, make_store: MakeStore, fault: Fault, reason: str
    ) -> None:
        with SmtpServer([fault], timeout=0.3) as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            self._waits(store, reason)
            assert deliver(store).states == {"SENT": 1}
        assert len(server.inbox) == 1
        assert outcomes(store) == [("SENT", "")]

    def test_a_server_that_is_not_there_is_tried_again_later(self, make_store: MakeStore) -> None:
        with refusing_port() as port:
            store = make_store(mail_url=f"smtp://127.0.0.1:{port}")
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            self._waits(store, "Connection refused")
        with SmtpServer() as server:
            assert deliver(make_store(mail_url=server.url)).states == {"SENT": 1}

    def test_a_line_dropped_twice_before_the_message_is_tried_again_later(self, make_store: MakeStore) -> None:
        with SmtpServer([Fault("data", DROP), Fault("data", DROP)]) as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            self._waits(store, "the line was dropped")
            assert deliver(store).states == {"SENT": 1}

    def test_a_refused_login_is_tried_again_later_and_no_password_is_told(self, make_store: MakeStore) -> None:
        with SmtpServer(tls="starttls", login=("ann", "hunter2")) as server:
            store = make_store(mail_url=server.url.replace("://", "://ann:hunter3@"))
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            self._waits(store, "login refused with 535")
        assert "hunter" not in row(store)["reason"]

    @pytest.mark.parametrize(
        ("files", "why"),
        [
            ({"txt": "Subject: Hi\n\n{{ nobody_knows }}"}, "UndefinedError: 'nobody_knows' is undefined"),
            ({"html": "{% if %}"}, "TemplateSyntaxError: Expected an expression, got 'end of statement block'"),
            ({"html": None}, "TemplateNotFound: 'tax-received.html' not found"),
            ({"txt": "Subject: {{ items + 1 }}"}, "TypeError"),
            ({"txt": 'Subject: Hi\n\n{{ "\\ud800" }}'}, "UnicodeEncodeError"),
        ],
    )
    def test_a_template_with_a_mistake_costs_no_mail_and_leaves_none_in_doubt(
        self, make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, Any], why: str
    ) -> None:
        templates = tmp_path / "templates"
        shutil.copytree(ROOT / "tasks" / "templates", templates)
        for kind, text in files.items():
            (templates / f"tax-received.{kind}").unlink()
            if text is not None:
                (templates / f"tax-received.{kind}").write_text(text)
        monkeypatch.setattr(tasks.mail._environment().loader, "searchpath", [str(templates)])
        tasks.mail._environment().cache.clear()  # type: ignore[union-attr]  # there is one
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            summary = deliver(store)
            assert (summary.states, summary.retries, row(store)["state"]) == ({}, 1, "WAITING")
            assert row(store)["reason"].startswith(f"the email template 'tax-received' cannot be used: {why}")
            monkeypatch.undo()
            tasks.mail._environment().cache.clear()  # type: ignore[union-attr]  # there is one
            make_due(store)
            assert deliver(store).states == {"SENT": 1}

    def test_each_wait_is_twice_as_long_up_to_ten_minutes(self, make_store: MakeStore) -> None:
        waits = []
        with SmtpServer([Fault("mail", "451 later")] * 9) as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            for _ in range(9):
                assert deliver(store).retries == 1
                mail = row(store)
                waits.append(round((mail["next_at"] - mail["changed_at"]) / 1000))
                make_due(store)
        assert [later / sooner for sooner, later in itertools.pairwise(waits[:6])] == [2, 2, 2, 2, 2]
        assert waits[-1] == 600

    def test_a_mail_that_never_gets_through_is_given_up_once_it_is_too_old(self, make_store: MakeStore) -> None:
        with SmtpServer([Fault("mail", "451 later")]) as server:
            store = make_store(mail_url=server.url, not_after="1s")
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            assert deliver(store).retries == 1
            make_due(store)
            time.sleep(1)
            deliver(store)
        [(verb, reason)] = outcomes(store)
        assert verb == "SUPPRESSED"
        assert reason == f"too old: past its not_after; last try: 127.0.0.1:{server.port}: refused MAIL: 451 later"

    @pytest.mark.only("sqlite", "postgresql")
    def test_a_time_that_a_clock_which_was_ahead_has_set_is_not_waited_for(self, make_store: MakeStore) -> None:
        with SmtpServer([Fault("rcpt", "451 4.3.0 later")]) as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            deliver(store)
            waits = row(store)["next_at"] - now()
            assert 0 < waits <= LONGEST_WAIT
            for ahead, due in ((LONGEST_WAIT - 60_000, 0), (LONGEST_WAIT + 60_000, 1)):
                with store.database.write() as connection:
                    connection.exec_driver_sql(f"UPDATE delivery SET next_at = {now() + ahead}")  # noqa: S608  # a number
                assert would_mail(store.database, now(), [], 10) == due
                assert deliver(store).states == +Counter(SENT=due)

    def test_a_mail_that_waits_holds_back_no_other(self, make_store: MakeStore) -> None:
        with SmtpServer([Fault("mail", "451 later"), None, Fault("rcpt", "550 no"), None]) as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, 1, 1, 1, 1)
            summary = deliver(store)
            assert (summary.states, summary.retries) == ({"SENT": 2, "FAILED": 1}, 1)
            make_due(store)
            assert deliver(store).states == {"SENT": 1}
        assert len({parsed(received)["Message-ID"] for received in server.inbox}) == len(server.inbox) == 3


class TestPermanentAndUnknown:
    @pytest.mark.only("sqlite")
    @pytest.mark.parametrize("step", ["rcpt", "data", "body"])
    def test_a_mail_that_is_refused_for_good_has_failed_and_is_not_tried_again(
        self, make_store: MakeStore, step: Any
    ) -> None:
        with SmtpServer([Fault(step, "550 5.1.1 no <ann@example.com> here")]) as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            assert deliver(store).states == {"FAILED": 1}
            make_due(store)
            assert deliver(store).states == {}
        [(verb, reason)] = outcomes(store)
        assert verb == "FAILED"
        assert reason.endswith(": 550 5.1.1 no <[address]> here")
        assert server.inbox == []

    @pytest.mark.only("sqlite")
    @pytest.mark.parametrize(
        "email", ["ann", "ann@example.com, bob@example.com", "ann@example.com\nBcc: eve@example.com"]
    )
    def test_an_address_that_is_none_has_failed_without_a_connection(self, make_store: MakeStore, email: str) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN._replace(email=email)])
            submitted(store, 1)
            assert deliver(store).states == {"FAILED": 1}
        [(_, reason)] = outcomes(store)
        assert reason.startswith("expected one address such as ann@example.com, found ")
        assert "bob" not in reason
        assert server.sessions == 0

    @pytest.mark.parametrize("sender", ["not an address", "shöp@example.com"])
    def test_a_sender_that_is_no_address_is_a_wrong_setting_and_costs_no_mail(
        self, make_store: MakeStore, sender: str
    ) -> None:
        store = make_store()
        save_contacts(store.database, [ANN])
        submitted(store, 1)
        with pytest.raises(UsageError, match="AFTERLOG_MAIL_FROM"):
            deliver(make_store(mail_from=sender))
        assert deliver(make_store()).states == {"SENT": 1}

    @pytest.mark.parametrize("accepted", [True, False])
    @pytest.mark.parametrize("answer", [DROP, HANG, "garbage"])
    def test_a_mail_whose_outcome_is_in_doubt_is_unknown_and_never_sent_again(
        self, make_store: MakeStore, answer: str, accepted: bool
    ) -> None:
        with SmtpServer([Fault("body", answer, accepted)], timeout=0.3) as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            assert deliver(store).states == {"UNKNOWN": 1}
            make_due(store)
            for _ in range(2):
                assert deliver(store).states == {}
        assert len(server.inbox) == accepted
        [(verb, reason)] = outcomes(store)
        assert verb == "UNKNOWN"
        assert "the message was handed over" in reason
        assert row(store)["state"] == "UNKNOWN"

    def test_a_claim_whose_sender_died_is_unknown_and_never_sent_again(self, make_store: MakeStore) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            outbox = self._queued(store)
            outbox.claim(outbox.waiting(now(), 1)[0])
            assert deliver(store).states == {"UNKNOWN": 1}
            assert deliver(store).states == {}
        assert server.sessions == 0
        assert outcomes(store) == [("UNKNOWN", "the sender died while it was sending")]

    @pytest.mark.parametrize("torn", [b"", b'{"subject": {"id": "EMAIL_SY'])
    def test_an_outcome_that_only_the_log_knows_is_adopted(self, make_store: MakeStore, torn: bytes) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            outbox = self._queued(store)
            outbox.claim(outbox.waiting(now(), 1)[0])
            line = b'{"subject":{"id":"EMAIL_SYSTEM"},"verb":"SENT","object":{"type":"EMAIL","id":"derive/events:0:0/tax-received"}}\n'
            folder = store.directory("deliveries", 0)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{0:020d}.jsonl").write_bytes(line + torn)
            assert deliver(store).states == {}
        assert server.sessions == 0
        assert log_bytes(store.home, "deliveries") == line
        assert (row(store)["state"], store.committed_end("deliveries", 0)) == ("SENT", len(line))

    def _known_to_the_log_alone(self, store: Store) -> Mail:
        """A mail in doubt is to be sent once more, says a person, and the process dies before a row says so."""

        def die(step: str) -> None:
            if step == "outcome-logged":
                raise OSError("died")

        mail = self._in_doubt(store)
        steps.arm(die)
        try:
            with pytest.raises(OSError, match="died"):
                resolve(store, mail.event_id, sent=False, again=True)
        finally:
            steps.arm(None)
        return mail

    def test_a_decision_that_only_the_log_knows_is_carried_out_where_it_came_after_the_restore(
        self, make_store: MakeStore
    ) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            mark_restored(store.database, store, run_of(store).topology.derived_logs())
            self._known_to_the_log_alone(store)
            assert row(store)["state"] == "UNKNOWN"
            assert deliver(store).states == {"SENT": 1}
            assert len(server.inbox) == 1

    @pytest.mark.parametrize("lost", ["nothing", "the rows", "an unknown time"])
    def test_a_mail_that_a_person_wants_sent_once_more_is_in_doubt_where_that_may_have_been_done(
        self, make_store: MakeStore, lost: str
    ) -> None:
        """Only the log knows of the decision: whoever wrote it died, or its database is lost, or an older one is put back."""
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            mail = self._known_to_the_log_alone(store)
            if lost == "the rows":
                lose_rows(store)
            elif lost == "an unknown time":
                mark_restored(store.database, store, run_of(store).topology.derived_logs())
            deliver_to_end(run_of(store))  # before anybody has derived the mail again
            process_to_end(run_of(store), "derive", None)
            deliver(store)
            assert row(store)["state"] == ("SENT" if lost == "nothing" else "UNKNOWN")
            assert len(server.inbox) == (lost == "nothing")
            if lost != "nothing":
                resolve(store, mail.event_id, sent=False, again=True)
                assert deliver(store).states == {"SENT": 1}
                assert len(server.inbox) == 1

    def test_a_mail_that_a_person_wants_sent_once_more_waits_until_it_is_known_to_whom(
        self, make_store: MakeStore
    ) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            mail = self._in_doubt(store)
            lose_rows(store)
            deliver_to_end(run_of(store))
            resolve(store, mail.event_id, sent=False, again=True)
            deliver_to_end(run_of(store))
            assert row(store)["state"] == "WAITING"
            process_to_end(run_of(store), "derive", None)
            assert deliver(store).states == {"SENT": 1}
        assert len(server.inbox) == 1

    def _in_doubt(self, store: Store) -> Mail:
        """A mail to Ann that is UNKNOWN: whoever claimed it died."""
        save_contacts(store.database, [ANN])
        submitted(store, 1)
        outbox = self._queued(store)
        [mail] = outbox.waiting(now(), 1)
        outbox.claim(mail)
        assert deliver(store).states == {"UNKNOWN": 1}
        return mail

    def _queued(self, store: Store) -> Outbox:
        """Have the mail wait in the outbox: the server was not there at its first try."""
        with refusing_port() as port:
            away = Store(msgspec.structs.replace(store.settings, mail_url=Secret(f"smtp://127.0.0.1:{port}")))
            deliver(away)
        make_due(store)
        return Outbox(store, DELIVERIES)


MAILER = """
import json
from tasks.processors import contract

class Processor(contract.Processor):
    name, reads, writes, mails = "mailer", "events", "own-mails", True

    def event(self, event, state, out):
        out.write(json.loads(bytes(event.object)))
"""
GOOD: dict[str, Any] = {
    "subject": {"id": "EMAIL_SYSTEM"}, "verb": "EMAIL", "object": {"id": 1, "type": "CLIENT", "template": "tax-received"},
    "context": {"at": 1650549837170, "source": {"log": "events", "partition": 0, "offset": 0}}, "event": {"id": "mailer/good"},
}  # fmt: skip


def with_mailer(make_store: MakeStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with a processor of one's own that gives as an event what stands in the object of each."""
    (folder / "mailer.py").write_text(MAILER)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, "mailer", None)
    del sys.modules["mailer"]
    return make_store(processors=("mailer",))


class TestUnusable:
    """EMAIL events of a processor of one's own that no mail can be made of."""

    @pytest.mark.parametrize(
        ("part", "change", "reason"),
        [
            ("object", {"id": 1, "template": "tax-received"}, "Object missing required field `type` - at `$.object`"),
            ("object", {"id": 1, "type": ""}, "Expected `str` of length >= 1 - at `$.object.type`"),
            ("object", {"id": 1.5, "type": "CLIENT"}, "Expected `int | str`, got `float` - at `$.object.id`"),
            ("object", None, "Expected `object`, got `null` - at `$.object`"),
            ("context", GOOD["context"], "Object missing required field `not_after` - at `$.context`"),
            ("context", GOOD["context"] | {"not_after": 2**63}, "Expected `int` <= 9223372036854775807"),
            ("context", {"at": 1650549837170, "not_after": 4_000_000_000_000}, "Object missing required field `source` - at `$.context`"),
            ("event", {}, "it has no `event.id`"),
        ],
    )  # fmt: skip
    def test_it_has_failed_with_its_place_and_holds_nobody_back(
        self,
        make_store: MakeStore,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        part: str,
        change: Any,
        reason: str,
    ) -> None:
        store = with_mailer(make_store, tmp_path, monkeypatch)
        save_contacts(store.database, [ANN])
        good = GOOD | {"context": GOOD["context"] | {"not_after": now() + MINUTE}}
        bad = good | {"event": {"id": "mailer/bad"}} | {part: change}
        context = {"at": now() - MINUTE}
        append_events(
            store, "events", [{"subject": {"id": 1}, "verb": "X", "object": o, "context": context} for o in (bad, good)]
        )
        run = run_of(store)
        process_to_end(run, "mailer", None)
        deliver_to_end(run)
        [(state, why), sent] = outcomes(store)
        assert (state, sent) == ("FAILED", ("SENT", ""))
        assert why.startswith(f"no mail, see own-mails:0:0: {reason}")
        assert run.notes == [
            "1 EMAIL events of log own-mails can never be sent; `afterlog deliveries list --state FAILED` says why"
        ]
        assert deliver(store).taken_in == 0
        assert len(outcomes(store)) == 2

    def test_only_the_log_of_baskets_says_what_became_of_an_abandonment(
        self, make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = with_mailer(make_store, tmp_path, monkeypatch)
        said = GOOD | {"verb": "RECOVERED_BASKET", "context": {"at": 1650549837170, "abandonment": "a/b"}}
        odd = GOOD | {"verb": "ABANDONMENT_RETRACTED", "context": "none", "event": {"id": "mailer/odd"}}
        context = {"at": now() - MINUTE}
        append_events(
            store, "events", [{"subject": {"id": 1}, "verb": "X", "object": o, "context": context} for o in (said, odd)]
        )
        process_to_end(run_of(store), "mailer", None)
        assert deliver(store).taken_in == 0
        assert log_bytes(store.home, "own-mails").count(b"abandonment") == 1
        with store.database.read() as connection:
            assert connection.execute(sa.text("SELECT * FROM settled")).all() == []


class TestTwoRuns:
    def test_two_runs_at_once_send_every_mail_once(self, make_store: MakeStore) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, *[1] * 40)
            settings = {**settings_of(store.home), "mail_url": server.url}
            env = {**os.environ, **{f"AFTERLOG_{name.upper()}": value for name, value in settings.items()}}
            command = [sys.executable, "-m", "deployments.cli", "deliver", "--no-prefect"]
            runs = [
                subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
                for _ in "ab"
            ]
            assert [(run.communicate(timeout=PATIENCE)[1], run.returncode) for run in runs] == [(b"", 0)] * 2
        sent = Counter(parsed(received)["Message-ID"] for received in server.inbox)
        assert (len(sent), set(sent.values())) == (40, {1})
        assert Counter(outcomes(store)) == {("SENT", ""): 40}

    def test_an_event_id_that_comes_twice_is_one_mail(
        self, make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = (
            "from tasks.processors import contract\n"
            "class Processor(contract.Processor):\n"
            "    name, reads, writes, mails = 'eager', 'events', 'eager', True\n"
            "    def event(self, event, state, out):\n"
            "        obj = {'id': 1, 'type': 'CLIENT', 'template': 'tax-received'}\n"
            "        out.write({'subject': {'id': 1}, 'verb': 'EMAIL', 'object': obj, 'context': {'at': event.at, 'not_after':\n"
            "            event.clock + 9_000_000, 'source': out.source(event.offset)},\n"
            "            'event': {'id': 'eager/the same', 'inserted_at': event.clock}})\n"
        )
        (tmp_path / "eager_one.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        with SmtpServer() as server:
            store = make_store(mail_url=server.url, processors=["eager_one"])
            save_contacts(store.database, [ANN])
            append_events(store, "events", [{"subject": {"id": n}, "verb": "X"} for n in range(3)])
            process_to_end(run_of(store), "eager", None)
            assert deliver(store).states == {"SENT": 1}
        assert len(server.inbox) == 1


class TestContacts:
    def _read(self, tmp_path: Path, text: bytes) -> list[Entry]:
        (tmp_path / "contacts.csv").write_bytes(text)
        return read_contacts(tmp_path / "contacts.csv")

    def test_a_csv_file_is_read_with_its_columns_in_any_order(self, tmp_path: Path) -> None:
        text = 'email,unsubscribed,id,type,note\r\nann@example.com,,1,CLIENT,x\r\n" bob@example.com ",Yes," 2 ",CUSTOMER,"a\nb"\r\n'
        assert self._read(tmp_path, b"\xef\xbb\xbf" + text.encode()) == [
            Entry("CLIENT", "1", "ann@example.com", None), Entry("CUSTOMER", "2", "bob@example.com", True),
        ]  # fmt: skip
        assert self._read(tmp_path, b"type,id,email\nCLIENT,1,ann@example.com\n") == [ANN._replace(unsubscribed=None)]
        assert self._read(tmp_path, b"type,id,email\n") == []

    def test_a_pipe_is_read_as_a_file_is(self) -> None:
        reader, writer = os.pipe()
        with os.fdopen(reader), os.fdopen(writer, "wb") as file:
            file.write(b"\xef\xbb\xbftype,id,email\nCLIENT,1,ann@example.com\nCLIENT,2,bob@example.com\n")
            file.close()
            assert [entry.id for entry in read_contacts(Path(f"/dev/fd/{reader}"))] == ["1", "2"]

    @pytest.mark.parametrize("mark", [";", "\t"])
    def test_what_a_spreadsheet_puts_between_cells_depends_on_its_language(self, tmp_path: Path, mark: str) -> None:
        text = "type,id,email,unsubscribed\nCLIENT,1,ann@example.com,yes\n".replace(",", mark)
        assert self._read(tmp_path, b"\xef\xbb\xbf" + text.encode()) == [ANN._replace(unsubscribed=True)]

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            (b"", "no column 'type'; found an empty file, expected type,id,email,unsubscribed"),
            (b"type,id,mail\nCLIENT,1,x@example.com\n", "no column 'email'; found type,id,mail, expected type,id,email,unsubscribed"),
            (b"type,id,email\nCLIENT,1,a@example.com\nCLIENT,,b@example.com\n", "line 3: an entry without type, id or email"),
            (b"type,id,email\nCLIENT,1\n", "line 2: an entry without type, id or email"),
            (b"type,id,email,unsubscribed\nCLIENT,1,a@example.com,maybe\n",
             "line 2: unsubscribed is neither yes nor no; found 'maybe', expected true or false"),
            (b"type,id,email,email\nCLIENT,1,a@example.com,b@example.com\n", "the column 'email' is there twice; found type,id,email,email"),
            (b"type,id,email,unsubscribed,Unsubscribed\nCLIENT,1,a@example.com,no,yes\n", "the column 'unsubscribed' is there twice"),
            (b"type,id,email,unsubscribe\nCLIENT,1,a@example.com,yes\n",
             "no column 'unsubscribed', but one that looks like it; found type,id,email,unsubscribe, expected type,id,email,unsubscribed. Call it 'unsubscribed'"),
            (b"type,id,email,un_subscribed\nCLIENT,1,a@example.com,yes\n", "no column 'unsubscribed', but one that looks like it"),
            (b"type,id,email\nCLIENT,1,\xff@example.com\n", "Save it as CSV UTF-8"),
            (b"type,id,email\nCLIENT,1,a@example.com\nCLIENT,1,b@example.com\n", "CLIENT 1 is there twice"),
            (b'type,id,email\nCLIENT,1,"a@example.com\n', "no CSV in UTF-8"),
        ],
    )  # fmt: skip
    def test_a_file_that_cannot_be_used_is_refused_with_its_line(
        self, tmp_path: Path, text: bytes, sentence: str
    ) -> None:
        with pytest.raises(UsageError) as raised:
            self._read(tmp_path, text)
        assert sentence in str(raised.value)
        assert str(raised.value).startswith(str(tmp_path / "contacts.csv"))

    @pytest.mark.parametrize(
        "header", [b"Type,ID,Email,Unsubscribed", b"type,id,email,unsubscribed ", b" TYPE , ID , EMAIL , UNSUBSCRIBED "]
    )
    def test_capitals_and_spaces_in_a_column_name_lose_nobodys_wish(self, tmp_path: Path, header: bytes) -> None:
        found = self._read(tmp_path, header + b"\nCLIENT,1,ann@example.com,yes\n")
        assert found == [ANN._replace(unsubscribed=True)]

    def test_of_an_address_with_a_name_the_address_is_kept_and_found_on_the_list(
        self, make_store: MakeStore, tmp_path: Path
    ) -> None:
        (tmp_path / "contacts.csv").write_text('type,id,email\nCLIENT,1,"Ann <ann@example.com>"\n')
        entries = read_contacts(tmp_path / "contacts.csv", parse_address)
        assert entries == [ANN._replace(unsubscribed=None)]
        with SmtpServer() as server:
            store = make_store(mail_url=server.url, mail_allow=["@example.com"])
            save_contacts(store.database, entries)
            submitted(store, 1)
            assert deliver(store).states == {"SENT": 1}

    @pytest.mark.parametrize("name", ["none.csv", "."])
    def test_a_file_that_is_not_there_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UsageError, match=r"cannot read the file: (No such file|Is a directory)"):
            read_contacts(tmp_path / name)

    @pytest.mark.parametrize(
        "text", ["type,id,email\nCLIENT,1,new@example.com\n", "type,id,email,unsubscribed\nCLIENT,1,new@example.com,\n"]
    )
    def test_who_has_unsubscribed_stays_so_where_a_file_does_not_say(
        self, store: Store, tmp_path: Path, text: str
    ) -> None:
        (tmp_path / "new.csv").write_text(text)
        new = read_contacts(tmp_path / "new.csv")
        save_contacts(store.database, [ANN._replace(unsubscribed=True)])
        save_contacts(store.database, new)
        assert list_contacts(store.database) == [ANN._replace(email="new@example.com", unsubscribed=True)]
        forget_contact(store.database, "CLIENT", "1")
        save_contacts(store.database, new)
        assert list_contacts(store.database) == [ANN._replace(email="new@example.com", unsubscribed=False)]

    def test_an_entry_is_replaced_by_the_next_of_its_type_and_id_and_can_be_forgotten(self, store: Store) -> None:
        bob = Entry("CUSTOMER", "1", "bob@example.com", True)
        assert save_contacts(store.database, [bob, ANN]) == 2
        assert save_contacts(store.database, [ANN._replace(email="new@example.com")]) == 1
        assert list_contacts(store.database) == [ANN._replace(email="new@example.com"), bob]
        assert forget_contact(store.database, "CLIENT", "1")
        assert not forget_contact(store.database, "CLIENT", "1")
        assert list_contacts(store.database) == [bob]
