"""Emails: what is composed from an event, and what each transport says became of it, against a real SMTP server."""

from __future__ import annotations

import pickle
import re
import resource
import signal
import stat
from datetime import UTC, datetime
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from typing import Any

import pytest

from tasks.mail import AddressError, TemplateMissing, UnusableEvent, compose, parse_address, templates
from tasks.mail_url import MailUrl, MailUrlError, parse_mail_url
from tasks.sending import NotSent, OutcomeUnknown
from tasks.transport import open_transport
from tests.smtp_server import DROP, HANG, Fault, Received, SmtpServer, refusing_port

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
SHOP = "Lemon & Co <shop@mail.example.com>"
BASKET = [
    {"id": 1, "name": "Orange", "price": 0.5, "count": 2},
    {"id": 2, "name": "Banana", "price": 1.22, "count": 1},
    {"id": 3, "name": "Lemon", "price": 5, "count": 2},
]


def email_event(template: object = "basket-reminder", basket: object = BASKET, **cause: Any) -> dict[str, Any]:
    """An EMAIL event as the derived logs hold it, with the basket in its causing event."""
    caused_by = {
        "subject": {"id": 15},
        "object": {"basket": basket},
        "context": {"at": 1598616204107},
    } | cause
    return {
        "subject": {"id": "EMAIL_SYSTEM"},
        "verb": "EMAIL",
        "object": {"id": 15, "type": "CUSTOMER", "template": template},
        "context": {"at": 1650549837170, "caused_by": caused_by},
        "event": {"id": "remind/abandonment/events:0:3186/abandoned/first", "inserted_at": 1650549837170},
    }


def composed(event: dict[str, Any], to: str = "ann@example.com") -> EmailMessage:
    return compose(event, to, SHOP, NOW)


def received(event: dict[str, Any]) -> EmailMessage:
    """The composed message as a mail program reads it from the wire."""
    return message_from_bytes(composed(event).as_bytes(), policy=default)


def part(event: dict[str, Any], kind: str) -> str:
    body = received(event).get_body((kind,))
    assert body is not None
    return str(body.get_content()).replace("\r\n", "\n")


def listed(basket: object) -> list[str]:
    """The lines of the plain text that name an item or the total."""
    return [line for line in part(email_event(basket=basket), "plain").splitlines() if re.match("- |Total", line)]


