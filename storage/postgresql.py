"""PostgreSQL as the database: how a connection is set up, and what its texts cannot hold.

Text in PostgreSQL has no NUL, JSON's strings do. So NUL is written as SUB and `0`, SUB itself as SUB and `1`, in every text that
goes in, and read back: no two texts become one, and nobody else needs to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from storage.errors import UsageError

_SUB = "\x1a"
CONNECT_TIMEOUT = 10  # seconds
# A server that is gone without a word (its power, the network) is found out within a minute; the system's own way takes two hours.
_NOTICED = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}


def escape(text: str) -> str:
    """`text` as PostgreSQL can hold it; another text for every other text."""
    if "\x00" not in text and _SUB not in text:
        return text
    return text.replace(_SUB, _SUB + "1").replace("\x00", _SUB + "0")


def unescape(text: str) -> str:
    """The text that `escape` was given."""
    return text.replace(_SUB + "0", "\x00").replace(_SUB + "1", _SUB) if _SUB in text else text


def database_url(text: str) -> sa.URL:
    """The URL of a database, PostgreSQL always by psycopg.

    Raises:
        UsageError: it is none. No part of it is told, since any may be of a password.
    """
    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        raise _no_url("it cannot be read") from None  # the error quotes what it stumbled over
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise _no_url("it is of another kind")
    if "@" in (url.host or "") or (url.host and "@" in (url.database or "")):  # else a part of it is told as a host
        raise _no_url("an @ in a password is written %40, a / %2F")
    return url


def shown(url: sa.URL) -> str:
    """A URL for people: without what may be secret."""
    return url.set(query={}).render_as_string(hide_password=True)


def secrets(url: sa.URL) -> list[str]:
    """What must not be told of a URL."""
    asked = url.query.get("password")
    return [one for one in (url.password, asked if isinstance(asked, str) else None) if one]


def check_driver() -> None:
    """Make sure that psycopg is there.

    Raises:
        UsageError: it is not.
    """
    try:
        import psycopg  # noqa: F401  # only PostgreSQL needs it
    except ImportError as error:
        raise UsageError(
            "setting AFTERLOG_DATABASE_URL: PostgreSQL needs the driver psycopg",
            found=str(error).splitlines()[0],
            do="Install it: pip install 'afterlog[postgres]'",
        ) from error


def connect_options(url: sa.URL) -> Mapping[str, Any]:
    """Options of the engine: a connection that died in the pool is made again, a server that is silent given up.

    What the URL says of that itself holds.
    """
    options = {"connect_timeout": CONNECT_TIMEOUT, **_NOTICED}
    return {
        "pool_pre_ping": True,
        "connect_args": {name: value for name, value in options.items() if name not in url.query},
    }


def configure(connection: Any, _record: object) -> None:
    """Set a new connection up: texts escaped, a commit durable when it says so.

    Raises:
        UsageError: the database cannot hold every text.
    """
    _escape_texts(connection.adapters)
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('server_encoding'), current_setting('synchronous_commit')")
        encoding, durable = cursor.fetchone()
        if durable == "off":
            cursor.execute("SET synchronous_commit TO on")
    connection.commit()
    if encoding != "UTF8":
        raise UsageError(
            "setting AFTERLOG_DATABASE_URL: the database cannot hold every text",
            found=f"encoding {encoding}",
            expected="UTF8",
            do="Make it with: createdb -E UTF8 -T template0 NAME",
        )


def _escape_texts(adapters: Any) -> None:
    """Let psycopg escape every text that it writes or reads by this connection."""
    from psycopg.types.string import StrDumperUnknown, TextLoader  # only PostgreSQL needs it

    class Dumper(StrDumperUnknown):
        def dump(self, obj: str) -> Any:
            return super().dump(escape(obj))

    class Loader(TextLoader):
        def load(self, data: Any) -> Any:
            text = super().load(data)
            return unescape(text) if isinstance(text, str) else text

    adapters.register_dumper(str, Dumper)
    for name in ("text", "varchar"):
        adapters.register_loader(name, Loader)


def _no_url(why: str) -> UsageError:
    return UsageError(
        f"setting AFTERLOG_DATABASE_URL: no URL of a database that Afterlog knows: {why}",
        expected="sqlite:////path/to/file or postgresql+psycopg://user:password@host:5432/name",
        do="Correct it and start again",
    )
