"""`afterlog archive` and `afterlog verify`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

from deployments.console import say, show_table
from storage.errors import AfterlogError, UsageError
from storage.settings import Settings, load_settings
from storage.store import Store


def archive(*, prefect: Annotated[bool, Parameter(negative="--no-prefect")] = True) -> None:
    """Put sealed segments into the archive, and remove here what is old and behind every checkpoint.

    Args:
        prefect: run as a Prefect flow run; --no-prefect does the same work in this process.
    """
    settings = load_settings()
    from tasks.archive import archive_all  # verify should not wait for it
    from tasks.topology import build_topology

    if prefect:
        from deployments.server import use_prefect

        use_prefect(settings)
        from prefect import tags  # after the environment: Prefect reads it at import

        from flows.archive import archive as flow

        with tags("afterlog", "cli"):
            done = flow()
    else:
        done = archive_all(Store(settings), build_topology(settings), f"afterlog archive, process {os.getpid()}")
    columns = ("log", "sealed", "archived", "removed", "events", "bytes", "archived bytes", "waits for")
    rows = [
        (d.name, d.sealed, d.put, d.removed, d.events, d.raw_bytes, d.archived_bytes, d.waits_for or "-") for d in done
    ]
    show_table("Archived", columns, rows)


def verify(*, head: Sequence[str] = (), derived: bool = False) -> None:
    """Check every sealed byte of every log, here and in the archive, and name the place of whatever is wrong.

    One line for each partition, with its head: note it elsewhere, and a later `--head` tells whether the history before it was
    rewritten.

    Args:
        head: a head that was noted earlier; may be given several times.
        derived: instead, go over the logs again with the recorded ticks and settings, and compare derived logs, byte by byte, and rows.
    """
    for noted in head:
        if not re.fullmatch("[0-9a-f]{64}", noted):  # else a slip of the pen is told as a rewritten history
            raise UsageError(
                "--head is no head",
                found=repr(noted[:80]),
                expected="64 digits 0 to f, whole, as `afterlog verify` shows it",
            )
    if derived:
        if head:
            raise UsageError("--head does not go with --derived", do="Run verify twice, once with each")
        _verify_derived(load_settings())
        return
    from tasks.verify import verify_all

    settings = load_settings()
    found, problems = verify_all(Store(settings), settings, head)
    columns = ("log", "segments", "archived", "events", "bytes", "head")
    show_table("Verified", columns, [(v.name, v.segments, v.archived, v.events, v.bytes, v.head or "-") for v in found])
    for each in found:
        if each.sealed_now:
            say(f"{each.name}: {each.sealed_now} sealed segments had no entry yet, and have one now")
    for problem in problems:
        say(problem)
    if problems:
        raise AfterlogError(
            f"{len(problems)} {'thing is' if len(problems) == 1 else 'things are'} wrong",
            do="Put back what was changed from a backup or the archive",
        )


def _verify_derived(settings: Settings) -> None:
    from tasks.topology import build_topology
    from tasks.verify_derived import report, verify_derived

    store = Store(settings)
    if not report(verify_derived(store, build_topology(settings)), say):
        raise AfterlogError(
            "what is live differs from what the log gives", do="The first difference of each is named above"
        )
