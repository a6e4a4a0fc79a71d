"""`afterlog status`: how things stand."""

from __future__ import annotations

import sys
from dataclasses import asdict

import orjson

from deployments.console import show_table
from storage.settings import load_settings
from storage.store import Store
from storage.times import show_duration
from tasks.status import read_status
from tasks.topology import build_topology


def status(*, json: bool = False) -> None:
    """Show how far each processor has come, and the mails by state.

    Args:
        json: one JSON document on standard output.
    """
    settings = load_settings()
    found = read_status(Store(settings), build_topology(settings))
    if json:
        sys.stdout.buffer.write(orjson.dumps(asdict(found), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        return
    rows = [
        (p.processor, f"{p.log}/{p.partition}", p.offset, p.lag_bytes, show_duration(p.lag_ms) if p.lag_bytes else "-",
         p.read, p.processed, p.quarantined, p.ignored, p.derived)
        for p in found.processors
    ]  # fmt: skip
    columns = (
        "processor",
        "log",
        "offset",
        "lag bytes",
        "lag",
        "read",
        "processed",
        "quarantined",
        "ignored",
        "derived",
    )
    show_table(f"Afterlog in {found.home}", columns, rows)
    if found.mails:
        show_table("Mails", ("state", "mails"), sorted(found.mails.items()))
