"""Remind: one reminder for each abandoned basket, never two to the same customer within a day of log time."""

from __future__ import annotations

import msgspec

from storage.event import Event
from tasks.processors import contract

TEMPLATE = "basket-reminder"


class Settings(msgspec.Struct, frozen=True):
    """`gap`: the least time between two reminders to a customer; `not_after`: how long one is worth sending."""

    gap: int = 86_400_000
    not_after: int = 86_400_000


class Reminded(msgspec.Struct):
    """When a customer was last reminded, in log time."""

    at: int


class Processor(contract.Processor[Reminded]):
    """Turns ABANDONED_BASKET into EMAIL. Whether it is still right to send it is asked when it is sent."""

    name, reads, writes = "remind", "baskets", "reminders"
    state = Reminded
    mails = True
    settings: Settings

    def event(self, event: Event, state: contract.States[Reminded], out: contract.Output) -> None:
        """Give a reminder for an abandonment, unless the customer had one within the gap."""
        before = state.get(event.key) if event.verb == "ABANDONED_BASKET" else None
        if event.verb != "ABANDONED_BASKET" or (before and event.clock - before.at < self.settings.gap):
            out.ignored += 1
            return
        state.put(event.key, Reminded(event.clock))
        out.emit(
            self,
            event,
            {"id": "EMAIL_SYSTEM"},
            "EMAIL",
            {"id": contract.json_id(event.id), "type": "CUSTOMER", "template": TEMPLATE},
            name=TEMPLATE,
            at=event.clock,
            not_after=event.clock + self.settings.not_after,
        )
