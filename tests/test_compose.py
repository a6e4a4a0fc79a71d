"""Emails: what is composed from an event, whatever its texts are, and which addresses are taken."""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import Any

import pytest

from tasks.mail import AddressError, TemplateMissing, UnusableEvent, compose, parse_address, templates
from tasks.sending import letter_of

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


def composed(event: dict[str, Any], to: str = "ann@example.com", sender: str = SHOP) -> EmailMessage:
    return compose(event, to, sender, NOW)


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
            compose(email_event(), "ann@example.com", "shöp@example.com", NOW)

    @pytest.mark.parametrize(
        ("address", "sent"),
        [
            ("ann@münchen.de", "ann@xn--mnchen-3ya.de"),
            ("ann@MÜNCHEN.de", "ann@xn--mnchen-3ya.de"),
            ("ann@日本語.jp", "ann@xn--wgv71a119e.jp"),
            ("ann@straße.de", "ann@straße.de"),  # by Python's rules it would be strasse.de, which is another one
            ("ann@" + "ü" * 60 + ".de", "ann@" + "ü" * 60 + ".de"),
            ("jörg@münchen.de", "jörg@münchen.de"),
            ("Ann@Example.com", "Ann@Example.com"),
        ],
    )
    def test_a_domain_outside_ascii_goes_as_every_server_takes_it(self, address: str, sent: str) -> None:
        letter = letter_of(composed(email_event(), address))
        assert (letter.recipient, letter.international) == (sent, not sent.isascii())
        assert b"\r\nTo: %s\r\n" % sent.encode() in letter.data
        assert parse_address(address) == address

    def test_a_sender_s_domain_too(self) -> None:
        message = compose(email_event(), "ann@example.com", "Bücher <shop@bücher.example>", NOW)
        assert letter_of(message).sender == "shop@xn--bcher-kva.example"
        assert str(message["Message-ID"]).endswith("@xn--bcher-kva.example>")


class TestAsBytes:
    """What a mail is on its way, read by a few lines of our own: the standard library reads what it has written."""

    def _headers(self, message: EmailMessage) -> dict[str, str]:
        head = letter_of(message).data.partition(b"\r\n\r\n")[0].decode()
        assert max(map(len, head.split("\r\n"))) <= 998
        lines = re.sub(r"\r\n(?=[ \t])", "", head).split("\r\n")
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def _decoded(self, value: str) -> str:
        words = re.sub(r"\?=\s+=\?", "?==?", value)  # what is between two of them is no part of the text
        return re.sub(r"=\?utf-8\?b\?([^?]*)\?=", lambda word: base64.b64decode(word[1]).decode(), words)

    @pytest.mark.parametrize(
        "name",
        ["Crème fraîche légère à l'ancienne, très épaisse", "Молоко овсяное без сахара с кальцием и витаминами",
         "日 ßé ? x?;=é?q Bcc: a@b.ć", "=?utf-8?q?=0D=0ABcc:x?=本=?utf-8?q?=0D=0ABcc:x?=", "plain " * 15],
    )  # fmt: skip
    @pytest.mark.parametrize("to", ["ann@example.com", "jörg@bücher.example"])
    def test_a_subject_keeps_its_spaces(self, name: str, to: str) -> None:
        event = email_event(basket=[{"id": 1, "name": name}])
        shown = name.strip().replace("=?", "= ?")
        subject = self._decoded(self._headers(composed(event, to))["Subject"])
        assert subject == f"Still in your basket: {shown}"

    @pytest.mark.parametrize(
        "name",
        ["Lemon, Lime & Co. Handelsgesellschaft mbH und Compagnie (Deutschland), Berlin", "," + "a" * 90,
         'Ann "the shop" O\\Neil ' * 4, "Müller, Söhne & Cie. <Handelsgesellschaft>, München (Süd)", "a@b " * 20, "x", "é"],
    )  # fmt: skip
    @pytest.mark.parametrize("to", ["ann@example.com", "jörg@bücher.example"])
    def test_a_sender_is_one_address_whatever_its_name(self, name: str, to: str) -> None:
        sender = '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '" <shop@mail.example.com>'
        found = self._headers(composed(email_event(), to, sender))["From"]
        shown, _, address = found.rpartition(" ")
        assert address == "<shop@mail.example.com>"
        name = name.strip()
        if shown.startswith('"'):
            assert re.fullmatch(r'"(?:[^"\\]|\\.)*"', shown)
            assert re.sub(r"\\(.)", r"\1", shown[1:-1]) == name
        else:
            assert not set(shown) & set('()<>[]:;@\\,."')
            assert self._decoded(shown) == name

    def test_nothing_is_less_than_nothing(self) -> None:
        basket = [{"name": "Bag", "price": -0.0, "count": 1}, {"name": "Rounding", "price": -0.001, "count": 1}]
        assert listed(basket) == ["- Bag: 1 x 0.00 = 0.00", "- Rounding: 1 x 0.00 = 0.00", "Total: 0.00"]
