"""A mail server at its worst.

A fake: a real one, behind a socket, would answer in an order that no seed repeats. That the transport tells a refusal from a doubt
is tested against a real server (tests/test_transport.py); here it is certain which of them it was, and what the server has.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from email.message import EmailMessage
from random import Random
from typing import Any

import tasks.mail
from tasks.sending import NotSent, OutcomeUnknown, Transport
from tests.simulator.disk import Disk

_usual_policy = tasks.mail.header_policy


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


class _Headers:
    """Each text of a header parsed but once in a process: most are the same, and none ever changes."""

    def __init__(self, usual: Any) -> None:
        self._parse, self._known = usual, functools.lru_cache(1_000)(usual)

    def __call__(self, name: str, value: Any) -> Any:
        return self._known(name, value) if isinstance(value, str) else self._parse(name, value)

    def __getitem__(self, name: str) -> Any:
        return self._parse[name]


@functools.cache
def policy() -> Any:
    """What mails are composed by."""
    usual: Any = _usual_policy()
    return usual.clone(header_factory=_Headers(usual.header_factory))
