"""What the system or Prefect's server refuses, in one sentence; and standard streams that are full, gone or were never there."""

from __future__ import annotations

import errno
import os
import re
import sys

from storage.errors import AfterlogError

_NOT_REACHED = "Failed to reach API at"
"""What Prefect says for it where a flow is run."""
_OF_STREAMS = {errno.EBADF, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC}


def open_closed() -> None:
    """Have something at 0, 1 and 2 where we were started without: else the next file to be opened, a log say, is taken for it.

    Reading from such an input or writing to such an output fails, as it should; what is said on standard error is lost.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_WRONLY if name != "stdout" else os.O_RDONLY)
            os.dup2(handle, number)
            if handle != number:
                os.close(handle)
            if name != "stdin":
                setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115  # it is open for as long as we are


def give_up_output() -> None:
    """Have nobody write to standard output any more, Python at its end least of all."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def from_system(error: OSError) -> AfterlogError:
    """What the system refused, and where."""
    try:
        sys.stdout.flush()
    except OSError:
        give_up_output()
    where = error.filename
    if where is None and error.errno in _OF_STREAMS:  # where we read or write a file ourselves, the error is told there
        where = "standard input or output"
    said = error.strerror or str(error) or type(error).__name__
    return AfterlogError(f"the system refuses: {said}", where="" if where is None else str(where))


def from_prefect(error: Exception) -> AfterlogError | None:
    """What keeps us from Prefect's server, where it is that; None for anything else."""
    httpx = sys.modules.get("httpx")  # who has not imported it has not asked a server
    if httpx is None:
        return None
    where = re.sub("//.*@", "//***@", os.environ.get("PREFECT_API_URL", "").partition("?")[0])
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403):
        return AfterlogError(
            "Prefect's server refuses the password, or asks for one", where=where,
            do="Set PREFECT_API_AUTH_STRING to its user:password (for Prefect Cloud, PREFECT_API_KEY)",
        )  # fmt: skip
    strange = isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 404
    if strange or isinstance(error, httpx.RequestError) or str(error).startswith(_NOT_REACHED):
        return AfterlogError(
            "no Prefect server can be reached there", where=where,
            do="Start `afterlog up`, or correct PREFECT_API_URL, http://127.0.0.1:4200/api say; --no-prefect does without, where there is that",
        )  # fmt: skip
    return None
