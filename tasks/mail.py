"""Compose the email that an EMAIL event asks for: headers, subject, plain text and HTML.

An email is two files in templates/: NAME.txt, whose first line is `Subject: ...`, and NAME.html. To add such
a pair is to add an email. Event text can be anything: in a header it can neither start another header nor
hide in an encoding, in HTML it is escaped, and what is missing or of a wrong type is left out, never guessed.
Nothing here reads the clock, the network or the log.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Context, Decimal
from email.headerregistry import Address
from email.message import EmailMessage
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError, select_autoescape

from storage.errors import AfterlogError
from tasks.mail_domain import on_the_wire
from tasks.mail_headers import EVENT_ID_HEADER, header_policy

LISTED = 20  # items shown; the rest is a number, as mail programs cut a message of about 100 KB
_MONEY = Context(prec=60, rounding=ROUND_HALF_UP)
_MAX_PRICE, _MAX_COUNT = 10**12, 10**6  # beyond these a number is a fault in the data, no amount to show

# Overrides of the writing direction make a text look like another one; Arabic and Hebrew do not need them.
_DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_ATOM = r'[^\s()<>\[\]:;@\\,."]+'
_LABEL = r"(?!-)(?:[A-Za-z0-9_-]|[^\x00-\x7f\s]){1,63}(?<!-)"
_DOMAIN = rf"{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Za-z.:]+\]"
_ADDRESS = re.compile(rf"(?P<local>{_ATOM}(?:\.{_ATOM})*)@(?P<domain>{_DOMAIN})")
_NAME = r'"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^"<>@,:;()\[\]\\]*)'
_NAMED = re.compile(rf"(?:{_NAME})\s*<\s*(?P<address>[^<>\s]+)\s*>")


class MailError(AfterlogError):
    """Mail was not composed or not sent.

    `reason` holds neither an address nor a password, so it may be written into a log that is never edited.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class AddressError(MailError):
    """A text that is not exactly one usable mail address."""


class TemplateMissing(MailError):
    """An event that names no template, or one that does not exist."""


class TemplateUnusable(MailError):
    """A template with a mistake in it, or half a pair: no fault of the mail, which can be sent once that is mended."""


class UnusableEvent(MailError):
    """An event without the `event.id` of every derived event: sent twice, it could not be recognised."""


@dataclass(frozen=True)
class BasketItem:
    """One item as the email shows it: `count` and `price` are None where the event has no usable number."""

    name: str
    count: Decimal | None
    price: Decimal | None

    @property
    def amount(self) -> Decimal | None:
        """Price times count, exactly, or None where either is missing."""
        return None if self.price is None or self.count is None else _MONEY.multiply(self.price, self.count)


def compose(event: Mapping[str, Any], to: str, sender: str, now: datetime, salt: str = "") -> EmailMessage:
    """Compose the message for one EMAIL event, from `sender` to the one address `to`, dated `now`.

    The Message-ID is the SHA-256 of `event.id` at the sender's domain: the same event, the same Message-ID. `salt` tells
    events apart that have the same id, since a log lost its end.

    Raises:
        AddressError: `to` or `sender` is not one address, or the sender's is not ASCII.
        TemplateMissing: no template of that name; the reason names the known ones.
        TemplateUnusable: there is one, but it cannot be rendered.
        UnusableEvent: no `event.id`.
        ValueError: `now` has no time zone.
    """
    if now.tzinfo is None:
        raise ValueError(f"the date of a message needs a time zone, found {now.isoformat()}")
    origin, recipient = parse_sender(sender), on_the_wire(_mailbox(to))
    event_id = _event_id(event)
    subject, text, html = _render(_template(event), _facts(event, origin.display_name or origin.addr_spec))
    message = EmailMessage(policy=header_policy())
    message["From"] = origin
    message["To"] = Address(username=recipient.username, domain=recipient.domain)
    message["Subject"] = _header_text(subject, 150)
    message["Date"] = now
    message["Message-ID"] = f"<{_digest(event_id + salt)}@{origin.domain}>"
    message["Auto-Submitted"] = "auto-generated"
    # A line of a message holds at most 998 bytes; the Message-ID names the event in any case.
    message[EVENT_ID_HEADER] = quote(event_id, safe="/:", errors="surrogatepass")[:900]
    message.set_content(text, cte="quoted-printable")
    message.add_alternative(html, subtype="html", cte="quoted-printable")
    return message


def parse_address(text: str) -> str:
    """Return the bare address of `text`, which may be `ann@example.com` or `Ann <ann@example.com>`.

    Raises:
        AddressError: no address or more than one, a control character, or one that cannot be read.
    """
    return _mailbox(text).addr_spec


def parse_sender(text: str) -> Address:
    """The sender that `text` names, its domain in ASCII.

    Raises:
        AddressError: as `parse_address`, or it cannot be had in ASCII.
    """
    origin = on_the_wire(_mailbox(text))
    if not origin.addr_spec.isascii():
        raise AddressError("a sender's address must be ASCII: its domain is also the Message-ID's")
    return origin


def templates() -> list[str]:
    """Return the names of the emails that can be composed, in order."""
    files = _environment().list_templates(extensions=["txt"])
    return sorted(file.removesuffix(".txt") for file in files if not file.startswith("_"))


