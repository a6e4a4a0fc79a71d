"""Transports: what each says became of a message, against a real SMTP server and a real folder."""

from __future__ import annotations

import pickle
import re
import resource
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from typing import Any

import pytest

from tasks.mail import compose
from tasks.mail_url import parse_mail_url
from tasks.sending import NotSent, OutcomeUnknown
from tasks.transport import open_transport
from tests.smtp_server import DROP, HANG, Fault, Received, SmtpServer, refusing_port
from tests.test_compose import NOW, SHOP, composed, email_event


def send(server: SmtpServer, *messages: EmailMessage, options: str = "", login: str = "") -> None:
    url = server.url.replace("://", f"://{login}@" if login else "://") + options
    with open_transport(parse_mail_url(url), Path("/nowhere")) as transport:
        for message in messages:
            transport.send(message)


def subjects(inbox: list[Received]) -> list[str]:
    return [str(message_from_bytes(entry.message, policy=default)["Subject"]) for entry in inbox]


Talk = Callable[[socket.socket], object]


@contextmanager
def talking(until: bytes, talk: Talk, timeout: float = 60) -> Iterator[str]:
    """A server written by hand: the usual answers up to a command, and what `talk` does in place of the answer to that."""
    usual = {b"": b"220 hi", b"data": b"354 go", b"quit": b"221 bye"}

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile("rb") as lines:
            command = b""
            while command != until:
                connection.sendall(usual.get(command, b"250 ok") + b"\r\n")
                if command == b"data":
                    while lines.readline() not in (b".\r\n", b""):
                        pass
                    connection.sendall(b"250 taken\r\n")
                command = lines.readline()[:4].lower() or until
            talk(connection)

    def accept() -> None:
        while True:
            try:
                connection = listening.accept()[0]
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield f"smtp://127.0.0.1:{listening.getsockname()[1]}?timeout={timeout}"
        listening.shutdown(socket.SHUT_RDWR)


@contextmanager
def talking_after_the_message() -> Iterator[str]:
    """A server whose answer to the message itself never ends."""

    def take(connection: socket.socket) -> None:
        connection.sendall(b"354 go\r\n")
        dribble(connection)

    with talking(b"data", take, timeout=1) as url:
        yield url


def silence(connection: socket.socket) -> None:
    connection.recv(1)


def dribble(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"250-wait\r\n")
        time.sleep(0.05)


def flood(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"250-wait\r\n" * 10_000)


def too_soon(connection: socket.socket) -> None:
    connection.sendall(b"354 go\r\n250 taken\r\n")
    silence(connection)


REMINDER, ORDER = composed(email_event()), composed(email_event("order-confirmed"))
TWO = ["Still in your basket: Orange and 2 more", "Your order is confirmed"]


