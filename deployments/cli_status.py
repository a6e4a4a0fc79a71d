"""`afterlog status`: how things stand."""

from __future__ import annotations

import sys
from dataclasses import asdict

import orjson

from deployments.console import say, show_table
from storage.errors import AfterlogError
from storage.settings import load_settings
from storage.store import Store
from storage.times import show_duration
from tasks.status import ProcessorStatus, Status, read_status
from tasks.topology import build_topology

COLUMNS = (
    "processor", "log", "state", "offset", "lag bytes", "lag", "read", "processed", "quarantined", "ignored", "derived",
)  # fmt: skip


def status(*, json: bool = False, check: bool = False) -> None:
    """Show how far each processor has come and whether it is idle, working, stuck, dead or paused, and the mails.

    Args:
        json: one JSON document on standard output.
        check: say on standard error what is wrong, one sentence for each problem, and exit with 1; say nothing and exit
            with 0 where all is well. For any monitor; with --json the document is still written.
    """
    settings = load_settings()
    found = read_status(Store(settings), build_topology(settings))
    if json:
        sys.stdout.buffer.write(orjson.dumps(asdict(found), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        sys.stdout.buffer.flush()
    elif not check:
        _show(found)
    if check and found.problems:
        for problem in found.problems[:-1]:
            say(f"afterlog: {problem}")
        raise AfterlogError(found.problems[-1])


def _show(found: Status) -> None:
    show_table(f"Afterlog in {found.home}", COLUMNS, [_cells(row) for row in found.processors])
    if found.mails:
        show_table("Mails", ("state", "mails"), sorted(found.mails.items()))
    for problem in found.problems:
        say(problem)


def _cells(row: ProcessorStatus) -> tuple[object, ...]:
    lag = show_duration(row.lag_ms) if row.lag_ms else "-"
    return (
        row.processor, f"{row.log}/{row.partition}", row.state, row.offset, row.lag_bytes, lag, row.read, row.processed,
        row.quarantined, row.ignored, row.derived,
    )  # fmt: skip
