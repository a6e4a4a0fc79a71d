"""`make simulate SEED=.. STEPS=.. SEEDS=..`: one seed, or many from it on."""

from __future__ import annotations

import sys
import time

from tests.simulator.schedule import STEPS, FoundError, simulate


def main(first: int, steps: int, seeds: int) -> int:
    """Live through seeds; the first that breaks a promise ends it, with what led there."""
    began = time.process_time()
    for seed in range(first, first + seeds):
        try:
            outcome = simulate(seed, steps)
        except FoundError as error:
            print(error)
            return 1
    if seeds == 1:
        print("\n".join(outcome.trace))
    cost = (time.process_time() - began) / seeds
    print(
        f"{seeds} seeds from {first} of {steps} steps: every promise held; {cost * 1000:.0f} ms CPU a seed, "
        f"last checksum {outcome.digest:08x}"
    )
    return 0


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    sys.exit(main(*given, *(1, STEPS, 1)[len(given) :]))