class TestCompose:
    def test_a_reminder_lists_the_basket_with_exact_amounts(self) -> None:
        assert received(email_event())["Subject"] == "Still in your basket: Orange and 2 more"
        assert part(email_event(), "plain") == (
            "Hello,\n\nyou left something in your basket on 2020-08-28 12:03 UTC:\n\n"
            "- Orange: 2 x 0.50 = 1.00\n- Banana: 1 x 1.22 = 1.22\n- Lemon: 2 x 5.00 = 10.00\n\nTotal: 12.22\n\n"
            "Prices are as they were then, and may have changed.\n"
            "If you no longer want it, you need not do anything.\n\n-- \n"
            "You get this message because you left a basket without ordering.\n"
            "Sent automatically by Lemon & Co.\n"
            "Reference: remind/abandonment/events:0:3186/abandoned/first\n"
        )

    def test_a_tax_confirmation_says_what_was_received_and_no_more(self) -> None:
        event = email_event("tax-received", subject={"id": "UK"}, object={"id": 901, "body": "SECRET"})
        assert received(event)["Subject"] == "We have received your tax submission"
        text = part(event, "plain")
        assert "\nClient number: 15\nSubmission: UK\nReceived: 2022-04-21 14:03 UTC\n" in text
        assert "SECRET" not in text + part(event, "html")

    def test_an_order_confirmation_does_without_a_basket(self) -> None:
        event = email_event("order-confirmed", object={"type": "NONE"})
        assert received(event)["Subject"] == "Your order is confirmed"
        assert "\nCustomer number: 15\nOrdered: 2022-04-21 14:03 UTC\n\nThis" in part(event, "plain")

    def test_the_headers_are_these_and_no_others(self) -> None:
        headers = dict(received(email_event()).items())
        assert headers.pop("Content-Type").startswith("multipart/alternative; boundary=")
        assert headers == {
            "From": "Lemon & Co <shop@mail.example.com>",
            "To": "ann@example.com",
            "Subject": "Still in your basket: Orange and 2 more",
            "Date": "Sun, 01 Mar 2026 12:30:00 +0000",
            "Message-ID": "<c12d1bf3524bac5f6d430d711647d69a2dd4d882492c927bba89b64eaf610391@mail.example.com>",
            "Auto-Submitted": "auto-generated",
            "X-Afterlog-Event-Id": "remind/abandonment/events:0:3186/abandoned/first",
            "MIME-Version": "1.0",
        }

    def test_an_event_has_one_message_id_whenever_and_to_whomever_it_is_sent(self) -> None:
        later = compose(email_event(basket=[]), "bob@example.org", SHOP, datetime(2027, 1, 1, tzinfo=UTC))
        assert later["Message-ID"] == composed(email_event())["Message-ID"]

    def test_the_event_id_stays_one_searchable_ascii_line(self) -> None:
        event = email_event()
        event["event"]["id"] = "x/é\r\nBcc: eve@example.com/" + "y" * 90
        line = b"X-Afterlog-Event-Id: x/%C3%A9%0D%0ABcc:%20eve%40example.com/" + b"y" * 90 + b"\r\n"
        assert line in composed(event).as_bytes()

    @pytest.mark.parametrize(
        "name",
        [
            "Orange\r\nBcc: eve@example.com",
            "=?utf-8?q?Orange=0D=0ABcc:_eve@example.com?=",
            "=?utf-8?b?T3JhbmdlDQpCY2M6IGV2ZUBleGFtcGxlLmNvbQ==?=",
            "\u2028Bcc: eve@example.com\u2029\x85\x0b\x00",
            "Bcc: eve@example.com " * 100,
            "\ud800\r\n\r\nBcc: eve@example.com",
            "Äpfel \U0001f34e " * 30,
        ],
    )
    def test_no_text_of_an_event_becomes_a_header(self, name: str) -> None:
        event = email_event(basket=[{"id": 1, "name": name}], subject={"id": name})
        assert received(event).keys() == received(email_event()).keys()
        assert received(event)["To"] == "ann@example.com"
        assert all(len(line) < 998 for line in composed(event).as_bytes().splitlines())

    def test_text_of_an_event_is_escaped_in_html_and_stays_on_its_line(self) -> None:
        event = email_event(basket=[{"name": "<script>alert('x')</script>\n\nPay here: & now", "price": 1}])
        assert "<td style" in part(event, "html")
        assert "<script" not in part(event, "html")
        assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; Pay here: &amp; now" in part(event, "html")
        assert "- <script>alert('x')</script> Pay here: & now: 1 x 1.00 = 1.00\n" in part(event, "plain")

    @pytest.mark.parametrize(
        ("item", "line"),
        [
            ({"id": 7, "price": 2, "count": 3}, "- Item 7: 3 x 2.00 = 6.00"),
            ({"id": "7b", "name": ["Kiwi"], "price": 2}, "- Item 7b: 1 x 2.00 = 2.00"),
            ({"name": " \r\n ", "price": 0.125, "count": 1}, "- An item: 1 x 0.13 = 0.13"),
            ({"name": "Kiwi", "price": None}, "- Kiwi: 1"),
            ({"name": "Kiwi", "price": "2.00", "count": 2}, "- Kiwi: 2"),
            ({"name": "Kiwi", "price": True, "count": 2}, "- Kiwi: 2"),
            ({"name": "Kiwi", "price": 1e300, "count": 2}, "- Kiwi: 2"),
            ({"name": "Kiwi", "price": float("nan"), "count": 2}, "- Kiwi: 2"),
            ({"name": "Kiwi", "price": 10**5000}, "- Kiwi: 1"),
            ({"name": "Kiwi", "price": 2, "count": None}, "- Kiwi: 2.00 each"),
            ({"name": "Kiwi", "price": 2, "count": "two"}, "- Kiwi: 2.00 each"),
            (
                {"name": "Kiwi", "price": 999_999_999_999, "count": 1.5},
                "- Kiwi: 1.5 x 999999999999.00 = 1499999999998.50",
            ),
            (None, "- An item"),
            ("Kiwi", "- An item"),
        ],
    )
    def test_an_item_shows_what_is_usable_of_it(self, item: object, line: str) -> None:
        assert listed([item])[0] == line

    def test_a_total_stands_only_where_every_item_has_an_amount(self) -> None:
        assert listed([*BASKET, {"name": "Kiwi", "price": "1"}])[-1] == "- Kiwi: 1"
        assert listed([{"name": "a", "price": 0.1}, {"name": "b", "price": 0.2}])[-1] == "Total: 0.30"

    def test_a_long_basket_is_cut_short_but_its_total_is_whole(self) -> None:
        lines = listed([{"name": f"n{number}", "price": 1} for number in range(23)])
        assert lines[-3:] == ["- n19: 1 x 1.00 = 1.00", "- and 3 more", "Total: 23.00"]

    @pytest.mark.parametrize("cause", [None, "text", ["list"], {"sha256": "ab" * 32, "length": 70000}])
    def test_a_reminder_whose_basket_is_not_at_hand_names_no_items(self, cause: object) -> None:
        event = email_event()
        event["context"]["caused_by"] = cause
        assert received(event)["Subject"] == "Your basket is still here"
        assert "you left something in your basket, and it is still there." in part(event, "plain")
        assert "you left something in your basket, and it is still there." in part(event, "html")

    @pytest.mark.parametrize("template", ["welcome", "../mail", "_items", "layout", None, {"a": 1}])
    def test_an_unknown_template_is_refused_with_the_known_ones(self, template: object) -> None:
        assert templates() == ["basket-reminder", "order-confirmed", "tax-received"]
        with pytest.raises(TemplateMissing, match="known ones are basket-reminder, order-confirmed, tax-received"):
            composed(email_event(template))

    @pytest.mark.parametrize("event_id", [None, "", 7])
    def test_an_event_without_its_id_is_refused(self, event_id: object) -> None:
        with pytest.raises(UnusableEvent, match=r"event\.id"):
            composed(email_event() | {"event": {"id": event_id}})

    def test_a_date_without_a_time_zone_is_refused(self) -> None:
        with pytest.raises(ValueError, match="time zone"):
            compose(email_event(), "ann@example.com", SHOP, NOW.replace(tzinfo=None))


