"""A disk that forgets: what is in a file, what of it would survive a power loss, and which call fails.

There is nothing under HOME but a model: of each file the bytes now, the bytes as of the last fsync, and the writes between; and for each
folder its names likewise. The model is strict: an fsync of a file does not make its name durable, one of its folder does. Somebody
whose calls are not simulated gets real files, and what they leave is taken over.
"""

from __future__ import annotations

import errno
import os
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.simulator.files import File, Folder, durable_file, missing


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


class Disk:
    """HOME as the kernel has it, and the point at which each call passes."""

    def __init__(self, home: Path, random: random.Random) -> None:
        self.home, self.random = home, random
        self._prefix = str(home)
        self.folders: dict[str, Folder] = {str(home): Folder()}
        self.process: Process | None = None
        self.fault: Fault | None = None
        self.injected: list[str] = []
        self._made: list[str] = []
        self.lost, self.how = False, ""
        self._joined: dict[str, bytes] = {}
        self._saved: dict[str, File | None] = {}
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
        where = where.removeprefix(self._prefix)
        self._made.append(f"{process.name} {call} {where}")
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

    @property
    def calls(self) -> int:
        """How many were made."""
        return len(self._made)

    @property
    def digest(self) -> int:
        """A checksum of the calls that were made, in their order."""
        return zlib.crc32("".join(self._made).encode())

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

    def known(self, path: str) -> tuple[bool, File | None]:
        """Whether there is something of that name, and the file that it is, unless it is a folder."""
        folder, _, name = path.rpartition("/")
        found = self.folders.get(folder)
        if found is not None and name in found.names:
            return True, found.names[name]
        return path == self._prefix, None

    def put(self, path: str, file: File | None) -> None:
        """A new name."""
        folder, _, name = path.rpartition("/")
        if folder not in self.folders:
            raise missing(path)
        self.folders[folder].put(name, file)
        self.touch(path)

    def give(self, folders: tuple[str, ...], name: str, data: bytes) -> None:
        """Have a file in folders that may be new, durable."""
        place = self._prefix
        for folder in folders:
            self.folders[place].names.setdefault(folder, None)
            self.folders[place].sync()
            place = f"{place}/{folder}"
            self.folders.setdefault(place, Folder())
        self.put(f"{place}/{name}", durable_file(data))
        self.folders[place].sync()

    def remove(self, path: str) -> None:
        """An unlink."""
        if self.known(path)[1] is None:
            raise missing(path)
        folder, _, name = path.rpartition("/")
        self.folders[folder].remove(name)
        self.touch(path)

    def made_durable(self, path: str) -> None:
        """Somebody whose calls are not simulated has made a file or a folder durable, if it is one that is known."""
        folder, _, name = path.rpartition("/")
        known = self.folders.get(path) or (self.folders[folder].names.get(name) if folder in self.folders else None)
        if known is not None:
            known.sync()

    def touch(self, path: str) -> None:
        """Something in the folder of `path` is other than before."""
        folder = path.rpartition("/")[0]
        self.touched.add(folder)
        self._joined.pop(folder, None)

    def _touch_all(self) -> None:
        self.touched.add("")
        self._joined.clear()

    def lose_power(self) -> None:
        """Have on the disk what a power loss leaves there, which is durable."""
        before, self.folders = self.folders, {}
        self._touch_all()
        how = self.how or self.random.choice(["lost", "lost", "kept", "some", "some", "some"])
        self._restart(self._prefix, how, before)
        self.how = ""

    def _restart(self, path: str, how: str, before: dict[str, Folder]) -> None:
        folder = before[path]
        left = folder.after_power_loss(how, self.random)
        for name in sorted(left):
            file = left[name]
            if file is None:
                self._restart(f"{path}/{name}", how, before)
            elif file.pending or folder.names.get(name) is not file:  # else it is as it was
                left[name] = durable_file(file.after_power_loss(how, self.random), file.modified)
        self.folders[path] = Folder(left, dict(left))

    def save(self) -> None:
        """Have under HOME what is on this disk, for whoever makes calls that are not simulated."""
        there = {
            f"{place}/{name}": file for place, folder in self.folders.items() for name, file in folder.names.items()
        }
        for path in sorted(self._saved.keys() - there.keys(), reverse=True):
            os.unlink(path) if self._saved[path] else os.rmdir(path)  # noqa: PTH106, PTH108  # paths would have to be made
        for path, file in sorted(there.items()):
            if file is None:
                os.makedirs(path, exist_ok=True)  # noqa: PTH103  # likewise
            elif file.changed or self._saved.get(path) is not file:
                with open(path, "wb") as real:  # noqa: PTH123  # likewise
                    real.write(file.content)
                os.utime(path, ns=(file.modified, file.modified))
                file.changed = False
        self._saved = there

    def adopt(self) -> None:
        """Take what lies under HOME as it is, durable."""
        self.folders, self._saved = {}, {}
        self._touch_all()
        for root, folders, files in os.walk(self.home):
            names: dict[str, File | None] = dict.fromkeys(sorted(folders))
            for path in (Path(root, name) for name in sorted(files)):
                names[path.name] = file = durable_file(path.read_bytes(), path.stat().st_mtime_ns)
                file.changed = False
            self.folders[root] = Folder(names, dict(names))
            self._saved |= {f"{root}/{name}": file for name, file in names.items()}

    def log(self, log: str, partition: int, *, durable: bool) -> bytes:
        """A partition's segments put together: as they are, or as they would surely be after a power loss."""
        path = f"{self._prefix}/logs/{log}/{partition}"
        if not durable and (known := self._joined.get(path)) is not None:
            return known
        if durable and not self._is_sure(("logs", log, str(partition))):
            return b""
        folder = self.folders.get(path)
        if folder is None:
            return b""
        names = folder.durable if durable else folder.names
        found = [file for name, file in sorted(names.items()) if file is not None and name.endswith(".jsonl")]
        joined = b"".join([file.durable if durable else file.content for file in found])
        if not durable:
            self._joined[path] = joined
        return joined

    def _is_sure(self, names: tuple[str, ...]) -> bool:
        """Whether a folder would be there after a power loss."""
        place = self._prefix
        for name in names:
            if name not in self.folders[place].durable:
                return False
            place = f"{place}/{name}"
        return True


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