def _mailbox(text: str) -> Address:
    expected = "expected one address such as ann@example.com"
    # The limit also bounds the time that the patterns take.
    if len(text) > 320:
        raise AddressError(f"{expected}, found {len(text)} characters, more than 320")
    if any(_unprintable(character) for character in text):
        raise AddressError(f"{expected}, found a control character in it")
    named = _NAMED.fullmatch(text.strip())
    match = _ADDRESS.fullmatch(named["address"] if named else text.strip())
    # A local part can be an encoded word too, see _header_text; no real one holds a `=?`.
    if match is None or "=?" in match[0] or len(match[0].encode()) > 254 or len(match["local"].encode()) > 64:
        found = {0: "none", 1: "one that cannot be read"}.get(text.count("@"), "more than one")
        raise AddressError(f"{expected}, found {found}")
    name = re.sub(r"\\(.)", r"\1", named["quoted"] or named["plain"] or "") if named else ""
    return Address(_header_text(name, 100), match["local"], match["domain"])


def _unprintable(character: str) -> bool:
    return unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} or character in _DIRECTION


def _clean(text: str, limit: int) -> str:
    """Return `text` as one line of at most `limit` characters, without control characters."""
    line = " ".join("".join(" " if _unprintable(character) else character for character in text).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def _header_text(text: str, limit: int) -> str:
    # The standard library decodes `=?utf-8?q?=0D=0ABcc:...?=` in a header, and writes the line break out.
    return _clean(text, limit).replace("=?", "= ?")


def _find(value: object, *path: str) -> Any:
    """Return what is at `path` in nested objects, or None where any step is missing or no object."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _event_id(event: Mapping[str, Any]) -> str:
    event_id = _find(event, "event", "id")
    if not isinstance(event_id, str) or not event_id:
        raise UnusableEvent(f"expected a text as event.id, found {_clean(repr(event_id), 60)}")
    return event_id


def _digest(event_id: str) -> str:
    return sha256(event_id.encode("utf-8", "surrogatepass")).hexdigest()


def _template(event: Mapping[str, Any]) -> str:
    name, known = _find(event, "object", "template"), templates()
    if not isinstance(name, str) or name not in known:
        found = _clean(repr(name), 60)
        raise TemplateMissing(f"no email template {found}; the known ones are {', '.join(known)}")
    return name


def _facts(event: Mapping[str, Any], sender: str) -> dict[str, Any]:
    """Return all that a template may use; a name that is not here is an error in the template."""
    cause = _find(event, "context", "caused_by")
    raw = _find(cause, "object", "basket")
    items = [_item(entry) for entry in raw] if isinstance(raw, Sequence) and not isinstance(raw, str) else []
    return {
        "sender": sender,
        "reference": _clean(_event_id(event), 200),
        "number": _identity(_find(event, "object", "id")),
        "office": _identity(_find(cause, "subject", "id")),
        "recorded": _moment(_find(event, "event", "inserted_at")),
        "left": _moment(_find(cause, "context", "at")),
        "items": items[:LISTED],
        "more": len(items[LISTED:]),
        "total": _total(items),
    }


def _item(entry: object) -> BasketItem:
    name = _find(entry, "name")
    shown = _clean(name, 100) if isinstance(name, str) else ""
    number = _identity(_find(entry, "id"))
    count = _number(entry.get("count", 1) if isinstance(entry, Mapping) else None, _MAX_COUNT)
    return BasketItem(
        name=shown or (f"Item {number}" if number else "An item"),
        count=count if count is not None and count > 0 else None,
        price=_number(_find(entry, "price"), _MAX_PRICE),
    )


def _number(value: object, limit: int) -> Decimal | None:
    """Return a JSON number smaller than `limit` either way, else None: so for a text, a boolean and NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    if isinstance(value, Decimal) and not value.is_finite():
        return None
    return Decimal(str(value)) if -limit < value < limit else None


def _total(items: Sequence[BasketItem]) -> Decimal | None:
    """Return the sum over all items, or None where one has no amount: a sum of the others would be wrong."""
    amounts = [item.amount for item in items]
    known = [amount for amount in amounts if amount is not None]
    return functools.reduce(_MONEY.add, known) if known and len(known) == len(amounts) else None


def _identity(value: object) -> str | None:
    if isinstance(value, str):
        return _clean(value, 60) or None
    usable = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**20
    return str(value) if usable else None


def _moment(value: object) -> str | None:
    """Return integer milliseconds UTC as a date that reads the same in every country, else None."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 4_102_444_800_000:
        return None
    return datetime.fromtimestamp(value / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _render(name: str, facts: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the subject, the plain text and the HTML of the template `name`."""
    try:
        text, html = (_environment().get_template(f"{name}.{kind}").render(facts) for kind in ("txt", "html"))
        (text + html).encode()  # half a surrogate, say, goes into no mail
    except Exception as error:  # whatever a template calls for
        # Only Jinja's own words: another error's may have a text of the event in them.
        said = f": {_clean(str(error), 100)}" if isinstance(error, TemplateError) else ""
        raise TemplateUnusable(f"the email template {name!r} cannot be used: {type(error).__name__}{said}") from error
    subject, _, body = re.sub(r"\n{3,}", "\n\n", text).strip().partition("\n")
    return subject.removeprefix("Subject: "), body.strip() + "\n", html


def _format_money(value: Decimal | None) -> str:
    # A zero has no sign; what is less than a cent below it is one.
    return "" if value is None else f"{_MONEY.add(value.quantize(Decimal('0.01'), context=_MONEY), Decimal(0)):f}"


def _format_count(value: Decimal | None) -> str:
    return "" if value is None else f"{value.normalize():f}"


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(money=_format_money, count=_format_count)
    return environment
