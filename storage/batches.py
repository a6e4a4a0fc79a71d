"""Judged batches, shared: whoever follows the same log in the same run decodes it once."""

from __future__ import annotations

import threading
from collections import OrderedDict

from storage.event import Batch
from storage.judge import decode
from storage.reader import PartitionReader


class BatchCache:
    """The last few batches that any follower of a run has read. A cache, no coupling: each goes at its own pace."""

    def __init__(self, size: int, max_line: int, kept: int = 4) -> None:
        self._size, self._max_line, self._kept = size, max_line, kept
        self._lock = threading.Lock()
        self._batches: OrderedDict[tuple[str, int, int, int], Batch] = OrderedDict()

    def get(self, reader: PartitionReader, log: str, partition: int, start: int, end: int, clock: int) -> Batch | None:
        """The judged lines from `start` on, not beyond `end`; None where there are none.

        `clock` is the greatest clock or tick before `start`.
        """
        key = (log, partition, start, clock)
        with self._lock:
            found = self._batches.get(key)
            if found is not None and found.end <= end:
                return found
            block = reader.read(start, end, self._size, self._max_line)
            if block is None:
                return None
            batch = self._batches[key] = decode(block, log, partition, clock, self._max_line)
            while len(self._batches) > self._kept:
                self._batches.popitem(last=False)
            return batch
