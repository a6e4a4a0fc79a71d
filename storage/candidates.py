"""The lines of one subject, found by a look at the bytes of a log: only what may be one of them is judged.

That is a line with the subject's id where an id may stand, or one that writes something with escapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from storage.event import Rejected
from storage.judge import judge
from storage.reader import PartitionReader

_PIECE = 256 << 10  # as much as stays in a processor's own cache while it is read, searched and cut
_SHORT = 3
# A line that begins with its subject, the id spelt as it can only be of one subject and not given a second time.
_FIRST = re.compile(
    rb'\{"subject": ?\{"id": ?(?:"([^"\\]*)"|(0|-?[1-9][0-9]*))(?:, ?"type": ?"[^"\\]*")?\}',
)

Text = bytes | bytearray


def lines_of(reader: PartitionReader, key: str, start: int, end: int, max_line: int) -> Iterator[tuple[int, bytes]]:
    """The good lines of the subject `key` from byte offset `start` to `end`, oldest first: (offset, line).

    Raises:
        CorruptLogError: `start` is not the start of a line.
    """
    find, buffer = _candidates(key), bytearray(_PIECE)
    while start < end:
        whole = buffer.rfind(b"\n", 0, reader.fill(buffer, start, end)) + 1
        if whole:
            found, stop = _lines(buffer, find(buffer, whole)), start + whole
        else:  # a line that is longer than the buffer
            block = reader.read(start, end, _PIECE, max_line)
            if block is None:
                return
            text = b"".join(line + b"\n" for line in block.lines if not block.oversized)
            found, stop = _lines(text, find(text, len(text))), block.end
        for place, line in found:
            if len(line) <= max_line and _is_of(key, line):
                yield start + place, line
        start = stop


def _is_of(key: str, line: bytes) -> bool:
    """Whether a line is a good one of the subject; those of most others are told by their first bytes."""
    first = _FIRST.match(line)
    if (
        first is not None
        and (first[1] or first[2] or b"") != key.encode("utf-8", "surrogatepass")
        and b"\\" not in line
        and line.count(b'"subject"') == 1
    ):
        return False
    try:
        return judge(line, 0, 0).key == key
    except Rejected:
        return False


def _lines(text: Text, hits: list[int]) -> Iterator[tuple[int, bytes]]:
    """The lines of a text that have `hits` in them: (place, line)."""
    end = -1
    for hit in sorted(hits):
        if hit > end:
            place = text.rfind(b"\n", 0, hit) + 1
            end = text.find(b"\n", hit)
            yield place, bytes(text[place:end])


def _candidates(key: str) -> Callable[[Text, int], list[int]]:
    """A function that gives places among the first bytes of a text: in all lines of the subject `key`, and in few others."""
    text = re.escape(json.dumps(key, ensure_ascii=False)[1:-1].encode("utf-8", "surrogatepass"))
    number = re.fullmatch(r"-?[0-9]+", key) is not None
    if len(key) > _SHORT:  # rare as it is: what stands around it is looked at only where it is found
        after, before = (rb'[",}\s]', rb'[":\s]') if number else (b'"', b'"')
        plain = re.compile(rb"%s(?=%s)(?<=%s%s)" % (text, after, before, text))
    else:
        forms = rb'"%s"|-?%s' % (text, text) if number else b'"%s"' % text
        # Items have short ids too; what is called so, or stands in a list, is no subject.
        nested = b"".join(rb'(?<!%s\{"id": %s)' % (parent, text) for parent in (b'"item": ', b", ", rb"\["))
        plain = re.compile(rb'"id"\s*:\s*(?:%s)(?=[,}\s])%s' % (forms, nested))
    # What is plain ASCII is escaped by whoever wants to, never by a common writer; anything else may well be.
    common = key.isascii() and key.isprintable() and not set(key) & {'"', "\\", "/"}
    escaped = re.compile(rb"\\u00[2-7]" if common else rb"\\")

    def find(text: Text, end: int) -> list[int]:
        hits = [match.start() for match in plain.finditer(text, 0, end)]
        if text.find(b"\\", 0, end) >= 0:
            hits += [match.start() for match in escaped.finditer(text, 0, end)]
        return hits

    return find
