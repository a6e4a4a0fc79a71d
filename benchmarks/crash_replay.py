"""Kill -9 of replays, promotions and rollbacks at random moments, beside appends, processors and mails.

    python -m benchmarks.crash_replay [KILLS] [SEED]

KILLS of each. After each kill the raw log has every byte, what is live is one generation or the other, whole, and `verify` is
clean; after every tenth, and at the end, `verify --derived` is, what is live is what a HOME gives that had its settings from
the beginning, and no mail was sent twice.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from collections import Counter
from email import message_from_bytes
from pathlib import Path

import orjson

from storage.contacts import Entry, save_contacts
from storage.door import append_lines
from storage.generations import DISCARDED, LIVE, READY, RUNNING, find_replay, list_replays
from storage.times import now
from tasks.mail_headers import EVENT_ID_HEADER
from tasks.topology import build_topology
from tasks.verify import verify_all
from tasks.verify_derived import verify_derived
from tests.conftest import log_bytes
from tests.helpers import copy_raw_logs, open_store, process
from tests.test_crash import ended, start

NAME, SHORT, LONG = "longer", "30m", "45m"
SMALL: dict[str, object] = {
    "batch_bytes": 10_000, "commit_bytes": 30_000, "spill_bytes": 5_000, "segment_bytes": 50_000, "brake_floor": 1_000_000,
}  # fmt: skip
VERBS: dict[str, tuple[str, ...]] = {
    "replay": ("replay", "--set", f"timeout={LONG}", "--name", NAME, "--no-prefect"),
    "promote": ("replays", "promote", NAME),
    "rollback": ("replays", "rollback", NAME),
}
CUSTOMERS, LOGS = 400, ("baskets", "reminders")
MINUTE, HOUR = 60_000, 3_600_000


class Replaying:
    """One HOME whose past is replayed, promoted and rolled back, killed on the way, and held against its promises."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.rng = home, random.Random(seed)
        self.store = open_store(home, **SMALL)
        self.kills: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.late: Counter[str] = Counter()
        """How many were killed after their last transaction."""
        self._at, self._appended = now() - 20 * HOUR, b""
        self._took = dict.fromkeys(VERBS, 0.5)
        save_contacts(
            self.store.database, [Entry("CUSTOMER", str(n), f"{n}@example.com", False) for n in range(CUSTOMERS)]
        )

    @property
    def state(self) -> str:
        """What has become of the newest replay; DISCARDED where none was made yet."""
        rows = list_replays(self.store.database)
        return rows[-1].state if rows else DISCARDED

    @property
    def timeout(self) -> str:
        """That of the generation that is live, as a person would have set it."""
        return LONG if self.state == LIVE else SHORT

    def grow(self, events: int) -> None:
        """A few minutes more in the shop; everything follows, and now and then mails go out."""
        lines = []
        for _ in range(events):
            self._at += self.rng.randrange(MINUTE // 4)
            verb = self.rng.choice(["ADDED_ITEM_TO_BASKET"] * 5 + ["REMOVED_ITEM_FROM_BASKET", "ORDERED"])
            item = {"type": "ITEM", "item": {"id": self.rng.randrange(3), "price": 5, "count": 2}}
            who = {"id": self.rng.randrange(CUSTOMERS), "type": "CUSTOMER"}
            at = {"context": {"at": self._at}, "event": {"inserted_at": self._at}}
            lines.append(orjson.dumps({"subject": who, "verb": verb, "object": item, **at}))
        append_lines(self.store, "events", lines)
        self._appended += b"".join(line + b"\n" for line in lines)
        process(self.home, as_of=self._at, timeout=self.timeout, **SMALL)
        if self.rng.random() < 0.3:
            self._whole("deliver", "--no-prefect", timeout=self.timeout)

    def hit(self, verb: str) -> None:
        """Begin it, or go on with it, and be killed at a random moment."""
        begun, before = time.monotonic(), self.state
        process = start(self.home, *VERBS[verb], timeout=self.timeout, **SMALL)
        process.join(self.rng.uniform(0.02, 1.2) * self._took[verb])
        process.kill()
        code = ended(process)
        said = Path(f"{self.home}.out").read_text()
        assert code in (0, -signal.SIGKILL), (verb, code, said)
        assert "Traceback" not in said, said
        if code == 0:
            self._took[verb] = 0.5 * self._took[verb] + 0.5 * (time.monotonic() - begun)
            self.done[verb] += 1
        else:
            self._took[verb] *= 1.1  # else a guess that is too short would never get to the end of it
            self.kills[verb] += 1
            self.late[verb] += self.state != before
        self.check()
        if code and self.kills.total() % 10 == 0:
            self.check_derived()

    def check_worth(self) -> None:
        """What was killed had something to lose: both generations have baskets, they differ, and mails were sent."""
        generation = find_replay(self.store.database, NAME).generation
        one, other = (log_bytes(self.home, log) for log in ("baskets", f"baskets@{generation}"))
        assert one != other, "both timeouts give the same"
        assert one.count(b"\n") > 20 < other.count(b"\n"), "hardly any baskets"
        assert self.mails(), "no mails"

    def finish(self, verb: str) -> None:
        """Do it undisturbed."""
        self._whole(*VERBS[verb], timeout=self.timeout)
        self.check()

    def discard(self) -> None:
        """Drop the replay, so that another one can be made."""
        self._whole("replays", "discard", NAME)
        self.check()
        assert not list((self.home / "logs").glob("*@*"))

    def check(self) -> None:
        """Every byte of the raw log is there, one generation is live in both logs, and `verify` is clean."""
        assert log_bytes(self.home, "events") == self._appended
        live = {self.store.live_generation(log) for log in LOGS}
        assert live == ({find_replay(self.store.database, NAME).generation} if self.state == LIVE else {1}), live
        assert verify_all(self.store, self.store.settings)[1] == []

    def check_derived(self) -> None:
        """What is live follows from the log, and from the log with its settings alone; no mail was sent twice."""
        process(self.home, timeout=self.timeout, **SMALL)
        found = verify_derived(self.store, build_topology(self.store.settings))
        assert [one.difference for one in found if one.difference] == []
        with tempfile.TemporaryDirectory(dir=self.home.parent) as folder:
            other = Path(folder) / "home"
            copy_raw_logs(self.home, other)
            process(other, timeout=self.timeout)
            for log in LOGS:
                generation = self.store.live_generation(log)
                data = log_bytes(self.home, log if generation == 1 else f"{log}@{generation}")
                assert data[: self.store.committed_end(log, 0)] == log_bytes(other, log), log
        mails = [message_from_bytes(path.read_bytes())[EVENT_ID_HEADER] for path in self.mails()]
        assert len(mails) == len(set(mails))

    def mails(self) -> list[Path]:
        """The mails that were sent."""
        return list((self.home / "outbox").rglob("*.eml"))

    def _whole(self, *arguments: str, **settings: object) -> None:
        process = start(self.home, *arguments, **settings, **SMALL)
        assert ended(process) == 0, (arguments, Path(f"{self.home}.out").read_text())


def run(shop: Replaying, wanted: int) -> None:
    """Kill each verb so many times."""
    while shop.kills["replay"] < wanted:
        if shop.state == READY:
            shop.discard()
            shop.grow(shop.rng.randrange(1, 60))
        shop.hit("replay")
    while min(shop.kills["promote"], shop.kills["rollback"]) < wanted:
        if shop.rng.random() < 0.5:
            shop.grow(shop.rng.randrange(1, 30))
        if shop.state in (RUNNING, DISCARDED):
            shop.finish("replay")
        verb = "rollback" if shop.state == LIVE else "promote"
        (shop.hit if shop.kills[verb] < wanted else shop.finish)(verb)
    shop.check_derived()
    shop.check_worth()


def main() -> None:
    """Kill as often as the first argument says (100), with the seed that the second names."""
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)
    print(f"{wanted} kills of each, seed {seed} (moments of real processes are not repeated by it)", flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="afterlog-crash-") as folder:
        shop = Replaying(Path(folder) / "home", seed)
        shop.grow(600)
        run(shop, wanted)
        mails, size = len(shop.mails()), len(log_bytes(shop.home, "events"))
    told = ", ".join(
        f"{verb} {shop.kills[verb]} ({shop.late[verb]} after its last transaction; {shop.done[verb]} more had ended before)"
        for verb in VERBS
    )
    print(f"{told} in {time.monotonic() - begun:.0f} s; {size} bytes of events, {mails} mails sent")
    print("Nothing lost, nothing twice, verify and verify --derived clean.")


if __name__ == "__main__":
    main()