class TestSmtp:
    def test_a_message_arrives_as_composed_from_sender_to_recipient(self) -> None:
        with SmtpServer() as server:
            send(server, REMINDER)
        [(envelope, message, _)] = server.inbox
        assert (envelope.mail_from, envelope.rcpt_tos) == ("shop@mail.example.com", ["ann@example.com"])
        assert message == REMINDER.as_bytes()

    def test_a_line_of_dots_arrives_as_it_was(self) -> None:
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = "a@example.com", "b@example.com", "Dots"
        message.set_content(".\n..\n.a\n\nend\n", cte="7bit")
        with SmtpServer() as server:
            send(server, message)
        assert server.inbox[0].message.endswith(b"\r\n\r\n.\r\n..\r\n.a\r\n\r\nend\r\n")

    def test_messages_share_one_connection(self) -> None:
        with SmtpServer() as server:
            send(server, REMINDER, ORDER)
        assert (subjects(server.inbox), server.sessions) == (TWO, 1)

    def test_a_connection_that_went_stale_is_replaced_before_the_next_message(self) -> None:
        with SmtpServer() as server, open_transport(parse_mail_url(server.url), Path()) as transport:
            transport.send(REMINDER)
            server.hang_up()
            transport.send(ORDER)
        assert (subjects(server.inbox), server.sessions) == (TWO, 2)

    def test_opening_a_transport_connects_to_nothing(self) -> None:
        with SmtpServer() as server, open_transport(parse_mail_url(server.url), Path()):
            pass
        assert server.sessions == 0

    @pytest.mark.parametrize("step", ["mail", "rcpt", "data", "body"])
    @pytest.mark.parametrize(
        ("answer", "permanent"),
        [
            ("451 4.3.0 later", False),
            ("550 5.1.1 never", True),
            ("421 4.4.2 bye", False),
            ("535 5.7.8 who", False),
        ],
    )
    def test_a_refusal_is_certain_and_the_next_message_goes_out(self, step: Any, answer: str, permanent: bool) -> None:
        with (
            SmtpServer([Fault(step, answer)]) as server,
            open_transport(parse_mail_url(server.url), Path()) as transport,
        ):
            with pytest.raises(NotSent, match=re.escape(answer)) as raised:
                transport.send(REMINDER)
            transport.send(ORDER)
        assert raised.value.permanent is (permanent and step != "mail")
        assert subjects(server.inbox) == TWO[1:]
        assert server.sessions == (2 if answer.startswith("421") else 1)

    def test_a_refused_sender_costs_no_mail_and_a_refused_size_its_own(self) -> None:
        refusals = ["553 5.7.1 not your address", "501 5.1.7 bad sender", "552 5.3.4 too large"]
        found = []
        with (
            SmtpServer([Fault("mail", answer) for answer in refusals]) as server,
            open_transport(parse_mail_url(server.url), Path()) as transport,
        ):
            for _ in refusals:
                with pytest.raises(NotSent, match="refused MAIL: 5") as raised:
                    transport.send(REMINDER)
                found.append(raised.value.permanent)
        assert found == [False, False, True]

    @pytest.mark.parametrize(
        ("step", "answer", "permanent"),
        [
            ("rcpt", "554 5.7.1 Service unavailable; Client host [192.0.2.1] blocked", False),
            ("rcpt", "553 5.7.1 <shop@mail.example.com>: Sender address rejected: not owned by user", False),
            ("rcpt", "550-5.7.1 we do not\r\n550 5.7.1 relay", False),
            ("rcpt", "550 5.1.8 sender's domain not found", False),
            ("rcpt", "553 sorry, that domain is not in my list (#5.7.1)", False),
            ("rcpt", "503 5.5.1 MAIL first", False),
            ("data", "554 5.7.1 not from you", False),
            ("rcpt", "550 5.1.1 no such user", True),
            ("rcpt", "550 5.4.1 Recipient address rejected: Access denied", True),
            ("rcpt", "552 5.2.2 mailbox full", True),
            ("rcpt", "550 no such user: 5.7.1", True),
            ("rcpt", "553 mailbox name not allowed", True),
            ("body", "550 5.7.26 not authenticated, see SPF and DKIM", False),
            ("body", "554 5.7.1 looks like spam", True),
            ("body", "552 5.3.4 too large", True),
        ],
    )
    def test_what_is_refused_of_the_sender_or_by_policy_costs_no_mail(
        self, step: Any, answer: str, permanent: bool
    ) -> None:
        with SmtpServer([Fault(step, answer)]) as server, pytest.raises(NotSent) as raised:
            send(server, REMINDER)
        assert raised.value.permanent is permanent

    def test_a_refusal_does_not_name_the_recipient(self) -> None:
        with (
            SmtpServer([Fault("rcpt", "550 <Ann@example.com>: no mailbox Ann (annex)")]) as server,
            pytest.raises(NotSent) as raised,
        ):
            send(server, REMINDER)
        assert str(raised.value) == (
            f"127.0.0.1:{server.port}: refused RCPT: 550 <[address]>: no mailbox [address] (annex)"
        )

    @pytest.mark.parametrize(
        ("answer", "shown"),
        [("554 no service", "554 no service"), ("421 busy", "421 busy"), ("garbage", "-1")],
    )
    def test_a_server_that_turns_the_connection_away_says_nothing_about_the_message(
        self, answer: str, shown: str
    ) -> None:
        with (
            SmtpServer([Fault("connect", answer)]) as server,
            pytest.raises(NotSent, match=f"answered {shown}") as raised,
        ):
            send(server, REMINDER)
        assert (raised.value.permanent, server.inbox, server.sessions) == (False, [], 1)

    @pytest.mark.parametrize("step", ["connect", "mail", "rcpt", "data"])
    def test_a_line_lost_before_the_message_is_tried_once_more(self, step: Any) -> None:
        with SmtpServer([Fault(step, DROP)]) as server:
            send(server, REMINDER)
        assert (subjects(server.inbox), server.sessions) == (TWO[:1], 2)

    @pytest.mark.parametrize("step", ["connect", "mail", "rcpt", "data"])
    def test_a_line_lost_twice_before_the_message_means_not_sent(self, step: Any) -> None:
        with (
            SmtpServer([Fault(step, DROP), Fault(step, DROP)]) as server,
            pytest.raises(NotSent, match="the line was dropped") as raised,
        ):
            send(server, REMINDER)
        assert (raised.value.permanent, server.inbox, server.sessions) == (False, [], 2)

    @pytest.mark.parametrize("step", ["connect", "mail", "rcpt", "data"])
    def test_silence_before_the_message_means_not_sent(self, step: Any) -> None:
        with (
            SmtpServer([Fault(step, HANG)], timeout=0.2) as server,
            pytest.raises(NotSent, match=r"no answer within 0\.2 s") as raised,
        ):
            send(server, REMINDER)
        assert (raised.value.permanent, server.inbox, server.sessions) == (False, [], 1)

    @pytest.mark.parametrize("step", ["mail", "rcpt", "data"])
    @pytest.mark.parametrize("answer", ["garbage", "333 go on", "2" * 9000])
    def test_nonsense_before_the_message_means_not_sent(self, step: Any, answer: str) -> None:
        with SmtpServer([Fault(step, answer)]) as server, pytest.raises(NotSent) as raised:
            send(server, REMINDER)
        assert (raised.value.permanent, server.inbox) == (False, [])

    @pytest.mark.parametrize("accepted", [True, False])
    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (HANG, "the message was handed over; no answer within 0.2 s"),
            (DROP, "the message was handed over; the line was dropped"),
            ("garbage", "the answer is unclear: -1"),
            ("354 more", "the answer is unclear: 354 more"),
            ("2" * 9000, "the message was handed over; answered 500 Line too long."),
        ],
    )
    def test_no_clear_answer_to_the_message_means_unknown(self, answer: str, reason: str, accepted: bool) -> None:
        with (
            SmtpServer([Fault("body", answer, accepted)], timeout=0.2) as server,
            open_transport(parse_mail_url(server.url), Path()) as transport,
        ):
            with pytest.raises(OutcomeUnknown, match=re.escape(reason)):
                transport.send(REMINDER)
            transport.send(ORDER)
        assert subjects(server.inbox) == (TWO if accepted else TWO[1:])
        assert server.sessions == 2

    def test_an_interrupt_inside_the_message_ends_the_connection(self) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            with (
                SmtpServer([Fault("body", HANG)]) as server,
                open_transport(parse_mail_url(server.url), Path()) as transport,
            ):
                signal.setitimer(signal.ITIMER_REAL, 0.3)
                with pytest.raises(KeyboardInterrupt):
                    transport.send(REMINDER)
                transport.send(ORDER)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert (subjects(server.inbox), server.sessions) == (TWO[1:], 2)

    @pytest.mark.parametrize("step", [b"", b"ehlo", b"mail", b"rset"])
    def test_an_interrupt_from_another_thread_before_the_message_ends_it_for_good(self, step: bytes) -> None:
        with talking(step, silence) as url, open_transport(parse_mail_url(url), Path()) as transport:
            if step == b"rset":
                transport.send(REMINDER)
            began = time.monotonic()
            threading.Timer(0.3, transport.interrupt).start()
            for _ in range(2):
                with pytest.raises(NotSent, match="interrupted before the message, since the run ends") as raised:
                    transport.send(REMINDER)
        assert raised.value.permanent is False
        assert time.monotonic() - began < 20

    def test_an_interrupt_ends_an_attempt_to_connect(self) -> None:
        waiting = [socket.socket() for _ in range(4)]
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            for one in waiting:  # the queue of those who are to be accepted has no more room after that
                one.setblocking(False)
                one.connect_ex(full.getsockname())
            with open_transport(parse_mail_url(f"smtp://127.0.0.1:{full.getsockname()[1]}?timeout=60"), Path()) as it:
                began = time.monotonic()
                threading.Timer(0.3, it.interrupt).start()
                with pytest.raises(NotSent, match="interrupted"):
                    it.send(REMINDER)
        for one in waiting:
            one.close()
        assert 0.2 < time.monotonic() - began < 20

    @pytest.mark.parametrize(("step", "error"), [(b"", NotSent), (b"mail", NotSent), (b"body", OutcomeUnknown)])
    def test_a_reply_that_comes_drop_by_drop_takes_no_longer_than_the_time_out(
        self, step: bytes, error: type[Exception]
    ) -> None:
        began = time.monotonic()
        usual = talking(step, dribble, timeout=1) if step != b"body" else talking_after_the_message()
        with (
            usual as url,
            open_transport(parse_mail_url(url), Path()) as transport,
            pytest.raises(error, match="no answer within 1 s"),
        ):
            transport.send(REMINDER)
        assert time.monotonic() - began < 20

    @pytest.mark.parametrize(
        ("step", "answer", "why"),
        [
            (b"data", too_soon, "an answer to the message before it was sent"),
            (b"rcpt", flood, "an answer without an end"),
        ],
    )
    def test_an_answer_that_is_none_is_no_acceptance(
        self, step: bytes, answer: Callable[[socket.socket], None], why: str
    ) -> None:
        with (
            talking(step, answer) as url,
            open_transport(parse_mail_url(url), Path()) as transport,
            pytest.raises(NotSent, match=why) as raised,
        ):
            transport.send(REMINDER)
        assert raised.value.permanent is False

    def test_a_goodbye_that_comes_drop_by_drop_is_not_waited_for(self) -> None:
        with talking(b"quit", dribble) as url:
            transport = open_transport(parse_mail_url(url), Path())
            transport.send(REMINDER)
            began = time.monotonic()
            transport.close()
        assert time.monotonic() - began < 10

    def test_nobody_listening_means_not_sent(self) -> None:
        with refusing_port() as port, pytest.raises(NotSent, match="Connection refused") as raised:
            open_transport(parse_mail_url(f"smtp://127.0.0.1:{port}"), Path()).send(REMINDER)
        assert raised.value.permanent is False

    def test_an_address_outside_ascii_needs_a_server_that_takes_it(self) -> None:
        message = composed(email_event(), "jörg@bücher.example")
        with SmtpServer() as server:
            send(server, message, ORDER)
        assert server.inbox[0].envelope.rcpt_tos == ["jörg@bücher.example"]
        assert "To: jörg@bücher.example\r\n".encode() in server.inbox[0].message
        assert f"Message-ID: {message['Message-ID']}\r\n".encode() in server.inbox[0].message
        with SmtpServer(utf8=False) as server, pytest.raises(NotSent, match="no SMTPUTF8") as raised:
            send(server, message)
        assert raised.value.permanent is True

    def test_an_error_survives_pickling(self) -> None:
        copy = pickle.loads(pickle.dumps(NotSent("why", permanent=True)))  # noqa: S301  # its own bytes
        assert (str(copy), copy.reason, copy.permanent) == ("why", "why", True)


