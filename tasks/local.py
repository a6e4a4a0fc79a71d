"""Running several processors of one process side by side, without Prefect."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tasks.process import Summary
from tasks.run import Run


@dataclass
class Outcome:
    """What each processor did, and which of them failed with what."""

    summaries: list[Summary] = field(default_factory=list)
    failures: dict[str, Exception] = field(default_factory=dict)


def side_by_side(run: Run, names: Iterable[str], work: Callable[[Run, str], Summary]) -> Outcome:
    """Let every processor work in a thread of its own. One that fails neither stops nor holds back the others.

    Whatever ends the wait (Ctrl-C, say) tells all of them to stop, and is raised once they have.
    """
    outcome, names = Outcome(), list(names)
    found: dict[str, Summary] = {}

    def one(name: str) -> None:
        try:
            found[name] = work(run, name)
        except Exception as error:  # noqa: BLE001  # the caller is told of it; the other processors go on
            outcome.failures[name] = error

    threads = [threading.Thread(target=one, args=(name,), name=name) for name in names]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        run.stop.set()
        for thread in threads:
            thread.join()
    outcome.summaries = [found[name] for name in names if name in found]
    return outcome
