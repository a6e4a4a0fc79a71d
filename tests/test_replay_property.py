"""Any history, lived through with crashes, archives, replays, promotions, rollbacks: what is live is what its settings give.

The other HOME knows nothing of generations: it had the live generation's timeout from the beginning, and the same ticks.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import steps
from storage.errors import AfterlogError
from storage.generations import LIVE, READY, RUNNING, list_replays
from storage.segment import segment_path
from storage.settings import load_settings
from storage.store import Store
from tasks.archive import archive_all
from tasks.deliver import deliver_to_end
from tasks.impact import compare
from tasks.promote import promote, rollback
from tasks.replay import run_replay, start
from tasks.replay_plan import Request, read_plan
from tasks.run import Run
from tasks.topology import build_topology
from tasks.verify_derived import verify_derived
from tests.conftest import log_bytes
from tests.helpers import parsed
from tests.test_property import EXAMPLES, MAX_LINE, CrashError, Shop, Step, fresh, histories

pytestmark = [
    pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),  # the crashes
]
SHORT, LONG = "30m", "45m"
LOGS = {"baskets": "abandonment", "reminders": "remind"}


@dataclass(frozen=True)
class Turn:
    """After so many lines, what comes next: a replay, its promotion, its rollback; a crash ends it after so many steps.

    Where it is to be archived, that comes first, and the crash may come in it.
    """

    after: int
    crash: int | None
    archived: bool


class Turning(Shop):
    """A shop whose timeout goes with the generation that is live, as a person would set it."""

    timeout = SHORT

    def use(self, timeout: str) -> None:
        """Go on with another timeout, in new runs."""
        self.timeout = timeout
        self.start()
        self.store.database.dispose()
        own = {
            name: getattr(self.store.settings, name)
            for name in ("batch_bytes", "commit_bytes", "segment_bytes", "cache_keys")
        }
        self.store = Store(load_settings(home=self.home, max_line=MAX_LINE, timeout=timeout, live_window="1ms", **own))
        self.topology = build_topology(self.store.settings)

    def live_log(self, log: str) -> bytes:
        """The live generation of a log."""
        return read_all(self.store, log, self.store.live_generation(log), self.store.committed_end(log, 0))

    def turn(self, turn: Turn) -> None:
        """Do it, with its crash; whichever generation is live after that, the timeout is that one's."""
        if turn.after % 3:
            self.process()
        self.start()
        with _crashing(turn.crash):
            if turn.archived:
                deliver_to_end(Run(self.store, self.topology, "test"))  # else the logs of mails stay here
                archive_all(self.store, self.topology, "test")
            rows = list_replays(self.store.database)
            if not rows or rows[-1].state == RUNNING:
                planned, _ = start(self.store, self.topology, Request(settings={"timeout": LONG}, name="long"), "test")
                run_replay(planned, self.store, self.topology, "test")
            else:
                (promote if rows[-1].state == READY else rollback)(self.store, self.topology, "long", "test")
        rows = list_replays(self.store.database)
        self.use(LONG if rows and rows[-1].state == LIVE else SHORT)


def read_all(store: Store, log: str, generation: int = 1, end: int | None = None) -> bytes:
    """The bytes of a log, wherever its segments are."""
    reader = store.reader(log, 0, generation)
    try:
        return b"".join(reader.raw(0, reader.end() if end is None else end))
    finally:
        reader.close()


@contextlib.contextmanager
def _crashing(after: int | None) -> Any:
    left = [after if after is not None else 1 << 40]

    def hook(_step: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise CrashError

    steps.arm(hook)
    try:
        with contextlib.suppress(CrashError, AfterlogError):
            yield
    finally:
        steps.arm(None)


turns = st.lists(
    st.builds(
        Turn,
        st.integers(0, 30),
        st.sampled_from([None, None, None, None, 0, 1, 2, 5, 9, 14, 20, 30]),
        st.booleans(),
    ),
    min_size=2,
    max_size=8,
)


@given(
    history=histories(),
    turns=turns,
    batch=st.sampled_from([1, 1000, 4 << 20]),
    commit=st.sampled_from([1, 2000, 64 << 20]),
    segment=st.sampled_from([500, 500, 64 << 20]),
    keys=st.sampled_from([1, 20_000]),
)
@settings(
    max_examples=max(18, EXAMPLES // 4), deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
def test_what_is_live_is_what_its_settings_give_through_any_promotions_and_crashes(
    history: list[Step], turns: list[Turn], batch: int, commit: int, segment: int, keys: int
) -> None:
    sizes = {"batch_bytes": batch, "commit_bytes": commit, "segment_bytes": segment, "cache_keys": keys}
    with fresh(**sizes) as plain:
        shop = Turning.__new__(Turning)
        shop.__dict__.update(plain.__dict__)
        shop.use(SHORT)
        lived = 0
        for turn in sorted(turns, key=lambda turn: turn.after):
            shop.live(history[lived : turn.after])
            lived = max(lived, turn.after)
            shop.turn(turn)
        shop.live(history[lived:])
        shop.tick(history[-1].as_of)
        shop.process()
        _check(shop)
        plain.store = shop.store
        plain._followers = {}


def _check(shop: Turning) -> None:
    with fresh("ever") as other:
        other.store = Store(load_settings(home=other.home, max_line=MAX_LINE, timeout=shop.timeout))
        other.topology = build_topology(other.store.settings)
        for log in ("events", "clock"):
            path = segment_path(other.store.directory(log, 0), 0)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read_all(shop.store, log))
        other.process()
        for log in LOGS:
            assert shop.live_log(log) == log_bytes(other.home, log), log
        ids = [event["event"]["id"] for event in parsed(shop.live_log("baskets"))]
        assert len(ids) == len(set(ids))
    if len(shop.live_log("baskets")) % 5 == 0:  # it makes a database, which takes longer than all the rest
        found = verify_derived(shop.store, shop.topology)
        assert [one.difference for one in found if one.difference] == []
    for row in list_replays(shop.store.database):
        planned = read_plan(row)
        run_replay(planned, shop.store, shop.topology, "test") if row.state == "RUNNING" else None
        if row.state == "READY":
            assert compare(shop.store, shop.topology, planned).logs[0].log == "baskets"
