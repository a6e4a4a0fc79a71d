"""Coverage-guided fuzzing of the judge, the reader and the commit's file work, with atheris.

    pip install atheris     # into an environment of its own; no dependency of the project
    python -m benchmarks.fuzz judge|reader|commit CORPUS_FOLDER -max_total_time=900

What follows the target's name goes to libFuzzer. A failure leaves its input in a file and prints the assertion.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris  # type: ignore[import-not-found]  # only whoever fuzzes has it

with atheris.instrument_imports(include=["storage"]):
    from storage.derived import DerivedWriter
    from storage.errors import CorruptLogError, NondeterminismError
    from storage.event import Rejected
    from storage.judge import decode, judge
    from storage.reader import PartitionReader
    from storage.slow_judge import judge_slowly

MAX_LINE = 64
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108  # a folder of its own is made there
FOLDER = Path(tempfile.mkdtemp(prefix="afterlog-fuzz-", dir=MEMORY))


def fuzz_judge(data: bytes) -> None:
    """The fast and the slow way agree on every line, and nothing but Rejected comes out of either."""
    line = data.replace(b"\n", b" ")
    outcomes = []
    for way in (judge, judge_slowly):
        try:
            event = way(line, 0, 0)
            outcomes.append(
                (event.id, event.key, event.verb, bytes(event.object), event.at, event.clock, event.event_id, event.type
                 if isinstance(event.type, str) else None, event.item and (event.item.key, bytes(event.item.raw)))
            )  # fmt: skip
        except Rejected as error:
            # What follows the colon quotes the line, and the two may spell a number differently.
            outcomes.append(str(error).partition(":")[0])  # type: ignore[arg-type]  # either of the two
    assert outcomes[0] == outcomes[1], outcomes


def fuzz_reader(data: bytes) -> None:
    """Blocks of any size, over any segments, give the lines that are there; batches account for each of them."""
    given = atheris.FuzzedDataProvider(data)
    size, cuts = given.ConsumeIntInRange(1, 200), [given.ConsumeIntInRange(0, 400) for _ in range(3)]
    log = given.ConsumeBytes(given.remaining_bytes())
    ends = [0, *(at + 1 for at, byte in enumerate(log) if byte == 10)]
    bases = sorted({0, *(max(e for e in ends if e <= cut) for cut in cuts)} - ({len(log)} if log else set()))
    folder = _fresh()
    for base, end in zip(bases, [*bases[1:], len(log)], strict=True):
        (folder / f"{base:020d}.jsonl").write_bytes(log[base:end])
    reader = PartitionReader(folder, "fuzz/0")
    try:
        end, position, lines, judged = reader.end(), 0, [], 0
        assert end == ends[-1], (end, ends[-1])
        while block := reader.read(position, end, size, MAX_LINE):
            batch = decode(block, "fuzz", 0, 0, MAX_LINE)
            judged += len(batch.events) + len(batch.bad)
            for index, line in enumerate(block.lines):
                length = block.oversized.get(index, len(line))
                lines.append(log[position : position + length])
                assert lines[-1].startswith(line)
                assert reader.line(position) == lines[-1]
                position += length + 1
            assert position == block.end
        assert lines == log[:end].split(b"\n")[:-1]
        assert judged == len(lines)
        assert b"".join(reader.raw(0, end)) == log[:end]
    finally:
        reader.close()


def fuzz_commit(data: bytes) -> None:
    """Whatever a crash left behind the committed end: the same bytes are confirmed, others are refused untouched."""
    given = atheris.FuzzedDataProvider(data)
    limit, may_differ = given.ConsumeIntInRange(1, 100), given.ConsumeBool()
    confirmed = b"".join(_line(given) for _ in range(given.ConsumeIntInRange(0, 4)))
    new = b"".join(_line(given) for _ in range(given.ConsumeIntInRange(0, 4)))
    kept = given.ConsumeIntInRange(0, len(new))
    tail = new[:kept] + given.ConsumeBytes(given.remaining_bytes())
    folder = _fresh()
    writer = DerivedWriter(folder, "fuzz/0", limit=limit, daily=False)
    if confirmed:
        writer.extend(0, confirmed, may_differ=False)
    if tail:
        newest = max(folder.glob("*.jsonl"), default=folder / f"{0:020d}.jsonl")
        with newest.open("ab") as file:
            file.write(tail)
    before = _whole(folder)
    agrees = tail.startswith(new) or new.startswith(tail)
    same = next((i for i, (a, b) in enumerate(zip(tail, new, strict=False)) if a != b), min(len(tail), len(new)))
    torn = not agrees and tail[same : same + 1] == b"\0"  # as a power loss leaves it: cut, not a difference
    try:
        cut = writer.extend(len(confirmed), new, may_differ=may_differ)
    except NondeterminismError:
        assert not may_differ
        assert not agrees
        assert not torn
        assert _whole(folder) == before
        return
    expected = confirmed + (new if may_differ or torn or len(new) > len(tail) else tail)
    assert _whole(folder) == expected, (_whole(folder), expected)
    assert not cut or may_differ or torn
    assert agrees or may_differ or torn


def _line(given: atheris.FuzzedDataProvider) -> bytes:
    return bytes(given.ConsumeBytes(given.ConsumeIntInRange(0, 40)).replace(b"\n", b" ")) + b"\n"


def _fresh() -> Path:
    shutil.rmtree(FOLDER)
    (FOLDER / "0").mkdir(parents=True)
    return FOLDER / "0"


def _whole(folder: Path) -> bytes:
    """A partition's segments put together, which must be one sequence."""
    whole = b""
    for path in sorted(folder.glob("*.jsonl")):
        if int(path.stem) != len(whole):
            raise CorruptLogError("a hole between segments", where=str(path))
        whole += path.read_bytes()
    return whole


TARGETS: dict[str, Callable[[bytes], None]] = {"judge": fuzz_judge, "reader": fuzz_reader, "commit": fuzz_commit}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m benchmarks.fuzz {'|'.join(TARGETS)} [CORPUS] [-max_total_time=SECONDS]")
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
