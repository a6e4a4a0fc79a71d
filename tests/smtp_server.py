"""A real SMTP server for tests, in a thread on a free port of 127.0.0.1, that can be told to fail.

    with SmtpServer([Fault("mail", "451 4.3.0 later"), None]) as server:
        ...                        # the first message is put off, the second and all later ones are accepted
        server.inbox[0].message

A fault belongs to one message and is used up by it; None stands for a message without one. A fault at
"connect" is used up by the next connection instead.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import shutil
import socket
import ssl
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HANG = "hang"  # say nothing more, and keep the connection
DROP = "drop"  # cut the connection


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one message: at `step` the server gives `answer`, a reply line, HANG or DROP.

    "connect" is in place of the greeting, "data" in place of the 354, "body" after the whole message. With `accepted`, which counts at "body" only, the message is in the inbox all the same.
    """

    step: Literal["connect", "mail", "rcpt", "data", "body"]
    answer: str
    accepted: bool = False


class Received(NamedTuple):
    """An accepted message: its envelope (mail_from, rcpt_tos), its bytes, and when (time.time())."""

    envelope: Envelope
    message: bytes
    accepted: float


class SmtpServer:
    """The server. `faults` may be filled again while it runs; `sessions` counts the connections so far.

    tls: "starttls" offers it, "implicit" speaks TLS from the start. login: the one user and password that the
    server then asks for. utf8: whether addresses outside ASCII are taken. timeout: the client's, in `url`. takes: seconds
    until a whole message is answered, as where it is scanned first.
    """

    def __init__(
        self,
        faults: Iterable[Fault | None] = (),
        *,
        tls: Literal["starttls", "implicit"] | None = None,
        login: tuple[str, str] | None = None,
        utf8: bool = True,
        timeout: float = 60,  # a busy machine may stand still for long
        takes: float = 0,
    ) -> None:
        self.faults = deque(faults)
        self.inbox: list[Received] = []
        self.sessions = 0
        self.tls, self.login, self.utf8, self.timeout = tls, login, utf8, timeout
        self.takes = takes
        self.open: set[asyncio.Transport] = set()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="smtp-server", daemon=True)

    @property
    def url(self) -> str:
        """The mail URL without a login, with the server's certificate; more options follow after a &."""
        scheme = "smtps" if self.tls == "implicit" else "smtp"
        cafile = f"&cafile={certificate()[0]}" if self.tls else ""
        return f"{scheme}://127.0.0.1:{self.port}?timeout={self.timeout}{cafile}"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(5)
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def hang_up(self) -> None:
        """Cut all open connections, as a server does with those that were idle for long."""
        done = threading.Event()

        def cut() -> None:
            for transport in list(self.open):
                transport.abort()
            self._loop.call_soon(done.set)

        self._loop.call_soon_threadsafe(cut)
        assert done.wait(5)

    def next_fault(self, *, connecting: bool) -> Fault | None:
        """Use up and return the first fault, if it is one for a connection, or else for a message."""
        if not self.faults or connecting != (self.faults[0] is not None and self.faults[0].step == "connect"):
            return None
        return self.faults.popleft()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        tls = _server_tls() if self.tls == "implicit" else None
        serving = self._loop.create_server(lambda: _Session(self, self._loop), sock=self._socket, ssl=tls)
        server = self._loop.run_until_complete(serving)
        self._ready.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        for transport in list(self.open):
            if not transport.is_closing():  # one that speaks TLS may have lost its protocol by then
                transport.abort()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()


class _Session(SMTP):
    """One connection, and the handler of its messages."""

    def __init__(self, owner: SmtpServer, loop: asyncio.AbstractEventLoop) -> None:
        self._owner = owner
        self._fault: Fault | None = None
        self._seen = False
        super().__init__(
            _Inbox(self),
            hostname="mail.test",
            loop=loop,
            enable_SMTPUTF8=owner.utf8,
            tls_context=_server_tls() if owner.tls == "starttls" else None,
            require_starttls=owner.tls == "starttls",
            auth_required=owner.login is not None,
            authenticator=self._check_login,
        )
        # As an argument it would warn of what is wanted here: a login in the clear, or under TLS from the start.
        self._auth_require_tls = owner.tls == "starttls"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        first, self._seen = not self._seen, True
        fault = None
        if first:  # else it is the same connection again, under TLS
            self._owner.sessions += 1
            self._owner.open.add(transport)
            fault = self._owner.next_fault(connecting=True)
        if fault is None:
            super().connection_made(transport)
        elif fault.answer == DROP:
            transport.abort()
        elif fault.answer != HANG:
            transport.write(f"{fault.answer}\r\n".encode())
            transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self.session is not None:  # else there was a fault in place of the greeting
            super().connection_lost(error)

    def eof_received(self) -> bool | None:
        return None if self.session is None else super().eof_received()

    async def smtp_MAIL(self, arg: str) -> None:
        self._fault = self._owner.next_fault(connecting=False)
        if not await self._fails("mail"):
            await super().smtp_MAIL(arg)

    async def smtp_RCPT(self, arg: str) -> None:
        if not await self._fails("rcpt"):
            await super().smtp_RCPT(arg)

    async def smtp_DATA(self, arg: str) -> None:
        if not await self._fails("data"):
            await super().smtp_DATA(arg)

    async def take(self, envelope: Envelope) -> str:
        """Answer a whole message that has come in."""
        fault = self._fault
        if fault is None or fault.accepted:
            message = envelope.original_content or b""
            self._owner.inbox.append(Received(envelope, message, time.time()))
        await asyncio.sleep(self._owner.takes)
        await self._fails("body", answer=False)
        return fault.answer if fault else "250 2.0.0 accepted"

    async def _fails(self, step: str, *, answer: bool = True) -> bool:
        fault = self._fault
        if fault is None or fault.step != step:
            return False
        self._fault = None
        if fault.answer == DROP:
            assert isinstance(self.transport, asyncio.Transport)
            self.transport.abort()
        if fault.answer in (DROP, HANG):
            await asyncio.Event().wait()  # until the connection or the server ends
        if answer:
            await self.push(fault.answer)
        return True

    def _check_login(self, *call: Any) -> AuthResult:
        user, password = self._owner.login or ("", "")
        return AuthResult(success=call[-1] == LoginPassword(user.encode(), password.encode()), handled=False)


class _Inbox:
    def __init__(self, session: _Session) -> None:
        self._session = session

    async def handle_DATA(self, *call: Any) -> str:
        return await self._session.take(call[-1])


@contextlib.contextmanager
def refusing_port() -> Iterator[int]:
    """Yield a port of 127.0.0.1 on which nobody listens, and which nobody else gets meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@functools.cache
def certificate() -> tuple[Path, Path]:
    """Make a self-signed certificate for 127.0.0.1 and localhost, once a process; return its file and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mail.test")])
    names = [x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName("localhost")]
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = Path(tempfile.mkdtemp(prefix="smtp-server-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *secret))
    return folder / "cert.pem", folder / "key.pem"


def _server_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate())
    return context
