"""Archiving: sealed segments go to the archive, and from here once they are old enough and behind every checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from storage.archive import Archive
from storage.backup import ARCHIVE_LOCK
from storage.errors import AfterlogError, CorruptLogError, LostDataError, Stopped
from storage.locks import RunLock
from storage.manifest import archived_end, digest_of, name_of, note_archived, read_manifest, seal
from storage.segment import Entry, Segment, fsync_directory, list_segments
from storage.steps import reached
from storage.store import CLOCK, DELIVERIES, Store
from storage.times import now
from tasks.intake import logs_taken_in
from tasks.process import positions
from tasks.topology import DELIVER, Topology


@dataclass
class Archived:
    """What was done to one partition: segments sealed, put and removed, and how large what was put is, raw and archived.

    `waits_for`: whose checkpoint keeps segments here that would be old enough.
    """

    name: str
    sealed: int = 0
    put: int = 0
    removed: int = 0
    events: int = 0
    raw_bytes: int = 0
    archived_bytes: int = 0
    waits_for: str = ""


def archive_all(store: Store, topology: Topology, holder: str, stop: threading.Event | None = None) -> list[Archived]:
    """Archive every partition of every log; waits while another archive or a backup is at work. Gives what was done.

    A partition that fails keeps no other one back; nothing is removed that is not proved to be in the archive.

    Raises:
        Stopped: `stop` was set; what was done stands.
        CorruptLogError: a sealed segment was changed, here or in the archive.
        AfterlogError: the archive refused, or several partitions failed: a sentence for each.
    """
    stop = stop or threading.Event()
    lock, bounds = RunLock(store.lock_path(ARCHIVE_LOCK), holder), _Bounds(store, topology)
    lock.acquire(stop)
    try:
        return _each(store.folders(), lambda directory: _Partition(store, bounds, directory, stop).archive())
    finally:
        lock.release()


def _each(directories: list[Path], work: Callable[[Path], Archived]) -> list[Archived]:
    """Do the work for every partition, also after it failed for some; what failed is raised at the end."""
    done, failed = [], []
    for directory in directories:
        try:
            done.append(work(directory))
        except Stopped:
            raise
        except (AfterlogError, OSError) as error:
            failed.append(error)
            if [str(each) for each in failed].count(str(error)) > 1:
                break  # the place itself refuses: the others would fare no better
    if not failed:
        return done
    if len(failed) == 1:
        raise failed[0]
    sentences = list(dict.fromkeys(map(str, failed)))
    raise AfterlogError("; ".join(sentences)) from failed[0]


def committed_end(store: Store, topology: Topology, directory: Path) -> int | None:
    """Up to where a derived log is certain; None for a raw one, where every line is."""
    log, _, generation = directory.parent.name.partition("@")
    if log not in topology.derived_logs() | {DELIVERIES}:
        return None
    return store.committed_end(log, int(directory.name), int(generation or 1))


class _Bounds:
    """Before which offset of a partition everybody is done; read once, since checkpoints only go on."""

    def __init__(self, store: Store, topology: Topology) -> None:
        self.store, self.topology = store, topology
        self._places = positions(store)
        self._readers: dict[str, set[str]] = {}
        for processor in topology.all():
            self._readers.setdefault(processor.reads, set()).add(processor.name)
        for log in logs_taken_in(topology):
            self._readers.setdefault(log, set()).add(DELIVER)

    def behind(self, directory: Path) -> list[tuple[int, str]]:
        """How far each reader of a partition is, and who it is; who never ran is at the beginning."""
        log, part = directory.parent.name.partition("@")[0], int(directory.name)
        if log == CLOCK:  # the ticks are read by whoever reads raw logs
            raw = self.topology.raw_logs()
            done = [(p.tick_offset, p.processor) for p in self._places if p.log in raw]
            wanted = set().union(*(self._readers.get(name, set()) for name in raw))
        else:
            done = [(p.offset, p.processor) for p in self._places if (p.log, p.partition) == (log, part)]
            wanted = self._readers.get(log, set())
        return [*done, *((0, name) for name in wanted - {name for _, name in done})]


class _Partition:
    """One partition, while the lock of all archives is held."""

    def __init__(self, store: Store, bounds: _Bounds, directory: Path, stop: threading.Event) -> None:
        self._store, self._bounds, self._directory, self._stop = store, bounds, directory, stop
        self._archive: Archive = store.archive
        self._checked: set[int] = set()
        self._done = Archived(name_of(directory))

    def archive(self) -> Archived:
        """Seal, put, and remove what may go."""
        end = committed_end(self._store, self._bounds.topology, self._directory)
        self._done.sealed = seal(self._directory, end)
        entries = read_manifest(self._directory)
        for entry in entries:
            if entry.end > archived_end(self._directory):
                self._put(entry)
        self._remove(entries, end)
        return self._done

    def _put(self, entry: Entry) -> None:
        if self._stop.is_set():
            raise Stopped("stopped between two segments")
        try:
            size = self._archive.put(self._directory, entry)
        except FileNotFoundError as error:
            raise LostDataError(
                "a sealed segment is missing before it was archived", where=f"{self._done.name}:{entry.base}",
                do="Put it back from a backup",
            ) from error  # fmt: skip
        self._checked.add(entry.base)
        note_archived(self._directory, entry.end)
        reached("archive-noted")
        self._done.put += 1
        self._done.events += entry.events
        self._done.raw_bytes += entry.length
        self._done.archived_bytes += size

    def _remove(self, entries: list[Entry], committed: int | None) -> None:
        """Remove local files that the archive has, oldest first, as long as they are old and nobody needs them soon."""
        local = {segment.base: segment for segment in list_segments(self._directory)[:-1]}
        behind = self._bounds.behind(self._directory)
        if committed is not None:  # after an older database was put back its writer gives these bytes again
            behind.append((committed, "its own processor"))
        oldest = now() - self._store.settings.live_window
        for entry in entries:
            segment = local.get(entry.base)
            if segment is None:
                continue
            if entry.end > archived_end(self._directory) or segment.path.stat().st_mtime_ns // 1_000_000 >= oldest:
                break
            slow = min((place for place in behind if place[0] < entry.end), default=None)
            if slow is not None:
                self._done.waits_for = slow[1]
                break
            if self._stop.is_set():
                raise Stopped("stopped between two segments")
            self._remove_one(entry, segment)

    def _remove_one(self, entry: Entry, segment: Segment) -> None:
        if entry.base not in self._checked:  # it was compared when it was put, which may be long ago
            try:
                self._archive.prove(self._directory, entry)
            except FileNotFoundError as error:
                raise CorruptLogError(
                    "a segment is gone from the archive; it stays here", where=f"{self._done.name}:{entry.base}",
                    do=f"Remove {self._directory / 'archived'}: the next archive puts there whatever is missing",
                ) from error  # fmt: skip
        reached("archive-checked")
        found = digest_of(segment.path)
        if found != (entry.length, entry.sha256):  # what it has beyond its entry the archive does not have
            raise CorruptLogError(
                "a sealed segment is not what was sealed; it stays here", where=str(segment.path),
                found=f"{found[0]} bytes, SHA-256 {found[1]}", expected=f"{entry.length} bytes, SHA-256 {entry.sha256}",
                do="`afterlog verify` tells more; the archive has what was sealed",
            )  # fmt: skip
        segment.path.unlink()
        fsync_directory(self._directory)
        reached("archive-removed")
        self._done.removed += 1
