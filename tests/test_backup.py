"""Backups: made while everything runs, put back older than what was sent since, and nobody is mailed twice."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import storage.backup
import storage.restore
from deployments import cli_backup
from storage.backup import copy_file, copy_segments
from storage.contacts import Entry, list_contacts, save_contacts
from storage.decisions import decide
from storage.door import append_lines
from storage.errors import AfterlogError, UsageError
from storage.locks import RunLock
from storage.manifest import seal
from storage.restore import last_restored, mark_restored
from storage.segment import list_segments, make_directory
from storage.store import Store
from storage.tables import Delivery
from storage.times import now
from tasks.process import process_to_end
from tasks.promote import promote
from tasks.promote_mails import Staging
from tasks.topology import build_topology
from tests.conftest import ROOT, log_bytes, settings_of, use_database
from tests.smtp_server import DROP, Fault, SmtpServer, refusing_port
from tests.test_commit import add, derived, process, processed, result, shop, tax
from tests.test_deliver import ANN, deliver, parsed, run_of, submitted
from tests.test_promotion import replayed

BOTH_DATABASES = True
MakeStore = Callable[..., Store]
Command = Callable[..., None]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command of the command line on a HOME, in this process."""

    def run(what: Callable[..., None], home: Path, *arguments: object) -> None:
        for name, value in settings_of(home).items():
            monkeypatch.setenv(f"AFTERLOG_{name.upper()}", value)
        what(*arguments)

    return run


def states(store: Store) -> dict[str, str]:
    """What became of each mail, by its row; the log must say the same of those that are settled."""
    with store.database.read() as connection:
        rows = connection.execute(sa.select(Delivery.__table__)).mappings().all()  # type: ignore[attr-defined]  # SQLModel hides it
    found = {row["event_id"]: row["state"] for row in rows}
    logged = {e["object"]["id"]: e["verb"] for e in map(json.loads, log_bytes(store.home, "deliveries").splitlines())}
    assert {id: state for id, state in found.items() if state != "WAITING"} == logged
    return found


def _command(home: Path, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("AFTERLOG_")}
    return subprocess.run(
        [sys.executable, "-m", "deployments.cli", *arguments], env={**env, "AFTERLOG_HOME": str(home)}, cwd=ROOT,
        capture_output=True, text=True, check=False, **more,
    )  # fmt: skip


