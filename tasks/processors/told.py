"""What a processor's code raises, told as a person needs it: the kind of the error, the event, and the line of code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from storage.errors import AfterlogError
from tasks.processors.contract import Processor


@contextmanager
def told(processor: Processor[Any], where: str) -> Iterator[None]:
    """Run code of `processor`; `where` says of what it was asked.

    Raises:
        AfterlogError: it raised something, or ended the process, which is not for it to do. What Afterlog raises itself, or a
            disk, stays as it is.
    """
    try:
        yield
    except (AfterlogError, OSError):
        raise
    except (Exception, SystemExit) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        notes = getattr(error, "__notes__", [])
        raise AfterlogError(
            said, where=notes[0] if notes else where,
            do=f"Correct it, at {_line(processor, error)}",
        ) from error  # fmt: skip


def check_settled(processor: Processor[Any], still_due: Iterator[str]) -> None:
    """Make sure that a tick has left nothing due: else it is due at every moment from then on, and a tick comes for it each time.

    Raises:
        AfterlogError: it has.
    """
    key = next(still_due, None)
    if key is not None:
        raise AfterlogError(
            f"a tick of {processor.name} has left a state due", found=repr(key[:100]),
            expected="each one that it was given dropped, or put with a due that the tick does not reach",
            do=f"Correct `tick` in {type(processor).__module__}",
        )  # fmt: skip


def _line(processor: Processor[Any], error: BaseException) -> str:
    """Where in the code it was: the last line of the processor's own file, else that file."""
    frames = traceback.extract_tb(error.__traceback__)
    file = getattr(sys.modules[type(processor).__module__], "__file__", "")
    own = [frame for frame in frames if frame.filename == file]
    return f"{file}:{own[-1].lineno}" if own else str(file)
