"""`afterlog verify-derived`: whether what is live follows from the log."""

from __future__ import annotations

from deployments.console import say
from storage.errors import AfterlogError
from storage.settings import load_settings
from storage.store import Store
from tasks.topology import build_topology
from tasks.verify_derived import report, verify_derived


def verify_derived_logs(processors: list[str] | None = None) -> None:
    """Go again over the log with the recorded ticks and settings, and compare every derived byte with what is live.

    Args:
        processors: those whose logs are verified; all where they are left out.
    """
    settings = load_settings()
    store = Store(settings)
    if not report(verify_derived(store, build_topology(settings), processors or ()), say):
        raise AfterlogError(
            "derived logs differ from what the log gives", do="The first difference of each is named above"
        )