def _contacts_in(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return int(connection.execute("SELECT COUNT(*) FROM contact").fetchone()[0])
    finally:
        connection.close()


def close(store: Store) -> None:
    """What ending a process does: its connections go."""
    store.database.dispose()


def lose(home: Path, *what: str) -> None:
    for name in what:
        path = home / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class TestNobodyTwice:
    """Mails before the backup, mails after it, the backup is put back, and everything runs again."""

    def _life(self, make_store: MakeStore, command: Command, server: SmtpServer, folder: Path) -> Store:
        """Three mails sent, one in the queue; a backup; then the one of the queue and two more are sent."""
        store = make_store(mail_url=server.url)
        save_contacts(store.database, [ANN])
        submitted(store, 1, 1, 1)
        assert deliver(store).states == {"SENT": 3}
        submitted(store, 1)
        with refusing_port() as port:
            deliver(make_store(mail_url=f"smtp://127.0.0.1:{port}"))
        command(cli_backup.backup, store.home, folder)
        with store.database.write() as connection:
            connection.exec_driver_sql("UPDATE delivery SET next_at = 0")
        submitted(store, 1, 1)
        assert deliver(store).states == {"SENT": 3}
        close(store)
        return store

    def _once(self, server: SmtpServer, count: int) -> None:
        ids = Counter(parsed(received)["Message-ID"] for received in server.inbox)
        assert set(ids.values()) == {1}
        assert len(ids) == count

    def test_an_older_database_beside_newer_logs(
        self, make_store: MakeStore, command: Command, tmp_path: Path, database: str
    ) -> None:
        with SmtpServer() as server:
            store = self._life(make_store, command, server, tmp_path / "backup")
            logs = {path.name: log_bytes(store.home, path.name) for path in (store.home / "logs").iterdir()}
            if database == "sqlite":
                (store.home / "afterlog.db").write_bytes(b"this is no database" * 1000)  # what a bad disk leaves
            command(cli_backup.restore, store.home, tmp_path / "backup")
            again = make_store(mail_url=server.url)
            assert {log: log_bytes(store.home, log) for log in logs} == logs
            submitted(again)
            assert process(again)[1] == {}
            assert deliver(again).states == {}
            assert Counter(states(again).values()) == {"SENT": 6}  # the log knew
            assert {log: log_bytes(store.home, log) for log in logs if log != "clock"} == {
                log: data for log, data in logs.items() if log != "clock"
            }
            self._once(server, 6)
            submitted(again, 1)
            assert deliver(again).states == {"SENT": 1}
            self._once(server, 7)

    def test_an_older_copy_of_everything(self, make_store: MakeStore, command: Command, tmp_path: Path) -> None:
        with SmtpServer() as server:
            store = self._life(make_store, command, server, tmp_path / "backup")
            submitted(store, 1)  # was there at the restore, and is lost
            lose(store.home, "logs", "afterlog.db", "afterlog.db-wal", "afterlog.db-shm")
            command(cli_backup.restore, store.home, tmp_path / "backup")
            again = make_store(mail_url=server.url)
            submitted(again)
            assert deliver(again).states == {"UNKNOWN": 1}  # the one that was in the queue
            assert Counter(states(again).values()) == {"SENT": 3, "UNKNOWN": 1}
            self._once(server, 6)
            submitted(again, 1, 1, 1)  # new ones, at the offsets of those that were lost
            assert deliver(again).states == {"SENT": 3}
            self._once(server, 9)
            reasons = [
                json.loads(line)["object"].get("reason") for line in log_bytes(store.home, "deliveries").splitlines()
            ]
            assert reasons.count("it may have been sent before a backup was put back") == 1

    def test_events_that_the_backup_had_not_processed_yet(
        self, make_store: MakeStore, command: Command, tmp_path: Path
    ) -> None:
        """Abandonments are flagged at another tick after the restore: later than it, of the same event id."""
        with SmtpServer() as server:
            store = make_store(mail_url=server.url, timeout="1s", settle="1ms")
            save_contacts(store.database, [ANN, Entry("CUSTOMER", "15", "kim@example.com", False)])
            item = {"item": {"id": 3, "price": 5}}
            old = shop("ADDED_ITEM_TO_BASKET", (now() - 60_000 - 1_700_000_000_000) / 60_000, **item)
            append_lines(store, "events", [old])
            command(cli_backup.backup, store.home, tmp_path / "backup")
            assert process(store, "now")[1] == {}
            assert deliver(store).states == {"SENT": 1}
            close(store)
            lose(store.home, "logs", "afterlog.db", "afterlog.db-wal", "afterlog.db-shm")
            command(cli_backup.restore, store.home, tmp_path / "backup")
            again = make_store(mail_url=server.url, timeout="1s", settle="1ms")
            assert process(again, "now")[1] == {}
            assert deliver(again).states == {"UNKNOWN": 1}
            assert deliver(again).states == {}
            assert len(server.inbox) == 1

    def test_a_home_that_was_put_back_by_other_means(self, make_store: MakeStore, command: Command) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, 1, 1)
            close(store)
            command(cli_backup.restore, store.home)  # nothing was sent, but who knows
            again = make_store(mail_url=server.url)
            assert deliver(again).states == {"UNKNOWN": 2}
            submitted(again, 1)
            assert deliver(again).states == {"SENT": 1}
            self._once(server, 1)

    @pytest.mark.only("sqlite")
    def test_a_lost_database_learns_from_the_log_what_was_sent(self, make_store: MakeStore) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, 1, 1)
            assert deliver(store).states == {"SENT": 2}
            close(store)
            lose(store.home, "afterlog.db", "afterlog.db-wal", "afterlog.db-shm")
            again = make_store(mail_url=server.url)
            save_contacts(again.database, [ANN])
            submitted(again, 1)
            assert deliver(again).states == {"SENT": 1}
            assert Counter(states(again).values()) == {"SENT": 3}
            self._once(server, 3)

    def test_a_restore_is_the_latest_also_where_the_clock_stands_still_or_goes_back(
        self, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = make_store()
        for wall in (5_000, 5_000, 4_000):
            monkeypatch.setattr(storage.restore, "now", lambda wall=wall: wall)
            mark_restored(store.database, store, set())
        last = last_restored(store.database)
        assert last is not None
        assert last.at == 5_002

    def test_a_decision_that_waits_in_the_backup_is_not_carried_out_again(
        self, make_store: MakeStore, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with SmtpServer([Fault("body", DROP)]) as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            assert deliver(store).states == {"UNKNOWN": 1}
            [mail] = states(store)
            decide(store.database, mail, "WAITING")
            command(cli_backup.backup, store.home, tmp_path / "backup")
            assert deliver(store).states["SENT"] == 1
            close(store)
            lose(store.home, "logs", "afterlog.db", "afterlog.db-wal", "afterlog.db-shm")
            command(cli_backup.restore, store.home, tmp_path / "backup")
            assert "1 decisions about mails may have been carried out since" in capsys.readouterr().err
            again = make_store(mail_url=server.url)
            submitted(again)
            assert deliver(again).states == {}
            assert states(again) == {mail: "UNKNOWN"}
            self._once(server, 1)

    @pytest.mark.parametrize("queued", [True, False])
    def test_what_is_too_old_needs_nobody_and_says_that_it_may_have_been_sent(
        self, make_store: MakeStore, command: Command, queued: bool
    ) -> None:
        store = make_store()
        save_contacts(store.database, [ANN])
        submitted(store, 1, ago=0 if queued else 2 * 86_400_000)
        if queued:
            with refusing_port() as port:
                deliver(make_store(mail_url=f"smtp://127.0.0.1:{port}"))
            with store.database.write() as connection:
                connection.exec_driver_sql("UPDATE delivery SET next_at = 0, not_after = 1")
        close(store)
        command(cli_backup.restore, store.home)
        done = deliver(make_store())
        assert done.states == {"SUPPRESSED": 1}
        assert done.reasons == {"too old: past its not_after; it may have been sent before a backup was put back": 1}


CARTER = """
from tasks.processors import contract

class Processor(contract.Processor):
    name, reads, writes, mails = "carter", "carts", "cartmails", True

    def event(self, event, state, out):
        target = {"id": event.id, "type": "CLIENT", "template": "tax-received"}
        out.emit(self, event, {"id": "EMAIL_SYSTEM"}, "EMAIL", target, name="m", at=event.clock, not_after=event.clock + 86_400_000)
"""


@pytest.mark.only("sqlite")
@pytest.mark.parametrize("copied_log", ["deliveries", "clock", "carts"])
def test_no_outcome_of_a_mail_is_in_a_backup_without_its_cause(
    make_store: MakeStore, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied_log: str
) -> None:
    """A mail is sent while the backup is made: right after a log is copied, whichever. Its event's place is never given again."""
    (tmp_path / "carter.py").write_text(CARTER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "carter", raising=False)
    monkeypatch.setenv("AFTERLOG_PROCESSORS", '["carter"]')
    with SmtpServer() as server:
        store = make_store(mail_url=server.url)
        save_contacts(store.database, [ANN, Entry("CLIENT", "2", "bob@example.com", False)])
        _cart(store, 1)
        copied = []

        def copy(source: Path, target: Path, end: int) -> None:
            copy_segments(source, target, end)
            copied.append(source.parent.name)
            if source.parent.name == copied_log:
                _cart(store, 1)

        monkeypatch.setattr(storage.backup, "copy_segments", copy)
        command(cli_backup.backup, store.home, tmp_path / "backup")
        assert copied[:2] == ["deliveries", "clock"]
        assert len(server.inbox) == 2
        close(store)
        lose(store.home, "logs", "afterlog.db", "afterlog.db-wal", "afterlog.db-shm")
        command(cli_backup.restore, store.home, tmp_path / "backup")
        again = make_store(mail_url=server.url)
        while now() <= last_restored(again.database).at:  # type: ignore[union-attr]  # it was restored
            pass
        _cart(again, 2)
        assert [parsed(mail)["To"] for mail in server.inbox[2:]] == ["bob@example.com"]


def _cart(store: Store, who: int) -> None:
    """Have the processor see an event of somebody, and deliver its mail."""
    event = {"subject": {"id": who}, "verb": "LOOKED", "object": {}, "context": {"at": now()}}
    append_lines(store, "carts", [json.dumps(event).encode()])
    process_to_end(run_of(store), "carter", None)
    deliver(store)


DYING = """
import os, pathlib, signal, sys
import storage.restore
from deployments import cli_backup

mark = storage.restore.mark_restored

def mark_and_die(database, *arguments):
    mark(database, *arguments)
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE contact SET email = 'x@example.com'")
    os.kill(os.getpid(), signal.SIGKILL)

storage.restore.mark_restored = mark_and_die
cli_backup.restore(pathlib.Path(sys.argv[1]))
"""


class TestWhole:
    def test_a_backup_made_while_everything_runs_goes_on_to_the_same_bytes(
        self, make_store: MakeStore, command: Command, tmp_path: Path
    ) -> None:
        lines = [add(n / 7, n % 40) for n in range(400)] + [tax(n) for n in range(200)] + [b"bad"] * 9
        store = make_store(batch_bytes=3000, commit_bytes=6000, segment_bytes=20_000)
        append_lines(store, "events", lines[:50])
        assert process(store)[1] == {}
        save_contacts(store.database, [ANN])
        append_lines(store, "events", lines[50:])
        working = threading.Thread(target=lambda: process(store))
        working.start()
        folders = [tmp_path / f"backup-{n}" for n in range(3)]
        for folder in folders:
            command(cli_backup.backup, store.home, folder)
        working.join()
        for n, folder in enumerate(folders):
            home = f"copy-{n}"
            command(cli_backup.restore, make_store(home).home, folder)
            copy = make_store(home)
            assert process(copy)[1] == {}
            assert {**derived(copy), "clock": b""} == {**derived(store), "clock": b""}
            rows = {name: rows for name, rows in result(copy).items() if name != "restored"}
            assert rows == {name: rows for name, rows in result(store).items() if name != "restored"}
            assert list_contacts(copy.database) == [ANN]
            append_lines(copy, "events", [tax(1)])
            assert process(copy)[1] == {}  # also a processor that is new gets a checkpoint's number of its own

    def test_it_is_for_its_owner_only_and_one_file(
        self, make_store: MakeStore, command: Command, tmp_path: Path
    ) -> None:
        store = make_store()
        processed(store, tax(1))
        command(cli_backup.backup, store.home, tmp_path / "backup")
        found = sorted(str(path.relative_to(tmp_path / "backup")) for path in (tmp_path / "backup").glob("*"))
        assert found == ["afterlog.db", "backup.json", "logs"]
        for path in (tmp_path / "backup", *(tmp_path / "backup").rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        connection = sqlite3.connect(tmp_path / "backup" / "afterlog.db")
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        connection.close()

    def test_a_folder_that_is_not_empty_and_one_that_is_no_backup(
        self, make_store: MakeStore, command: Command, tmp_path: Path
    ) -> None:
        home = make_store().home
        with pytest.raises(UsageError, match="a backup needs a folder of its own"):
            command(cli_backup.backup, home, home)
        with pytest.raises(UsageError, match="a backup among the logs would be taken for one"):
            command(cli_backup.backup, home, home / "logs" / "monday")
        with pytest.raises(UsageError, match="no backup, or one that is not whole"):
            command(cli_backup.restore, home, tmp_path)

    @pytest.mark.parametrize(
        ("harm", "sentence"),
        [
            (lambda backup: shutil.rmtree(backup / "logs" / "events"), r"found 0, expected \d+ bytes of events/0"),
            (
                lambda backup: os.truncate(next((backup / "logs" / "events" / "0").glob("*.jsonl")), 10),
                r"found 10, expected \d+ bytes of events/0",
            ),
            (lambda backup: (backup / "afterlog.db").unlink(), "expected its database afterlog.db"),
            (lambda backup: (backup / "backup.json").write_bytes(b"{}"), "expected a folder with backup.json"),
            (lambda backup: (backup / "backup.json").write_bytes(b"\xff"), "expected a folder with backup.json"),
        ],
    )
    def test_a_backup_of_which_something_is_missing_is_refused_before_anything_is_changed(
        self, make_store: MakeStore, command: Command, tmp_path: Path, harm: Callable[[Path], object], sentence: str
    ) -> None:
        store = make_store()
        submitted(store, 1)
        command(cli_backup.backup, store.home, tmp_path / "backup")
        harm(tmp_path / "backup")
        new = tmp_path / "new"
        with pytest.raises(UsageError, match=f"no backup, or one that is not whole; {sentence}"):
            command(cli_backup.restore, new, tmp_path / "backup")
        assert list((new / "logs").iterdir()) == []

    @pytest.mark.parametrize("name", ["deliver", "derive", "replay-12", "promotion"])
    def test_nothing_is_replaced_while_somebody_works(
        self, make_store: MakeStore, command: Command, tmp_path: Path, name: str
    ) -> None:
        store = make_store()
        processed(store, tax(1))
        command(cli_backup.backup, store.home, tmp_path / "backup")
        held = RunLock(store.lock_path(f"{name}.lock"), "somebody")
        assert held.try_acquire()
        close(store)
        with pytest.raises(UsageError, match=f"{name} is at work: somebody"):
            command(cli_backup.restore, store.home, tmp_path / "backup")
        held.release()
        command(cli_backup.restore, store.home, tmp_path / "backup")

    def test_nothing_is_replaced_while_a_generation_is_promoted(
        self, make_store: MakeStore, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At any moment of it, also before it holds those back who follow."""
        store = make_store()
        processed(store, tax(1))
        topology = build_topology(store.settings)
        generation = replayed(store)
        command(cli_backup.backup, store.home, tmp_path / "backup")
        read_on, refused = Staging.read_on, []

        def meanwhile(staging: Staging) -> None:
            read_on(staging)
            with pytest.raises(UsageError, match=" is at work: test") as error:
                command(cli_backup.restore, store.home, tmp_path / "backup")
            refused.append(str(error.value))

        monkeypatch.setattr(Staging, "read_on", meanwhile)
        promote(store, topology, generation, "test")
        assert refused[0].startswith("replay-2 is at work")  # it holds no other lock yet
        assert store.database.live_generation("reactions") == generation

    def test_logs_that_differ_are_refused_and_nothing_is_changed(
        self, make_store: MakeStore, command: Command, tmp_path: Path
    ) -> None:
        one, two = make_store("one"), make_store("two")
        processed(one, tax(1))
        processed(two, tax(2), tax(3))
        command(cli_backup.backup, one.home, tmp_path / "backup")
        before = {path: path.read_bytes() for path in (two.home / "logs").rglob("*.jsonl")}
        close(two)
        with pytest.raises(AfterlogError, match="the log in HOME is another one than the backup's"):
            command(cli_backup.restore, two.home, tmp_path / "backup")
        assert {path: path.read_bytes() for path in (two.home / "logs").rglob("*.jsonl")} == before
        assert process(make_store("two"))[1] == {}

    def test_a_log_keeps_the_number_of_its_partitions(
        self, make_store: MakeStore, command: Command, tmp_path: Path
    ) -> None:
        one = make_store("one", partitions=4)
        append_lines(one, "events", [tax(1)])
        command(cli_backup.backup, one.home, tmp_path / "backup")
        two = make_store("two")
        close(two)
        command(cli_backup.restore, two.home, tmp_path / "backup")
        assert make_store("two").partitions("events") == [0, 1, 2, 3]
        other = make_store("other", partitions=2)
        close(other)
        other.begin("events")
        with pytest.raises(AfterlogError, match="it has another number of partitions; found 2, expected 4"):
            command(cli_backup.restore, other.home, tmp_path / "backup")
        assert not [*(other.home / "logs").rglob("*.jsonl")]
        assert make_store("other").begin("events") == 2

    def test_it_can_be_put_back_again_after_what_a_power_loss_had_left_was_cut(
        self, make_store: MakeStore, command: Command, tmp_path: Path
    ) -> None:
        with SmtpServer() as server:
            store = make_store(mail_url=server.url)
            save_contacts(store.database, [ANN])
            submitted(store, 1)
            assert deliver(store).states == {"SENT": 1}
            [newest] = (store.home / "logs" / "deliveries" / "0").glob("*.jsonl")
            with newest.open("ab") as file:
                file.write(b"\0" * 30 + b'"}\n')
            command(cli_backup.backup, store.home, tmp_path / "backup")
            for _ in range(2):
                close(store)
                command(cli_backup.restore, store.home, tmp_path / "backup")
                store = make_store(mail_url=server.url)
                submitted(store, 1)
                assert deliver(store).states == {"SENT": 1}

    def test_a_file_of_somebody_elses_in_a_backup_is_no_partition(
        self, make_store: MakeStore, command: Command, tmp_path: Path
    ) -> None:
        store = make_store("one")
        processed(store, tax(1))
        command(cli_backup.backup, store.home, tmp_path / "backup")
        (tmp_path / "backup" / "logs" / "events" / ".DS_Store").write_bytes(b"a desktop's")
        other = make_store("other")
        close(other)
        command(cli_backup.restore, other.home, tmp_path / "backup")
        assert log_bytes(other.home, "events") == log_bytes(store.home, "events")

    def test_a_log_that_has_lost_its_end_is_completed(
        self, make_store: MakeStore, command: Command, tmp_path: Path
    ) -> None:
        store = make_store(segment_bytes=100)
        for n in range(4):
            processed(store, tax(n))
        whole = derived(store), log_bytes(store.home, "events")
        command(cli_backup.backup, store.home, tmp_path / "backup")
        close(store)
        last = sorted(store.directory("events", 0).glob("*.jsonl"))
        last[-1].unlink()
        os.truncate(last[-2], 5)
        command(cli_backup.restore, store.home, tmp_path / "backup")
        again = make_store()
        assert process(again)[1] == {}
        assert (derived(again), log_bytes(store.home, "events")) == whole

    @pytest.mark.only("sqlite")
    @pytest.mark.parametrize("sealed", [False, True])
    def test_a_log_that_was_derived_again_into_other_files_stays_as_it_is(
        self, make_store: MakeStore, command: Command, tmp_path: Path, sealed: bool
    ) -> None:
        store = make_store(segment_bytes=1)
        place = store.directory("reactions", 0)
        for n in range(3):
            processed(store, tax(n))
        assert len(list_segments(place)) == 3
        if sealed:
            seal(place)
        command(cli_backup.backup, store.home, tmp_path / "backup")
        close(store)
        lose(store.home, "logs/reactions", "afterlog.db", "afterlog.db-wal", "afterlog.db-shm")
        again = make_store()
        processed(again, tax(3))
        if sealed:
            again = make_store(segment_bytes=1)
            processed(again, tax(4))
            seal(place)
            assert len(list_segments(place)) == 2
        before = derived(again)
        close(again)
        command(cli_backup.restore, store.home, tmp_path / "backup")
        put_back = make_store()
        assert derived(put_back) == before
        assert process(put_back)[1] == {}
        assert derived(put_back) == before

    def test_a_shorter_log_of_other_files_is_refused_before_anything_is_changed(
        self, make_store: MakeStore, command: Command, tmp_path: Path
    ) -> None:
        store = make_store(segment_bytes=1)
        append_lines(store, "events", [tax(0)])
        append_lines(store, "events", [tax(1)])
        append_lines(store, "events", [tax(2)])
        command(cli_backup.backup, store.home, tmp_path / "backup")
        close(store)
        place = store.directory("events", 0)
        lose(store.home, "logs/events/0")
        make_directory(place)
        (place / f"{0:020d}.jsonl").write_bytes(tax(0) + b"\n" + tax(1) + b"\n")
        lose(store.home, "logs/clock")
        before = sorted(path for path in (store.home / "logs").rglob("*") if path.is_file())
        with pytest.raises(AfterlogError, match="lacks some of the backup's, and begins its files at other places"):
            command(cli_backup.restore, store.home, tmp_path / "backup")
        assert sorted(path for path in (store.home / "logs").rglob("*") if path.is_file()) == before
        lose(store.home, "logs/events/0")
        command(cli_backup.restore, store.home, tmp_path / "backup")
        assert log_bytes(store.home, "events").splitlines() == [*map(tax, range(3))]

    @pytest.mark.only("sqlite")
    def test_the_database_that_is_replaced_is_kept_whole(
        self, make_store: MakeStore, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = make_store()
        save_contacts(store.database, [ANN])
        command(cli_backup.backup, store.home, tmp_path / "backup")
        live = store.home / "afterlog.db"
        reader = sqlite3.connect(live, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM contact").fetchone()
        save_contacts(store.database, [Entry("CUSTOMER", str(n), "kim@example.com", False) for n in range(50)])
        close(store)
        monkeypatch.setattr(storage.restore, "_PATIENCE", 0.1)
        with pytest.raises(AfterlogError, match="somebody is at work on the database"):
            command(cli_backup.restore, store.home, tmp_path / "backup")
        assert len(list_contacts(store.database)) == 51
        close(store)
        reader.close()
        command(cli_backup.restore, store.home, tmp_path / "backup")
        assert list_contacts(make_store().database) == [ANN]
        assert _contacts_in(live.with_name("afterlog.db.replaced")) == 51

    @pytest.mark.only("sqlite")
    def test_a_database_outside_home_is_replaced_in_one_step(
        self, make_store: MakeStore, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What takes its place lies whole beside it before, wherever that is: between two file systems there is no such step."""
        real, link = tmp_path / "elsewhere" / "a.db", tmp_path / "link.db"
        real.parent.mkdir()
        link.symlink_to(real)
        use_database(tmp_path / "home", f"sqlite:///{link}")
        store = make_store()
        save_contacts(store.database, [ANN])
        command(cli_backup.backup, store.home, tmp_path / "backup")
        save_contacts(store.database, [Entry("CUSTOMER", "15", "kim@example.com", False)])
        close(store)
        replace, steps = Path.replace, []

        def look(draft: Path, live: Path) -> None:
            steps.append((draft.parent, live, *(_contacts_in(path) for path in (draft, live))))
            replace(draft, live)

        monkeypatch.setattr(Path, "replace", look)
        command(cli_backup.restore, store.home, tmp_path / "backup")
        assert steps == [(real.parent, real, 1, 2)]
        assert link.is_symlink()
        assert list_contacts(make_store().database) == [ANN]
        assert {path.name.removesuffix("-shm").removesuffix("-wal") for path in real.parent.iterdir()} == {
            "a.db",
            "a.db.replaced",
        }

    @pytest.mark.parametrize("folder", [True, False])
    def test_a_generation_whose_log_is_empty_stays_live(
        self, make_store: MakeStore, command: Command, tmp_path: Path, folder: bool
    ) -> None:
        """Also where no copy has its folders: a log without a line has no file in it, and many tools copy files only."""
        store = make_store()
        processed(store, tax(1))
        topology = build_topology(store.settings)
        generation = replayed(store)
        promote(store, topology, generation, "test")
        copy, backup = store.home, tmp_path / "backup"
        if folder:
            command(cli_backup.backup, store.home, backup)
            copy = backup
        close(store)
        for path in sorted(copy.glob("logs/*/*"), reverse=True):
            if not list_segments(path):
                lose(path.parent.parent, path.parent.name)
        assert [path.name for path in copy.glob("logs/quarantine@*")] == []
        store = make_store("fresh" if folder else "home")
        command(cli_backup.restore, store.home, *([backup] if folder else []))
        again = make_store(store.home.name)
        assert again.live_generation("quarantine") == again.database.live_generation("quarantine") == generation
        append_lines(again, "events", [b"bad"])
        assert process(again)[1] == {}
        assert again.committed_end("quarantine", 0) > 0

    @pytest.mark.only("sqlite")
    def test_what_a_killed_restore_left_is_not_applied_to_the_next(
        self, make_store: MakeStore, command: Command, tmp_path: Path
    ) -> None:
        store = make_store()
        for name, count in (("small", 1_000), ("large", 20_000)):
            save_contacts(store.database, [Entry("CUSTOMER", str(n), "kim@example.com", False) for n in range(count)])
            command(cli_backup.backup, store.home, tmp_path / name)
        close(store)
        arguments = [sys.executable, "-c", DYING, str(tmp_path / "large")]
        killed = subprocess.run(arguments, env=os.environ, cwd=ROOT, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert (store.home / "afterlog.db.restoring-wal").stat().st_size > 100_000
        command(cli_backup.restore, store.home, tmp_path / "small")
        assert _contacts_in(store.home / "afterlog.db") == 1_000
        assert not [*store.home.glob("*.restoring*")]

    @pytest.mark.only("sqlite")
    @pytest.mark.parametrize("place", [0, -1])
    def test_a_backup_whose_database_is_damaged_is_refused(
        self, make_store: MakeStore, command: Command, tmp_path: Path, place: int
    ) -> None:
        store = make_store()
        save_contacts(store.database, [Entry("CUSTOMER", str(n), "kim@example.com", False) for n in range(1_000)])
        command(cli_backup.backup, store.home, tmp_path / "backup")
        close(store)
        copy = tmp_path / "backup" / "afterlog.db"
        pages = [copy.read_bytes()[at : at + 4096] for at in range(0, copy.stat().st_size, 4096)]
        pages[place] = b"\xff" * 4096
        copy.write_bytes(b"".join(pages))
        with pytest.raises(AfterlogError, match="the backup's database is damaged"):
            command(cli_backup.restore, store.home, tmp_path / "backup")
        assert len(list_contacts(store.database)) == 1_000

    @pytest.mark.only("sqlite")
    def test_where_there_is_no_space_it_is_told_in_one_sentence(self, make_store: MakeStore, tmp_path: Path) -> None:
        """No file may be larger than 64 KiB, which stands for a disk that is full; the database is larger, then a log."""
        store = make_store()
        append_lines(store, "events", [tax(1)])
        save_contacts(store.database, [ANN])
        close(store)
        backup, restore = ("backup", str(tmp_path / "backup")), ("restore", str(tmp_path / "backup"))
        small = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))}
        failed = _command(store.home, *backup, **small)
        assert failed.returncode == 1
        assert failed.stderr.startswith(f"afterlog: {tmp_path}/backup: the backup failed: ")
        assert failed.stderr.endswith(". What is there is no whole backup: make one into another folder\n")
        assert not (tmp_path / "backup" / "backup.json").exists()
        shutil.rmtree(tmp_path / "backup")
        append_lines(store, "events", [b"x" * 100_000])
        assert _command(store.home, *backup).returncode == 0
        before = log_bytes(store.home, "events")
        for lost in (False, True):
            if lost:
                lose(store.home, "logs")
            failed = _command(store.home, *restore, **small)
            assert failed.returncode == 1
            assert failed.stderr.startswith(f"afterlog: {tmp_path}/backup: the restore failed: ")
            assert failed.stderr.endswith(". Nothing is lost: make space, say, and restore again\n")
            assert not [*store.home.rglob("*.restoring"), *store.home.glob("afterlog.db.restoring*")]
        assert _command(store.home, *restore).returncode == 0
        assert log_bytes(store.home, "events") == before
        assert list_contacts(make_store().database) == [ANN]

    def test_a_file_of_somebody_elses_is_passed_over(
        self, make_store: MakeStore, command: Command, tmp_path: Path
    ) -> None:
        store = make_store()
        append_lines(store, "events", [tax(1)])
        (store.home / "logs" / ".DS_Store").touch()
        command(cli_backup.backup, store.home, tmp_path / "backup")
        assert [path.name for path in (tmp_path / "backup" / "logs").iterdir()] == ["events"]

    def test_what_a_producer_appends_meanwhile_is_not_lost(
        self, make_store: MakeStore, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, short = make_store("whole"), make_store("short")
        append_lines(whole, "events", [tax(n) for n in range(20)])
        append_lines(short, "events", [tax(n) for n in range(5)])
        command(cli_backup.backup, whole.home, tmp_path / "backup")
        producer = threading.Thread(target=append_lines, args=(short, "events", [tax(99)]))

        def copy(*arguments: Any) -> None:
            copy_file(*arguments)
            if "events" in arguments[1].parts:
                producer.start()
                producer.join(0.5)

        monkeypatch.setattr(storage.restore, "copy_file", copy)
        command(cli_backup.restore, short.home, tmp_path / "backup")
        producer.join()
        assert log_bytes(short.home, "events").splitlines() == [*map(tax, range(20)), tax(99)]

    def test_what_a_producer_has_appended_since_the_logs_were_compared_stops_it(
        self, make_store: MakeStore, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, short = make_store("whole"), make_store("short")
        append_lines(whole, "events", [tax(n) for n in range(20)])
        command(cli_backup.backup, whole.home, tmp_path / "backup")

        def make(directory: Path) -> None:
            make_directory(directory)
            append_lines(short, "events", [tax(99)])

        monkeypatch.setattr(storage.restore, "make_directory", make)
        with pytest.raises(AfterlogError, match="they differ"):
            command(cli_backup.restore, short.home, tmp_path / "backup")
        assert log_bytes(short.home, "events").splitlines() == [tax(99)]


@pytest.mark.only("sqlite")
def test_a_backup_moves_a_home_to_postgresql(
    make_store: MakeStore,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    store = make_store()
    processed(store, add(0, name="Ä\x00\x1a", price=1.25), tax(1), shop("ORDERED", 9), add(20))
    save_contacts(store.database, [ANN])
    before = {name: rows for name, rows in result(store).items() if name != "restored"}
    command(cli_backup.backup, store.home, tmp_path / "backup")
    close(store)
    url = request.getfixturevalue("postgres").create()
    monkeypatch.setenv("AFTERLOG_DATABASE_URL", url)
    command(cli_backup.restore, store.home, tmp_path / "backup")
    moved = make_store(database_url=url)
    after: dict[str, list[Any]] = {name: rows for name, rows in result(moved).items() if name != "restored"}
    assert after == before
    processed(moved, add(100), tax(2))
    assert log_bytes(store.home, "baskets").count(b"\n") > 0
