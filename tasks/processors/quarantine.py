"""Quarantine: every bad line with its place, its reason and its bytes."""

from __future__ import annotations

import base64
from typing import Any

from storage.event import Batch, Event
from storage.slow_judge import judge_slowly
from tasks.processors import contract


class Processor(contract.Processor[dict[str, Any]]):
    """Copies what the judge refused to a log of its own, where a person finds it."""

    name, reads, writes = "quarantine", "events", "quarantine"
    code = (judge_slowly.__module__,)  # whose reasons are in what it writes

    def process(self, batch: Batch, state: contract.States[dict[str, Any]], out: contract.Output) -> None:
        """Give one REJECTED for each bad line, at the clock before it."""
        for bad in batch.bad:
            out.write(
                {
                    "subject": {"id": batch.log, "type": "LOG"},
                    "verb": "REJECTED",
                    "object": {
                        "type": "LINE",
                        "reason": bad.reason,
                        "length": bad.length,
                        "bytes": base64.b64encode(bad.head).decode(),
                    },
                    "context": {"at": bad.clock, "source": out.source(bad.offset)},
                    "event": {
                        "id": f"{self.name}/{batch.log}:{batch.partition}:{bad.offset}/rejected",
                        "inserted_at": bad.clock,
                    },
                }
            )

    def event(self, event: Event, state: contract.States[dict[str, Any]], out: contract.Output) -> None:
        """Good events pass."""
