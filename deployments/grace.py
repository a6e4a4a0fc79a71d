"""A server that was away gives every run time to be heard of before it calls it dead.

Prefect writes down until when it waits for a run's next heartbeat. A server that starts again after that moment fires at
once, before the runs that are alive have reached it: it would mark them Crashed, and start each a second time.
"""

from __future__ import annotations

import contextlib
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

NOT_HEARD_OF = "Afterlog: a run without a heartbeat has crashed"
"""The automation that waits for heartbeats."""

_LATER = """
UPDATE automation_bucket SET "end" = :until
WHERE "end" < :until AND automation_id IN (SELECT id FROM automation WHERE name = :name)
"""


def give_grace(database: Path, seconds: float) -> None:
    """Have Prefect wait `seconds` from now at least for every run; its server must not be running.

    There is no call of its API for it. Where the file is not there, or is another version's, nothing happens: the price is
    a run that is started twice, of which one waits for the other's locks.
    """
    if not database.is_file():
        return
    until = datetime.now(UTC) + timedelta(seconds=seconds)
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(database, timeout=5)) as connection,
        connection,
    ):
        connection.execute(_LATER, {"until": until.strftime("%Y-%m-%d %H:%M:%S.%f"), "name": NOT_HEARD_OF})
