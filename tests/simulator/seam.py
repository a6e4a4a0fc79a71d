"""The one seam: the kernel's calls that touch files under HOME pass through the simulated disk, all others pass by."""

from __future__ import annotations

import errno
import fcntl
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from unittest import mock
from weakref import WeakSet

import storage.manifest
import storage.times
import tasks.follow
from storage.append import _Tail
from tests.simulator.disk import Disk, KilledError, Process
from tests.simulator.files import FOLDER, File, Folder, missing, state_of

_OPEN_TAIL = _Tail.__init__
_NO_TIME = SimpleNamespace(thread_time=lambda: 0.0)  # the kernel's is a slow call, and no seed's
_FIRST = 1 << 30  # no descriptor of the kernel's is that high, and none of ours is given twice


@dataclass(slots=True)
class _Handle:
    path: str
    file: File | None
    process: Process | None
    appends: bool


class Seam:
    """What stands for `os` and `fcntl` while a simulation runs."""

    def __init__(self, disk: Disk) -> None:
        self.wall = 0
        self._take(disk)
        self._handles: dict[int, _Handle] = {}
        self._next = _FIRST
        self._real = SimpleNamespace(
            **{name: getattr(os, name) for name in _CALLS}, flock=fcntl.flock, open_file=io.open
        )
        self._passing = False
        self._tails: WeakSet[_Tail] = WeakSet()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put it in place of the kernel's calls, and of the wall clock."""
        clock = SimpleNamespace(time_ns=self._time_ns)
        calls = {name: getattr(self, f"_{name}") for name in _CALLS}
        calls |= {name: partial(self._not_simulated, getattr(os, name)) for name in _OTHERS}
        with (
            mock.patch.multiple(os, **calls),
            mock.patch.object(fcntl, "flock", self._flock),
            mock.patch.object(storage.times, "time", clock),
            mock.patch.object(tasks.follow, "time", _NO_TIME),
            mock.patch.object(_Tail, "__init__", lambda *given: self._open_tail(*given)),
            mock.patch.object(io, "open", self._open_file),
            mock.patch.object(storage.manifest, "open", self._open_file, create=True),
        ):
            yield

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Let calls pass by for a while."""
        self._passing = True
        try:
            yield
        finally:
            self._passing = False

    @contextmanager
    def serving(self, disk: Disk) -> Iterator[None]:
        """Have another HOME's calls pass through its own disk for a while, and this one's pass by."""
        before = self.disk
        self._take(disk)
        try:
            yield
        finally:
            self._take(before)

    def _take(self, disk: Disk) -> None:
        self.disk, self.home, self._root = disk, f"{disk.home}/", str(disk.home)

    def end(self, process: Process) -> None:
        """A process is no more: its descriptors are closed, and so its locks are free."""
        process.dead = True
        for number in sorted(process.handles):
            self._release(number)
        process.handles.clear()

    def let_go(self) -> None:
        """Have nobody close a descriptor of a dead process later, when it would be one of the kernel's."""
        for tail in self._tails:
            if tail.handle >= _FIRST:
                tail.handle = -1

    def _open_tail(self, tail: _Tail, base: int, path: Path) -> None:
        _OPEN_TAIL(tail, base, path)
        self._tails.add(tail)

    def _ours(self, path: Any) -> str:
        """The name of what is simulated, HOME and all in it; nothing for what passes by."""
        if self._passing or isinstance(path, int):
            return ""
        name: str = os.fspath(path)
        return name if name.startswith(self.home) or name == self._root else ""

    def _open(self, path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        if not (name := self._ours(path)):
            return int(self._real.open(path, flags, mode, **more))
        assert not flags & (os.O_TRUNC | os.O_EXCL), "nobody needs that here"
        creates = bool(flags & os.O_CREAT)
        how = self.disk.enter("create" if creates and not self.disk.known(name)[0] else "open", name)
        there, file = self.disk.known(name)  # only now: another may have been quicker
        if not there:
            if not creates:
                raise missing(name)
            file = File()
            self.disk.put(name, file)
        if how:
            self.disk.leave(how)
        self._next += 1
        process = self.disk.process
        self._handles[self._next] = _Handle(name, file, process, bool(flags & os.O_APPEND))
        if process is not None:
            process.handles.add(self._next)
        return self._next

    def _open_file(self, path: Any, mode: str = "r", *more: Any, **named: Any) -> IO[Any]:
        """A file object; whoever asks for one wants to read, and no fault befalls it."""
        if not (name := self._ours(path)):
            opened: IO[Any] = self._real.open_file(path, mode, *more, **named)
            return opened
        there, file = self.disk.known(name)
        if file is None:
            raise IsADirectoryError(errno.EISDIR, "Is a directory", name) if there else missing(name)
        assert mode in ("r", "rb"), "nobody writes so"
        data = io.BytesIO(bytes(file.content))
        return data if mode == "rb" else io.TextIOWrapper(data, encoding="utf-8")

    def _close(self, number: int) -> None:
        if number < _FIRST:
            self._real.close(number)
        elif number in self._handles:  # else it went with its process
            process = self._handles[number].process
            if process is not None:
                process.handles.discard(number)
            self._release(number)

    def _release(self, number: int) -> None:
        handle = self._handles.pop(number)
        if handle.file is not None:
            handle.file.holders.discard(number)

    def _at(self, call: str, number: int) -> tuple[_Handle, str]:
        handle = self._handles.get(number)
        if handle is None:
            raise KilledError
        return handle, self.disk.enter(call, handle.path)

    def _pread(self, number: int, length: int, at: int) -> bytes:
        if number < _FIRST:
            return bytes(self._real.pread(number, length, at))
        handle, how = self._at("read", number)
        self.disk.leave(how)
        assert handle.file is not None
        return bytes(handle.file.content[at : at + length])

    def _write(self, number: int, data: bytes) -> int:
        if number < _FIRST:
            return int(self._real.write(number, data))
        handle, how = self._at("write", number)
        assert handle.file is not None
        assert handle.appends
        if how == "short" or how.endswith("half"):
            data = data[: self.disk.random.randrange(len(data)) + (how == "short")]
        at = len(handle.file.content)
        handle.file.write(at, data)
        self._touch(handle)
        self.disk.leave(how)
        return len(data)

    def _pwrite(self, number: int, data: bytes, at: int) -> int:
        if number < _FIRST:
            return int(self._real.pwrite(number, data, at))
        handle, how = self._at("pwrite", number)
        assert handle.file is not None
        handle.file.write(at, data)
        self._touch(handle)
        self.disk.leave(how)
        return len(data)

    def _ftruncate(self, number: int, length: int) -> None:
        if number < _FIRST:
            self._real.ftruncate(number, length)
            return
        handle, how = self._at("ftruncate", number)
        assert handle.file is not None
        handle.file.write(length, None)
        self._touch(handle)
        self.disk.leave(how)

    def _fsync(self, number: int) -> None:
        if number < _FIRST:
            self._real.fsync(number)
            if self._passing:  # what it makes durable is so for all
                self.disk.made_durable(os.readlink(f"/proc/self/fd/{number}"))  # noqa: PTH115  # a link of the kernel's
            return
        known = self._handles.get(number)
        handle, how = self._at("flush" if known and known.file and known.file.pending else "fsync", number)
        (handle.file or self.disk.folders[handle.path]).sync()
        self.disk.leave(how)

    _fdatasync = _fsync

    def _fstat(self, number: int) -> Any:
        if number < _FIRST:
            return self._real.fstat(number)
        if (handle := self._handles.get(number)) is None:
            raise KilledError
        return FOLDER if handle.file is None else state_of(handle.file)

    def _stat(self, path: Any, **more: Any) -> Any:
        if not (name := self._ours(path)):
            return self._real.stat(path, **more)
        there, file = self.disk.known(name)
        if file is not None:
            return state_of(file)
        if there:
            return FOLDER
        raise missing(name)

    def _mkdir(self, path: Any, mode: int = 0o777, **more: Any) -> None:
        if not (name := self._ours(path)):
            self._real.mkdir(path, mode, **more)
            return
        how = self.disk.enter("mkdir", name)
        if self.disk.known(name)[0]:
            raise FileExistsError(errno.EEXIST, "File exists", name)
        self.disk.put(name, None)
        self.disk.folders[name] = Folder()
        self.disk.leave(how)

    def _unlink(self, path: Any, **more: Any) -> None:
        if not (name := self._ours(path)):
            self._real.unlink(path, **more)
            return
        how = self.disk.enter("unlink", name)
        self.disk.remove(name)
        self.disk.leave(how)

    def _listdir(self, path: Any = ".") -> list[str]:
        if not (name := self._ours(path)):
            found: list[str] = self._real.listdir(path)
            return found
        folder = self.disk.folders.get(name)
        if folder is None:
            raise missing(name)
        return [*folder.names]

    def _flock(self, number: int, what: int) -> None:
        if number < _FIRST:
            self._real.flock(number, what)
            return
        handle, how = self._at("flock", number)
        assert handle.file is not None
        if not handle.file.lock(number, shared=bool(what & fcntl.LOCK_SH)):
            if what & fcntl.LOCK_NB:
                raise BlockingIOError(errno.EWOULDBLOCK, "Resource temporarily unavailable")
            # It waits for one that it interrupted, who cannot go on before it ends: it is killed while it waits.
            self.disk.die("kill")
        self.disk.leave(how)

    def _time_ns(self) -> int:
        return self.wall * 1_000_000

    def _touch(self, handle: _Handle) -> None:
        assert handle.file is not None
        handle.file.modified = self._time_ns()
        self.disk.touch(handle.path)

    def _not_simulated(self, real: Callable[..., Any], path: Any, *more: Any, **named: Any) -> Any:
        """A call that a file of HOME has no answer to."""
        assert not self._ours(path), f"{real.__name__} of {path} is not simulated"
        return real(path, *more, **named)


_CALLS = (
    "open", "close", "pread", "write", "pwrite", "fsync", "fdatasync", "ftruncate", "fstat", "stat", "mkdir", "unlink", "listdir",
)  # fmt: skip
_OTHERS = ("scandir", "rename", "replace", "link", "symlink", "rmdir", "truncate", "utime", "chmod", "lstat")
