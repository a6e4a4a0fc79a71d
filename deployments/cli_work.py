"""`afterlog process` and `deliver`: the work, by hand."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from cyclopts import Parameter

from deployments.cli_arguments import Whole
from deployments.console import say, show_table
from deployments.server import use_prefect
from storage.errors import AfterlogError, UsageError
from storage.failures import note_failure
from storage.settings import Settings, load_settings
from storage.store import Store
from storage.times import parse_moment, show
from tasks.deliver import DeliverySummary, deliver_to_end
from tasks.local import Outcome, side_by_side
from tasks.mail_url import parse_mail_url
from tasks.process import AsOf, FinalTick, Summary, check_as_of, follow, process_to_end, tick_now
from tasks.run import Run
from tasks.topology import build_topology

_MOST = 1_000_000_000
_LONGEST = 1_000_000
"""How many seconds a run by hand may follow: days, and within what a timer can."""


def process(
    *,
    as_of: str = "now",
    follow_for: float | None = None,
    prefect: Annotated[bool, Parameter(negative="--no-prefect")] = True,
) -> None:
    """Run every processor on raw logs, to their ends.

    Args:
        as_of: the time as of which baskets are judged abandoned: now, log-end (the greatest clock in the logs), RFC 3339,
            or milliseconds since 1970. Later than now is refused.
        follow_for: go on for so many seconds as the logs grow. It runs in this process.
        prefect: run as a Prefect flow run; --no-prefect does the same work in this process.
    """
    settings, when = load_settings(), check_as_of(parse_as_of(as_of))
    if follow_for is not None:
        if when != "now":
            raise UsageError("--follow-for goes with --as-of now only")
        if not 0 < follow_for <= _LONGEST:
            raise UsageError(
                "--follow-for is no length of time", found=follow_for, expected=f"seconds, up to {_LONGEST:,}"
            )
        _finish(*_follow_for(settings, follow_for))
    elif prefect:
        use_prefect(settings)
        from prefect import tags  # after the environment: Prefect reads it at import

        from flows.process import process as flow

        with tags("afterlog", "cli"):
            # As a moment: a number of milliseconds that is small enough would be taken for seconds once more.
            _show_counts(flow(as_of=datetime.fromisoformat(show(when)) if isinstance(when, int) else when))
    else:
        _finish(*_process_here(settings, when))


def deliver(
    *,
    limit: Whole | None = None,
    prefect: Annotated[bool, Parameter(negative="--no-prefect")] = True,
) -> None:
    """Run the processors on derived logs, then deliver every mail that is due.

    Args:
        limit: try at most so many mails.
        prefect: run as a Prefect flow run; --no-prefect does the same work in this process.
    """
    if limit is not None and limit < 1:
        raise UsageError("--limit is too small", found=limit, expected="at least 1")
    if limit is not None and limit > _MOST:
        raise UsageError("--limit is too large", found=limit, expected=f"at most {_MOST:,}, or none for all")
    settings = load_settings()
    parse_mail_url(settings.mail_url.reveal())  # before anything is done
    if prefect:
        use_prefect(settings)
        from prefect import tags  # after the environment: Prefect reads it at import

        from flows.react import react as flow

        with tags("afterlog", "cli"):
            flow(limit=limit)
        return
    run = _open(settings, "deliver")
    outcome = side_by_side(run, run.topology.on_derived_logs(), lambda r, name: process_to_end(r, name, None))
    _show_done(run, outcome)
    run.stop.clear()
    _show_mails(deliver_to_end(run, limit, lambda reason: say(f"delivery has stopped itself: {reason}")))
    _raise_failures(run, outcome)


def parse_as_of(text: str) -> AsOf:
    """What a person means by `--as-of`.

    Raises:
        UsageError: it is no time.
    """
    if text == "now" or text == "log-end":  # the type checker narrows this way
        return "now" if text == "now" else "log-end"
    return parse_moment(text, "--as-of", "now", "log-end")


def _open(settings: Settings, what: str) -> Run:
    return Run(Store(settings), build_topology(settings), f"afterlog {what}, process {os.getpid()}")


def _process_here(settings: Settings, as_of: AsOf) -> tuple[Run, Outcome]:
    run, final = _open(settings, "process"), FinalTick(as_of)
    if as_of == "now":
        tick_now(run)
    return run, side_by_side(run, run.topology.on_raw_logs(), lambda r, name: process_to_end(r, name, final))


def _follow_for(settings: Settings, seconds: float) -> tuple[Run, Outcome]:
    run = _open(settings, "process")
    tick_now(run)
    run.pulse.start()
    timer = threading.Timer(seconds, run.stop.set)
    timer.start()
    try:
        followed = side_by_side(run, run.topology.on_raw_logs(), follow)
    finally:
        timer.cancel()
    return run, followed


def _finish(run: Run, outcome: Outcome) -> None:
    """Show what was done; an error for whatever failed, after all the rest was told."""
    _show_done(run, outcome)
    _raise_failures(run, outcome)


def _show_done(run: Run, outcome: Outcome) -> None:
    for note in run.notes:
        say(note)
    _show_counts(outcome.summaries)


def _raise_failures(run: Run, outcome: Outcome) -> None:
    for name, failure in outcome.failures.items():
        say(f"{name} failed: {failure}")
        note_failure(run.store.database, name, failure)
    if outcome.failures:
        raise AfterlogError(f"{len(outcome.failures)} processors failed", do="What the others did stands; run it again")


def _show_counts(summaries: Sequence[Summary]) -> None:
    columns = ("processor", "read", "processed", "quarantined", "ignored", "derived", "bytes")
    rows = [(s.processor, s.lines, s.processed, s.quarantined, s.ignored, s.derived, s.bytes) for s in summaries]
    show_table("Processed", columns, rows)


def _show_mails(summary: DeliverySummary) -> None:
    rows: list[tuple[object, ...]] = [(state, count) for state, count in sorted(summary.states.items()) if count]
    rows += [("WAITING", summary.waiting)] if summary.waiting else []
    show_table("Mails", ("state", "mails"), rows)
    for reason, count in summary.reasons.most_common():
        say(f"{count} x {reason}")
    if summary.held:
        say(
            f"mails are held: {summary.held}. `afterlog resume deliver` sends them, `afterlog deliveries drop` drops them"
        )
