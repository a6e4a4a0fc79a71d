"""A mail server at its worst.

A fake: a real one, behind a socket, would answer in an order that no seed repeats. That the transport tells a refusal from a doubt
is tested against a real server (tests/test_transport.py); here it is certain which of them it was, and what the server has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from email.message import EmailMessage
from random import Random

from tasks.sending import NotSent, OutcomeUnknown, Transport
from tests.simulator.disk import Disk


class MailServer:
    """What was accepted, by `event.id`."""

    def __init__(self, random: Random, disk: Disk, claimed: Callable[[], list[str]]) -> None:
        self.random, self.disk, self.claimed = random, disk, claimed
        self.accepted: Counter[str] = Counter()
        self.kind = True
        self.broken: list[str] = []

    def take(self) -> None:
        """A message comes in: it is accepted, refused, or the connection ends before or after it is."""
        claimed = self.claimed()
        if len(claimed) != 1:
            self.broken.append(f"a mail was sent while {claimed} were claimed, and committed")
            return
        self.disk.leave(self.disk.enter("connect", claimed[0]))
        how = "accept" if self.kind else self.random.choice(_MANNERS)
        if how == "later":
            raise NotSent("450 try again later", permanent=False)
        if how == "never":
            raise NotSent("550 no such person", permanent=True)
        if how != "lost":
            self.accepted[claimed[0]] += 1
        self.disk.leave(self.disk.enter("quit", claimed[0]))
        if how in ("lost", "taken"):
            raise OutcomeUnknown("no answer after DATA")


_MANNERS = ["accept", "accept", "accept", "later", "never", "lost", "taken"]


class SimulatedTransport(Transport):
    """The connection of one delivery."""

    def __init__(self, server: MailServer) -> None:
        self._server = server

    def send(self, message: EmailMessage) -> None:
        assert message["Message-ID"]
        self._server.take()

    def close(self) -> None:
        """There is none."""

    def interrupt(self) -> None:
        """Nobody waits."""
