"""`make simulate SEED=.. STEPS=.. SEEDS=..`: one seed, or many from it on, on all processors."""

from __future__ import annotations

import os
import sys
import time
import zlib
from multiprocessing import get_context
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

from tests.simulator.many import live
from tests.simulator.memory import empty_database
from tests.simulator.schedule import STEPS, FoundError, simulate


def main(first: int, steps: int, seeds: int) -> int:
    """Live through seeds; the first that breaks a promise ends it, with what led there."""
    began = time.monotonic()
    if seeds == 1:
        return _one(first, steps)
    workers = min(seeds, os.cpu_count() or 1)
    empty_database()  # before the fork: all have it
    digest = 0
    for outcome in live(range(first, first + seeds), steps, workers, get_context("fork")):
        if isinstance(outcome, str):
            print(outcome)
            return 1
        digest = zlib.crc32(b"%08x" % outcome.digest, digest)
    used = sum(usage.ru_utime + usage.ru_stime for usage in map(getrusage, (RUSAGE_SELF, RUSAGE_CHILDREN)))
    print(
        f"{seeds} seeds from {first} of {steps} steps: every promise held; {time.monotonic() - began:.0f} s in {workers} processes, "
        f"{used / seeds * 1000:.0f} ms CPU a seed, checksum {digest:08x}"
    )
    return 0


def _one(seed: int, steps: int) -> int:
    try:
        outcome = simulate(seed, steps)
    except FoundError as error:
        print(error)
        return 1
    print("\n".join(outcome.trace))
    print(f"seed {seed} of {steps} steps: every promise held; checksum {outcome.digest:08x}")
    return 0


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    sys.exit(main(*given, *(1, STEPS, 1)[len(given) :]))
