"""A follower that begins behind what the clock has recorded: a new processor, an older database put back, or a lost one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

import storage.clock
from storage.clock import Clock, Tick
from storage.door import append_lines
from storage.store import Store
from tasks.process import process_to_end
from tasks.run import Run
from tasks.topology import build_topology
from tests.conftest import log_bytes
from tests.helpers import copy_raw_logs, parsed, process
from tests.test_replay import MINUTE, START, line

MakeStore = Callable[..., Store]


def to_end(store: Store, name: str) -> Run:
    run = Run(store, build_topology(store.settings), "test")
    process_to_end(run, name, None)
    return run


class TestManyTicks:
    def _ticks(self, store: Store, end: int, first: int, count: int, apart: int) -> None:
        """Write ticks as an idle log gets them."""
        store.writer("clock", 0).append(
            [
                b'{"subject":{"id":"CLOCK"},"verb":"TICK","object":{"type":"TICK","as_of":%d,"ends":{"events/0":%d}},'
                b'"context":{"at":%d},"event":{"inserted_at":%d}}' % (at, end, at, at)
                for at in range(first, first + count * apart, apart)
            ]
        )

    def test_are_not_taken_into_memory_at_once(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        class Counted(Tick):
            alive = most = 0

            def __init__(self, *values: Any) -> None:
                super().__init__(*values)
                Counted.alive += 1
                Counted.most = max(Counted.most, Counted.alive)

            def __del__(self) -> None:
                Counted.alive -= 1

        monkeypatch.setattr(storage.clock, "Tick", Counted)
        append_lines(store, "events", [line(1, 0)])
        self._ticks(store, len(log_bytes(store.home, "events")), START, 30_000, 1000)
        to_end(store, "abandonment")
        assert 1_000 < Counted.most < 15_000
        (event,) = parsed(log_bytes(store.home, "baskets"))
        assert event["event"]["inserted_at"] == START + 30 * MINUTE + 1000

    def test_give_the_same_in_blocks_of_any_size(
        self, store: Store, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for part in range(4):
            append_lines(store, "events", [line(part, 100 * part), line(9, 100 * part + 40)])
            self._ticks(store, len(log_bytes(store.home, "events")), START + (100 * part + 50) * MINUTE, 10, 4 * MINUTE)
        process(store.home, "abandonment")
        baskets = log_bytes(store.home, "baskets")
        assert len(parsed(baskets)) > 6
        for size in (1, 700, 2000):
            other = make_store(f"blocks of {size}")
            copy_raw_logs(store.home, other.home)
            with monkeypatch.context() as patched:
                patched.setattr(Clock, "ticks", functools.partialmethod(Clock.ticks, size=size))
                process(other.home, "abandonment")
            assert log_bytes(other.home, "baskets") == baskets
