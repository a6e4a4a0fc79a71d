"""Shifts: scheduled runs that follow the logs until their successor takes over.

A run's process takes seconds to start, so runs that end before the next begins leave holes. A shift instead makes itself
known once its followers stand at the locks; the one before lets go at a batch boundary, and the locks change hands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from prefect.futures import PrefectFuture
from prefect.runtime import flow_run

from storage.owner import owner_of, take_over
from storage.times import now
from tasks.run import Run

LOOK_EVERY = 0.05
LOOK_ANYWAY = 5.0
READY_WITHIN = 15.0
HAND_OVER = 10.0
"""Seconds for a mail on its way: the successor waits at the lock, and a server that scans mails takes some."""


class Superseded(Exception):
    """A run that started late: a successor that was scheduled after it follows already."""


class Shift:
    """One run's turn to follow for a flow."""

    def __init__(self, run: Run, flow: str) -> None:
        self.run, self.flow = run, flow
        self.run_id = str(flow_run.id)
        scheduled = flow_run.scheduled_start_time
        self.scheduled = int(scheduled.timestamp() * 1000) if scheduled else now()
        self._ends = time.monotonic() + run.store.settings.shift_longest / 1000
        # The row in the database says who follows. Asking it 20 times a second cost 2 CPU s a minute with nothing to do,
        # so whoever writes it also touches a file; a look at that is a hundredth of it.
        self._bell = run.store.lock_path(f"{flow}.owner")

    def check_not_late(self, processors: Iterable[str]) -> None:
        """Make sure that no successor of this run is at work.

        Raises:
            Superseded: one is.
        """
        owner = owner_of(self.run.store.database, self.flow)
        if owner is not None and owner.scheduled > self.scheduled and any(map(self.run.is_held, processors)):
            raise Superseded(f"run {owner.run_id}, scheduled later, follows already")

    def hold(self, futures: list[PrefectFuture[Any]]) -> str:
        """Take over once every follower is ready, and return when the shift is over, with the reason in words."""
        why = self._until_over(futures)
        self.run.grace = HAND_OVER
        return why

    def _until_over(self, futures: list[PrefectFuture[Any]]) -> str:
        done: list[PrefectFuture[Any]] = []
        for future in futures:
            future.add_done_callback(done.append)
        self._wait(lambda: self.run.ready() >= len(futures) or len(done) == len(futures), READY_WITHIN)
        take_over(self.run.store.database, self.flow, self.run_id, self.scheduled)
        self._bell.write_text(f"{self.run_id}\n")
        heard, asked = 0, 0.0
        while time.monotonic() < self._ends:
            time.sleep(LOOK_EVERY)
            if len(done) == len(futures):
                return "every follower has ended"
            rung = self._bell.stat().st_mtime_ns
            if rung == heard and time.monotonic() - asked < LOOK_ANYWAY:
                continue
            heard, asked = rung, time.monotonic()
            owner = owner_of(self.run.store.database, self.flow)
            if owner is not None and owner.run_id != self.run_id:
                return f"handed over to run {owner.run_id}"
        return "reached its greatest length"

    def _wait(self, until: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            time.sleep(0.01)
