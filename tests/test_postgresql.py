"""PostgreSQL: what its texts cannot hold, a connection that is lost in mid-commit, and every wrong URL in one sentence."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from storage import steps
from storage.backup import make_backup
from storage.brake import PAUSED, STOPPED, put_on, read_brake, release
from storage.commit import load_position
from storage.contacts import Entry, list_contacts, save_contacts
from storage.database import Database
from storage.door import append_lines
from storage.errors import AfterlogError, ConflictError, UsageError
from storage.generations import LIVE, Move, move, read_ends
from storage.outbox import Outbox
from storage.postgresql import escape, unescape
from storage.retries import Place, begin_retry, forget_retry
from storage.settings import load_settings
from storage.staged import staging
from storage.state import StateStore
from storage.store import Store
from storage.times import now
from tasks.process import process_to_end
from tests.conftest import ROOT, log_bytes
from tests.postgres import Cluster
from tests.test_commit import add, derived, new_run, process, processed, result, shop, tax
from tests.test_deliver import ANN, submitted

MakeStore = Callable[..., Store]


@pytest.fixture
def url(postgres: Cluster) -> str:
    return postgres.create()


@given(st.text(alphabet="\x00\x1a01a"), st.text(alphabet="\x00\x1a01a"))
def test_every_text_comes_back_and_no_two_become_one(one: str, two: str) -> None:
    assert unescape(escape(one)) == one
    assert "\x00" not in escape(one)
    assert (escape(one) == escape(two)) == (one == two)


NAMES = ("a\x00b", "a\x1a0b", "a\x1ab", "\x00", "ä'\"\\%s:x", "\x1a")


def test_ids_and_names_with_nul_stop_nobody(url: str, make_store: MakeStore) -> None:
    lines = [add(n, name, id=name, name=name) for n, name in enumerate(NAMES)]  # type: ignore[arg-type]  # an id may be text
    lines += [shop("X", 40, "a\x00b"), shop("ORDERED", 50, "a\x00b"), tax(1)]  # type: ignore[arg-type]  # the same
    here, there = make_store("sqlite"), make_store("postgresql", database_url=url)
    for store in (here, there):
        processed(store, *lines)
    assert {**derived(there), "clock": b""} == {**derived(here), "clock": b""}
    assert result(there) == result(here)
    with there.database.read() as connection:
        assert set(connection.scalars(sa.text("SELECT key FROM customer"))) == set(NAMES)
        assert set(connection.scalars(sa.text("SELECT name FROM item"))) == set(NAMES)
    entry = Entry("CUSTOMER", "a\x00b", "ann@example.com", False)
    save_contacts(there.database, [entry])
    assert list_contacts(there.database) == [entry]


def test_a_server_that_goes_down_in_mid_commit_is_told_and_a_retry_goes_on(
    postgres: Cluster, url: str, make_store: MakeStore
) -> None:
    lines = [add(n, n) for n in range(20)] + [tax(1), shop("X", 90, 3)]
    here, there = make_store("sqlite"), make_store("postgresql", database_url=url, commit_bytes=700, batch_bytes=500)
    processed(here, *lines)
    append_lines(there, "events", lines)
    seen: list[str] = []

    def restart(step: str) -> None:
        seen.append(step)
        if step == "transaction-ready" and seen.count(step) == 3:
            postgres.restart()

    steps.arm(restart)
    try:
        with pytest.raises(AfterlogError, match="the connection to the database was lost") as raised:
            process_to_end(new_run(there), "abandonment", None)
    finally:
        steps.arm(None)
    assert "\n" not in str(raised.value)
    assert process(there)[1] == {}
    assert {**derived(there), "clock": b""} == {**derived(here), "clock": b""}
    assert result(there) == result(here)


def test_the_second_of_two_claims_and_of_two_swaps_is_refused(url: str, make_store: MakeStore) -> None:
    store = make_store(database_url=url)
    save_contacts(store.database, [ANN])
    submitted(store, 1)
    one, two = Outbox(store, "deliveries"), Outbox(store, "deliveries")
    reader, position = store.reader("reactions", 0), load_position(store.database, "deliver", 1, "reactions", 0)
    mail = {"event_id": "a", "state": "WAITING", "reason": "", "log": "reactions", "generation": 1, "partition": 0, "offset": 0, "recipient_type": "CLIENT",
            "recipient_id": "1", "not_after": now() + 1000, "changed_at": now()}  # fmt: skip
    again = load_position(store.database, "deliver", 1, "reactions", 0)
    assert again == position
    one.take_in(reader, position, [mail], [])
    with pytest.raises(ConflictError, match="another run has committed"):
        two.take_in(reader, again, [{**mail, "event_id": "b"}], [])
    [first], [second] = one.waiting(now(), 9), two.waiting(now(), 9)
    one.claim(first)
    with pytest.raises(ConflictError, match="another run has taken this mail"):
        two.claim(second)


def test_two_that_make_a_checkpoint_at_once_get_the_same(url: str, make_store: MakeStore) -> None:
    store = make_store(database_url=url)
    with store.database.write() as connection:
        connection.execute(sa.text("SELECT 1"))
        one = load_position(store.database, "derive", 1, "events", 0)
    assert load_position(store.database, "derive", 1, "events", 0) == one


class TestSentences:
    """Each is one line, and holds no part of a password."""

    def _refused(self, url: str, kind: type[AfterlogError], tmp_path: Path) -> str:
        with pytest.raises(kind) as raised:
            Store(load_settings(home=tmp_path, database_url=url)).committed_end("reactions", 0)
        text = str(raised.value)
        assert "\n" not in text
        assert "sesame" not in text
        assert "secr" not in text
        return text

    @pytest.mark.parametrize(
        "url",
        ["nonsense", "postgresql+psycopg://ann:secr@et@127.0.0.1/x", "postgresql+psycopg://ann:secr/et", "mysql://a:secret@b/c",
         "postgresql+psycopg://ann:secret@127.0.0.1:port/x"],
    )  # fmt: skip
    def test_a_url_that_is_none(self, url: str, tmp_path: Path) -> None:
        assert "setting AFTERLOG_DATABASE_URL: no URL" in self._refused(url, UsageError, tmp_path)

    def test_a_server_that_is_not_there(self, tmp_path: Path) -> None:
        text = self._refused("postgresql://ann:secret@127.0.0.1:9/x", AfterlogError, tmp_path)
        assert text.startswith("postgresql+psycopg://ann:***@127.0.0.1:9/x: the database refused: connection failed")
        assert "Connection refused" in text

    def test_a_wrong_password_and_a_database_that_is_not_there(
        self, postgres: Cluster, url: str, tmp_path: Path
    ) -> None:
        wrong = sa.make_url(url).set(password="secret", query={"application_name": "x"})
        text = self._refused(wrong.render_as_string(hide_password=False), AfterlogError, tmp_path)
        assert 'password authentication failed for user "ann"' in text
        assert 'database "nowhere" does not exist' in self._refused(postgres.url("nowhere"), AfterlogError, tmp_path)

    def test_a_database_that_cannot_hold_every_text(self, postgres: Cluster, tmp_path: Path) -> None:
        with postgres.admin.connect() as connection:
            connection.exec_driver_sql("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
        assert "found encoding LATIN1, expected UTF8" in self._refused(postgres.url("latin"), UsageError, tmp_path)

    def test_no_driver(self, tmp_path: Path) -> None:
        code = "import sys; sys.modules['psycopg'] = None\nfrom deployments.cli import main; main(['contacts', 'list'])"
        env = {"AFTERLOG_HOME": str(tmp_path), "AFTERLOG_DATABASE_URL": "postgresql://ann:secret@127.0.0.1/x"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith("afterlog: setting AFTERLOG_DATABASE_URL: PostgreSQL needs the driver psycopg")
        assert "pip install 'afterlog[postgres]'" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_commit_is_durable_also_where_the_server_says_otherwise(url: str, tmp_path: Path) -> None:
    quick = sa.make_url(url).update_query_dict({"options": "-c synchronous_commit=off"})
    with Database(quick.render_as_string(hide_password=False), tmp_path).read() as connection:
        assert connection.scalar(sa.text("SHOW synchronous_commit")) == "on"


def test_a_server_that_is_gone_without_a_word_is_found_out_within_a_minute(url: str, tmp_path: Path) -> None:
    def waits(url: str) -> tuple[int, ...]:
        with Database(url, tmp_path).read() as connection:
            line = socket.socket(fileno=os.dup(connection.connection.driver_connection.pgconn.socket))  # type: ignore[union-attr]  # psycopg's
        with line:
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            return tuple(line.getsockopt(socket.IPPROTO_TCP, option) for option in options)

    assert waits(url) == (30, 10, 3, 60_000)
    assert waits(f"{url}?keepalives_idle=7&tcp_user_timeout=9000") == (7, 10, 3, 9_000)


def test_a_connection_lost_in_mid_backup_is_told_of_the_database_that_lost_it(
    postgres: Cluster, url: str, make_store: MakeStore, tmp_path: Path
) -> None:
    store = make_store(database_url=url)
    save_contacts(store.database, [Entry("CLIENT", str(n), "ann@example.com", False) for n in range(20_000)])

    def cut(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "FROM contact" in statement:
            postgres.restart()

    sa.event.listen(store.database.engine, "after_cursor_execute", cut)
    with pytest.raises(AfterlogError, match="the connection to the database was lost") as raised:
        make_backup(store, set(), tmp_path / "backup")
    assert raised.value.where == sa.make_url(url).render_as_string(hide_password=True)
    assert "\n" not in str(raised.value)


def test_when_every_connection_is_in_use_that_is_told_in_one_sentence(
    url: str, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = make_store(database_url=url).database
    monkeypatch.setattr(database.engine.pool, "_timeout", 0.1)
    with ExitStack() as held:
        for _ in range(15):
            held.enter_context(database.read())
        with pytest.raises(AfterlogError, match=r"every connection to the database .* is in use") as raised:
            list_contacts(database)
    assert "\n" not in str(raised.value)
    assert list_contacts(database) == []


def test_commit_numbers_do_not_end_at_32_bits(url: str, make_store: MakeStore) -> None:
    store = make_store(database_url=url)
    processed(store, tax(1))
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE checkpoint SET commit = 2147483647")
    processed(store, tax(2))
    assert [json.loads(line)["object"]["id"] for line in log_bytes(store.home, "reactions").splitlines()] == [1, 2]


def test_what_is_due_at_the_same_moment_comes_in_code_points_whatever_language_the_database_was_made_for(
    postgres: Cluster, make_store: MakeStore
) -> None:
    name = "english"
    with postgres.admin.connect() as connection:
        connection.exec_driver_sql(
            f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' LOCALE_PROVIDER icu ICU_LOCALE 'en-US'"
        )
    store = make_store(database_url=postgres.url(name))

    def states() -> StateStore[dict[str, int]]:
        return StateStore(store.database, 7, dict, cache_keys=10)

    first = states()
    for key in "acBD":
        first.put(key, {}, (1, 0))
    pending = [key for some in first.due_before(2, 10) for key, _ in some]
    with store.database.write() as connection:
        first.write(connection)
    assert pending == ["B", "D", "a", "c"]
    assert [key for some in states().due_before(2, 10) for key, _ in some] == pending
    assert [key for some in states().due_before(2, 1) for key, _ in some] == pending


def test_positions_and_ends_are_of_one_moment_and_keep_nobody_from_committing(url: str, make_store: MakeStore) -> None:
    store, other = make_store("one", database_url=url), make_store("other", database_url=url)
    load_position(store.database, "derive", 1, "events", 0)
    with store.database.write() as connection:
        connection.execute(
            sa.text("INSERT INTO committed_end (log, generation, partition, \"end\") VALUES ('reactions', 1, 0, 0)")
        )

    def commit_meanwhile() -> None:
        with other.database.write() as connection:
            connection.execute(sa.text('UPDATE checkpoint SET "offset" = 1000, commit = commit + 1'))
            connection.execute(sa.text('UPDATE committed_end SET "end" = 777'))

    with ThreadPoolExecutor(1) as pool:
        committing: list[Future[None]] = []

        def between(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if "FROM committed_end" in statement and not committing:
                committing.append(pool.submit(commit_meanwhile))
                committing[0].result(10)

        sa.event.listen(store.database.engine, "before_cursor_execute", between)
        [position], ends = read_ends(store.database, {"reactions": 1})
    assert (position.offset, ends["reactions", 0]) == (0, 0)
    [position], ends = read_ends(store.database, {"reactions": 1})
    assert (position.offset, ends["reactions", 0]) == (1000, 777)


def test_positions_are_there_while_a_promotion_turns_them(url: str, make_store: MakeStore) -> None:
    store, other = make_store("one", database_url=url), make_store("other", database_url=url)
    load_position(store.database, "derive", 1, "events", 0)
    load_position(store.database, "derive", 2, "events", 0, live=False)
    with ThreadPoolExecutor(1) as pool:
        with other.database.write() as connection:
            connection.execute(sa.text("UPDATE checkpoint SET live = NOT live"))
            reading = pool.submit(read_ends, store.database, {})
            wait([reading], 1)
        positions, _ = reading.result()
    assert len(positions) == 1


def test_of_two_who_try_a_line_again_at_once_one_is_refused(url: str, make_store: MakeStore) -> None:
    store, place = make_store(database_url=url), Place("events", 0, 5)
    both = threading.Barrier(2)

    def together(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "INSERT INTO retried" in statement:
            both.wait(10)

    sa.event.listen(store.database.engine, "before_cursor_execute", together)
    with ThreadPoolExecutor(2) as pool:
        tries = [pool.submit(begin_retry, store.database, place, force=False) for _ in range(2)]
    told = [each.exception() for each in tries]
    assert sorted(map(type, told), key=str) == [type(None), UsageError]
    assert "this line was tried again before" in "".join(map(str, told))


def test_a_try_that_is_forgotten_while_another_is_refused_leaves_the_line_to_that_one(
    url: str, make_store: MakeStore
) -> None:
    store, other, place = (
        make_store("one", database_url=url), make_store("other", database_url=url), Place("events", 0, 5)
    )  # fmt: skip
    begin_retry(other.database, place, force=False)

    def forget(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "FROM retried" in statement:
            forget_retry(other.database, place)

    sa.event.listen(store.database.engine, "before_cursor_execute", forget)
    begin_retry(store.database, place, force=False)
    with pytest.raises(UsageError, match="a try whose end is not known"):
        begin_retry(other.database, place, force=False)


@pytest.mark.parametrize("released", [False, True])  # without and with a row
def test_of_two_who_put_the_brake_on_at_once_both_get_the_one_that_holds(
    url: str, make_store: MakeStore, released: bool
) -> None:
    store, both = make_store(database_url=url), threading.Barrier(2)
    if released:
        release(store.database)

    def together(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "INSERT INTO brake" in statement:
            both.wait(10)

    sa.event.listen(store.database.engine, "before_cursor_execute", together)
    with ThreadPoolExecutor(2) as pool:
        given = list(pool.map(lambda state: put_on(store.database, state, f"by {state}"), (PAUSED, STOPPED)))
    assert given == [read_brake(store.database)] * 2


def test_a_commit_between_a_promotions_look_and_its_turn_is_refused(url: str, make_store: MakeStore) -> None:
    store, other = make_store("one", database_url=url), make_store("other", database_url=url)
    position = load_position(store.database, "derive", 1, "events", 0)
    load_position(store.database, "derive", 2, "events", 0, live=False)

    def commit_meanwhile() -> int:
        swap = 'UPDATE checkpoint SET "offset" = 9, commit = commit + 1 WHERE id = :id AND commit = 0 AND live'
        with other.database.write() as connection:
            return connection.execute(sa.text(swap), {"id": position.id}).rowcount

    with ThreadPoolExecutor(1) as pool:
        committing: list[Future[int]] = []

        def between(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if statement.startswith("DELETE FROM live_generation"):
                committing.append(pool.submit(commit_meanwhile))
                wait(committing, 1)

        sa.event.listen(store.database.engine, "before_cursor_execute", between)
        with staging(store.database) as staged:
            move(staged, Move({"reactions": 2}, {"derive": (1, 2)}, expected=[position]), 2, LIVE)
    assert [each.result() for each in committing] == [0]
