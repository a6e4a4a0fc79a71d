"""Proof that what is live follows from the log: the recorded ticks and settings again from the beginning, compared byte by byte.

Nothing is written but into a database of its own that is gone afterwards; the live one is only looked at.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from storage.commit import Target
from storage.database import Database
from storage.derived import DerivedWriter
from storage.errors import AfterlogError, LostDataError
from storage.generations import read_ends
from storage.reader import PartitionReader
from storage.store import Store
from tasks.local import side_by_side
from tasks.process import Summary
from tasks.replay_follow import QuietFollower, ReplayRun, versions_of
from tasks.run import Run
from tasks.timeline import Place, Version
from tasks.topology import Topology
from tasks.verify_rows import VerifiedRows, verify_rows

_PIECE = 1 << 20


@dataclass(frozen=True)
class GoneCode:
    """A stretch of a derived log that other code made than there is now; what is compared there is what today's code gives."""

    code: str
    start: int
    end: int
    """Offsets in the derived log."""


@dataclass
class Verified:
    """One partition of one derived log; `difference` is the first one, as a sentence, or empty."""

    processor: str
    log: str
    partition: int
    generation: int
    compared: int = 0
    difference: str = ""
    gone: list[GoneCode] = field(default_factory=list)

    def told(self) -> list[str]:
        """What was found, a sentence each."""
        place = f"{self.log}/{self.partition}" + (f" generation {self.generation}" if self.generation > 1 else "")
        gone = [
            f"{place}: bytes {one.start} to {one.end} were made by code {one.code[:12]} of {self.processor}, which is gone: "
            "they are compared with what the code of today gives"
            for one in self.gone
        ]
        return [*gone, self.difference or f"{place}: {self.compared} bytes follow from the log"]


class DifferenceError(AfterlogError):
    """The bytes that are live are not those that follow from the log."""


def verify_derived(store: Store, topology: Topology, names: Sequence[str] = ()) -> list[Verified | VerifiedRows]:
    """Verify every derived log that is live, and every row, or those of the processors `names`, up to what is committed now.

    Raises:
        UsageError: there is no processor of a name, or its recorded settings fit the code no more.
        LostDataError: a log is shorter than what was read from it.
    """
    chosen = list(names or topology.processors)
    writers = [name for name in chosen if topology.make(name).writes is not None]
    logs = {str(topology.writes(name)) for name in writers}
    positions, ends = read_ends(store.database, {log: store.live_generation(log) for log in logs})
    results: list[Verified] = []
    rows: list[VerifiedRows] = []
    goals = {
        (p.processor, p.partition): (Place(p.offset, p.tick_offset), p.generation)
        for p in positions
        if p.processor in writers
    }

    def work(run: Run, name: str) -> Summary:
        for (processor, partition), (goal, generation) in goals.items():
            if processor == name:
                log = str(topology.writes(name))
                found = Verified(name, log, partition, generation)
                results.append(found)
                _verify(run, found, goal, ends.get((log, partition), 0))
        if topology.make(name).tables:
            rows.extend(verify_rows(run, name, store.database))
        return Summary(name)

    with tempfile.TemporaryDirectory(prefix="afterlog-verify-") as folder:
        scratch = _Scratch(store, Path(folder))
        try:
            run = ReplayRun(scratch, topology, "verify", {})
            outcome = side_by_side(run, chosen, work)
        finally:
            scratch.database.dispose()
    for error in outcome.failures.values():
        raise error
    results += _unheld(store, topology, writers, ends, results)
    return [*sorted(results, key=lambda found: (writers.index(found.processor), found.partition)), *rows]


