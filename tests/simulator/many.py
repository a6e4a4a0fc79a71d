"""Many seeds, on all processors: each is a world of its own, so they need nothing of each other."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext

from tests.simulator.schedule import FoundError, Outcome, simulate

_PART = 10


def live(seeds: range, steps: int, workers: int, context: BaseContext) -> Iterator[Outcome | str]:
    """How each of `seeds` went, in their order whoever is done first; the last is the first that breaks a promise, as a text."""
    parts = [seeds[at : at + _PART] for at in range(0, len(seeds), _PART)]
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        for part in pool.map(_live, parts, [steps] * len(parts)):
            yield from part
            if isinstance(part[-1], str):
                return
    finally:
        pool.shutdown(cancel_futures=True)


def _live(seeds: range, steps: int) -> list[Outcome | str]:
    done: list[Outcome | str] = []
    for seed in seeds:
        try:
            outcome = simulate(seed, steps)
        except FoundError as error:
            return [*done, str(error)]
        done.append(Outcome(outcome.calls, outcome.digest))
    return done
