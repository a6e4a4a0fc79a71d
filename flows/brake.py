"""The flow `brake`: hold mails, let them go, or drop them, from the UI."""

from __future__ import annotations

from typing import Annotated, Literal

from prefect import flow, get_run_logger
from pydantic import Field

from flows.run_name import run_settings
from storage.brake import PAUSED, put_on, read_brake, release
from storage.store import Store
from tasks.settle import drop

Action = Literal["pause", "resume", "drop what is held"]


@flow(name="brake", flow_run_name="{action}", log_prints=False)
def brake(action: Action, reason: Annotated[str, Field(pattern=r"\S", max_length=500)] = "by a person") -> str:
    """Hold all mails, send them again, or drop those that are held.

    Args:
        action: `pause` holds all mails: none is claimed or sent. `resume` sends what was held, and all after it. `drop what
            is held` suppresses, for ever, what waits while delivery is paused or has stopped itself.
        reason: with `pause`: why, for whoever looks at the status.
    """
    store = Store(run_settings())
    if action == "pause":
        found = put_on(store.database, PAUSED, reason)
        said = f"{found.state}: {found.reason}"
    elif action == "resume":
        said = f"RUNNING; {release(store.database)} mails had been held"
    else:
        count, holder = drop(store)
        later = f", to be carried out by {holder}" if holder else ""
        said = f"{count} mails dropped{later}; delivery is {read_brake(store.database).state}"
    get_run_logger().info("deliver: %s", said)
    return said