def _unheld(
    store: Store,
    topology: Topology,
    writers: Sequence[str],
    ends: Mapping[tuple[str, int], int],
    found: Sequence[Verified],
) -> list[Verified]:
    """The logs that have bytes of a processor of which the database has no checkpoint: nothing says from what they follow."""
    seen = {(one.log, one.partition) for one in found}
    unheld = []
    for name in writers:
        for (log, partition), end in sorted(ends.items()):
            if log == topology.writes(name) and end and (log, partition) not in seen:
                said = f"{log}/{partition}: {end} bytes are committed, and the database has no checkpoint of {name} that is live"
                unheld.append(Verified(name, log, partition, store.live_generation(log), difference=said))
    return unheld


class _Scratch(Store):
    """The logs of a store, with a database of its own for state and checkpoints."""

    def __init__(self, real: Store, folder: Path) -> None:
        super().__init__(real.settings)
        self._real = real
        self.__dict__["database"] = Database(f"sqlite:///{folder / 'verify.db'}", folder)

    def committed_end(self, log: str, partition: int, generation: int | None = None) -> int:
        return self._real.committed_end(log, partition, generation)

    def live_generation(self, log: str) -> int:
        return self._real.live_generation(log)


class _Comparer(DerivedWriter):
    """Compares what a writer would write with what is there."""

    def __init__(self, reader: PartitionReader, end: int) -> None:
        self._reader, self._end = reader, end
        self.compared = 0

    def extend(self, end: int, data: bytes, *, may_differ: bool, durable: bool = True) -> str:
        """Compare `data` with the bytes at `end`.

        Raises:
            DifferenceError: they are others.
        """
        done = 0
        for piece in self._reader.raw(end, min(end + len(data), self._end)):
            if piece != data[done : done + len(piece)]:
                at = done + next(i for i, byte in enumerate(piece) if byte != data[done + i])
                raise self._difference_at(end, data, at)
            done += len(piece)
        self.compared = end + done
        if done < len(data):
            raise self._difference_at(end, data, done)
        return ""

    def _difference_at(self, end: int, data: bytes, at: int) -> DifferenceError:
        start = data.rfind(b"\n", 0, at) + 1
        stop = data.find(b"\n", at)
        found = b"".join(self._reader.raw(end + start, min(end + start + stop - start, self._end)))
        self.compared = end + start
        return DifferenceError(
            "the first difference",
            where=f"{self._reader.name}:{end + start}",
            found=f"live {found[:200]!r}",
            expected=f"replayed {data[start:stop][:200]!r}",
        )


class _VerifyingFollower(QuietFollower):
    """Compares instead of writing."""

    def __init__(self, run: Run, name: str, partition: int, versions: Sequence[Version], comparer: _Comparer) -> None:
        self._comparer = comparer
        super().__init__(run, name, partition, versions)

    def _make_target(self) -> Target | None:
        return Target(str(self.processor.writes), self._comparer, 0)


def _verify(run: Run, found: Verified, goal: Place, end: int) -> None:
    reader = run.store.reader(found.log, found.partition, found.generation)
    comparer = _Comparer(reader, end)
    source = run.topology.reads(found.processor)
    base = {found.log: found.generation, source: run.generation(source)}
    versions = versions_of(run, found.processor, found.partition, base, {})
    follower = _VerifyingFollower(run, found.processor, found.partition, versions, comparer)
    try:
        if reader.end() < end:
            raise LostDataError(
                "the derived log is shorter than its committed end", where=reader.name, found=reader.end(), expected=end
            )
        follower.run_to(goal)
        made = follower.target.end if follower.target is not None else 0
        if made < end:
            extra = reader.line(made)
            found.difference = f"{reader.name}:{made}: live has more than what was replayed: {extra[:200]!r}"
    except DifferenceError as error:
        found.difference = str(error)
    finally:
        follower.close()
        reader.close()
    found.compared = comparer.compared
    found.gone = [GoneCode(*stretch) for stretch in follower.gone(end, derived=True)]


def report(results: Sequence[Verified | VerifiedRows], tell: Callable[[str], None]) -> bool:
    """Say what was found, one sentence each; whether all is well."""
    for found in results:
        for sentence in found.told():
            tell(sentence)
    return not any(found.difference for found in results)
