"""Sending over SMTP, driven by hand, so that what was certainly not accepted and what is in doubt are told apart."""

from __future__ import annotations

import contextlib
import re
import smtplib
import socket
import ssl
import threading
import time
from collections.abc import Collection
from email.message import EmailMessage

from tasks.mail_url import MailUrl
from tasks.sending import Letter, NotSent, OutcomeUnknown, Transport, letter_of
from tasks.smtp_refusal import is_for_good

_LONGEST_REPLY = 64 << 10  # bytes; real ones have some hundred
_GOODBYE = 2.0  # seconds


class SmtpTransport(Transport):
    """Send over SMTP. The line is kept for the next message, and replaced when it has gone stale."""

    def __init__(self, url: MailUrl, context: ssl.SSLContext) -> None:
        self._url, self._context = url, context
        self._where = f"{url.host}:{url.port}"
        self._client: _Line | None = None
        self._interrupted = threading.Event()

    def send(self, message: EmailMessage) -> None:
        letter = letter_of(message)
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
                client.timeout = _GOODBYE
                if client.sock is not None:
                    client.sock.settimeout(_GOODBYE)
                client.quit()
            client.close()

    def interrupt(self) -> None:
        self._interrupted.set()
        client = self._client
        if client is not None and client.wire is not None:
            with contextlib.suppress(OSError):
                client.wire.shutdown(socket.SHUT_RDWR)

    def _reach_data(self, letter: Letter, retry: bool = True) -> smtplib.SMTP:
        """Return a line on which the server waits for the message; until there it has accepted nothing."""
        is_connected = False
        try:
            client = self._connected()
            is_connected = True
            self._announce(client, letter)
        except (OSError, ValueError) as error:  # ValueError: smtplib on a garbled challenge at the login
            self._drop()
            if self._interrupted.is_set():
                raise self._stopped() from error
            at_work = isinstance(error.__context__, TimeoutError | _EndlessReply)
            lost = isinstance(error, smtplib.SMTPServerDisconnected) and not at_work
            if retry and lost:
                return self._reach_data(letter, retry=False)
            raise NotSent(f"{self._where}: {_why(error, self._url.timeout)}", False, not is_connected) from error
        return client

    def _stopped(self) -> NotSent:
        return NotSent(f"{self._where}: interrupted before the message, since the run ends", permanent=False)

    def _connected(self) -> _Line:
        client = self._client
        if client is not None:
            with contextlib.suppress(OSError):
                if client.rset()[0] == 250:
                    return client
            self._drop()
        return self._connect()

    def _connect(self) -> _Line:
        url = self._url
        client = (
            _TlsLine(timeout=url.timeout, context=self._context)
            if url.scheme == "smtps"
            else _Line(timeout=url.timeout)
        )
        client._host = url.host  # type: ignore[attr-defined]  # what TLS verifies; smtplib sets it only in its constructor
        self._client = client  # before it connects, so that an interrupt finds it
        if self._interrupted.is_set():
            raise self._stopped()
        try:
            self._greeted(client.connect(url.host, url.port))
            client.ehlo_or_helo_if_needed()
            if url.starttls != "never":
                self._encrypt(client)
            if url.user is not None and url.password is not None:
                client.login(url.user, url.password)
        except BaseException:
            self._drop()
            raise
        return client

    def _greeted(self, reply: tuple[int, bytes]) -> None:
        code, text = reply
        if code != 220:
            raise smtplib.SMTPConnectError(code, text)

    def _encrypt(self, client: smtplib.SMTP) -> None:
        if client.has_extn("starttls"):
            client.starttls(context=self._context)
            client.ehlo_or_helo_if_needed()
        elif self._url.starttls == "require":
            raise NotSent(
                f"{self._where}: offers no STARTTLS, which a password needs, or starttls=require asks for",
                False,
                of_session=True,
            )

    def _announce(self, client: _Line, letter: Letter) -> None:
        options = [f"SIZE={len(letter.data)}"] if client.has_extn("size") else []
        if letter.international:
            if not client.has_extn("smtputf8"):
                raise NotSent(f"{self._where}: takes no address outside ASCII (no SMTPUTF8)", permanent=True)
            options += ["SMTPUTF8", "BODY=8BITMIME"]
        self._expect((250, 251), "MAIL", client.mail(letter.sender, options), letter)
        self._expect((250, 251, 252), "RCPT", client.rcpt(letter.recipient), letter)
        self._expect((354,), "DATA", client.docmd("DATA"), letter)
        if client.is_ahead():  # else that would be taken for the answer to the message
            raise smtplib.SMTPException("an answer to the message before it was sent")

    def _expect(self, good: Collection[int], step: str, reply: tuple[int, bytes], letter: Letter) -> None:
        code, text = reply
        if code // 100 in (4, 5):
            raise self._refusal(step, code, text, letter)
        if code not in good:
            raise smtplib.SMTPException(f"an answer to {step} that is none: {code} {_shown(text, letter)}")

    def _hand_over(self, client: smtplib.SMTP, letter: Letter) -> None:
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

    def _refusal(self, step: str, code: int, text: bytes, letter: Letter) -> NotSent:
        if code == 421:  # the server closes the line
            self._drop()
        return NotSent(f"{self._where}: refused {step}: {code} {_shown(text, letter)}", is_for_good(step, code, text))

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(OSError):
                client.close()


