"""How great the clock of a line can be at most, told from its last bytes without reading the rest.

Most producers write `event` last, so that a line ends in its stamp. Whatever does not look like that is judged in full.
A bound is the line's own stamp, or more: where a line is bad it has none, and only a look at all of it would tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from storage.event import Rejected
from storage.judge import judge

NONE = -1
"""The bound of a line without a stamp."""

# The last object of the last member of a line: no brace or backslash in it, so it is where it seems to be, and as the
# last of its name it is the one that counts.
_TAIL = re.compile(rb'[ ,{]"event": ?\{"inserted_at": ?(\d{13})(?:,(?!.*"inserted_at")[^{}\\]*)?\}\}')
_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)
_STAMP = 13


def bounds(lines: Sequence[bytes], max_line: int) -> Callable[[int], int]:
    """Gives, for a number of lines, a bound of the greatest stamp (milliseconds) among so many of `lines`."""
    stamps = alike(lines)
    if stamps is None:
        return _one_by_one(lines, max_line)
    return lambda count: int(max(stamps[:count])) if count else NONE


def alike(lines: Sequence[bytes]) -> list[bytes] | None:
    """The bounds of lines that all end as the first one does but for digits, thirteen digits each; None for others.

    Several times as quick as one by one, and most producers write all their lines so.
    """
    first = lines[0] if lines else b""
    found = _TAIL.fullmatch(first, max(0, first.rfind(b'"event"') - 1))
    if found is None:
        return None
    before, after = len(first) - found.start(), len(first) - found.start(1)
    tails = [line[-before:] for line in lines]
    if b"".join(tails).translate(_DIGITS) != first[-before:].translate(_DIGITS) * len(lines):
        return None
    return [tail[-after : _STAMP - after] for tail in tails]


def _one_by_one(lines: Sequence[bytes], max_line: int) -> Callable[[int], int]:
    each = [_bound(line, max_line) for line in lines]
    return lambda count: max(each[:count], default=NONE)


def _bound(line: bytes, max_line: int) -> int:
    if len(line) > max_line:
        return NONE
    found = _TAIL.fullmatch(line, max(0, line.rfind(b'"event"') - 1))
    if found is not None:
        return int(found[1])
    try:
        return judge(line, 0, 0).clock
    except Rejected:
        return NONE
