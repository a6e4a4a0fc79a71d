"""`afterlog quarantine`: lines that were no events, and trying them again."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import orjson
from cyclopts import App

from deployments.cli_arguments import AnyBytes
from deployments.console import say, show_table
from storage.errors import UsageError
from storage.settings import load_settings
from storage.store import Store
from tasks.quarantine import list_quarantine
from tasks.quarantine import retry as try_again

quarantine = App(name="quarantine", help="Lines that were no events: what was wrong with them, and trying them again.")

COLUMNS = ("id", "reason", "length", "tried again", "line")


@quarantine.command(name="list")
def list_(*, reason: str = "", json: bool = False) -> None:
    """Show the lines in quarantine, in the order of their log. `process` puts them there.

    Args:
        reason: only those with this in their reason.
        json: one JSON document on standard output.
    """
    found = list_quarantine(Store(load_settings()), reason)
    if json:
        data = orjson.dumps([asdict(each) for each in found], option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        sys.stdout.buffer.write(data)
        return
    rows = [(q.id, q.reason, q.length, q.retried or "-", " ".join(q.head.split())) for q in found]
    show_table("Quarantine", COLUMNS, rows)


@quarantine.command
def retry(
    id: str, *, line: Annotated[str | None, AnyBytes] = None, file: Path | None = None, force: bool = False
) -> None:
    """Append a line in quarantine again, as a new event of the log that it came from, if the judge takes it.

    Args:
        id: the line's id, as `afterlog quarantine list` shows it, or its offset.
        line: the corrected line; the same bytes where neither this nor a file is given.
        file: a file with the corrected line.
        force: also where it was tried again before.
    """
    if line is not None and file is not None:
        raise UsageError("--line and --file are two lines", do="Give one of them")
    store = Store(load_settings())
    done = try_again(
        store, id, line.encode("utf-8", "surrogateescape") if line is not None else _read(file), force=force
    )
    say(f"{done.id} is in {done.log} again, at {done.log}:{done.partition}:{done.offset}")


def _read(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return file.read_bytes().removesuffix(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read the file: {error.strerror}", where=str(file)) from error
