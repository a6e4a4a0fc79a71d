"""The schedule of one seed: what is done, what goes wrong meanwhile, and what must hold after each step."""

from __future__ import annotations

import functools
import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

from tests.simulator.actors import Actors
from tests.simulator.disk import Fault
from tests.simulator.promises import Promises
from tests.simulator.world import BrokenPromiseError, World, world

STEPS = 20
_MINUTE, _DAY = 60_000, 86_400_000
_JUMPS = [0, 0, 1, 100, 5_000, 5_000, 20_000, _MINUTE, 10 * _MINUTE, 31 * _MINUTE, 31 * _MINUTE, _DAY, -_MINUTE, -_DAY]
_DEEDS = (
    ["append"] * 8 + ["by_hand", "tick", "tick"] + ["process"] * 5 + ["follow"] * 5 + ["go_astray"] * 3
    + ["deliver"] * 4 + ["back_up", "restore"]
)  # fmt: skip
_MEANWHILE = ["append", "append", "tick", "process", "go_astray"]
_FAULTS = [
    "kill", "kill", "kill", "death", "death", "unflushed", "unflushed", "unflushed", "power", "power", "outage", "outage", "torn", "torn", "torn",
    "eio", "eio", "enospc", "enospc", "short", "refused", "refused", "unheard",
]  # fmt: skip


_AIMS = ["/logs/deliveries/", "/logs/deliveries/", "/logs/clock/", "/logs/reactions/", "/logs/baskets/", "/locks/"]

_DERIVED = ["/logs/reactions/", "/logs/baskets/", "/logs/anomalies/"]
_WEAK = {
    "deliver": ["/logs/deliveries/"], "follow": ["/locks/", *_DERIVED], "tick": ["/logs/clock/"], "process": _DERIVED,
}  # fmt: skip


class FoundError(Exception):
    """A promise did not hold: the seed, and what led there."""


@dataclass
class Outcome:
    """How one seed went: the calls that were made, and a checksum of them that the same seed gives again."""

    calls: int
    digest: int
    trace: list[str] = field(default_factory=list)


def simulate(seed: int, steps: int = STEPS) -> Outcome:
    """Live through one seed.

    Raises:
        FoundError: a promise did not hold.
    """
    random = Random(seed)
    settings = {
        "partitions": random.choice([1, 1, 1, 1, 1, 2]),
        "segment_bytes": random.choice([1, 2_000, 2_000, 64 << 20]),
        "segment_daily": random.choice([True, False]),
        "batch_bytes": random.choice([1, 700, 700, 512 << 10, 512 << 10]),
        "commit_bytes": random.choice([1, 1_500, 1_500, 64 << 20, 64 << 20]),
        "spill_bytes": random.choice([1, 1_500, 4 << 20, 4 << 20]),
        "cache_keys": random.choice([1, 20_000]),
    }
    with _rare_collections(), world(random, **settings) as made:
        lived = _Schedule(made)
        try:
            for _ in range(steps):
                lived.step()
            lived.end()
        except Exception as error:  # noqa: BLE001  # whatever it is, the seed and the schedule are told with it
            where = "".join(traceback.format_exception(error))
            head = f"seed {seed}, {len(lived.trace)} of {steps} steps: {error}"
            traceback.clear_frames(error.__traceback__)
            lived.actors.forget_all()
            raise FoundError("\n".join([head, str(settings), *lived.trace, where])) from None
        outcome = Outcome(made.disk.calls, made.disk.digest, lived.trace)
    _freeze()
    return outcome


@functools.cache
def _freeze() -> None:
    """Once a seed was lived through, all is imported and compiled: the collections of so many worlds need not look at that."""
    gc.collect()
    gc.freeze()


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Worlds come and go so quickly that to look for cycles now and then is enough."""
    usual = gc.get_threshold()
    gc.set_threshold(50_000, 5, 5)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


class _Schedule:
    def __init__(self, made: World) -> None:
        self.world, self.random = made, made.random
        self.actors = Actors(made)
        self.promises = Promises(made, self.actors)
        self.trace: list[str] = []
        self._usual: dict[str, int] = {}
        made.disk.preempt = self._meanwhile

    def step(self) -> None:
        """Somebody does something; often something goes wrong, or another one comes between."""
        disk, deed = self.world.disk, self.random.choice(_DEEDS)
        self.world.seam.wall += self.random.choice(_JUMPS)
        self.world.server.kind = False
        disk.injected, self.world.doubled = [], self.actors.stray is not None
        disk.fault = self._draw_fault(deed, self._usual.get(deed, 40))
        self.trace.append(f"{deed} at {self.world.wall}")
        before = disk.calls
        getattr(self.actors, deed)()
        self._usual[deed] = max(disk.calls - before, 3)
        disk.fault = None
        self.trace[-1] += "".join(f"; {what}" for what in disk.injected)
        if disk.lost or self.random.random() < 0.02:
            self.trace[-1] += "; the power is lost"
            self.actors.forget_all()
            self.world.lose_power()
        self.promises.check()

    def _draw_fault(self, deed: str, calls: int) -> Fault | None:
        """What goes wrong in a step that makes so many calls: at any of them, or at one of the few that a bug would hide at."""
        draw, pick = self.random.random(), self.random.randint
        if draw >= 0.6:
            return None
        if deed in _WEAK and draw < 0.15:
            return Fault(
                self.random.choice(["unflushed", "torn", "torn", "kill", "eio", "enospc"]), pick(1, 2),
                aim=self.random.choice(_WEAK[deed]),
            )  # fmt: skip
        if draw >= 0.45:
            return Fault("preempt", pick(1, calls))
        kind = self.random.choice(_FAULTS)
        lasts = kind in ("enospc", "eio", "refused") and self.random.random() < 0.3
        if kind in ("torn", "unflushed", "enospc", "eio", "kill", "power") and self.random.random() < 0.5:
            return Fault(kind, pick(1, 2 if kind in ("torn", "unflushed") else 6), lasts, self.random.choice(_AIMS))
        rare = kind in ("torn", "unflushed", "enospc", "short")
        most = calls if kind in ("kill", "power") else 4 if rare else max(calls // 6, 2)
        return Fault(kind, pick(1, most), lasts)

    def end(self) -> None:
        """Nothing goes wrong any more, and everything is brought to its end."""
        self.world.disk.injected, self.world.doubled, self.world.server.kind = [], False, True
        self.trace.append("end")
        self.actors.forget_all()
        self.world.seam.wall += _DAY // 24
        self.actors.finish()
        self.actors.deliver()
        self.promises.check_end()

    def _meanwhile(self) -> None:
        deed = self.random.choice(_MEANWHILE)
        self.trace[-1] += f"; meanwhile {deed}"
        self.world.doubled = self.world.doubled or deed in ("go_astray", "process")
        getattr(self.actors, deed)()


__all__ = ["STEPS", "BrokenPromiseError", "FoundError", "Outcome", "simulate"]
