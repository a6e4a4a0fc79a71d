"""What a sealed segment holds, found in one pass over its file: bytes, lines, first and last clock, and their SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from storage.event import Rejected
from storage.judge import judge
from storage.times import LATEST, SECONDS_BELOW

_BLOCK = 4 << 20
_LONGEST = 64 << 20  # what goes on for longer without a newline is no event, and not kept in memory


class Span(NamedTuple):
    """`first` and `last` are the running greatest clock (milliseconds UTC) after the first good line, and after all."""

    length: int
    events: int
    first: int
    last: int
    sha256: str


class _Context(msgspec.Struct, gc=False):
    at: int | float | str | UnsetType = UNSET


class _Stamp(msgspec.Struct, gc=False):
    inserted_at: int | float | str | UnsetType = UNSET


class _Times(msgspec.Struct, gc=False):
    context: _Context | None = None
    event: _Stamp | None = None


_times = msgspec.json.Decoder(_Times)


def span_of(path: Path, clock: int) -> Span:
    """The span of a segment's file; `clock` is the greatest clock before it. A line that is no event has no clock."""
    digest, length, events, first, last = hashlib.sha256(), 0, 0, -1, clock
    rest = b""
    for block in _blocks(path):
        digest.update(block)
        length += len(block)
        events += block.count(b"\n")
        whole, newline, tail = block.rpartition(b"\n")
        if not newline:
            rest = rest + block if len(rest) < _LONGEST else b""
            continue
        data, rest = rest + whole, tail
        lines = data.split(b"\n")
        if first < 0:
            found = next((own for own in map(_clock, lines) if own is not None), None)
            first = -1 if found is None else max(found, clock)
        last = _greatest(data, lines, last)
    return Span(length, events, clock if first < 0 else first, last, digest.hexdigest())


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _greatest(data: bytes, lines: list[bytes], clock: int) -> int:
    """The greatest clock of good lines and `clock`.

    Few lines need the judge: only one that claims more than all others decides, if it is good.
    """
    claims = _claims(data, lines)
    best = max(claims)
    if best <= clock:
        return clock
    if _is_good(lines[claims.index(best)]):
        return best
    for index in sorted(range(len(claims)), key=claims.__getitem__, reverse=True):
        if claims[index] <= clock:
            break
        if _is_good(lines[index]):
            return claims[index]
    return clock


def _claims(data: bytes, lines: list[bytes]) -> list[int]:
    """The clock that each line has if it is good."""
    try:
        times = _times.decode_lines(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        times = []
    if len(times) != len(lines):
        return [_clock(line) or 0 for line in lines]
    claims = []
    for index, each in enumerate(times):
        stamp: Any = UNSET if each.event is None else each.event.inserted_at
        if stamp is UNSET and each.context is not None:
            stamp = each.context.at
        if stamp.__class__ is int and SECONDS_BELOW <= stamp <= LATEST:
            claims.append(stamp)
        else:
            claims.append(_clock(lines[index]) or 0)  # seconds, or a text: the judge reads it
    return claims


def _clock(line: bytes) -> int | None:
    """The clock of a line by itself; None where it is bad."""
    try:
        return judge(line, 0, 0).clock
    except Rejected:
        return None


def _is_good(line: bytes) -> bool:
    return _clock(line) is not None
