"""Where settings come from, and what a person wrote made into what the code takes; storage/settings.py says which there are."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from storage.errors import UsageError

PREFIX = "AFTERLOG_"
_UNITS = {"ms": 1, "s": 1000, "m": 60_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
_CENTURY = 36_525 * 86_400_000
"""More would lead to times that no log can name."""
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "array": "a list",
    "object": "a table",
}
"""What msgspec calls by Python's or JSON's names."""
_WORDS = {"yes": "true", "on": "true", "no": "false", "off": "false"}
_AT = re.compile(r" - at `(?:key in )?\$(.*)`$")
_NOT_UTF8 = re.compile("[\ud800-\udfff]")
"""What Python makes of bytes that are none."""
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")

Duration = Annotated[int, Meta(description="a length of time")]
"""Milliseconds inside; a person writes `30m`."""
S = TypeVar("S")


class Secret:
    """A setting that nothing may show: not its `repr`, not a log, not an error."""

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """What it is, for whoever connects with it."""
        return self._value

    def __repr__(self) -> str:
        return "a secret"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


def parse_duration(value: object) -> int:
    """Milliseconds of a length of time as a person writes it: `90`, `90s`, `30m`, `24h`, `1.5h`, `7d`, `20ms`.

    Raises:
        ValueError: it is none, none at all long, or longer than a century.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d)?", str(value).strip())
    if isinstance(value, bool) or match is None:
        raise ValueError("expected a length of time such as 90s, 30m, 24h or 7d")
    millis = float(match[1]) * _UNITS[match[2] or "s"]
    if millis > _CENTURY:
        raise ValueError("expected a length of time of 100 years at most")
    if round(millis) == 0:
        raise ValueError("expected a length of time greater than 0")
    return round(millis)


def gather(fields: Mapping[str, Any], environment: Mapping[str, str], file: Path) -> dict[str, Any]:
    """What was given for each name: `AFTERLOG_NAME`, or `AFTERLOG_NAME__PART`, of the environment over `name` of a TOML file.

    Raises:
        UsageError: the file is no TOML, a variable is not UTF-8, or a list or a table in the environment is no JSON.
    """
    try:
        given: dict[str, Any] = tomllib.loads(file.read_text("utf-8")) if file.is_file() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"no TOML: {error}", where=str(file), do="Correct it and start again") from error
    for variable in sorted(environment):  # a whole before its parts
        path = variable.lower().removeprefix(PREFIX.lower()).split("__")
        if variable.upper().startswith(PREFIX) and path[0] in fields:
            if _NOT_UTF8.search(environment[variable]):  # no database, no server and no log takes it
                raise _refused(path, "it is not UTF-8")
            value = _written(path, fields[path[0]], environment[variable])
            for part in reversed(path):
                value = {part: value}
            given = merged(given, value)
    return given


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` before `under`; tables are put together."""
    both = {**under, **over}
    for key in under.keys() & over.keys():
        if isinstance(under[key], dict) and isinstance(over[key], dict):
            both[key] = merged(under[key], over[key])
    return both


def convert(cls: type[S], fields: Mapping[str, Any], given: Mapping[str, Any]) -> S:
    """A `cls` with the fields that were given.

    Raises:
        UsageError: one is unknown or does not fit; the sentence names it, what was found and what fits.
    """
    values = {}
    for name, value in given.items():
        if name not in fields:
            near = difflib.get_close_matches(name.lower(), fields, n=1)
            raise _refused([name], "no such setting", do=f"Did you mean `{near[0]}`?" if near else "Remove it")
        values[name] = _fitting([name], fields[name], value)
    return cls(**values)


def _fitting(path: list[str], kind: Any, value: Any) -> Any:
    """The value of the setting at `path` as a `kind`."""
    if kind == dict[str, Duration] and isinstance(value, dict):
        return {key: _fitting([*path, key], Duration, each) for key, each in value.items()}
    try:
        if kind is Duration:
            return parse_duration(value)
        if kind is bool and isinstance(value, str):
            value = _WORDS.get(value.strip().lower(), value)
        return msgspec.convert(value, kind, strict=False, dec_hook=_special)
    except msgspec.ValidationError as error:
        message = str(error)
        place = _AT.search(message)
        inner = re.findall(r"\.(\w+)", place[1].partition("[")[0]) if place else []
        message = message[: place.start()] if place else message
        if unknown := _UNKNOWN.fullmatch(message):
            raise _refused([*path, *inner, unknown[1]], "no such setting") from error
        found = "a secret" if kind in (Secret, Secret | None) else repr(_at(value, inner))[:200]
        message = re.sub(", got `.*`", "", message)  # of a variable it is always a text, and what was found is shown
        message = re.sub("`(.*?)`", lambda match: _KINDS.get(match[1], match[0]), message)
        raise _refused([*path, *inner], message[0].lower() + message[1:], found) from error
    except ValueError as error:  # a length of time
        raise _refused(path, str(error), repr(value)[:200]) from error


def _special(kind: Any, value: Any) -> Any:
    """What msgspec does not know."""
    if isinstance(value, kind):  # an argument, not what a person wrote
        return value
    if kind is Path and isinstance(value, str):
        if not value:
            raise ValueError("expected a folder")  # nothing would be the working folder, whatever that is
        try:
            return Path(value).expanduser()  # a file or a unit has no shell to do it, and `~` would be a folder's name
        except RuntimeError as error:
            raise ValueError(f"expected a folder: {error}") from error
    if kind is Secret and isinstance(value, str):
        return Secret(value)
    raise ValueError("expected a text")


def _is_compound(kind: Any) -> bool:
    """Whether it is a list or a table."""
    return getattr(kind, "__origin__", kind) in (tuple, frozenset, dict) or hasattr(kind, "__struct_fields__")


def _written(path: list[str], kind: Any, text: str) -> Any:
    """What a variable's text says: JSON where a list or a table is to be, or is part of one, else itself."""
    if not _is_compound(kind) or (len(path) > 1 and text.lstrip()[:1] not in ("[", "{")):
        return text
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise _refused(path, 'expected JSON, such as ["one", "two"]', repr(text)[:200]) from error


def _at(value: Any, path: list[str]) -> Any:
    """What stands at a place of a table, as far as it is one."""
    for part in path:
        value = value.get(part, value) if isinstance(value, dict) else value
    return value


def _refused(
    path: list[str], message: str, found: str | None = None, do: str = "Correct it and start again"
) -> UsageError:
    return UsageError(
        f"setting {PREFIX}{'__'.join(path).upper()} (or `{'.'.join(path)}` in afterlog.toml): {message}",
        found=found, do=do,
    )  # fmt: skip
