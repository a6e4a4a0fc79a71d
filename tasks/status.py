"""How things stand: each processor's checkpoint against its log's end, and the mails by state."""

from __future__ import annotations

from dataclasses import dataclass

from storage.batches import BatchCache
from storage.commit import Position
from storage.outbox import Outbox
from storage.store import Store
from storage.times import now
from tasks.process import positions
from tasks.topology import DELIVER, DELIVERIES, Topology


@dataclass(frozen=True)
class ProcessorStatus:
    """One processor in one partition. `lag_ms` is how long the first event that it has not taken has been in the log."""

    processor: str
    log: str
    partition: int
    offset: int
    end: int
    lag_bytes: int
    lag_ms: int
    commit: int
    read: int
    processed: int
    quarantined: int
    ignored: int
    derived: int


@dataclass(frozen=True)
class Status:
    """Everything that `afterlog status` shows."""

    home: str
    processors: list[ProcessorStatus]
    mails: dict[str, int]


def read_status(store: Store, topology: Topology) -> Status:
    """The status as it is committed now; a processor that never ran is shown at its log's beginning."""
    known = {(p.processor, p.log, p.partition): p for p in positions(store)}
    rows = []
    for processor in topology.all():
        for partition in store.partitions(processor.reads):
            position = known.pop((processor.name, processor.reads, partition), None) or Position(
                0, processor.name, 1, processor.reads, partition
            )
            rows.append(_row(store, topology, position))
    rows += [_row(store, topology, position) for key, position in known.items() if key[0] == DELIVER]
    return Status(str(store.home), rows, Outbox(store, DELIVERIES).counts())


def _row(store: Store, topology: Topology, position: Position) -> ProcessorStatus:
    reader = store.reader(position.log, position.partition)
    try:
        if position.log in topology.derived_logs():
            end = store.committed_end(position.log, position.partition)
        else:
            end = reader.end()
        lag_ms = 0
        if end > position.offset:
            cache = BatchCache(1, 1 << 30, kept=1)
            first = cache.get(reader, position.log, position.partition, position.offset, end, position.clock)
            lag_ms = max(0, now() - first.clock) if first else 0
    finally:
        reader.close()
    return ProcessorStatus(
        position.processor, position.log, position.partition, position.offset, end, max(0, end - position.offset),
        lag_ms, position.commit, position.lines, position.processed, position.quarantined, position.ignored,
        position.derived,
    )  # fmt: skip