class TestAddresses:
    @pytest.mark.parametrize(
        ("text", "address"),
        [
            ("ann@example.com", "ann@example.com"),
            (" Ann <ann+shop@sub.example.com> ", "ann+shop@sub.example.com"),
            ('"Ann, of Kent" <ann@localhost>', "ann@localhost"),
            ("o'neil_{x}@[192.0.2.1]", "o'neil_{x}@[192.0.2.1]"),
            ("jörg@bücher.example", "jörg@bücher.example"),
        ],
    )
    def test_one_address_is_taken_with_or_without_a_name(self, text: str, address: str) -> None:
        assert parse_address(text) == address

    @pytest.mark.parametrize(
        "text",
        ["", "ann", "@example.com", "ann@", "ann@example.com, bob@example.com", "ann@example.com bob@example.com",
         "ann@example.com\r\nBcc: eve@example.com", "ann@exam\x00ple.com", "ann@example.com\u2028", "group: ann@example.com;",
         "ann@-example.com", "ann@example..com", "ann..x@example.com", "<ann@example.com", "a b@example.com",
         "ann@example.com>", "x" * 65 + "@example.com", "((((" * 500, "=?utf-8?q?a=0D=0A?= <ann@exa\u202emple.com>",
         "=?utf-8?q?=0D=0ABcc:_eve?=@example.com", "=?utf-8?q?=0D=0A@example.com"],
    )  # fmt: skip
    def test_anything_else_is_refused_without_being_quoted(self, text: str) -> None:
        with pytest.raises(AddressError, match=r"expected one address such as ann@example\.com, found") as raised:
            parse_address(text)
        assert "bob" not in str(raised.value)
        assert "eve" not in str(raised.value)

    def test_the_name_of_a_sender_is_kept(self) -> None:
        message = compose(email_event(), "ann@example.com", '"Zitrone, Äpfel" <shop@example.com>', NOW)
        sender = message_from_bytes(message.as_bytes(), policy=default)["From"].addresses[0]
        assert (sender.display_name, sender.addr_spec) == ("Zitrone, Äpfel", "shop@example.com")

    def test_a_sender_outside_ascii_is_refused(self) -> None:
        with pytest.raises(AddressError, match="must be ASCII"):
            compose(email_event(), "ann@example.com", "shop@bücher.example", NOW)


