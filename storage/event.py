"""What a line of a log becomes: a good event, or a bad line with its reason, in batches of one partition."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Raw

MAX_DEPTH = 500
MAX_DERIVED_DEPTH = 750  # a derived line nests its cause, and that its own
HEAD = 65_536  # how much of a bad line is kept, and how long a cause may be to be carried whole
ITEM_VERBS = frozenset({"ADDED_ITEM_TO_BASKET", "CHANGED_ITEM_COUNT_IN_BASKET"})


class _WithObject(msgspec.Struct, gc=False):
    object: Raw = Raw(b"null")


_decode_object = msgspec.json.Decoder(_WithObject).decode


class Item(msgspec.Struct, frozen=True, gc=False):
    """The item of an ADDED or CHANGED event: its key (`3` and `"3"` are one), its count, its own bytes."""

    key: str
    count: int | float
    raw: bytes


class Event(msgspec.Struct, gc=False):
    """A good line. Times in milliseconds UTC; `raw` is the line itself."""

    offset: int
    raw: bytes
    id: int | str
    key: str  # 15 and "15" are the same subject
    type: Any
    verb: str
    at: int  # when it happened: never later than `clock`
    clock: int  # when the log took it: never less than any clock or tick before it
    item: Item | None
    event_id: str | None  # the `event.id` that Afterlog gave to a derived event

    @property
    def object(self) -> Raw:
        """The JSON of `object`, as it came; read when it is asked for, since few events are asked."""
        return _decode_object(self.raw).object


class Bad(msgspec.Struct, gc=False):
    """A line that the judge refused, with the clock before it and the first 64 KiB of its bytes."""

    offset: int
    reason: str
    length: int
    head: bytes
    clock: int


class Block(msgspec.Struct, gc=False):
    """Whole lines of a log as they were read, without their newlines.

    `oversized` maps an index of `lines` to the full length of a line of which only the head was read.
    """

    start: int
    end: int
    lines: list[bytes]
    oversized: dict[int, int]
    text: bytes = b""  # the lines together, each with its newline, where they were read so


class Batch(msgspec.Struct, gc=False):
    """A stretch of one partition, judged: what every processor gets."""

    log: str
    partition: int
    start: int
    end: int
    lines: int
    events: list[Event]
    bad: list[Bad]
    clock: int  # after the last line
    text: bytes  # of all lines together, the bad ones too; from `start` on, so that an offset is a place in it
    _by_verb: dict[str, list[Event]] | None = None

    def by_verb(self) -> dict[str, list[Event]]:
        """The good events by verb, each list in log order; built at the first call, then shared."""
        if self._by_verb is None:
            groups: dict[str, list[Event]] = {}
            for event in self.events:
                groups.setdefault(event.verb, []).append(event)
            self._by_verb = groups
        return self._by_verb

    def holding(self, words: Iterable[bytes]) -> list[Event]:
        """The good events that have any of `words` in their lines, in log order: a search of all bytes at once."""
        text, events, start = self.text, self.events, self.start
        starts = [event.offset - start for event in events]
        starts.append(len(text))
        found = set()
        for word in words:
            at = text.find(word)
            while at >= 0:
                after = bisect_right(starts, at)  # at 0 it is in a bad line, and so it is beyond its event's end
                if after and at < starts[after - 1] + len(events[after - 1].raw):
                    found.add(after - 1)
                at = text.find(word, starts[after])
        return [events[index] for index in sorted(found)]


class Rejected(Exception):
    """A line that is bad, for one named reason."""
