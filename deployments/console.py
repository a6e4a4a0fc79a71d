"""How the command line speaks: results on stdout, everything else on stderr; tables on a terminal, plain lines in a pipe."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence

# What ends a line, steers a terminal or turns the direction of writing; a lone surrogate cannot be written at all.
_STEERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def say(message: str) -> None:
    """A word to the person at the terminal, of several lines where it has newlines; nothing in it steers the terminal."""
    print("\n".join(map(_shown, message.split("\n"))), file=sys.stderr, flush=True)


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
            print("\t".join(_shown(cell) for cell in row))
        sys.stdout.flush()  # before whatever is said next, where both go into one pipe
        return
    from rich.console import Console  # only a terminal needs it, and a pipe should not wait for it
    from rich.table import Table
    from rich.text import Text  # text, since a str would be read for markup

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        numbers = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(Text(f"{cell:,}" if isinstance(cell, int) else _shown(cell)) for cell in row))
    Console().print(table)


def _shown(cell: object) -> str:
    """A cell on one line, whatever a log or a person has put in it."""
    return _STEERS.sub(lambda match: match[0].encode("unicode_escape").decode(), str(cell))
