"""Whether what is live follows from the log: settings that changed, a byte that was changed, code that is gone."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import orjson
import pytest
import sqlalchemy as sa

from storage.door import append_lines
from storage.store import Store
from tasks.topology import build_topology
from tasks.verify_derived import report, verify_derived
from tests.conftest import afterlog, log_bytes
from tests.helpers import DERIVED, TABLES, derived, process
from tests.test_replay import EITHER, MINUTE, START, line, write

ITEMS_ARE_SHARED = "item: not compared, since several partitions set its rows, in whatever order they ran"
BOTH_DATABASES = True
pytestmark = pytest.mark.only("sqlite")
OWN = """
from tasks.processors import contract

class Processor(contract.Processor):
    name, reads, writes = "vip", "events", "vips"

    def event(self, event, state, out):
        out.emit(self, event, {"id": event.id}, "SEEN", {"type": "NONE"}, name="seen")
"""


def check(store: Store) -> tuple[bool, list[str]]:
    told: list[str] = []
    return report(verify_derived(store, build_topology(store.settings)), told.append), told


def test_what_is_live_follows_from_the_log_also_where_settings_changed(make_store: Callable[..., Store]) -> None:
    store = make_store(batch_bytes=300, commit_bytes=300)
    write(store, *[line(n % 5, n * 11) for n in range(30)], b"{", as_of=400)
    process(store.home, timeout="10m", as_of=START + 420 * MINUTE)
    append_lines(store, "events", [line(n % 3, 430 + n * 11) for n in range(30)])
    process(store.home, timeout="10m", as_of=START + 760 * MINUTE)
    write(store, line(9, 790), as_of=900)
    before = derived(store.home)
    good, told = check(store)
    assert good, told
    assert told[2] == f"baskets/0: {len(before['baskets'])} bytes follow from the log"
    assert len(told) == len(DERIVED) + len(TABLES)
    assert derived(store.home) == before
    assert not list(store.home.parent.glob("afterlog-verify-*"))


def test_the_first_difference_is_named(store: Store) -> None:
    write(store, line(1, 0), line(1, 50), as_of=100)
    [segment] = (store.home / "logs" / "baskets" / "0").glob("*.jsonl")
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(lines[0] + lines[1].replace(b"ABANDONED", b"abandoned", 1))
    done = afterlog(store.home, "verify", "--derived")
    assert done.returncode == 1
    assert f"\nbaskets/0:{len(lines[0])}: the first difference".encode() in done.stderr
    assert b"\nreminders/0: " in done.stderr


def test_code_that_is_gone_is_named_with_its_stretch(
    make_store: Callable[..., Store], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]  # pytest's own
    import importlib
    import sys

    module = tmp_path / "vip_code.py"
    module.write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    store = make_store(processors=("vip_code",))
    append_lines(store, "events", [line(1, 0)])
    process(store.home, processors=("vip_code",))
    first = len(log_bytes(store.home, "vips"))
    module.write_text(OWN + "\n# other words, the same deeds\n")
    importlib.invalidate_caches()
    sys.modules.pop("vip_code")
    append_lines(store, "events", [line(1, 1)])
    process(store.home, processors=("vip_code",))
    good, told = check(store)
    assert good, told
    assert any(f"vips/0: bytes 0 to {first} were made by code" in sentence for sentence in told)
    sys.modules.pop("vip_code")


@pytest.mark.parametrize("how", ["DELETE FROM checkpoint", "UPDATE checkpoint SET live = 0"])
def test_a_log_without_a_checkpoint_is_not_passed_over(store: Store, how: str) -> None:
    write(store, line(1, 0), line(1, 50), as_of=100)
    with store.database.write() as connection:
        connection.exec_driver_sql(f"{how} WHERE processor = 'abandonment'")
    good, told = check(store)
    assert not good
    end = len(log_bytes(store.home, "baskets"))
    said = f"baskets/0: {end} bytes are committed, and the database has no checkpoint of abandonment that is live"
    assert [each for each in told if each.startswith("baskets/")] == [said]
    assert len(told) == len(DERIVED) + len(TABLES)


def item(customer: object, at: int, item: str, price: str, verb: str = "ADDED_ITEM_TO_BASKET") -> bytes:
    """An event of an item, as its text says."""
    return (
        f'{{"subject":{{"id":{orjson.dumps(customer).decode()},"type":"CUSTOMER"}},"verb":"{verb}","object":{{"type":"ITEM","item":'
        f'{{"id":{item},"name":"\\u0000 a","price":{price},"count":2}}}},"context":{{"at":{START + at}}}}}'
    ).encode()


@EITHER
@pytest.mark.parametrize(
    ("how", "table", "live", "replayed"),
    [
        ("UPDATE customer SET last_at = last_at + 1 WHERE key = '1'", "customer", "'key': '1'", "'key': '1'"),
        ("UPDATE item SET price = 5.000001", "item", "5.000001", "'price': 5"),
        ("UPDATE orders SET value = NULL", "orders", "'value': None", "'value': 10"),
        ("UPDATE order_line SET name = 'b'", "order_line", "'name': 'b'", "'name': None"),
        ("DELETE FROM basket_line WHERE customer = '1'", "basket_line", "no such row", "'customer': '1'"),
        (
            "UPDATE basket_line SET customer = '9' WHERE customer = '1'",
            "basket_line",
            "'customer': '9'",
            "no such row",
        ),
    ],
)
def test_the_first_row_that_somebody_changed_is_named(
    store: Store, how: str, table: str, live: str, replayed: str
) -> None:
    write(store, line(1, 0), line(2, 1), line(2, 2, "ORDERED"), as_of=100)
    assert check(store)[0]
    with store.database.write() as connection:
        connection.exec_driver_sql(how)
    good, told = check(store)
    assert not good
    [said] = [sentence for sentence in told if "row" in sentence and "follow" not in sentence]
    found, expected = said.split(", expected replayed ")
    assert found.startswith(f"{table}: the first row that differs: found live ")
    assert live in found
    assert replayed in expected
    assert len(told) == len(DERIVED) + len(TABLES)


@EITHER
@pytest.mark.parametrize("partitions", [1, 3])
def test_rows_of_any_text_and_number_follow_from_the_log(make_store: Callable[..., Store], partitions: int) -> None:
    store = make_store(partitions=partitions)
    prices = ("0.1", "99999999999999.123456", "1e13", "-7.0000005", "1e400", '"x"')
    lines = [
        item(customer, at, one, price)
        for at, price in enumerate(prices)
        for customer in (1, "\0a", "c")
        for one in ("7", '"\\u0000"')
    ]
    write(store, *lines, as_of=100)
    write(store, item(1, 90, "7", "3"), item("c", 91, "7", "3", "REMOVED_ITEM_FROM_BASKET"), as_of=200)
    good, told = check(store)
    assert good, told
    assert told[-5:] == [
        "customer: 3 rows follow from the log",
        "item: 2 rows follow from the log" if partitions == 1 else ITEMS_ARE_SHARED,
        "orders: 0 rows follow from the log",
        "order_line: 0 rows follow from the log",
        "basket_line: 5 rows follow from the log",
    ]


def test_no_processor_waits_until_all_rows_are_copied(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite gives up after a minute, and many rows take longer."""
    write(store, line(1, 0), line(2, 1), line(2, 2, "ORDERED"), as_of=100)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    asked = []

    def look(connection: sa.Connection, _cursor: object, statement: str, *_: object) -> None:
        if connection.dialect.name == "sqlite" and statement.lstrip().startswith("SELECT basket_line."):
            [other] = tmp_path.glob("afterlog-verify-*/verify.db")
            with closing(sqlite3.connect(other, timeout=0, isolation_level=None)) as mine:
                mine.execute("BEGIN IMMEDIATE")
            asked.append(statement)

    sa.event.listen(store.database.engine, "before_cursor_execute", look)
    assert verify_derived(store, build_topology(store.settings), ["normalise"])
    assert len(asked) == 1
