"""The flow `process`: raw logs to derived logs and rows, each processor a task of its own."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from prefect import flow, get_run_logger
from prefect.futures import wait
from pydantic import Field

from flows.alerts import watched
from flows.artifacts import Report
from flows.running import SIDE_BY_SIDE, conclude, not_needed, open_run
from flows.shift import Shift, Superseded
from storage.errors import UsageError
from storage.times import LATEST, parse_moment
from tasks.prefect_tasks import follow_task, process_task
from tasks.process import AsOf, FinalTick, Summary, check_as_of, tick_now

# The server checks a form against its schema, but no `format`: the pattern refuses what is no time before anything runs.
_TIME = r"^\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(:\d\d(\.\d+)?)?([Zz]|[+-]\d\d:?\d\d)?$"
Moment = Annotated[datetime, Field(json_schema_extra={"pattern": _TIME})]
AsOfParameter = Literal["now", "log-end"] | Moment | Annotated[int, Field(ge=0, le=LATEST)]


@flow(name="process", flow_run_name="process", log_prints=False, task_runner=SIDE_BY_SIDE)
def process(as_of: AsOfParameter = "now", shift: bool = False) -> list[Summary]:
    """Run every processor over what raw logs hold beyond its checkpoint.

    Args:
        as_of: the time as of which baskets are judged abandoned: `now`, `log-end` (the greatest clock in the logs), a
            moment (in UTC where it has no offset), or seconds or milliseconds since 1970. Later than now is refused;
            earlier than the last tick changes nothing.
        shift: follow the logs until the next shift takes over, instead of ending at their ends. For schedules.
    """
    if shift and as_of != "now":
        raise UsageError(
            "a shift follows the logs as of now", found=f"as_of {as_of}", do="Switch shift off, as process/by-hand does"
        )
    return _shift() if shift else _to_end(_as_of(as_of))


def _to_end(as_of: AsOf) -> list[Summary]:
    final = FinalTick(check_as_of(as_of))
    with open_run("process", final) as run:
        if as_of == "now":
            tick_now(run)
        names = run.topology.on_raw_logs()
        report = Report(run, "process", names)
        ended: list[Summary] = conclude(run, report, "process", names, [process_task.submit(name) for name in names])
        return ended


def _shift() -> list[Summary]:
    with open_run("process") as run:
        names = run.topology.on_raw_logs()
        shift = Shift(run, "process")
        try:
            shift.check_not_late(names)
        except Superseded as late:
            refused: list[Summary] = not_needed("process", late)
            return refused
        run.pulse.start()
        tick_now(run)
        report = Report(run, "process", names)
        futures = [follow_task.submit(name) for name in names]
        report.keep_up()
        with watched(run):
            get_run_logger().info("Shift over: %s", shift.hold(futures))
        wait(futures)
        tick_now(run)  # whoever applies it
        ended: list[Summary] = conclude(run, report, "process", names, futures)
        return ended


def _as_of(value: AsOfParameter) -> AsOf:
    """What the form says, as the command line has it."""
    if value == "now" or value == "log-end":  # the type checker narrows this way
        return "now" if value == "now" else "log-end"
    if isinstance(value, datetime):
        return parse_moment(
            (value if value.tzinfo else value.replace(tzinfo=UTC)).isoformat(), "as_of", "now", "log-end"
        )
    return parse_moment(str(value), "as_of", "now", "log-end")
