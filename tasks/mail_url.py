"""Where mail goes, as one URL: `file:outbox`, `smtp://user:password@host` or `smtps://host`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit

from tasks.mail import MailError

_HOST = re.compile(r"(?=.{1,253}\Z)(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*|[0-9a-f:.]*:[0-9a-f:.]*")
_PORTS = {"smtp": 25, "smtps": 465}


class MailUrlError(MailError):
    """The setting of the mail URL cannot be used. It quotes nothing in which a password might stand."""

    exit_code = 2

    def __init__(self, what: str, found: str, expected: str) -> None:
        super().__init__(f"setting AFTERLOG_MAIL_URL: {what}: found {found}, expected {expected}")
        self.args = (what, found, expected)  # what a copy by pickle is made from


@dataclass(frozen=True)
class MailUrl:
    """Where mail goes; a file has a path only. `starttls` is auto, require or never, `timeout` in seconds.

    Neither repr nor str shows the password.
    """

    scheme: str
    host: str = ""
    port: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    starttls: str = "never"
    cafile: str | None = None
    timeout: float = 30.0
    path: str = ""

    def __str__(self) -> str:
        if self.scheme == "file":
            return f"file:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{self.user + ':***@' if self.user else ''}{host}:{self.port}"


def parse_mail_url(url: str) -> MailUrl:
    """Read `file:FOLDER`, `smtp://[USER:PASSWORD@]HOST[:PORT]` or `smtps://...`, options after a `?`.

    Options are cafile=PATH and timeout=SECONDS (30), and for smtp starttls=auto|require|never: auto encrypts
    where the server offers it, and is the default without a user; with one the default is require.

    Raises:
        MailUrlError: what is wrong, found and expected.
    """
    if " " in url or not url.isprintable() or not unquote(url).isprintable():
        raise MailUrlError("mail URL", "a space or control character", "spaces as %20, and no other")
    try:
        parts = urlsplit(url)
    except ValueError:
        # From None: the text of that error quotes the URL.
        raise MailUrlError("mail URL", "brackets that fit no URL", "them percent-encoded") from None
    if parts.scheme == "file":
        return _file_url(parts)
    if parts.scheme in _PORTS:
        return _smtp_url(parts)
    raise MailUrlError("scheme of the mail URL", parts.scheme or "none", "file, smtp or smtps")


def _file_url(parts: SplitResult) -> MailUrl:
    if parts.netloc or parts.query or parts.fragment or not parts.path:
        raise MailUrlError("file mail URL", "a host, an option or no path", "file:outbox or file:/path")
    return MailUrl("file", path=unquote(parts.path))


def _smtp_url(parts: SplitResult) -> MailUrl:
    what = f"{parts.scheme} mail URL"
    if "@" in parts.path + parts.query + parts.fragment:
        raise MailUrlError(what, "an @ behind the host", "any / ? # in user and password percent-encoded")
    if parts.path not in ("", "/") or parts.fragment:
        raise MailUrlError(what, "a path or fragment", f"{parts.scheme}://HOST:PORT?OPTIONS")
    if not _HOST.fullmatch(parts.hostname or ""):
        raise MailUrlError(f"host of the {what}", "none that can be used", "a name or an address")
    try:
        port = _PORTS[parts.scheme] if parts.port is None else parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise MailUrlError(f"port of the {what}", "no such number", "1 to 65535")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if bool(user) != bool(password) or not (user + password).isascii():
        raise MailUrlError(f"login of the {what}", "a half or no ASCII", "USER:PASSWORD in ASCII, or neither")
    smtp = parts.scheme == "smtp"
    options = _options(what, parts.query, {"cafile", "timeout", "starttls"} if smtp else {"cafile", "timeout"})
    starttls = options.get("starttls", "require" if user else "auto") if smtp else "never"
    if starttls not in ("auto", "require", "never"):
        raise MailUrlError(f"starttls of the {what}", starttls, "auto, require or never")
    return MailUrl(
        parts.scheme,
        parts.hostname or "",
        port,
        user or None,
        password or None,
        starttls,
        options.get("cafile"),
        _seconds(what, options.get("timeout", "30")),
    )


def _options(what: str, query: str, known: set[str]) -> dict[str, str]:
    pairs = [part.partition("=")[::2] for part in query.split("&")] if query else []
    options = {name: unquote(value) for name, value in pairs}
    if len(options) < len(pairs) or not known.issuperset(options) or not all(options.values()):
        raise MailUrlError(f"options of the {what}", "one twice, empty or unknown", ", ".join(sorted(known)))
    return options


def _seconds(what: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise MailUrlError(f"timeout of the {what}", text, "seconds from above 0 to 3600")
    return seconds
