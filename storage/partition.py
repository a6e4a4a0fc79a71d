"""Which partition a subject's events go to: Kafka's default, so that a copy to Kafka keeps its partitions.

How many a raw log has is written down in the folder of its first one, in the file `partitions`, before its first line. It keeps
them for good: with another number a subject's events would go elsewhere from then on, where nobody knows what it did before.
"""

from __future__ import annotations

import os
from pathlib import Path

from storage.errors import CorruptLogError
from storage.locks import locked
from storage.segment import fsync_directory, make_directory

PARTITIONS = "partitions"
MOST = 1024
_LONGEST = 16
_MASK = 0xFFFFFFFF


def murmur2(data: bytes) -> int:
    """Kafka's murmur2 with its seed, as an unsigned 32-bit number."""
    m, length = 0x5BD1E995, len(data)
    h = 0x9747B28C ^ length
    for i in range(0, length - length % 4, 4):
        k = int.from_bytes(data[i : i + 4], "little") * m & _MASK
        h = (h * m & _MASK) ^ ((k ^ k >> 24) * m & _MASK)
    rest = data[length - length % 4 :]
    if rest:
        h = (h ^ int.from_bytes(rest, "little")) * m & _MASK
    h = (h ^ h >> 13) * m & _MASK
    return h ^ h >> 15


def partition_of(key: str, partitions: int) -> int:
    """The partition of a subject by its key, as a Kafka producer chooses it."""
    if partitions == 1:
        return 0
    return (murmur2(key.encode("utf-8", "surrogatepass")) & 0x7FFFFFFF) % partitions


def recorded_partitions(first: Path) -> int | None:
    """How many partitions a log was begun with, by the folder of its first; None where that is not written down.

    Raises:
        CorruptLogError: what is written there is no number of partitions.
    """
    try:
        return _parse(first, (first / PARTITIONS).read_bytes())
    except FileNotFoundError:
        return None


def record_partitions(first: Path, count: int) -> int:
    """Write down durably that a log has `count` partitions, unless it has a number already; gives the one that holds.

    Raises:
        CorruptLogError: what is written there is no number of partitions.
        OSError: it cannot be written or made durable.
    """
    make_directory(first)
    with locked(first / PARTITIONS) as handle:
        known = _parse(first, os.pread(handle, _LONGEST, 0))
        if known is None:
            os.ftruncate(handle, 0)
            os.pwrite(handle, b"%d\n" % count, 0)
        os.fsync(handle)  # also what another has written and may have died before it was durable
    fsync_directory(first)
    return known or count


def _parse(first: Path, text: bytes) -> int | None:
    """What a crash leaves, a torn line or NULs, is not there yet: nothing was appended before all of it was durable."""
    if len(text) < _LONGEST and (b"\0" in text or not text.endswith(b"\n")):
        return None
    number = text.removesuffix(b"\n")
    if len(text) < _LONGEST and number.isdigit() and 1 <= int(number) <= MOST:
        return int(number)
    raise CorruptLogError(
        "the number of partitions is none", where=str(first / PARTITIONS), found=repr(text[:_LONGEST]), expected=f"1 to {MOST}",
        do="Copy the file from a backup, or write into it, as a line, the number of partitions that the log was begun with",
    )  # fmt: skip
