"""Hand one composed message to a mail server or to a folder of .eml files, and say what became of it.

`send` returns once the message is accepted; it raises NotSent where it certainly was not, and OutcomeUnknown
where it was handed over and no clear answer came: so it can be sent again, given up, or left to a person.
"""

from __future__ import annotations

import contextlib
import os
import re
import smtplib
import ssl
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path
from typing import Protocol, Self

from storage.segment import fsync_directory
from tasks.mail import MailError
from tasks.mail_url import MailUrl, MailUrlError

_AUTHENTICATION = {530, 534, 535, 538}  # refusals of the session: another login cures them for every message


class NotSent(MailError):
    """The server or folder has certainly not accepted the message. `permanent`: nor would it later."""

    def __init__(self, reason: str, permanent: bool) -> None:
        super().__init__(reason)
        self.args = (reason, permanent)
        self.permanent = permanent


class OutcomeUnknown(MailError):
    """The message was handed over, whole or in part, and whether it was accepted cannot be told."""


class Transport(Protocol):
    """What delivers. One thread at a time; connects at the first `send`, and again after `close`."""

    def send(self, message: EmailMessage) -> None:
        """Deliver `message` from its From to its To, one address each.

        Raises:
            NotSent: certainly not accepted; `permanent` where the same message would be refused again.
            OutcomeUnknown: handed over, without a clear answer. Sending it again might deliver it twice.
            ValueError: the message lacks one From, one To, or a usable Message-ID.
        """

    def close(self) -> None:
        """End the connection, if any. Raises nothing, and waits two seconds for an answer at most."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_transport(url: MailUrl, home: Path) -> Transport:
    """Return the transport for `url`; a relative folder or CA file is under `home`. Connects to nothing yet.

    Raises:
        MailUrlError: the CA file cannot be read.
    """
    if url.scheme == "file":
        return FileTransport(home / url.path)
    try:
        context = ssl.create_default_context(cafile=home / url.cafile if url.cafile else None)
    except OSError as error:
        found = f"{url.cafile}: {error.strerror or error}"
        raise MailUrlError("cafile of the mail URL", found, "a readable file of PEM certificates") from error
    return SmtpTransport(url, context)


class FileTransport(Transport):
    """Write each message to FOLDER/<local part of its Message-ID>.eml, complete or not at all.

    A file of that name is the same message from an earlier try, and counts as accepted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def send(self, message: EmailMessage) -> None:
        letter = _letter(message)
        name = re.fullmatch(r"<([A-Za-z0-9_][A-Za-z0-9._-]{0,199})@.+>", str(message["Message-ID"]).strip())
        if name is None:
            raise ValueError(f"no Message-ID that can name a file: {message['Message-ID']}")
        try:
            self._write(letter.data, self._folder / f"{name[1]}.eml")
        except OSError as error:
            raise NotSent(f"{self._folder}: {error.strerror or error}", permanent=False) from error
        try:
            fsync_directory(self._folder)
        except OSError as error:
            # The file has its name, but a power cut could still take it away.
            raise OutcomeUnknown(f"{self._folder}: written, but {error.strerror or error}") from error

    def close(self) -> None:
        """Do nothing: every message is closed when it is written."""

    def _write(self, data: bytes, place: Path) -> None:
        if not self._folder.is_dir():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fsync_directory(self._folder.parent)
        if place.exists():
            return
        handle, draft = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self._folder)  # with mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(handle)
            Path(draft).rename(place)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise


