"""Derive: what follows from one event alone, by rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Raw

from storage.event import Batch, Event
from tasks.processors import contract


class Settings(msgspec.Struct, frozen=True):
    """`not_after`: how long an email is worth sending, in milliseconds from its own stamp."""

    not_after: int = 86_400_000


@dataclass(frozen=True)
class Rule:
    """Events of `verb` give an EMAIL from `template`, to whom `recipient` says; to nobody where it says None."""

    verb: str
    template: str
    recipient: Callable[[Event], dict[str, Any] | None]


_decode_fields = msgspec.json.Decoder(dict[str, Raw]).decode  # of a key that stands there twice the last one
_decode_id = msgspec.json.Decoder(int | str).decode


def client_of_object(event: Event) -> dict[str, Any] | None:
    """The client whose id the object carries."""
    try:
        ident = _decode_id(_decode_fields(event.object)["id"])
        return {"id": contract.json_id(ident), "type": "CLIENT"}
    except (KeyError, msgspec.MsgspecError):
        return None


def customer_of_subject(event: Event) -> dict[str, Any]:
    """The customer who is the subject, whatever the system calls itself that speaks for them."""
    return {"id": contract.json_id(event.id), "type": "CUSTOMER"}


RULES = (
    Rule("SUBMIT_TAX", "tax-received", client_of_object),
    Rule("ORDER_COMPLETED", "order-confirmed", customer_of_subject),
)
_VERBS = frozenset(rule.verb for rule in RULES)


class Processor(contract.Processor[dict[str, Any]]):
    """Applies `RULES`; an event that no rule names is ignored."""

    name, reads, writes = "derive", "events", "reactions"
    mails = True
    settings: Settings

    def process(self, batch: Batch, state: contract.States[dict[str, Any]], out: contract.Output) -> None:
        """Give the emails that the rules ask for, in log order."""
        processed = 0
        for event in [event for event in batch.events if event.verb in _VERBS]:
            before = len(out.lines)
            for rule in RULES:
                if rule.verb == event.verb and (recipient := rule.recipient(event)) is not None:
                    self._mail(event, rule, recipient, out)
            processed += len(out.lines) > before  # once, however many rules name it
        out.ignored += len(batch.events) - processed

    def _mail(self, event: Event, rule: Rule, recipient: dict[str, Any], out: contract.Output) -> None:
        out.emit(
            self,
            event,
            {"id": "EMAIL_SYSTEM"},
            "EMAIL",
            {**recipient, "template": rule.template},
            name=rule.template,
            at=event.clock,
            not_after=event.clock + self.settings.not_after,
        )
