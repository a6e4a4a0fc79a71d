"""Judged batches, shared: whoever follows the same log in the same run decodes it once."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from pathlib import Path

from storage.event import MAX_DEPTH, Batch
from storage.judge import decode
from storage.reader import PartitionReader

PATIENCE = 1.0
"""Seconds that a follower waits for those behind it."""


class BatchCache:
    """The last few batches that any follower of a run has read.

    A cache, no coupling: each follower goes at its own pace. But one that is about to run ahead of what is kept waits a
    moment for the others, which would have to decode again what it drops; for one that does not move it waits once.
    """

    def __init__(
        self, size: int, max_line: int, max_depth: int = MAX_DEPTH, kept: int = 3, stop: threading.Event | None = None
    ) -> None:
        self._stop = stop or threading.Event()
        self._size, self._max_line, self._max_depth, self._kept = size, max_line, max_depth, kept
        self._changed = threading.Condition()
        self._batches: OrderedDict[tuple[Path, int, int, int], Batch] = OrderedDict()
        self._places: dict[Path, dict[PartitionReader, int]] = {}

    def get(
        self, reader: PartitionReader, log: str, partition: int, start: int, end: int, clock: int, max_line: int = 0
    ) -> Batch | None:
        """The judged lines from `start` on, not beyond `end`; None where there are none.

        `clock` is the greatest clock or tick before `start`. `max_line` is for one who goes by another limit than the rest.
        """
        max_line = max_line or self._max_line
        # A log's name stands for another generation after a promotion.
        key = (reader.directory, start, clock, max_line)
        with self._changed:
            found = self._batches.get(key)
            if found is not None and found.end <= end:
                return found
            block = reader.read(start, end, self._size, max_line)
            if block is None:
                return None
            batch = self._batches[key] = decode(block, log, partition, clock, max_line, self._max_depth)
            while len(self._batches) > self._kept:
                self._batches.popitem(last=False)
            return batch

    def leave(self, reader: PartitionReader) -> None:
        """`reader` reads no further: nobody need wait for it."""
        with self._changed:
            for places in self._places.values():
                places.pop(reader, None)
            self._changed.notify_all()

    def keep_pace(self, reader: PartitionReader, start: int) -> None:
        """Wait a moment for those far behind `start`; to be said before `get` by whoever catches up."""
        with self._changed:
            places = self._places.setdefault(reader.directory, {})
            places[reader] = start
            self._changed.notify_all()
            behind = start - (self._kept - 1) * self._size
            patient_until = time.monotonic() + PATIENCE
            while min(places.values()) < behind and not self._stop.is_set():
                if time.monotonic() >= patient_until:
                    for slow in [other for other, place in places.items() if place < behind]:
                        del places[slow]  # until it moves again
                    return
                self._changed.wait(0.05)
