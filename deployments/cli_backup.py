"""`afterlog backup` and `restore`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deployments.console import say, show_table
from storage.away import bytes_away, objects_missing
from storage.backup import ARCHIVE_LOCK, make_backup, read_label, told
from storage.errors import UsageError
from storage.locks import RunLock
from storage.restore import mark_restored, restore_database, restore_logs
from storage.settings import load_settings
from storage.store import Store
from storage.times import show
from tasks.run import PROMOTION
from tasks.topology import DELIVER, Topology, build_topology

_SHOWN = 20


def backup(folder: Path) -> None:
    """Write a backup of the database and the logs, while everything runs.

    Args:
        folder: a folder that is new or empty.
    """
    settings = load_settings()
    store = Store(settings)
    copied = make_backup(store, build_topology(settings).derived_logs(), folder)
    show_table("Backup", ("log", "bytes"), sorted(copied.items()))
    say(f"backup written to {folder}")
    if away := bytes_away(folder):
        say(
            f"{away} bytes of the logs are only in the archive, {store.archive.remote.shown}, and not in this backup: "
            "keep that for as long as this"
        )


def restore(folder: Path | None = None) -> None:
    """Put a backup back. Logs that have grown since stay; mails that may have been sent since wait for a person.

    Args:
        folder: the backup. Leave it out where HOME or its database was put back by other means (a disk's snapshot, a dump).
    """
    settings = load_settings()
    store, topology = Store(settings), build_topology(settings)
    label = None if folder is None else read_label(folder)
    with _alone(store, topology):
        if folder is None or label is None:
            doubts = mark_restored(store.database, store, topology.derived_logs())
        else:
            with told("the restore failed", folder, "Nothing is lost: make space, say, and restore again"):
                for name in restore_logs(store, folder):
                    say(f"{name} was put back")
                doubts = restore_database(store, folder, topology.derived_logs())
            say(f"the database is that of {show(label.at)}")
        missing = objects_missing(store)
    for sentence in missing[:_SHOWN]:
        say(sentence)
    if missing[_SHOWN:]:
        say(f"and {len(missing) - _SHOWN} more")
    say(
        f"{doubts.mails} mails in the queue may have been sent since: those of which the log `deliveries` does not know are UNKNOWN"
    )
    if doubts.decisions:
        say(
            f"{doubts.decisions} decisions about mails may have been carried out since, and were dropped: "
            "see afterlog deliveries list, and decide again"
        )


@contextmanager
def _alone(store: Store, topology: Topology) -> Iterator[None]:
    """Hold every lock, so that nobody works on what is being replaced."""
    held: list[RunLock] = []
    try:
        locks = {name: f"{name}.lock" for name in (*topology.processors, DELIVER)} | {"archive or backup": ARCHIVE_LOCK}
        # A replay, its promotion and its rollback hold its own from end to end. By files: the database may be what was lost.
        locks |= {path.stem: path.name for path in sorted(store.lock_path("").glob("replay-*.lock"))}
        locks["promotion"] = PROMOTION  # the last, since whoever follows lets go of its own while this one is held
        for name, file in locks.items():
            lock = RunLock(store.lock_path(file), f"afterlog restore, process {os.getpid()}")
            if not lock.try_acquire():
                raise UsageError(f"{name} is at work: {lock.held_by()}", do="Stop `afterlog up` and every run first")
            held.append(lock)
        yield
    finally:
        for lock in held:
            lock.release()
