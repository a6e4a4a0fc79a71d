"""Mail URLs: how they are read, and how a bad one is refused without its password."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.mail_url import MailUrl, MailUrlError, parse_mail_url
from tasks.transport import open_transport


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
