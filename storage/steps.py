"""Named steps of a commit, a mail, an archive or a promotion: where tests kill the process.

A crash between any two of them loses nothing and doubles nothing (docs/guarantees.md); their names are for tests only.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable

_hook: Callable[[str], None] | None = None


def reached(step: str) -> None:
    """Say that `step` was reached; does nothing unless a test has armed a hook."""
    if _hook is not None:
        _hook(step)


def arm(hook: Callable[[str], None] | None) -> None:
    """Call `hook` at each step from now on; None disarms."""
    global _hook  # one process, one hook: this is a test's switch
    _hook = hook


def arm_from_environment() -> None:
    """Kill this process without notice at the nth time that a step is reached, where `AFTERLOG_TEST_KILL=step:n` says so."""
    wish = os.environ.get("AFTERLOG_TEST_KILL")
    if not wish:
        return
    wanted, _, nth = wish.rpartition(":")
    seen = itertools.count(1)

    def kill(step: str) -> None:
        if step == wanted and next(seen) == int(nth):  # one operation, so that no thread steps over it
            os.kill(os.getpid(), signal.SIGKILL)

    arm(kill)
