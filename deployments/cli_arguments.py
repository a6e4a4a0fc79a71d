"""What an argument may be, where the parser of the command line takes more than a person can have meant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token

from storage.errors import UsageError


def utf8(_type: Any, value: object) -> None:
    """Refuse a text with bytes that are not UTF-8: no log, no database and no server takes it.

    Raises:
        UsageError: it has some.
    """
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(text, str) and re.search("[\ud800-\udfff]", text):
            raise UsageError("an argument is not UTF-8", found=repr(text[:100]), do="Write it in UTF-8")


def whole(_type: Any, tokens: Sequence[Token]) -> int:
    """A whole number; `1.5` would otherwise be taken for 2, and 22.5 for port 22.

    Raises:
        UsageError: it is none.
    """
    text, option = tokens[0].value, tokens[0].keyword or "the number"
    if not re.fullmatch(r"[+-]?[0-9]{1,40}", text):
        raise UsageError(f"{option} is no whole number", found=repr(text[:50]), expected="digits")
    return int(text)


def check_port(port: int) -> None:
    """Refuse what is no port.

    Raises:
        UsageError: it is none.
    """
    if not 1 <= port <= 65_535:
        raise UsageError("--port is no port", found=port, expected="1 to 65535")


Whole = Annotated[int, Parameter(converter=whole)]
AnyBytes = Parameter(validator=())
"""For the names of files, and for lines: they may be bytes of any kind."""
