"""When delivery stops itself: far more mails than usual, or baskets left behind in numbers while the log is silent.

A dead producer is not a thousand lost customers. What is held is not lost: it waits for a person, who releases or drops it.
"""

from __future__ import annotations

from collections import Counter

from storage.brake import (
    BUCKET,
    HOUR,
    STOPPED,
    mailed_since,
    put_on,
    read_brake,
    tally_since,
    usual_mails,
    usual_tally,
    would_mail,
)
from storage.segment import list_segments
from storage.store import Store
from storage.times import now, show_duration
from tasks.run import Run

ABANDONED = "ABANDONED_BASKET"
_USUAL_FOR = 60_000  # the usual is measured anew after so many milliseconds


class BrakeCheck:
    """Asked before each round of mails whether they are held; holds them itself where it must."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._database, self._settings = run.store.database, run.store.settings
        self._usual, self._measured_at = 0.0, -_USUAL_FOR
        self.stopped: str | None = None
        """Why delivery stopped itself, where it did so in this run."""

    def holds(self, limit: int) -> bool:
        """Whether mails are held; asked before at most `limit` of them are tried."""
        brake = read_brake(self._database)
        if brake.is_on:
            return True
        wall = now()
        due = would_mail(self._database, wall, self._settings.mail_allow, self._most(wall) + 1)
        if not due:
            return False
        reason = self._flood(wall, min(due, limit)) or self._surge(wall, brake.since)
        if not reason:
            return False
        if put_on(self._database, STOPPED, reason).state == STOPPED:
            self.stopped = reason
        return True

    def _most(self, wall: int) -> int:
        if wall - self._measured_at >= _USUAL_FOR:
            self._usual, self._measured_at = usual_mails(self._database, wall), wall
        return max(self._settings.brake_floor, int(self._settings.brake_factor * self._usual))

    def _flood(self, wall: int, due: int) -> str:
        """More mails in an hour, those due now counted as sent, than a person would want to hear of afterwards."""
        most, sent = self._most(wall), mailed_since(self._database, wall - HOUR)
        if sent + due <= most:
            return ""
        return (
            f"mails surge: {sent} within the last hour and at least {due} due now, at most {most} an hour "
            f"(BRAKE_FLOOR {self._settings.brake_floor}, or BRAKE_FACTOR {self._settings.brake_factor:g} x the usual "
            f"{self._usual:g})"
        )

    def _surge(self, wall: int, released: int) -> str:
        """Baskets left behind in numbers since the log fell silent; a person who released has seen those until then."""
        silent_since = last_append(self._run.store, self._run.topology.reads("abandonment"))
        if wall - silent_since < self._settings.brake_silence:
            return ""
        since = max(silent_since, released + BUCKET, wall - HOUR)
        count = tally_since(self._database, ABANDONED, since)
        if count <= self._settings.brake_surge_floor:
            return ""
        usual = usual_tally(self._database, ABANDONED, silent_since) * max(wall - since, BUCKET) / HOUR
        if count <= usual * self._settings.brake_surge:
            return ""
        return (
            f"abandonments surge while the log is silent: {count} baskets, usual for as long {usual:.0f}, and no new event "
            f"for {show_duration(wall - silent_since)}; the producer may be dead"
        )


def last_append(store: Store, log: str) -> int:
    """When a line was last appended to a log, by the files themselves; 0 if never."""
    written = [list_segments(store.directory(log, part))[-1:] for part in store.partitions(log)]
    return max((segment.path.stat().st_mtime_ns // 1_000_000 for last in written for segment in last), default=0)


def tallies(clocks: list[int]) -> list[dict[str, object]]:
    """Rows for the tally of abandonments, by ten minutes of the log's clock."""
    counts = Counter(clock // BUCKET * BUCKET for clock in clocks)
    return [{"what": ABANDONED, "bucket": bucket, "count": count} for bucket, count in counts.items()]
