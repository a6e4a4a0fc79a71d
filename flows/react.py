"""The flow `react`: baskets to reminders, and every email to its recipient."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.futures import wait
from pydantic import Field

from flows.alerts import watched
from flows.artifacts import Report
from flows.running import SIDE_BY_SIDE, conclude, not_needed, open_run
from flows.shift import Shift, Superseded
from storage.errors import UsageError
from tasks.prefect_tasks import deliver_task, follow_mail_task, follow_task, process_task
from tasks.topology import DELIVER


@flow(name="react", flow_run_name="react", log_prints=False, task_runner=SIDE_BY_SIDE)
def react(limit: Annotated[int, Field(ge=1)] | None = None, shift: bool = False) -> Any:
    """Turn abandoned baskets into reminders, and deliver every mail that is due.

    Args:
        limit: try at most so many mails; all that are due where it is left out.
        shift: follow the logs until the next shift takes over, instead of ending when nothing is due. For schedules.
    """
    if shift and limit is not None:
        raise UsageError(
            "a shift tries every mail that is due", found=f"limit {limit}", do="Switch shift off, as react/by-hand does"
        )
    return _shift() if shift else _to_end(limit)


def _to_end(limit: int | None) -> Any:
    with open_run("react") as run:
        names = [*run.topology.on_derived_logs(), DELIVER]
        report = Report(run, "react", names)
        reminders = [process_task.submit(name) for name in names[:-1]]
        wait(reminders)  # their mails are to be among those that are due
        return conclude(run, report, "react", names, [*reminders, deliver_task.submit(DELIVER, limit)])


def _shift() -> Any:
    with open_run("react") as run:
        names = [*run.topology.on_derived_logs(), DELIVER]
        shift = Shift(run, "react")
        try:
            shift.check_not_late(names)
        except Superseded as late:
            return not_needed("react", late)
        run.pulse.start()
        report = Report(run, "react", names)
        futures = [*(follow_task.submit(name) for name in names[:-1]), follow_mail_task.submit(DELIVER)]
        report.keep_up()
        with watched(run):
            get_run_logger().info("Shift over: %s", shift.hold(futures))
        return conclude(run, report, "react", names, futures)
