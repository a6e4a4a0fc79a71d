"""Looking for a few bytes in a log of gigabytes: which of its lines hold them."""

from __future__ import annotations

from collections.abc import Iterator

from storage.reader import PartitionReader


def lines_with(reader: PartitionReader, needle: bytes, end: int, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """The lines before `end` that hold `needle`, oldest first: (offset, line). `needle` has no newline in it."""
    rest, place = b"", start
    at = -1
    for piece in reader.raw(start, end):
        data = rest + piece
        found = data.find(needle)
        while found >= 0:
            offset = reader.line_start(place - len(rest) + found + 1)
            if offset != at:
                at = offset
                yield offset, reader.line(offset)
            found = data.find(needle, found + 1)
        rest, place = data[max(0, len(data) - len(needle) + 1) :], place + len(piece)