class SmtpTransport(Transport):
    """Send over SMTP. The line is kept for the next message, and replaced when it has gone stale."""

    def __init__(self, url: MailUrl, context: ssl.SSLContext) -> None:
        self._url, self._context = url, context
        self._where = f"{url.host}:{url.port}"
        self._client: smtplib.SMTP | None = None

    def send(self, message: EmailMessage) -> None:
        letter = _letter(message)
        try:
            self._hand_over(self._reach_data(letter), letter)
        except NotSent:
            raise
        except BaseException:
            # Lost or interrupted inside the message: the server would read any further command as part of it.
            self._drop()
            raise

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(OSError):
                if client.sock is not None:
                    client.sock.settimeout(2)
                client.quit()
            client.close()

    def _reach_data(self, letter: _Letter, retry: bool = True) -> smtplib.SMTP:
        """Return a line on which the server waits for the message; until there it has accepted nothing."""
        try:
            client = self._connected()
            self._announce(client, letter)
        except (OSError, ValueError) as error:  # ValueError: smtplib on a garbled challenge at the login
            self._drop()
            lost = isinstance(error, smtplib.SMTPServerDisconnected) and not _timed_out(error)
            if retry and lost:
                return self._reach_data(letter, retry=False)
            raise NotSent(f"{self._where}: {_why(error, self._url.timeout)}", permanent=False) from error
        return client

    def _connected(self) -> smtplib.SMTP:
        client = self._client
        if client is not None:
            with contextlib.suppress(OSError):
                if client.rset()[0] == 250:
                    return client
            self._drop()
        self._client = self._connect()
        return self._client

    def _connect(self) -> smtplib.SMTP:
        url = self._url
        client = (
            smtplib.SMTP_SSL(url.host, url.port, timeout=url.timeout, context=self._context)
            if url.scheme == "smtps"
            else smtplib.SMTP(url.host, url.port, timeout=url.timeout)
        )
        try:
            client.ehlo_or_helo_if_needed()
            if url.starttls != "never":
                self._encrypt(client)
            if url.user is not None and url.password is not None:
                client.login(url.user, url.password)
        except BaseException:
            client.close()
            raise
        return client

    def _encrypt(self, client: smtplib.SMTP) -> None:
        if client.has_extn("starttls"):
            client.starttls(context=self._context)
            client.ehlo_or_helo_if_needed()
        elif self._url.starttls == "require":
            raise NotSent(f"{self._where}: offers no STARTTLS, which starttls=require asks for", permanent=False)

    def _announce(self, client: smtplib.SMTP, letter: _Letter) -> None:
        options = [f"SIZE={len(letter.data)}"] if client.has_extn("size") else []
        if letter.international:
            if not client.has_extn("smtputf8"):
                raise NotSent(f"{self._where}: takes no address outside ASCII (no SMTPUTF8)", permanent=True)
            options += ["SMTPUTF8", "BODY=8BITMIME"]
        self._expect((250, 251), "MAIL", client.mail(letter.sender, options), letter)
        self._expect((250, 251, 252), "RCPT", client.rcpt(letter.recipient), letter)
        self._expect((354,), "DATA", client.docmd("DATA"), letter)

    def _expect(self, good: Collection[int], step: str, reply: tuple[int, bytes], letter: _Letter) -> None:
        code, text = reply
        if code // 100 in (4, 5):
            raise self._refusal(step, code, text, letter)
        if code not in good:
            raise smtplib.SMTPException(f"an answer to {step} that is none: {code} {_shown(text, letter)}")

    def _hand_over(self, client: smtplib.SMTP, letter: _Letter) -> None:
        try:
            client.send(_dot_stuffed(letter.data) + b".\r\n")
            code, text = client.getreply()
        except OSError as error:  # smtplib's own "500 Line too long" is one too, and no answer of the server
            why = _why(error, self._url.timeout)
            raise OutcomeUnknown(f"{self._where}: the message was handed over; {why}") from error
        if code // 100 in (4, 5):
            raise self._refusal("the message", code, text, letter)
        if code // 100 != 2:
            shown = f"{code} {_shown(text, letter)}"
            raise OutcomeUnknown(f"{self._where}: the message was handed over; the answer is unclear: {shown}")

    def _refusal(self, step: str, code: int, text: bytes, letter: _Letter) -> NotSent:
        if code == 421:  # the server closes the line
            self._drop()
        permanent = code // 100 == 5 and code not in _AUTHENTICATION
        return NotSent(f"{self._where}: refused {step}: {code} {_shown(text, letter)}", permanent)

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(OSError):
                client.close()


@dataclass(frozen=True)
class _Letter:
    """What SMTP needs of a message: the two addresses, the bytes, and whether they hold more than ASCII."""

    sender: str
    recipient: str
    data: bytes
    international: bool


def _letter(message: EmailMessage) -> _Letter:
    found = [[a.addr_spec for a in getattr(message[header], "addresses", ())] for header in ("From", "To")]
    if [len(addresses) for addresses in found] != [1, 1]:
        raise ValueError("a message needs one address in From and one in To")
    (sender,), (recipient,) = found
    international = not (sender + recipient).isascii()
    policy = SMTP.clone(utf8=international, cte_type="8bit" if international else "7bit")
    return _Letter(sender, recipient, message.as_bytes(policy=policy), international)


def _dot_stuffed(data: bytes) -> bytes:
    """Return `data` with CRLF after every line, also the last, and no line that could be read as its end."""
    lines = re.sub(rb"\r\n|\r|\n", b"\r\n", data).removesuffix(b"\r\n") + b"\r\n"
    return re.sub(rb"(?m)^\.", b"..", lines)


def _timed_out(error: BaseException) -> bool:
    # smtplib turns a time-out into SMTPServerDisconnected, and keeps it as the context only.
    return isinstance(error, TimeoutError) or isinstance(error.__context__, TimeoutError)


def _why(error: OSError | ValueError, timeout: float) -> str:
    if _timed_out(error):
        return f"no answer within {timeout:g} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted ({error.verify_message}); name a private CA with ?cafile=PATH"
    if isinstance(error, smtplib.SMTPAuthenticationError):
        # The code alone: servers are known to quote what they were sent.
        return f"login refused with {error.smtp_code}; check user and password"
    if isinstance(error, smtplib.SMTPResponseException):
        return f"answered {error.smtp_code} {_shown(error.smtp_error)}"
    if isinstance(error, smtplib.SMTPServerDisconnected):
        return "the line was dropped"
    return "an answer that cannot be read" if isinstance(error, ValueError) else error.strerror or str(error)


def _shown(text: bytes | str, letter: _Letter | None = None) -> str:
    """Return a server's text on one line, without the addresses it quotes, as a reason may go into a log."""
    line = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    line = "".join(character if character.isprintable() else " " for character in line)
    line = re.sub(r"[^\s<>@]+@[^\s<>@]+", "[address]", line)
    if letter is not None:
        local = re.escape(letter.recipient.rpartition("@")[0])
        line = re.sub(rf"(?<!\w){local}(?!\w)", "[address]", line, flags=re.IGNORECASE)
    return " ".join(line.split())[:200]
