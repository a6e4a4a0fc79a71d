"""Kill -9 of `afterlog archive` at random moments, beside appends and processors: nothing lost, and verify clean.

python -m benchmarks.crash_archive [KILLS] [SEED]
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from storage.manifest import archived_end, read_manifest
from storage.store import Store
from tasks.verify import verify_all
from tests.helpers import open_store, process
from tests.processes import ended
from tests.test_crash import start

SMALL: dict[str, object] = {"segment_bytes": 2_000, "live_window": "1ms"}


class Archiving:
    """One HOME that is archived, killed on the way, and held against what was appended after each kill."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.rng = home, random.Random(seed)
        self.appended, self.kills, self._took, self._number = b"", 0, 0.3, 0
        self.store: Store = open_store(home, **SMALL)

    def grow(self) -> None:
        """Some segments more, read by all processors."""
        lines = []
        for _ in range(self.rng.randrange(20, 120)):
            self._number += 1
            event = {"subject": {"id": self._number}, "verb": "SUBMIT_TAX", "object": {"id": self._number}}
            lines.append(json.dumps({**event, "context": {"at": 1_700_000_000_000 + self._number}}).encode())
            if self.rng.random() < 0.1:
                self._append(lines)
                lines = []
        self._append(lines)
        process(self.home, **SMALL)

    def _append(self, lines: list[bytes]) -> None:
        if lines:
            self.store.writer("events", 0).append(lines)
            self.appended += b"".join(line + b"\n" for line in lines)

    def hit(self) -> bool:
        """Archive, and be killed at a random moment; whether it was alive by then."""
        begun = time.monotonic()
        process = start(self.home, "archive", "--no-prefect", **SMALL)
        process.join(self.rng.uniform(0.2, 1.1) * self._took)
        process.kill()
        code = ended(process)
        output = Path(f"{self.home}.out")
        said = output.read_text() if output.exists() else ""  # it may have been killed before it began
        assert code in (0, -signal.SIGKILL), said
        assert "Traceback" not in said, said
        if code == 0:
            self._took = 0.7 * self._took + 0.3 * (time.monotonic() - begun)
        else:
            self._took *= 1.05
            self.kills += 1
        self.check()
        return code != 0

    def check(self) -> None:
        """Every byte is read as it was appended, and the chain is whole."""
        reader = self.store.reader("events", 0)
        assert b"".join(reader.raw(0, reader.end())) == self.appended
        reader.close()
        assert verify_all(self.store, self.store.settings)[1] == []

    def finish(self) -> tuple[int, int]:
        """Archive undisturbed; gives how many segments of the raw log are archived, and how many are still here."""
        process = start(self.home, "archive", "--no-prefect", **SMALL)
        assert ended(process) == 0, Path(f"{self.home}.out").read_text()
        self.check()
        directory = self.store.directory("events", 0)
        entries = read_manifest(directory)
        assert archived_end(directory) == entries[-1].end
        assert not list((self.home / "archive").rglob("*.part"))
        return len(entries), len(list(directory.glob("*.jsonl")))


def main() -> None:
    """Kill as often as the first argument says (100), with the seed that the second names."""
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)
    print(f"{wanted} kills, seed {seed} (moments of real processes are not repeated by it)", flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="afterlog-crash-") as folder:
        archiving = Archiving(Path(folder) / "home", seed)
        while archiving.kills < wanted:
            archiving.grow()
            archiving.hit()
        archived, here = archiving.finish()
    seconds = time.monotonic() - begun
    print(
        f"{archiving.kills} kills in {seconds:.0f} s; {archived} segments archived, {here} here, {len(archiving.appended)} bytes"
    )
    print("Every byte was read as it was appended after each kill, and verify found nothing wrong.")


if __name__ == "__main__":
    main()
