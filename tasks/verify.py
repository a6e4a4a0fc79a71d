"""Verifying every log of a HOME; quick to start, since it asks the database as `status` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from storage.look import Look
from storage.settings import Settings
from storage.store import CLOCK, DELIVERIES, Store
from storage.verify import Verified, Verifier, missing_heads
from tasks.topology import build_topology


def verify_all(store: Store, settings: Settings, heads: Sequence[str] = ()) -> tuple[list[Verified], list[str]]:
    """Verify every partition, and that the chains still have the `heads`; gives what was found, and every wrong place."""
    made = build_topology(settings).derived_logs() | {DELIVERIES, CLOCK}
    derived = made - {CLOCK}
    committed, needed = _database(store, settings)
    verifier = Verifier(store.archive)
    found = []
    try:
        for directory in store.folders():
            name, _, generation = directory.parent.name.partition("@")
            place = (name, int(generation or 1), int(directory.name))
            # Of a derived log checkpoints name places in whichever generation they read; its committed end says it all.
            certain = committed.get(place, 0) if name in derived else None
            found.append(verifier.verify(directory, certain, needed.get(place, 0) if certain is None else certain))
    finally:
        verifier.close()
    problems = [problem for each in found for problem in each.problems]
    ends = {place: end for place, end in committed.items() if place[0] in derived}
    ends |= {place: end for place, end in needed.items() if place[0] not in derived}
    return found, [*problems, *_gone(store, settings, ends, made), *missing_heads(heads, found)]


Places = dict[tuple[str, int, int], int]


def _gone(store: Store, settings: Settings, ends: Places, made: set[str]) -> list[str]:
    """What is wrong with logs and a database that are not there at all; `made` are the logs that are never without a database."""
    found = []
    for (log, generation, partition), end in sorted(ends.items()):
        directory = store.directory(log, partition, generation)
        if end and not directory.is_dir():
            found.append(f"{directory.parent.name}/{partition}: the log is gone, and up to {end} it was there")
    if not _has_database(settings) and any(store.directory(log, 0).parent.is_dir() for log in made):
        found.append(
            "the database is gone: how far the logs reached cannot be told. Restore it, or let `afterlog process` make it anew"
        )
    return found


def _database(store: Store, settings: Settings) -> tuple[Places, Places]:
    """The committed ends, and how far each log was read, by log, generation and partition; none where there is no database."""
    if not _has_database(settings):
        return {}, {}
    look = Look(store)
    try:
        ends = look.rows('SELECT log, generation, partition, "end" FROM committed_end')
        read = look.rows(
            'SELECT log, partition, MAX("offset") AS place, MAX(tick_offset) AS tick FROM checkpoint GROUP BY log, partition'
        )
    finally:
        look.close()
    needed = {(row["log"], 1, row["partition"]): row["place"] for row in read}
    needed[CLOCK, 1, 0] = max((row["tick"] for row in read), default=0)
    return {(row["log"], row["generation"], row["partition"]): row["end"] for row in ends}, needed


def _has_database(settings: Settings) -> bool:
    url = settings.resolved_database_url
    return not url.startswith("sqlite:///") or Path(url.removeprefix("sqlite:///").partition("?")[0]).exists()
