"""Hand one composed message to a mail server or to a folder of .eml files, and say what became of it.

`send` returns once the message is accepted; it raises NotSent where it certainly was not, and OutcomeUnknown
where it was handed over and no clear answer came: so it can be sent again, given up, or left to a person.
"""

from __future__ import annotations

import os
import re
import ssl
import tempfile
from email.message import EmailMessage
from pathlib import Path

from storage.errors import UsageError
from storage.segment import fsync_directory
from tasks.mail import AddressError, parse_sender
from tasks.mail_url import MailUrl, MailUrlError
from tasks.sending import NotSent, OutcomeUnknown, Transport, letter_of
from tasks.smtp import SmtpTransport


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


def check_sender(sender: str) -> None:
    """Make sure that mails can come from `sender`: one that is no usable address is a wrong setting, and must not cost a single mail.

    Raises:
        UsageError: it is no address, or none that can be had in ASCII.
    """
    try:
        parse_sender(sender)
    except AddressError as error:
        raise UsageError(
            f"setting AFTERLOG_MAIL_FROM: {error}", do="Give an address, `Shop <shop@example.com>` say"
        ) from error


class FileTransport(Transport):
    """Write each message to FOLDER/<local part of its Message-ID>.eml, complete or not at all.

    A file of that name is the same message from an earlier try, and counts as accepted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def send(self, message: EmailMessage) -> None:
        letter = letter_of(message)
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

    def interrupt(self) -> None:
        """A file does not keep anybody waiting."""

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
