"""What the simulated disk keeps of files and folders: as they are, and as they would surely be after a power loss."""

from __future__ import annotations

import errno
import itertools
import os
import random
import stat
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_numbers = itertools.count(1)
_NEW = 1 << 62  # of a file that nothing was written to yet: its time is the machine's own, which no wall here reaches


@dataclass
class File:
    """One file's bytes: now, as of the last fsync, and what was done in between (offset and bytes; None truncates)."""

    content: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    modified: int = _NEW
    """In nanoseconds, as the kernel has it."""
    number: int = field(default_factory=lambda: next(_numbers))
    """The inode."""
    changed: bool = True
    """Since it was last saved."""
    holders: set[int] = field(default_factory=set)
    """The descriptors that have it locked: one, or any number that share it."""
    shared: bool = False

    def write(self, at: int, data: bytes | None) -> None:
        """Write, or truncate."""
        _apply(self.content, at, data)
        self.pending.append((at, data))
        self.changed = True

    def sync(self) -> None:
        """An fsync."""
        for at, data in self.pending:
            _apply(self.durable, at, data)
        self.pending.clear()

    def after_power_loss(self, how: str, random: random.Random) -> bytes:
        """What is left: nothing since the last fsync, all of it, or some of it, torn; a hole reads as NULs."""
        left = bytearray(self.durable)
        for at, data in self.pending:
            if how == "lost" or (how == "some" and random.random() < 0.4):
                if how == "some" and data and random.random() < 0.5:
                    _apply(left, at, bytes(len(data)))  # its length reached the disk, its bytes did not
                continue
            if how == "some" and data and random.random() < 0.4:
                cut = random.randrange(len(data) + 1)
                data = bytes(cut) + data[cut:] if random.random() < 0.3 else data[:cut]
            _apply(left, at, data)
        return bytes(left)

    def lock(self, holder: int, *, shared: bool) -> bool:
        """A flock that does not wait; whether it was free."""
        if self.holders - {holder} and not (shared and self.shared):
            return False
        self.holders.add(holder)
        self.shared = shared
        return True


@dataclass
class Folder:
    """The names in one folder: now, as of its last fsync, and what was done in between. A folder in it is None."""

    names: dict[str, File | None] = field(default_factory=dict)
    durable: dict[str, File | None] = field(default_factory=dict)
    pending: list[tuple[str, bool, File | None]] = field(default_factory=list)

    def put(self, name: str, file: File | None) -> None:
        """A new name."""
        self.names[name] = file
        self.pending.append((name, True, file))

    def remove(self, name: str) -> None:
        """An unlink."""
        self.pending.append((name, False, self.names.pop(name)))

    def sync(self) -> None:
        """An fsync."""
        self.durable = dict(self.names)
        self.pending.clear()

    def after_power_loss(self, how: str, random: random.Random) -> dict[str, File | None]:
        """The names that are left."""
        left = dict(self.durable)
        for name, made, file in self.pending:
            if how == "lost" or (how == "some" and random.random() < 0.4):
                continue
            if made:
                left[name] = file
            else:
                left.pop(name, None)
        return left


def _apply(content: bytearray, at: int, data: bytes | None) -> None:
    if data is None:
        del content[at:]
        return
    if len(content) < at:
        content.extend(bytes(at - len(content)))
    content[at : at + len(data)] = data


def durable_file(data: bytes, modified: int = _NEW) -> File:
    """A file whose bytes would all survive."""
    return File(bytearray(data), bytearray(data), modified=modified)


class State(NamedTuple):
    """What is asked of `os.stat_result`; what is not fails loudly."""

    st_mode: int
    st_ino: int
    st_size: int
    st_mtime: float
    st_mtime_ns: int
    st_dev: int = 0


FOLDER = State(stat.S_IFDIR | 0o700, 0, 0, 0.0, 0)


def state_of(file: File) -> State:
    """What the kernel says of a file."""
    return State(stat.S_IFREG | 0o600, file.number, len(file.content), file.modified / 1e9, file.modified)


def missing(path: Any) -> FileNotFoundError:
    """What the kernel says where there is none."""
    return FileNotFoundError(errno.ENOENT, "No such file or directory", os.fspath(path))