class _Line(smtplib.SMTP):
    """A line to a server, of which no reply takes longer than the time-out, and which another thread can end at any moment."""

    wire: socket.socket | None = None
    """The connection under whatever is spoken on it, as soon as there is an attempt at one."""

    def getreply(self) -> tuple[int, bytes]:
        if self.sock is not None:
            if not isinstance(self.file, _Replies):
                self.file = _Replies(self.sock)
            self.file.begin(self.timeout)
        reply = super().getreply()
        if self.sock is not None:
            self.sock.settimeout(self.timeout)
        return reply

    def is_ahead(self) -> bool:
        """Whether the server has said more than it was asked, as far as that was read."""
        return isinstance(self.file, _Replies) and self.file.has_more

    def close(self) -> None:
        super().close()
        if self.wire is not None:
            self.wire.close()

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        failed = OSError("a name without an address")
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            made = socket.socket(family, kind, protocol)
            if self.wire is not None:
                self.wire.close()
            self.wire = made.dup()  # TLS takes the other one away
            made.settimeout(timeout)
            try:
                made.connect(address)
            except OSError as error:
                made.close()
                failed = error
            else:
                return made
        raise failed


class _TlsLine(smtplib.SMTP_SSL, _Line):
    """The same, speaking TLS from the start."""


class _EndlessReply(OSError):
    """A reply that goes on and on."""


class _Replies:
    """Where smtplib reads replies. A socket's own time-out begins anew with each byte, so a slow server could hold us for ever."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._rest = sock, b""
        self._until, self._left = 0.0, 0

    def begin(self, timeout: float) -> None:
        """A reply is to come, all of it within so many seconds."""
        self._until, self._left = time.monotonic() + timeout, _LONGEST_REPLY

    @property
    def has_more(self) -> bool:
        """Whether there is something behind the last line."""
        return bool(self._rest)

    def readline(self, limit: int) -> bytes:
        while b"\n" not in self._rest and len(self._rest) < limit and (more := self._receive()):
            self._rest += more
        end = min(self._rest.find(b"\n") + 1 or limit, limit)
        line, self._rest = self._rest[:end], self._rest[end:]
        self._left -= len(line)
        if self._left < 0:
            raise _EndlessReply
        return line

    def close(self) -> None:
        """The socket is closed by itself."""

    def _receive(self) -> bytes:
        wait = self._until - time.monotonic()
        if wait <= 0:
            raise TimeoutError
        self._sock.settimeout(wait)
        return self._sock.recv(4096)


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
    if isinstance(error.__context__, _EndlessReply):
        return "an answer without an end"
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


def _shown(text: bytes | str, letter: Letter | None = None) -> str:
    """Return a server's text on one line, without the addresses it quotes, as a reason may go into a log."""
    line = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    line = "".join(character if character.isprintable() else " " for character in line)
    line = re.sub(r"[^\s<>@]+@[^\s<>@]+", "[address]", line)
    if letter is not None:
        local = re.escape(letter.recipient.rpartition("@")[0])
        line = re.sub(rf"(?<!\w){local}(?!\w)", "[address]", line, flags=re.IGNORECASE)
    return " ".join(line.split())[:200]
