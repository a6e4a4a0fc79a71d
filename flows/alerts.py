"""Conditions that people should know of, told as Prefect events: `afterlog.lag` and the like. Automations send them on."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from prefect import get_run_logger
from prefect.events import emit_event

from storage.errors import AfterlogError
from storage.times import now
from tasks.alerts import Alert, Watch
from tasks.run import Run


def tell(alert: Alert) -> None:
    """Tell an alert as a Prefect event and in the run's log."""
    get_run_logger().warning(alert.sentence)
    emit_event(
        event=f"afterlog.{alert.kind}",
        resource={"prefect.resource.id": f"afterlog.{alert.about}", "prefect.resource.name": alert.about},
        payload={"sentence": alert.sentence, **alert.figures},
    )


@contextmanager
def watched(run: Run) -> Iterator[None]:
    """Look for alerts now and then until the run is told to stop, and once more at the end of the block."""
    watch = Watch(run.store, run.topology)

    def look() -> None:
        try:
            for alert in watch.look(now()):
                tell(alert)
        except (AfterlogError, OSError, sa.exc.SQLAlchemyError) as error:
            get_run_logger().warning("Could not look for alerts: %s", error)  # the work is not to end for that

    def go_on() -> None:
        while not run.stop.wait(run.store.settings.alert_every / 1000):
            look()

    thread = threading.Thread(target=contextvars.copy_context().run, args=(go_on,), name="alerts", daemon=True)
    thread.start()
    try:
        yield
    finally:
        run.stop.set()
        thread.join()
    look()
