"""Bytes of Afterlog's database for a shop's events: python -m benchmarks.database_size [CUSTOMERS] [DATABASE_URL]

The example's shop over two days, processed and delivered to a folder; 2,600 customers give about 100,000 events.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import sqlalchemy as sa

from deployments.example import history
from storage.contacts import Entry, save_contacts
from storage.door import append_lines
from storage.settings import load_settings
from storage.store import Store
from storage.times import now
from tasks.deliver import deliver_to_end
from tasks.local import side_by_side
from tasks.process import FinalTick, process_to_end
from tasks.run import Run
from tasks.topology import build_topology


def measure(home: Path, customers: int, url: str | None) -> None:
    """Fill a HOME and say how large its database and its logs are."""
    settings = {"home": home} | ({"database_url": url} if url else {})
    store = Store(load_settings(**settings))
    lines = list(history(now(), customers=customers, hours=48))
    append_lines(store, "events", lines)
    save_contacts(
        store.database, [Entry("CUSTOMER", str(n), f"c{n}@example.com", False) for n in range(customers + 101)]
    )
    run, final = Run(store, build_topology(store.settings), "size"), FinalTick("log-end")
    assert side_by_side(run, run.topology.on_raw_logs(), lambda r, n: process_to_end(r, n, final)).failures == {}
    run.stop.clear()
    process_to_end(run, "remind", None)
    mails = deliver_to_end(run)
    store.database.dispose()
    for log in sorted((home / "logs").iterdir()):
        print(f"log {log.name}: {sum(p.stat().st_size for p in log.rglob('*.jsonl')):,} bytes")
    with store.database.read() as connection:
        if connection.dialect.name == "sqlite":
            size = sum(path.stat().st_size for path in home.glob("afterlog.db"))
        else:
            size = connection.scalar(sa.text("SELECT pg_database_size(current_database())"))
        for table in sa.inspect(connection).get_table_names():
            print(f"table {table}: {connection.scalar(sa.text(f'SELECT count(*) FROM {table}')):,} rows")  # noqa: S608  # our own tables
    print(
        f"{len(lines):,} events, {dict(mails.states)}, database {size:,} bytes: {size * 100_000 / len(lines):,.0f} per 100,000"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        measure(
            Path(folder), int(sys.argv[1]) if len(sys.argv) > 1 else 2_600, sys.argv[2] if len(sys.argv) > 2 else None
        )
