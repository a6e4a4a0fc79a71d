"""The flow `quarantine-retry`: a line that was no event, tried again from the UI."""

from __future__ import annotations

from typing import Annotated

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from flows.run_name import run_settings
from storage.store import Store
from tasks.quarantine import retry

# The place of a line, or its offset alone; the words are what the form and the server answer with.
Ident = Annotated[
    str,
    Field(
        pattern=r"^\s*((quarantine/)?[a-z0-9][a-z0-9_.-]*:[0-9]+:[0-9]+(/rejected)?|[0-9]+)\s*$",
        title="Line",
        examples=["events:0:6400", "6400"],
    ),
]
Line = Annotated[str, Field(min_length=2, max_length=1 << 20, pattern=r"^[^\n]*$", title="Corrected line")]


@flow(name="quarantine-retry", flow_run_name="retry {line_id}", log_prints=False)
def quarantine_retry(line_id: Ident, line: Line | None = None, force: bool = False) -> str:
    """Append a line in quarantine again, as a new event of the log that it came from, if the judge takes it.

    Args:
        line_id: its id, as the quarantine shows it: `events:0:6400`, or its offset.
        line: the corrected line, one JSON object. Left out, the same bytes are tried again, once the judge accepts them.
        force: also where it was tried again before, which would count it twice.
    """
    store = Store(run_settings())
    # A run that crashed is run again by itself: what it may have appended is not forced in a second time.
    forced = force and flow_run.run_count == 1
    done = retry(store, line_id, line.encode() if line is not None else None, force=forced)
    said = f"{done.id} is in {done.log} again, at {done.log}:{done.partition}:{done.offset}"
    get_run_logger().info(said)
    return said
