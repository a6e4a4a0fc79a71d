"""What it is to send a mail: it is accepted, or certainly not, or nobody knows."""

from __future__ import annotations

from dataclasses import dataclass
from email.message import EmailMessage
from email.policy import SMTP
from typing import Protocol, Self

from tasks.mail import MailError


class NotSent(MailError):
    """The server or folder has certainly not accepted the message. `permanent`: nor would it later.

    `of_session`: nor any other message now, since there is no connection, or none that is secure or logged in.
    """

    def __init__(self, reason: str, permanent: bool, of_session: bool = False) -> None:
        super().__init__(reason)
        self.args = (reason, permanent, of_session)
        self.permanent, self.of_session = permanent, of_session


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

    def interrupt(self) -> None:
        """From another thread: end a `send` that waits for the other side; none connects any more after that. Raises nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class Letter:
    """What SMTP needs of a message: the two addresses, the bytes, and whether they hold more than ASCII."""

    sender: str
    recipient: str
    data: bytes
    international: bool


def letter_of(message: EmailMessage) -> Letter:
    """The letter of a message.

    Raises:
        ValueError: it has not exactly one address in From and one in To.
    """
    found = [[a.addr_spec for a in getattr(message[header], "addresses", ())] for header in ("From", "To")]
    if [len(addresses) for addresses in found] != [1, 1]:
        raise ValueError("a message needs one address in From and one in To")
    (sender,), (recipient,) = found
    international = not (sender + recipient).isascii()
    policy = SMTP.clone(utf8=international, cte_type="8bit" if international else "7bit")
    return Letter(sender, recipient, message.as_bytes(policy=policy), international)
