"""Times on the wire and inside: integer milliseconds UTC, rounded half to even."""

from __future__ import annotations

import calendar
import re
import time
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation

from storage.errors import UsageError

SECONDS_BELOW = 100_000_000_000  # a number under this counts seconds, from there on milliseconds
LATEST = 4_102_444_800_000  # 2100-01-01T00:00:00Z
DAY = 86_400_000

_RFC3339 = re.compile(r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(\.\d+)?(?:([Zz])|([+-])(\d\d):(\d\d))", re.ASCII)


def now() -> int:
    """The wall clock, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def parse_time(value: int | str) -> int | None:
    """Milliseconds since 1970 of a time as the wire has it; None where it is no usable time.

    A number is seconds below 1e11 and milliseconds from there on; a string is RFC 3339 with its offset.
    """
    if isinstance(value, str):
        return _parse_text(value)
    return _in_range(value * 1000 if value < SECONDS_BELOW else value)


def typed_number(text: str) -> int | None:
    """The whole number that a person has typed; None where it is none, or has more digits than any time or offset."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def parse_moment(text: str, what: str, *words: str) -> int:
    """Milliseconds since 1970 of a time that a person has typed for `what`, where it is none of the `words` that mean one.

    Raises:
        UsageError: it is no time.
    """
    number = typed_number(text)
    millis = parse_time(text if number is None else number)
    if millis is None:
        fits = ", ".join([*words, "RFC 3339 such as 2026-01-31T12:00:00Z, or milliseconds since 1970"])
        raise UsageError(f"{what} is no time", found=repr(text), expected=fits)
    return millis


def parse_time_literal(literal: str) -> int | None:
    """Milliseconds since 1970 of a JSON number by its own digits, which a float would have rounded already."""
    value = parse_number(literal)
    if value is None:  # an exponent beyond even Decimal's reach
        return 0 if float(literal) == 0 else None
    if not value or value.adjusted() < -9:
        return 0
    if value.adjusted() > 14:
        return None
    exact = Context(prec=len(literal) + 4)
    return _in_range(_round(value.scaleb(3, exact) if value < SECONDS_BELOW else value))


def parse_number(literal: str) -> Decimal | None:
    """The exact decimal of a JSON number's own text; None where it is out of all reach."""
    try:
        return Decimal(literal)
    except InvalidOperation:
        return None


def _in_range(millis: int) -> int | None:
    return millis if 0 <= millis <= LATEST else None


def _round(value: Decimal) -> int:
    return int(value.to_integral_value(rounding=ROUND_HALF_EVEN))


def _parse_text(text: str) -> int | None:
    match = _RFC3339.fullmatch(text)
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(match[i]) for i in range(1, 7))
    offset = 0
    if match[9]:
        offset_hours, offset_minutes = int(match[10]), int(match[11])
        if offset_hours > 23 or offset_minutes > 59:
            return None
        offset = (offset_hours * 60 + offset_minutes) * (-60 if match[9] == "-" else 60)
    try:
        date(year, month, day)
    except ValueError:
        return None
    if hour > 23 or minute > 59 or second > 59:
        return None
    seconds = calendar.timegm((year, month, day, hour, minute, second)) - offset
    # Whole seconds are an even number of milliseconds, so that half to even is the same with them and without.
    fraction = _round(Decimal(f"0{match[7]}e3")) if match[7] else 0
    return _in_range(seconds * 1000 + fraction)


def show(millis: int) -> str:
    """A time as people read it: RFC 3339 in UTC, to the millisecond."""
    at = datetime.fromtimestamp(millis // 1000, UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{millis % 1000:03d}Z"


def show_duration(millis: int) -> str:
    """A length of time as people read it: `1d 2h`, `5m 3s`, `250ms`."""
    if millis < 1000:
        return f"{millis}ms"
    parts, seconds = [], millis // 1000
    for name, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if seconds >= size:
            parts.append(f"{seconds // size}{name}")
            seconds %= size
    return " ".join(parts[:2])
