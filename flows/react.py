"""The flow `react`: baskets to reminders, and every email to its recipient."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow, get_run_logger
from pydantic import Field

from flows.alerts import watched
from flows.artifacts import counts_table, mail_table, publish
from flows.running import collect, open_run, raise_failures
from flows.shift import Shift, Superseded
from tasks.deliver import DeliverySummary
from tasks.prefect_tasks import deliver_task, follow_mail_task, follow_task, process_task
from tasks.process import Summary
from tasks.topology import DELIVER


@flow(name="react", flow_run_name="react", log_prints=False)
def react(limit: Annotated[int, Field(ge=1)] | None = None, shift: bool = False) -> None:
    """Turn abandoned baskets into reminders, and deliver every mail that is due.

    Args:
        limit: try at most so many mails; all that are due where it is left out.
        shift: follow the logs until the next shift takes over, instead of ending when nothing is due. For schedules.
    """
    if shift:
        _shift()
    else:
        _to_end(limit)


def _to_end(limit: int | None) -> None:
    with open_run("react") as run:
        names = run.topology.on_derived_logs()
        summaries, failures = collect([process_task.submit(name) for name in names], names)
        mails, mail_failures = collect([deliver_task.submit(DELIVER, limit)], [DELIVER])
        _publish("Delivered", [*summaries, *mails])
        raise_failures({**failures, **mail_failures}, run.notes)


def _shift() -> None:
    with open_run("react") as run:
        names = [*run.topology.on_derived_logs(), DELIVER]
        shift = Shift(run, "react")
        try:
            shift.check_not_late(names)
        except Superseded as late:
            get_run_logger().info("Not needed: %s", late)
            return
        run.pulse.start()
        futures = [*(follow_task.submit(name) for name in names[:-1]), follow_mail_task.submit(DELIVER)]
        with watched(run):
            get_run_logger().info("Shift over: %s", shift.hold(futures))
        done, failures = collect(futures, names)
        _publish("Delivered in a shift", done)
        raise_failures(failures, run.notes)


def _publish(title: str, done: list[Any]) -> None:
    counts = [part for part in done if isinstance(part, Summary)]
    mails = [part for part in done if isinstance(part, DeliverySummary)]
    publish("react", title, [counts_table(counts), *map(mail_table, mails)])