class TestMailUrl:
    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("file:outbox", MailUrl("file", path="outbox")),
            ("file:/var/mail%20box", MailUrl("file", path="/var/mail box")),
            ("file:///var/out", MailUrl("file", path="/var/out")),
            ("smtp://mail.example.com", MailUrl("smtp", "mail.example.com", 25, starttls="auto")),
            ("smtp://[::1]:2525/", MailUrl("smtp", "::1", 2525, starttls="auto")),
            ("smtp://u%40x:p%2F%20%3A@h:587", MailUrl("smtp", "h", 587, "u@x", "p/ :", "require")),
            (
                "smtp://u:p@h?starttls=never&timeout=2.5",
                MailUrl("smtp", "h", 25, "u", "p", "never", timeout=2.5),
            ),
            ("smtps://h?cafile=/etc/a%20b.pem", MailUrl("smtps", "h", 465, cafile="/etc/a b.pem")),
        ],
    )
    def test_a_url_is_read_with_its_defaults(self, url: str, expected: MailUrl) -> None:
        assert parse_mail_url(url) == expected

    @pytest.mark.parametrize(
        ("url", "reason"),
        [
            ("", "scheme of the mail URL: found none, expected file, smtp or smtps"),
            ("smpt://u:hunter2@h", "scheme of the mail URL: found smpt, expected file, smtp or smtps"),
            ("file://outbox", "found a host, an option or no path, expected file:outbox or file:/path"),
            ("file:", "expected file:outbox or file:/path"),
            ("smtp://", "host of the smtp mail URL: found none that can be used"),
            ("smtp://u:hunter2@ho_st..x", "host of the smtp mail URL: found none that can be used"),
            ("smtp://u:hunter2@h:0", "port of the smtp mail URL: found no such number, expected 1 to 65535"),
            ("smtp://u:hunter2@h:70000", "port of the smtp mail URL"),
            ("smtp://u:hunter2", "port of the smtp mail URL"),
            (
                "smtp://u:hun/ter2@h",
                "found an @ behind the host, expected any / ? # in user and password percent-",
            ),
            ("smtp://u:hun?ter2@h", "found an @ behind the host"),
            ("smtp://u:hun#ter2@h", "found an @ behind the host"),
            ("smtp://u:hun[ter2@h", "found brackets that fit no URL"),
            ("smtp://u:hun%0Ater2@h", "found a space or control character"),
            ("smtp://u:hünter2@h", "login of the smtp mail URL: found a half or no ASCII"),
            ("smtp://hunter2@h", "login of the smtp mail URL: found a half"),
            ("smtp://h/inbox", "found a path or fragment"),
            (
                "smtp://h?startls=auto",
                "found one twice, empty or unknown, expected cafile, starttls, timeout",
            ),
            ("smtp://h?timeout=1&timeout=2", "found one twice"),
            ("smtps://h?starttls=auto", "expected cafile, timeout"),
            (
                "smtp://h?starttls=yes",
                "starttls of the smtp mail URL: found yes, expected auto, require or never",
            ),
            (
                "smtp://h?timeout=nan",
                "timeout of the smtp mail URL: found nan, expected seconds from above 0 to 3600",
            ),
        ],
    )
    def test_a_bad_url_is_refused_without_its_password(self, url: str, reason: str) -> None:
        with pytest.raises(MailUrlError) as raised:
            parse_mail_url(url)
        assert reason in str(raised.value)
        assert "ter2" not in str(raised.value)

    def test_a_url_never_shows_its_password(self) -> None:
        url = parse_mail_url("smtp://ann:hunter2@mail.example.com:587")
        assert str(url) == "smtp://ann:***@mail.example.com:587"
        assert "hunter2" not in repr(url)

    def test_an_unreadable_ca_file_is_refused_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(MailUrlError, match=r"found none\.pem: No such file or directory, expected a readable"):
            open_transport(parse_mail_url("smtps://h?cafile=none.pem"), tmp_path)


def send(server: SmtpServer, *messages: EmailMessage, options: str = "", login: str = "") -> None:
    url = server.url.replace("://", f"://{login}@" if login else "://") + options
    with open_transport(parse_mail_url(url), Path("/nowhere")) as transport:
        for message in messages:
            transport.send(message)


def subjects(inbox: list[Received]) -> list[str]:
    return [str(message_from_bytes(entry.message, policy=default)["Subject"]) for entry in inbox]


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
            ("550 5.7.1 never", True),
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
        assert raised.value.permanent is permanent
        assert subjects(server.inbox) == TWO[1:]
        assert server.sessions == (2 if answer.startswith("421") else 1)

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
        copy = pickle.loads(pickle.dumps(NotSent("why", permanent=True)))  # noqa: S301
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
