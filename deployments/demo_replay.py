"""What the demo shows of a replay: the same two days with another timeout, beside what is live."""

from __future__ import annotations

from collections.abc import Callable

from deployments.cli_replay import show_comparison
from storage.store import Store
from tasks.impact import compare
from tasks.replay import run_replay, start
from tasks.replay_plan import Request
from tasks.topology import Topology

_TIMEOUT = "45m"


def show_replay(store: Store, topology: Topology, tell: Callable[[str], None]) -> None:
    """Replay with a longer timeout, and print the difference; nothing that is live changes."""
    tell(
        f"\n[bold]What if the timeout were {_TIMEOUT}?[/] The same events again, into a generation beside the live one:"
    )
    planned, _ = start(store, topology, Request(settings={"timeout": _TIMEOUT}, name="what-if"), "afterlog demo")
    run_replay(planned, store, topology, "afterlog demo")
    show_comparison(compare(store, topology, planned))
    tell(f"  `afterlog replays promote {planned.row.name}` would make it live; docs/replay.md\n")
