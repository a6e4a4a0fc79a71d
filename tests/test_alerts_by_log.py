"""Many bad lines are told of the log that they are in, with its own counts, also where those have fallen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from storage.door import append_lines
from storage.store import Store
from storage.times import now
from tasks.alerts import QUARANTINE, Watch
from tasks.topology import build_topology
from tests.helpers import process
from tests.test_replay import line, use

CLICKS = """
from tasks.processors import contract
class Processor(contract.Processor):
    name, reads = "clicks-reader", "clicks"
    def event(self, event, state, out):
        pass
"""


def test_of_two_raw_logs_the_one_with_bad_lines_is_named(
    make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tmp_path, monkeypatch, CLICKS)
    settings = {"processors": ("own_mailer",), "alert_quarantine_lines": 10}
    store = make_store(**settings)
    watch = Watch(store, build_topology(store.settings))
    append_lines(store, "events", [line(n, n) for n in range(40)])
    append_lines(store, "clicks", [line(n, n) for n in range(5)] + [b"no click"] * 15)
    process(store.home, **settings)
    found = [alert for alert in watch.look(now()) if alert.kind == QUARANTINE]
    assert [(alert.about, alert.figures) for alert in found] == [("clicks", {"bad": 15, "lines": 20})]
    assert found[0].sentence.startswith("15 of the last 20 lines of log clicks are no events")


def test_where_an_older_database_is_put_back_lines_are_counted_anew(make_store: Callable[..., Store]) -> None:
    store = make_store(alert_quarantine_lines=10)
    watch = Watch(store, build_topology(store.settings))
    append_lines(store, "events", [line(n, n) for n in range(40)])
    process(store.home)
    assert QUARANTINE not in {alert.kind for alert in watch.look(now())}
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE checkpoint SET lines = 0, processed = 0, ignored = 0")
    assert QUARANTINE not in {alert.kind for alert in watch.look(now())}
    append_lines(store, "events", [line(n, n) for n in range(10)] + [b"no event"] * 10)
    process(store.home)
    assert [a.figures for a in watch.look(now()) if a.kind == QUARANTINE] == [{"bad": 10, "lines": 20}]
