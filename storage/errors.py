"""Every error that Afterlog raises on purpose: one base class, few leaves.

A message says what went wrong and where, what was found against what was expected, and what to do.
"""

from __future__ import annotations


class AfterlogError(Exception):
    """The work failed; the command line shows the sentence and ends with `exit_code`."""

    exit_code = 1

    def __init__(
        self, what: str, *, where: str = "", found: object = None, expected: object = None, do: str = ""
    ) -> None:
        self.what, self.where, self.found, self.expected, self.do = what, where, found, expected, do
        text = f"{where}: {what}" if where else what
        if found is not None:
            text += f"; found {found}"
        if expected is not None:
            text += f", expected {expected}" if found is not None else f"; expected {expected}"
        super().__init__(f"{text}. {do}" if do else text)


class UsageError(AfterlogError):
    """Wrong arguments or settings: nothing was done."""

    exit_code = 2


class CorruptLogError(AfterlogError):
    """A log's files do not form one sequence, or a position is not the start of a line."""


class LostDataError(AfterlogError):
    """A checkpoint or committed end lies beyond what the files hold: a lost disk or an older copy."""


class NondeterminismError(AfterlogError):
    """A processor gave other bytes than before for the same input, code and settings."""


class ConflictError(AfterlogError):
    """Another run committed since this one read its checkpoint: this one has changed nothing."""


class AppendError(AfterlogError):
    """A write failed half way: `offsets` of the lines that are in, and the indexes of those that are `missing`.

    A retry passes only the missing ones. Where an fsync failed, not all that are in are `durable`: the machine's power may take them.
    """

    def __init__(self, what: str, *, where: str, offsets: list[int], missing: list[int], durable: bool = True) -> None:
        super().__init__(what, where=where, do=f"{len(offsets)} lines are in; append the rest again, nothing else")
        self.offsets, self.missing, self.durable = offsets, missing, durable


class Stopped(AfterlogError):
    """The run was asked to stop while it waited; whatever was committed stands."""
