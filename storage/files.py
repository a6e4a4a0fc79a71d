"""How many files a process may have open: each partition takes some for whoever appends to it or follows it."""

from __future__ import annotations

import functools
import resource
from contextlib import suppress

_ENOUGH = 65_536
"""For 1,024 partitions and a dozen processors."""


@functools.cache
def allow_files() -> None:
    """Let this process have as many files open as the system lets it have; what it begins with is 1,024 as a rule."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with suppress(ValueError, OSError):  # where the system will not: the 1,024 are enough for most
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
