"""A disk that forgets: what is in a file, what of it would survive a power loss, and which call fails.

The files themselves lie in memory (tmpfs) under HOME, so whoever reads them reads what was written. Beside each there is a
model of it: the bytes now, the bytes as of the last fsync, and the writes between; and for each folder its names likewise. The
model is strict: an fsync of a file does not make its name durable, one of its folder does.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


class KilledError(BaseException):
    """The process that made the call is dead; nothing that it does from here on has an effect."""


@dataclass
class Process:
    """Whoever makes calls. Its descriptors, and so its locks, go with it."""

    name: str
    dead: bool = False
    handles: set[int] = field(default_factory=set)


@dataclass
class Fault:
    """What goes wrong: at the `at`th call that it can befall; once, or from there on to the end of the step."""

    kind: str
    at: int
    lasts: bool = False
    aim: str = ""
    """Only where a path has this in it."""


@dataclass
class File:
    """One file's bytes: now, as of the last fsync, and what was done in between (offset and bytes; None truncates)."""

    content: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def write(self, at: int, data: bytes | None) -> None:
        """Write, or truncate."""
        _apply(self.content, at, data)
        self.pending.append((at, data))

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


class Disk:
    """HOME as the kernel has it, and the point at which each call passes."""

    def __init__(self, home: Path, random: random.Random) -> None:
        self.home, self.random = home, random
        self._prefix = str(home)
        self.folders: dict[str, Folder] = {str(home): Folder()}
        self.process: Process | None = None
        self.fault: Fault | None = None
        self.injected: list[str] = []
        self.calls, self.digest = 0, 0
        self.lost, self.how = False, ""
        self.touched: set[str] = set()
        """The folders in which anything was written, made or removed since whoever keeps this last looked."""
        self.preempt: Callable[[], None] = lambda: None

    def enter(self, call: str, where: str) -> str:
        """A call begins: gives how it is to end where that is not as it should ("after", "half", "short").

        Raises:
            OSError: it fails.
            KilledError: the process is dead, or dies now; all of them, where the power is `lost`.
        """
        process = self.process
        if process is None:
            return ""
        if process.dead or self.lost:
            raise KilledError
        self.calls += 1
        where = where.removeprefix(self._prefix)
        self.digest = zlib.crc32(f"{process.name} {call} {where}".encode(), self.digest)
        fault = self.fault
        if fault is None or call not in CALLS[fault.kind] or fault.aim not in where:
            return ""
        fault.at -= 1
        if fault.at > 0:
            return ""
        if not fault.lasts:
            self.fault = None
        self.injected.append(f"{fault.kind} at {call} {where} of {process.name}")
        return self._befall(fault.kind, call)

    def _befall(self, kind: str, call: str) -> str:
        if kind == "preempt":
            self.preempt()
            if self.lost:
                raise KilledError
            return ""
        if kind == "eio":
            raise OSError(errno.EIO, "Input/output error")
        if kind == "enospc":
            if call == "write" and self.random.random() < 0.5:
                self.fault = Fault("enospc", 1, lasts=self.random.random() < 0.5)  # a part fits, then nothing does
                return "short"
            raise OSError(errno.ENOSPC, "No space left on device")
        if kind in ("short", "refused", "unheard"):
            return kind
        if kind in ("torn", "unflushed"):
            self.how = "some" if kind == "torn" else ""
            self.die(kind)
        how = self.random.choice(["before", "after", "half"] if call == "write" else ["before", "after"])
        if how == "before":
            self.die(kind)
        return f"{kind} {how}"

    def leave(self, how: str) -> None:
        """A call has had its effect; a process that was to die after it dies now."""
        if how.startswith(("kill", "death", "power", "outage")):
            self.die(how.split()[0])

    def die(self, kind: str) -> None:
        """End the process that runs, or all of them."""
        assert self.process is not None
        self.process.dead = True
        self.lost = self.lost or kind not in ("kill", "death", "unflushed")
        raise KilledError

    def folder_of(self, path: str) -> tuple[Folder, str]:
        """The folder that a path lies in, and its name there."""
        folder, _, name = path.rpartition("/")
        return self.folders[folder], name

    def has(self, path: str) -> bool:
        """Whether there is a file or a folder of that name."""
        folder, _, name = path.rpartition("/")
        known = self.folders.get(folder)
        return known is not None and name in known.names

    def made_durable(self, path: str) -> None:
        """Somebody whose calls are not simulated has made a file or a folder durable, if it is one that is known."""
        folder, _, name = path.rpartition("/")
        known = self.folders.get(path) or (self.folders[folder].names.get(name) if folder in self.folders else None)
        if known is not None:
            known.sync()

    def touch(self, path: str) -> None:
        """Something in the folder of `path` is other than before."""
        self.touched.add(path.rpartition("/")[0])

    def lose_power(self) -> None:
        """Put on the disk what a power loss leaves there, which is durable."""
        before, self.folders = self.folders, {}
        self.touched.add("")  # all of them
        how = self.how or self.random.choice(["lost", "lost", "kept", "some", "some", "some"])
        self._restart(self.home, how, before)
        self.how = ""

    def _restart(self, path: Path, how: str, before: dict[str, Folder]) -> None:
        folder = before[str(path)]
        left = folder.after_power_loss(how, self.random)
        for gone in (path / name for name in folder.names.keys() - left.keys()):
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        for name in sorted(left):
            file = left[name]
            if file is None:
                (path / name).mkdir(exist_ok=True)
                self._restart(path / name, how, before)
            elif file.pending or folder.names.get(name) is not file:  # else it is as it was
                left[name] = _rewritten(path / name, file.after_power_loss(how, self.random))
        self.folders[str(path)] = Folder(left, dict(left))

    def adopt(self) -> None:
        """Take what lies under HOME as it is, durable."""
        self.folders = {}
        self.touched.add("")  # all of them
        for root, folders, files in os.walk(self.home):
            held = {name: _durable(Path(root, name).read_bytes()) for name in sorted(files)}
            names: dict[str, File | None] = {**dict.fromkeys(sorted(folders)), **held}
            self.folders[root] = Folder(names, dict(names))

    def log(self, log: str, partition: int, *, durable: bool) -> bytes:
        """A partition's segments put together: as they are, or as they would surely be after a power loss."""
        path = f"{self.home}/logs/{log}/{partition}"
        if durable:
            place = str(self.home)
            for name in ("logs", log, str(partition)):
                if name not in self.folders[place].durable:
                    return b""
                place = f"{place}/{name}"
        folder = self.folders.get(path)
        if folder is None:
            return b""
        names = folder.durable if durable else folder.names
        found = [names[name] for name in sorted(names) if name.endswith(".jsonl")]
        return b"".join([file.durable if durable else file.content for file in found if file is not None])


