"""What a run shows in the UI: one artifact of its counts, tables of the latest findings, and the hourly plot.

Keys are stable, so the UI shows an artifact's versions over time. A run has one version of each, which it brings up to
date as it works. The work never waits for any of it, and does not fail where Prefect's server is gone.
"""

from __future__ import annotations

import contextvars
import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import Artifact, create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client

from flows import plot, tables
from flows.counts import counts_markdown
from flows.naming import Done, following
from flows.run_name import rename
from storage.mails import FAILED, SENT, SUPPRESSED, UNKNOWN, WAITING
from storage.outbox import Outbox
from storage.store import DELIVERIES
from tasks.deliver import DeliverySummary
from tasks.process import Summary, positions
from tasks.run import Run
from tasks.topology import DELIVER

FIRST_REPORT, REPORT_EVERY = 8.0, 120.0
"""Seconds into a shift after which it first tells what it has done, and after which again."""
PLOT_KEY = "last-48-hours"
PLOT_EVERY = timedelta(minutes=10)
"""A shift draws the plot where the last one is older; a run by hand always does."""

_TABLES: dict[str, tuple[str, str, Callable[..., list[tables.Row]]]] = {
    "baskets": ("abandoned-baskets", "The latest abandoned baskets", tables.abandoned_baskets),
    "anomalies": ("anomalies", "The latest anomalies", tables.anomalies),
    DELIVERIES: ("mails", "Mails that wait, and the latest that were decided", tables.mails),
}
"""By the log whose growth makes a new version: the key, the title, and the rows."""


class Report:
    """The artifacts of the current run of `flow`, which works with the processors `names`."""

    def __init__(self, run: Run, flow: str, names: Sequence[str]) -> None:
        self._run, self._flow, self._names = run, flow, names
        self._ids: dict[str, UUID] = {}
        self._shown: dict[str, str] = {}
        self._start = {p.id: replace(p) for p in positions(run.store)}
        self._ends = self._log_ends()
        self._mails = Outbox(run.store, DELIVERIES).counts() if DELIVER in names else {}
        self._lock = threading.Lock()
        self.at_work = False
        """Whether it is a shift, which tells on its way."""

    def keep_up(self) -> None:
        """Name the run by what it follows, and tell now and then what was done so far, until the run is to stop.

        In a thread of its own: a server that does not answer must not keep a shift from handing over.
        """
        self.at_work = True
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._tell_now_and_then,), name="report", daemon=True).start()

    def publish(self, done: Done, *, draw: bool = True) -> None:
        """Show what a run did, if it did anything; `draw` the plot even if there is a recent one."""
        self._tell(lambda: done, at_work=False, draw=draw)

    def _tell(self, what: Callable[[], Done], *, at_work: bool, draw: bool) -> None:
        with self._lock:  # what the thread is at comes first, and nothing of it after the end
            if at_work and self._run.stop.is_set():
                return
            try:
                done = what()
                if not done.is_nothing():
                    self._publish(done, at_work, draw)
            except Exception as error:  # noqa: BLE001  # whatever it is, the run's work is done and must count
                get_run_logger().warning("Artifacts are not up to date: %r", error)

    def _publish(self, done: Done, at_work: bool, draw: bool) -> None:
        text = counts_markdown(self._run, self._flow, done, at_work=at_work)
        self._put(self._flow, "What the run did", text, text)
        ends = self._log_ends()
        for log, (key, title, rows) in _TABLES.items():
            if log in self._logs() and ends[log] != self._ends[log]:
                shown = rows(self._run.store)
                self._put(key, title, shown, json.dumps(shown))
        if draw or (self._flow == "process" and _is_old(PLOT_KEY)):  # of two shifts at once one is enough
            found = plot.read_plot(self._run.store, self._run.topology)
            text = plot.markdown(found)
            self._put(PLOT_KEY, "Events, abandonments, recoveries and mails by the hour", text, text)

    def _put(self, key: str, title: str, content: Any, data: str) -> None:
        """A new version at a run's first word about it, in place after that."""
        if self._shown.get(key) == data:
            return
        if key not in self._ids:
            create = create_markdown_artifact if isinstance(content, str) else create_table_artifact
            self._ids[key] = cast(UUID, create(content, key=key, description=title))
        else:
            with get_client(sync_client=True) as client:
                # Not `update_artifact`: it would keep every state of the text once more, as a Prefect event.
                client.request("PATCH", "/artifacts/{id}", path_params={"id": self._ids[key]}, json={"data": data})
        self._shown[key] = data

    def _tell_now_and_then(self) -> None:
        name = following(self._run, self._flow, self._names, self._start.values())
        get_run_logger().info(name[0].upper() + name[1:])
        with self._lock:
            if not self._run.stop.is_set():
                rename(name)
        wait = FIRST_REPORT
        while not self._run.stop.wait(wait):
            self._tell(self._so_far, at_work=True, draw=False)
            wait = REPORT_EVERY

    def _so_far(self) -> Done:
        """What the processors have done since the run began, by their checkpoints."""
        summaries = {name: Summary(name) for name in self._names if name in self._run.topology.processors}
        for position in positions(self._run.store):
            if position.processor in summaries:
                blank = replace(position, offset=0, lines=0, processed=0, quarantined=0, ignored=0, derived=0)
                summaries[position.processor].add(self._start.get(position.id, blank), position)
        return Done(list(summaries.values()), [self._mails_so_far()] if DELIVER in self._names else [])

    def _mails_so_far(self) -> DeliverySummary:
        """What has become of mails since the run began, by the outbox; the reasons are in the table of mails."""
        counts = Outbox(self._run.store, DELIVERIES).counts()
        states = Counter({state: count - self._mails.get(state, 0) for state, count in counts.items()})
        decided = Counter({state: states[state] for state in (SENT, SUPPRESSED, FAILED, UNKNOWN) if states[state] > 0})
        return DeliverySummary(states.total(), decided, waiting=counts.get(WAITING, 0))

    def _logs(self) -> set[str]:
        """The logs that this run writes, as far as there is a table of them."""
        written = {
            self._run.topology.make(name).writes for name in self._names if name in self._run.topology.processors
        }
        return {log for log in _TABLES if log in written or (log == DELIVERIES and DELIVER in self._names)}

    def _log_ends(self) -> dict[str, int]:
        store = self._run.store
        return {log: sum(store.committed_end(log, part) for part in store.partitions(log)) for log in _TABLES}


def _is_old(key: str) -> bool:
    """Whether the newest version of an artifact is due for another."""
    latest = Artifact.get(key)
    created = getattr(latest, "created", None) or getattr(latest, "updated", None)
    return created is None or datetime.now(UTC) - created > PLOT_EVERY
