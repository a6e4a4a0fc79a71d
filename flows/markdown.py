"""Text in the UI: whatever an event holds is shown as it is, and does nothing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from prefect.runtime import flow_run

# What Markdown or HTML give a meaning to, and what makes a link of a plain text. Backslashes, as the UI shows an entity
# in a heading or a table by its number.
_SPECIAL = re.compile(r"[!#&*<>@\[\\\]_`{|}~]|:(?=//)|(?<=[wW]{3})\.")
# One of Prefect's two UIs takes the cell of a table artifact for Markdown, the other for plain text: what is put in must not
# be seen. A space of no width breaks tags, entities, links, and what makes a list or a heading of the line.
_IN_CELL = re.compile(
    r"(?<=[<&\\])|(?<=\])(?=[(\[])|(?<=:)(?=//)|(?<=[wW]{3})(?=\.)|(?=@)|^(?=[#>=\[~`]|[-+](?!\d)|\d+[.)](?!\S))"
)
# A mark opens nothing before white space, which a byte order mark is to the UI; within a word an underscore is no mark.
_MARKS = re.compile(r"\*+|~+|(?<!\w)_+|_+(?!\w)")
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # overrides of the writing direction


def line_of(value: object, limit: int = 120) -> str:
    """A value as one line of text of at most `limit` characters, without control characters."""
    text = value if isinstance(value, str) else str(value)
    shown = "".join(" " if _unprintable(character) else character for character in text[: limit * 4])
    line = " ".join(shown.split())
    return line if len(line) <= limit and len(text) <= limit * 4 else line[: limit - 1].rstrip(" ,") + "…"


def escape(value: object, limit: int = 120) -> str:
    """`line_of` such that Markdown shows it as it is: no tag, link, picture, code or cell comes of it."""
    return _SPECIAL.sub(lambda found: "\\" + found[0], line_of(value, limit))


def cell(value: object, limit: int = 120) -> str:
    """`line_of` such that the cell of a table artifact shows it as it is: no tag, link, list or style comes of it."""
    shown = _MARKS.sub(lambda found: found[0] + "\ufeff", _IN_CELL.sub("\u200b", line_of(value, limit)))
    return shown.replace("`", "\\`") if shown.count("`") > 1 else shown  # nothing that is not seen breaks these


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers stand right, with thousands apart, and every text is escaped."""
    right = [bool(rows) and all(isinstance(row[i], int) for row in rows) for i in range(len(columns))]
    lines = [columns, ["--:" if numbers else "---" for numbers in right]]
    lines += [[f"{each:,}" if isinstance(each, int) else escape(each) for each in row] for row in rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def run_link() -> str:
    """A link to the current run, by its path alone: it holds wherever the UI is served."""
    return f"[this run](/runs/flow-run/{flow_run.id})"


def _unprintable(character: str) -> bool:
    return unicodedata.category(character) in {"Cc", "Cs"} or character in _TURNS