FILES = {"open", "create", "read", "write", "pwrite", "fsync", "flush", "ftruncate", "mkdir", "unlink", "flock"}
STATEMENTS = {"begin", "execute", "commit"}
HINGES = {"fsync", "flush", "begin", "commit", "committed", "connect", "quit"}
CALLS = {
    "kill": FILES | STATEMENTS | {"committed", "connect", "quit"},
    "power": FILES | STATEMENTS | {"committed", "connect", "quit"},
    "death": HINGES,
    "outage": HINGES,
    "torn": {"flush"},
    "unflushed": {"flush"},
    "eio": FILES - {"flock"},
    "enospc": {"create", "write", "pwrite", "mkdir"},
    "short": {"write"},
    "refused": STATEMENTS,
    "unheard": {"committed"},
    "preempt": FILES,
}
"""Which calls a fault can befall. "unheard": it was committed, and the connection lost before anybody heard of it. "death" and
"outage": a kill or the loss of power where most hangs on the order of things. "unflushed" and "torn": the same just
before bytes are made durable."""


def _apply(content: bytearray, at: int, data: bytes | None) -> None:
    if data is None:
        del content[at:]
        return
    if len(content) < at:
        content.extend(bytes(at - len(content)))
    content[at : at + len(data)] = data


def _rewritten(path: Path, data: bytes) -> File:
    before = path.stat().st_mtime_ns if path.exists() else None
    path.write_bytes(data)
    if before is not None:
        os.utime(path, ns=(before, before))
    return _durable(data)


def _durable(data: bytes) -> File:
    return File(bytearray(data), bytearray(data))
