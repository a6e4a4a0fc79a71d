"""One HOME: where its logs, locks and database are."""

from __future__ import annotations

import os
import threading
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from storage.append import PartitionWriter
from storage.errors import UsageError
from storage.files import allow_files
from storage.partition import MOST, record_partitions, recorded_partitions
from storage.reader import PartitionReader
from storage.segment import check_log_name, make_directory
from storage.settings import Settings

if TYPE_CHECKING:
    from storage.archive import Archive
    from storage.database import Database

CLOCK = "clock"
DELIVERIES = "deliveries"
"""What became of each mail."""


class Store:
    """Everything under one HOME, made at first use."""

    def __init__(self, settings: Settings) -> None:
        allow_files()
        self.settings = settings
        self.home = settings.home.resolve()
        self._logs, self._locks = f"{self.home}/logs", self.home / "locks"
        self._directories: dict[tuple[str, int, int], Path] = {}
        self._counts: dict[str, int] = {}
        self._writers: dict[tuple[str, int], PartitionWriter] = {}
        self._lock = threading.Lock()
        try:
            make_directory(self.home / "logs")
            make_directory(self._locks)
        except OSError as error:
            raise UsageError(
                f"cannot make HOME: {error.strerror}", where=str(self.home), do="Set AFTERLOG_HOME to a folder of yours"
            ) from error

    @cached_property
    def database(self) -> Database:
        """The database, made and migrated when it is first asked for."""
        from storage.database import Database  # most of a command's start; a raw log can do without

        return Database(self.settings.resolved_database_url, self.home)

    @cached_property
    def archive(self) -> Archive:
        """The archive, opened when it is first asked for."""
        from storage.archive import Archive  # nothing that is still here needs it
        from storage.remote import Remote

        given = self.settings.archive_url
        url = given.reveal() if given else "archive"
        # A folder that is not written in full is in HOME, whatever the folder in which a command runs.
        return Archive(Remote(url if "://" in url else str(self.home / url)), self.home / "cache")

    @property
    def may_fork(self) -> bool:
        """Whether nothing was opened here that a child process could not go on with."""
        archive: Archive | None = self.__dict__.get("archive")  # looking must not open it
        return archive is None or not archive.remote.connected

    def directory(self, log: str, partition: int, generation: int | None = None) -> Path:
        """Where a partition's segments lie. Later generations lie beside the first, which has the plain name.

        Here and below, a log's name alone means the generation that is live.
        """
        generation = self.live_generation(log) if generation is None else generation
        known = self._directories.get((log, generation, partition))  # asked for several times in every round
        if known is None:
            folder = check_log_name(log) if generation == 1 else f"{check_log_name(log)}@{generation}"
            known = self._directories[log, generation, partition] = self.home / "logs" / folder / str(partition)
        return known

    def partitions(self, log: str, generation: int | None = None) -> list[int]:
        """The partitions that a log has, by its folders and by what it was begun with, or else will be.

        One that is empty yet may have its first line at any moment.
        """
        count = self._counts.get(log) or recorded_partitions(self.directory(log, 0, 1)) or self.settings.partitions
        return sorted({*self._made(log, generation), *range(count)})

    def begin(self, log: str) -> int:
        """How many partitions a raw log has; before its first line it is decided for good, by the setting.

        Raises:
            CorruptLogError: the log's file `partitions` is damaged.
            OSError: it cannot be written or made durable.
        """
        found = self._counts.get(log)
        if found is None:
            # A log that was begun by hand, or by an Afterlog that did not write it down, has those at least that are there.
            least = max(self._made(log, 1), default=0) + 1
            found = self._counts[log] = record_partitions(
                self.directory(log, 0, 1), max(least, self.settings.partitions)
            )
        return found

    def _made(self, log: str, generation: int | None) -> list[int]:
        try:
            names = os.listdir(str(self.directory(log, 0, generation))[: -len("/0")])
        except (FileNotFoundError, NotADirectoryError):
            return []
        # A folder with a greater number, a copy of some day say, is none of them: its events would count a second time.
        return [part for part in (int(name) for name in names if name.isdigit()) if part < MOST]

    def logs(self) -> list[str]:
        """The names of the logs that were ever written."""
        return sorted(path.name for path in (self.home / "logs").iterdir() if path.is_dir() and "@" not in path.name)

    def folders(self) -> list[Path]:
        """The folders of all partitions of all logs and generations, in order."""
        logs = [path for path in (self.home / "logs").iterdir() if path.is_dir()]  # no file of somebody else's
        found = [path for log in logs for path in log.iterdir() if path.name.isdigit()]
        return sorted(found, key=lambda path: (path.parent.name, int(path.name)))

    def writer(self, log: str, partition: int) -> PartitionWriter:
        """The one writer of this process for a raw log's partition."""
        with self._lock:
            found = self._writers.get((log, partition))
            if found is None:
                settings = self.settings
                found = self._writers[log, partition] = PartitionWriter(
                    self.directory(log, partition),
                    f"{log}/{partition}",
                    limit=settings.segment_bytes,
                    daily=settings.segment_daily,
                    # A tick that was torn was never used, and must not become one that was: its line is closed as no JSON.
                    closing=b"~\n" if log == CLOCK else b"\n",
                )
            return found

    def reader(self, log: str, partition: int, generation: int | None = None) -> PartitionReader:
        """A new reader of a partition."""
        return PartitionReader(self.directory(log, partition, generation), f"{log}/{partition}", lambda: self.archive)

    def lock_path(self, name: str) -> Path:
        """The lock file of a processor or a flow."""
        return self._locks / name

    def committed_end(self, log: str, partition: int, generation: int | None = None) -> int:
        """Where readers of a derived log stop."""
        generation = self.live_generation(log) if generation is None else generation
        return self.database.committed_end(log, partition, generation)

    def live_generation(self, log: str) -> int:
        """The generation of a log that is live: the first, where there never was another.

        Most logs never ask the database, which a raw one can do without. A generation has its folder before it goes live: its
        processor makes it, and so does a restore.
        """
        one = f"{log}@"
        later = any(name.startswith(one) for name in os.listdir(self._logs))
        return self.database.live_generation(log) if later else 1
