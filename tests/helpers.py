"""What several test files do with a HOME: read its logs, bring its processors to the end, run it again undisturbed."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from storage.settings import load_settings
from storage.store import Store
from tasks.local import side_by_side
from tasks.process import FinalTick, follow, process_to_end
from tasks.run import Run
from tasks.topology import build_topology
from tests.conftest import log_bytes, settings_of

DERIVED = ("quarantine", "reactions", "baskets", "anomalies", "reminders")
TABLES = ("customer", "item", "orders", "order_line", "basket_line")


def open_store(home: Path, **settings: object) -> Store:
    """A store on `home`, with settings of the test's own."""
    return Store(load_settings(**settings_of(home), **settings))


def process(home: Path, *names: str, as_of: Any = None, **settings: object) -> None:
    """Bring processors to the end in this process: all of them where none is named; no tick where no time is given."""
    store = open_store(home, **settings)
    run = Run(store, build_topology(store.settings), "test")
    final = FinalTick(as_of) if as_of is not None else None
    _bring(run, names or run.topology.on_raw_logs(), final)
    if not names:
        _bring(run, run.topology.on_derived_logs(), None)
    store.database.dispose()


def _bring(run: Run, names: Sequence[str], final: FinalTick | None) -> None:
    outcome = side_by_side(run, names, lambda r, name: process_to_end(r, name, final))
    assert outcome.failures == {}
    run.stop.clear()


def copy_raw_logs(home: Path, other: Path) -> None:
    """Give another HOME the same raw log and ticks, and nothing of what was made from them."""
    settings_of(other)
    for log in ("events", "clock"):
        if (home / "logs" / log).is_dir():
            shutil.copytree(home / "logs" / log, other / "logs" / log)


def undisturbed(home: Path) -> Path:
    """Another HOME with the same log and ticks, processed in one go."""
    other = home.with_name(home.name + "-undisturbed")
    copy_raw_logs(home, other)
    process(other)
    return other


def derived(home: Path) -> dict[str, bytes]:
    """The bytes of every derived log."""
    return {log: log_bytes(home, log) for log in DERIVED}


def rows(home: Path, *tables: str) -> dict[str, list[Any]]:
    """The rows of tables, in order."""
    store = open_store(home)
    found = rows_of(store, tables)
    store.database.dispose()
    return found


def rows_of(store: Store, tables: Sequence[str]) -> dict[str, list[Any]]:
    """The same of a store that is open."""
    with store.database.read() as connection:
        return {table: sorted(connection.execute(sa.text(f"SELECT * FROM {table}"))) for table in tables}  # noqa: S608  # names of this module's callers


def check_undisturbed(home: Path, before: Sequence[dict[str, bytes]] = ()) -> None:
    """The logs and rows are an undisturbed run's, and no log ever held anything else than a beginning of them."""
    process(home)  # what `process` leaves to `deliver`
    other = undisturbed(home)
    assert derived(home) == derived(other)
    assert rows(home, *TABLES) == rows(other, *TABLES)
    for once in before:
        assert all(derived(home)[log].startswith(there) for log, there in once.items())


def parsed(log: bytes) -> list[dict[str, Any]]:
    """The events of a log."""
    return [json.loads(line) for line in log.split(b"\n")[:-1]]


@contextmanager
def followed(store: Store, *names: str) -> Iterator[None]:
    """A live shift beside the test."""
    run = Run(store, build_topology(store.settings), "shift")
    run.pulse.start()
    thread = threading.Thread(target=lambda: side_by_side(run, names, follow))
    thread.start()
    try:
        yield
    finally:
        run.stop.set()
        thread.join()
