"""Kill -9 of real processes, at random moments over all verbs, and what is left of the promises afterwards: all of them.

    make crash            # 100 kills
    make crash N=1000

Between kills it holds the logs against what was appended and against what they were; at the end it finishes the work and
holds derived logs and rows against a run that nobody disturbed, and the mails against what the server took.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deployments.example import history
from storage.contacts import Entry, save_contacts
from storage.times import now
from tests.conftest import log_bytes
from tests.helpers import check_undisturbed, derived, open_store, parsed
from tests.smtp_server import SmtpServer
from tests.test_crash import HOUR, Inbox, basket_line, check_mails, ended, start

VERBS = {
    "append": ("append", "events"),
    "process": ("process", "--no-prefect"),
    "deliver": ("deliver", "--no-prefect"),
}
"""What is killed; a new verb is one more line here, if it ends by itself."""
SMALL = {"batch_bytes": 3000, "commit_bytes": 9000, "segment_bytes": 200_000, "brake_floor": 1_000_000}
"""Commits are small, so that there are many; and a thousand kills send more mails in an hour than the brake lets pass."""
GROUP = 250
PEOPLE = 100_000


class Shop:
    """One HOME with its mail server, and what is known to be in its raw log."""

    def __init__(self, home: Path, server: SmtpServer, seed: int) -> None:
        self.home, self.server, self.rng = home, server, random.Random(seed)
        self.known, self.before = b"", derived(home)
        self.took = dict.fromkeys(VERBS, 0.5)
        self.kills: Counter[str] = Counter()
        self._groups = self._news(seed)
        self._book = 0

    def _news(self, seed: int) -> Iterator[bytes]:
        """Groups of lines for ever: an example shop's, and somebody new who hands in taxes, leaves a basket, orders."""
        person, round = 0, 0
        while True:
            lines = list(history(now(), seed=seed + round, customers=60, hours=24))
            for first in range(0, len(lines), GROUP):
                at = now() - HOUR
                group = lines[first : first + GROUP]
                for _ in range(3):
                    person += 1
                    who = PEOPLE + person
                    tax = {"subject": {"id": "UK"}, "verb": "SUBMIT_TAX", "object": {"id": who}, "context": {"at": at}}
                    group += [json.dumps(tax).encode(), basket_line(who, at=at + person)]
                yield b"".join(line + b"\n" for line in group)
            round += 1

    def prepare(self, verb: str) -> tuple[str, ...]:
        """The arguments of a verb, and what it needs to have something to do."""
        if verb != "append":
            if self.rng.random() < 0.7:
                self.append(kill=False)
            return VERBS[verb]
        group = self.home.with_name("group")
        group.write_bytes(next(self._groups))
        return (*VERBS[verb], str(group))

    def append(self, *, kill: bool) -> None:
        """Append one group in full, or until it is killed."""
        self._run("append", self.prepare("append"), kill=kill)

    def hit(self) -> bool:
        """Start a random verb and kill it at a random moment; whether it was alive by then."""
        verb = self.rng.choice(list(VERBS))
        if verb == "deliver":
            self._address()
        return self._run(verb, self.prepare(verb), kill=True)

    def _address(self) -> None:
        """Everybody that mail may go to by now is in the address book."""
        store = open_store(self.home)
        new = range(self._book, self._book + 300)
        known = [Entry(type, str(PEOPLE + id), f"{type[:2]}{id}@example.com", False) for id in new for type in TYPES]
        save_contacts(store.database, known)
        store.database.dispose()
        self._book = new.stop

    def _run(self, verb: str, arguments: tuple[str, ...], *, kill: bool) -> bool:
        begun = time.monotonic()
        process = start(self.home, *arguments, mail_url=self.server.url, **SMALL)
        if kill:
            if self.rng.random() < 0.5:
                process.join(self.rng.uniform(0, 1.1 * self.took[verb]))
            else:
                self._await_writes(process, self.rng.randint(1, 12))
            process.kill()
        code = ended(process)
        said = Path(f"{self.home}.out").read_text()
        assert code == -signal.SIGKILL if kill and code else code == 0, (verb, code, said)
        assert "Traceback" not in said, said
        if code == 0:
            self.took[verb] = 0.7 * self.took[verb] + 0.3 * (time.monotonic() - begun)
        else:
            self.kills[verb] += 1
        self._check(Path(arguments[-1]).read_bytes() if verb == "append" else b"", whole=code == 0)
        return code != 0

    def _await_writes(self, process: Any, count: int) -> None:
        """Wait until logs were written to so many times: between such a write and its transaction little time passes."""
        before = self._sizes()
        while count and process.is_alive():
            if (after := self._sizes()) != before:
                before, count = after, count - 1

    def _sizes(self) -> list[int]:
        return [path.stat().st_size for path in (self.home / "logs").rglob("*.jsonl")]

    def _check(self, group: bytes, *, whole: bool) -> None:
        """The raw log holds what it did and a beginning of what was appended; derived logs are what they were and more."""
        log = log_bytes(self.home, "events")
        closed = self.known if not self.known or self.known.endswith(b"\n") else self.known + b"\n"
        if log != self.known:
            assert log.startswith(closed)
            assert group.startswith(log[len(closed) :])
        assert not whole or log == (closed + group if group else self.known)
        self.known = log
        after = derived(self.home)
        assert all(after[name].startswith(there) for name, there in self.before.items())
        self.before = after

    def finish(self) -> None:
        """Do what is left to do, undisturbed, and hold everything against what was promised."""
        self._address()
        for verb in ("process", "deliver"):
            process = start(self.home, *VERBS[verb], mail_url=self.server.url, **SMALL)
            process.join(1800)  # a thousand mails and their claims take a while
            assert process.exitcode == 0, (verb, process.exitcode, Path(f"{self.home}.out").read_text())
        inbox = self.server.inbox
        assert isinstance(inbox, Inbox)
        for log in ("reactions", "reminders"):
            ids = [event["event"]["id"] for event in parsed(log_bytes(self.home, log))]
            assert len(ids) == len(set(ids)), log
        check_mails(self.home, inbox)
        check_undisturbed(self.home)


TYPES = ("CLIENT", "CUSTOMER")


def main() -> None:
    """Kill as often as the first argument says (100), with the seed that the second names."""
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)
    print(f"{wanted} kills, seed {seed} (moments of real processes are not repeated by it)", flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="afterlog-crash-") as folder, SmtpServer() as server:
        server.inbox = Inbox()
        shop = Shop(Path(folder) / "home", server, seed)
        shop.append(kill=False)
        while shop.kills.total() < wanted:
            if shop.hit() and shop.kills.total() % 50 == 0:
                print(f"{shop.kills.total()} kills after {time.monotonic() - begun:.0f} s", flush=True)
        shop.finish()
        states = Counter(e["verb"] for e in parsed(log_bytes(shop.home, "deliveries")))
        lines = shop.known.count(b"\n")
    killed = ", ".join(f"{verb} {count}" for verb, count in sorted(shop.kills.items()))
    mails = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    print(f"{shop.kills.total()} kills ({killed}) in {time.monotonic() - begun:.0f} s, {lines} lines, mails: {mails}")
    print("Derived logs and rows are those of an undisturbed run; no mail came twice, none was lost.")


if __name__ == "__main__":
    main()
