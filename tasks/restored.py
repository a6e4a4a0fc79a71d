"""After a backup was put back: which mails may have been sent by those who worked after it was made."""

from __future__ import annotations

from typing import Any

from storage.restore import last_restored
from storage.times import SECONDS_BELOW, parse_time
from tasks.guards import event_there, read_event
from tasks.run import Run


class Restores:
    """Tells a mail that may have been sent before from one that is certainly new; without a restore every mail is new."""

    def __init__(self, run: Run) -> None:
        self._run, self._last = run, last_restored(run.store.database)
        self._derived = run.topology.derived_logs()

    def may_have_been_sent(self, event: dict[str, Any]) -> bool:
        """Whether the cause of an EMAIL event was there, or had happened, when the backup was put back, or cannot be found."""
        last = self._last
        if last is None:
            return False
        while True:
            context, stamped = event.get("context", {}), event.get("event", {})
            stamps = (_millis(context.get("at")), _millis(stamped.get("inserted_at")))
            if any(stamp is not None and stamp <= last.at for stamp in stamps):
                return True
            source = context.get("source")
            if not isinstance(source, dict):
                return False
            log, partition, offset = source["log"], source["partition"], source["offset"]
            event = event_there(self._run, log, partition, offset, self._run.generation(log))
            if not event:
                return True  # of another generation than the one that is live: nobody can tell
            if log not in self._derived:
                event = {**event, "context": {"at": event.get("context", {}).get("at")}}  # a raw line ends the chain
                if offset < last.ends.get(f"{log}/{partition}", 0):
                    return True

    def may_have_been_sent_at(self, log: str, partition: int, offset: int) -> bool:
        """The same of the EMAIL event at a place."""
        if self._last is None:
            return False
        return self.may_have_been_sent(read_event(self._run, log, partition, offset, self._run.generation(log)))

    def salt(self, event: dict[str, Any]) -> str:
        """What the Message-ID of a mail needs beside its event's id.

        A log that has lost its end gives its offsets, and so ids, a second time: to other events.
        """
        return "" if self._last is None or self.may_have_been_sent(event) else f"\n{self._last.at}"


def _millis(value: object) -> int | None:
    if isinstance(value, float):
        value = round(value * 1000 if value < SECONDS_BELOW else value)
    return parse_time(value) if isinstance(value, (int, str)) else None
