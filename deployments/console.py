"""How the command line speaks: results on stdout, everything else on stderr; tables on a terminal, plain lines in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence


def say(message: str) -> None:
    """A word to the person at the terminal."""
    print(message, file=sys.stderr, flush=True)


def show_json(document: object) -> None:
    """One JSON document on standard output, dataclasses as objects.

    What it shows may come from a log: integers of any size, and deeper nested than orjson writes.
    """
    text = json.dumps(document, default=vars, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.buffer.write(text.encode() + b"\n")
    sys.stdout.buffer.flush()


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on a terminal; in a pipe the same as tab-separated lines, the columns' names first."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            print("\t".join(str(cell) for cell in row))
        return
    from rich.console import Console  # only a terminal needs it, and a pipe should not wait for it
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        numbers = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    Console().print(table)
