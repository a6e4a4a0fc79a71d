"""What of the logs of a HOME, or of a backup, lies only in the archive, and whether it is still there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from storage.errors import AfterlogError
from storage.manifest import name_of, with_archived
from storage.segment import Entry, list_segments, segment_path
from storage.store import Store


def bytes_away(folder: Path) -> int:
    """How many bytes of the logs in a backup or HOME only the archive has."""
    return sum(entry.length for _, entry in _away(folder))


def objects_missing(store: Store) -> list[str]:
    """A sentence for each archived segment that is neither here nor there; asks for names only, `verify` reads them."""
    remote, missing = store.archive.remote, []
    try:
        for directory, entry in _away(store.home):
            name = f"{name_of(directory)}/{segment_path(directory, entry.base).name}.zst"
            if not remote.exists(name):
                place = f"{name_of(directory)}, offsets {entry.base} to {entry.end}"
                missing.append(f"{place}: the segment is neither here nor in the archive, {remote.path(name)}")
    except AfterlogError as error:  # the restore itself is done
        missing.append(f"not known whether the archive has all that is not here: {error}")
    return missing


def _away(folder: Path) -> Iterator[tuple[Path, Entry]]:
    for directory in sorted(path for path in (folder / "logs").glob("*/*") if path.name.isdigit()):
        for segment in with_archived(directory, list_segments(directory)):
            if segment.entry is not None:
                yield directory, segment.entry