class TestTlsAndLogin:
    @pytest.mark.parametrize("tls", ["starttls", "implicit"])
    def test_a_login_goes_over_verified_tls(self, tls: Any) -> None:
        with SmtpServer(tls=tls, login=("ann@x", "p/ w")) as server:
            send(server, REMINDER, ORDER, login="ann%40x:p%2F%20w")
        assert (subjects(server.inbox), server.sessions) == (TWO, 1)

    def test_starttls_is_used_where_offered_without_a_login_too(self) -> None:
        with SmtpServer(tls="starttls") as server:  # which refuses mail in the clear
            send(server, REMINDER)
        assert subjects(server.inbox) == TWO[:1]

    def test_starttls_never_stays_in_the_clear_and_is_refused_there(self) -> None:
        with SmtpServer(tls="starttls") as server, pytest.raises(NotSent, match="530 Must issue") as raised:
            send(server, REMINDER, options="&starttls=never")
        assert raised.value.permanent is False

    def test_a_login_is_kept_back_from_a_server_without_starttls(self) -> None:
        with (
            SmtpServer(login=("ann", "hunter2")) as server,
            pytest.raises(NotSent, match="offers no STARTTLS"),
        ):
            send(server, REMINDER, login="ann:hunter2")
        with SmtpServer(login=("ann", "hunter2")) as server:
            send(server, REMINDER, login="ann:hunter2", options="&starttls=never")
        assert subjects(server.inbox) == TWO[:1]

    def test_a_wrong_password_is_temporary_and_not_told(self) -> None:
        with (
            SmtpServer(tls="starttls", login=("ann", "hunter2")) as server,
            pytest.raises(NotSent, match="login refused with 535; check user and password") as raised,
        ):
            send(server, REMINDER, login="ann:hunter3")
        assert raised.value.permanent is False
        assert "hunter3" not in str(raised.value)

    @pytest.mark.parametrize("tls", ["starttls", "implicit"])
    def test_an_unknown_certificate_is_not_trusted(self, tls: Any) -> None:
        with SmtpServer(tls=tls) as server:
            url = server.url.partition("?")[0]
            with pytest.raises(NotSent, match=r"certificate not accepted .*self.signed.*cafile") as raised:
                open_transport(parse_mail_url(url), Path()).send(REMINDER)
        assert (raised.value.permanent, server.inbox) == (False, [])

    def test_a_certificate_for_another_name_is_not_trusted(self) -> None:
        with SmtpServer(tls="implicit") as server:
            url = server.url.replace("127.0.0.1", "127.1")  # the same host, by a name not in the certificate
            with pytest.raises(NotSent, match=r"certificate not accepted .*127\.1"):
                open_transport(parse_mail_url(url), Path()).send(REMINDER)


