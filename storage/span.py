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
from storage.stamps import alike
from storage.times import LATEST, SECONDS_BELOW

_BLOCK = 256 << 10  # what is read, hashed and decoded while it is still at hand
_LONGEST = 64 << 20  # what goes on for longer without a newline is no event, and not kept in memory


class Span(NamedTuple):
    """`first` and `last` are the running greatest clock (milliseconds UTC) after the first good line, and after all."""

    length: int
    events: int
    first: int
    last: int
    sha256: str


class _Context(msgspec.Struct, frozen=True, gc=False):
    at: int | float | str | UnsetType = UNSET


class _Stamp(msgspec.Struct, frozen=True, gc=False):
    inserted_at: int | float | str | UnsetType = UNSET


class _Times(msgspec.Struct, gc=False):
    context: _Context = _Context()
    event: _Stamp = _Stamp()


_decode_times = msgspec.json.Decoder(_Times).decode_lines


def span_of(path: Path, clock: int) -> Span:
    """The span of a segment's file; `clock` is the greatest clock before it. A line that is no event has no clock."""
    digest, length, events, first, last = hashlib.sha256(), 0, 0, -1, clock
    rest = b""
    for block in _blocks(path):
        digest.update(block)
        length += len(block)
        if b"\n" not in block:
            rest = rest + block if len(rest) < _LONGEST else b""
            continue
        *lines, rest = (rest + block).split(b"\n")
        events += len(lines)
        if first < 0:
            found = next((own for own in map(_clock, lines) if own is not None), None)
            first = -1 if found is None else max(found, clock)
        last = _greatest(lines, last)
    return Span(length, events, clock if first < 0 else first, last, digest.hexdigest())


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _greatest(lines: list[bytes], clock: int) -> int:
    """The greatest clock of the good among some lines, and `clock`.

    Few lines need the judge: the one that claims more than all others decides, if it is good.
    """
    # Digits, or numbers: to make these of those costs a sixth of an append.
    claims: list[Any] = alike(lines) or _claims(lines)
    if claims:
        best = max(claims)
        if int(best) <= clock or _clock(lines[claims.index(best)]) == int(best):
            return max(int(best), clock)
    return max(clock, *(_clock(line) or 0 for line in lines))


def _claims(lines: list[bytes]) -> list[int]:
    """The clock that each line has if it is good; none where any of them says it in another way than nearly all do."""
    try:
        times = _decode_times(b"\n".join(lines))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []
    claims: list[Any] = [each.event.inserted_at for each in times]
    kinds = {*map(type, claims)}
    if UnsetType in kinds:
        claims = [each.context.at if (at := each.event.inserted_at) is UNSET else at for each in times]
        kinds = {*map(type, claims)}
    plain = kinds == {int} and min(claims) >= SECONDS_BELOW and max(claims) <= LATEST
    return claims if plain and len(claims) == len(lines) else []


def _clock(line: bytes) -> int | None:
    """The clock of a line by itself; None where it is bad."""
    try:
        return judge(line, 0, 0).clock
    except Rejected:
        return None
