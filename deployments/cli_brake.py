"""`afterlog pause` and `afterlog resume`: the brake, by hand."""

from __future__ import annotations

from typing import Literal

from deployments.console import say
from storage.brake import PAUSED, put_on, release
from storage.errors import UsageError
from storage.settings import load_settings
from storage.store import Store
from storage.times import now, show


def pause(what: Literal["deliver"], *, reason: str = "by a person") -> None:
    """Hold all mails: none is claimed or sent from now on, whatever runs, until `afterlog resume deliver`.

    Args:
        what: deliver.
        reason: why, for whoever looks at the status.
    """
    if not reason.strip():
        raise UsageError("--reason is empty", do="Say why, or leave it out")
    begun = now()
    brake = put_on(Store(load_settings()).database, PAUSED, reason)
    already = brake.since < begun
    say(
        f"{what} is {brake.state}{' already' * already} since {show(brake.since)}: {brake.reason}."
        f"{' Nothing has changed.' * already} Mails wait; `afterlog resume {what}` sends them"
    )


def resume(what: Literal["deliver"]) -> None:
    """Send again, what was held first; it is not counted a second time towards a surge.

    Args:
        what: deliver.
    """
    say(f"{what} is RUNNING; {release(Store(load_settings()).database)} mails had been held")