class TestFile:
    def test_a_message_becomes_one_private_file_under_home(self, tmp_path: Path) -> None:
        with open_transport(parse_mail_url("file:out/box"), tmp_path) as transport:
            transport.send(REMINDER)
        [place] = (tmp_path / "out/box").iterdir()
        assert f"<{place.name}" == REMINDER["Message-ID"].replace("@mail.example.com>", ".eml")
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        assert place.read_bytes() == REMINDER.as_bytes()

    def test_an_absolute_folder_is_taken_as_it_is(self, tmp_path: Path) -> None:
        open_transport(parse_mail_url(f"file:{tmp_path}/box"), Path("/nowhere")).send(REMINDER)
        assert len(list((tmp_path / "box").iterdir())) == 1

    def test_a_message_already_there_stays_as_it_is(self, tmp_path: Path) -> None:
        transport = open_transport(parse_mail_url("file:box"), tmp_path)
        transport.send(REMINDER)
        transport.send(compose(email_event(), "bob@example.com", SHOP, NOW))
        [place] = (tmp_path / "box").iterdir()
        assert place.read_bytes() == REMINDER.as_bytes()

    def test_a_folder_that_cannot_be_made_means_not_sent(self, tmp_path: Path) -> None:
        (tmp_path / "box").write_text("a file")
        with pytest.raises(NotSent, match="box: File exists") as raised:
            open_transport(parse_mail_url("file:box"), tmp_path).send(REMINDER)
        assert raised.value.permanent is False

    def test_a_full_disk_leaves_nothing_behind(self, tmp_path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(NotSent, match="File too large"):
                open_transport(parse_mail_url("file:box"), tmp_path).send(REMINDER)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list((tmp_path / "box").iterdir()) == []

    @pytest.mark.parametrize("message_id", [None, "<../x@example.com>", "<.x@example.com>"])
    def test_a_message_that_cannot_name_its_file_is_refused(self, tmp_path: Path, message_id: str | None) -> None:
        message = EmailMessage()
        message["From"], message["To"] = "a@example.com", "b@example.com"
        if message_id:
            message["Message-ID"] = message_id
        with pytest.raises(ValueError, match="no Message-ID that can name a file"):
            open_transport(parse_mail_url("file:box"), tmp_path).send(message)
