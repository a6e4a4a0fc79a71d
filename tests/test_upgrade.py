"""A database of an earlier version, with rows in it, goes on with the newest code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from storage.door import append_lines
from storage.schema import HEAD
from storage.settings import load_settings
from storage.store import Store
from tasks.topology import build_topology
from tests.conftest import settings_of
from tests.test_commit import add, derived, process, processed, result, shop, tax
from tests.test_deliver import deliver

BOTH_DATABASES = True
A = "0001"  # the schema of 0.1.0
LINES = [tax(1), add(0), add(3, 16, name="Lemon"), b"bad", shop("ORDERED", 9, 16)]
CHECKPOINT = (
    "id", "processor", "generation", "log", "partition", "offset", "clock", "as_of", "tick_offset", "commit", "version",
    "changed_at", "committed_at", "lines", "processed", "quarantined", "ignored", "derived",
)  # fmt: skip
MAIL = ("derive/events:0:0/tax-received", "SENT", "reactions", 1, 0, 0, "CLIENT", "1", 4102444800000, 0, 1, "", 0)
LATER = [add(50), tax(2), shop("ORDERED", 70)]


def downgraded(store: Store) -> None:
    """Take a database back to the schema of A, its rows with it."""
    config = Config()
    config.set_main_option("script_location", "storage:migrations")
    with store.database.write() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, A)
        assert connection.scalar(sa.text("SELECT version_num FROM alembic_version")) == A
    store.database.dispose()


def test_a_database_of_a_goes_on_where_it_was(make_store: Callable[..., Store], tmp_path: Path) -> None:
    new, old = make_store("new"), make_store("old")
    for store in (new, old):
        processed(store, *LINES)
        deliver(store)
    before = result(old)
    downgraded(old)
    upgraded = Store(load_settings(**settings_of(tmp_path / "old")))
    assert result(upgraded) == before
    with upgraded.database.read() as connection:
        assert connection.scalar(sa.text("SELECT version_num FROM alembic_version")) == HEAD
    for store in (new, upgraded):
        append_lines(store, "events", LATER)
        assert process(store)[1] == {}
        deliver(store)
    assert {**derived(upgraded), "clock": b""} == {**derived(new), "clock": b""}
    assert {name: rows for name, rows in result(upgraded).items() if name != "delivery"} == {
        name: rows for name, rows in result(new).items() if name != "delivery"
    }
    assert build_topology(upgraded.settings)
    upgraded.database.dispose()


@pytest.mark.only("sqlite")
def test_the_very_file_of_a_goes_on(tmp_path: Path) -> None:
    """A's own SQL, as its first migration wrote it, with a row in every table that delivery and processors need."""
    home = tmp_path / "home"
    home.mkdir()
    engine = sa.create_engine(f"sqlite:///{home}/afterlog.db")
    config = Config()
    config.set_main_option("script_location", "storage:migrations")
    line = tax(1)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, A)
        checkpoint: dict[str, object] = dict.fromkeys(CHECKPOINT, 0)
        checkpoint |= {
            "id": 1,
            "processor": "derive",
            "generation": 1,
            "log": "events",
            "version": "",
            "changed_at": -1,
        }
        checkpoint |= {"offset": len(line) + 1, "commit": 5, "lines": 1, "processed": 1}
        columns = ", ".join(f'"{name}"' for name in checkpoint)
        for sql, values in (
            ("INSERT INTO contact VALUES (?, ?, ?, ?)", ("CLIENT", "1", "ann@example.com", 0)),
            (f"INSERT INTO checkpoint ({columns}) VALUES ({', '.join('?' * 18)})", tuple(checkpoint.values())),  # noqa: S608  # our own
            (f"INSERT INTO delivery VALUES ({', '.join('?' * 13)})", MAIL),  # noqa: S608  # our own
        ):
            connection.exec_driver_sql(sql, values)
    engine.dispose()
    store = Store(load_settings(home=home))
    append_lines(store, "events", [line, tax(2)])
    assert process(store)[1] == {}
    with store.database.read() as connection:
        commit, lines = connection.execute(sa.text('SELECT "commit", lines FROM checkpoint WHERE id = 1')).one()
        assert (commit > 5, lines) == (True, 2)  # a tick of its own is one more commit
        assert connection.scalar(sa.text("SELECT state FROM delivery")) == "SENT"
        assert connection.scalar(sa.text("SELECT email FROM contact")) == "ann@example.com"
    store.database.dispose()
