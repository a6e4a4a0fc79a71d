"""The one seam: the kernel's calls that touch files under HOME pass through the simulated disk, all others pass by."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from weakref import WeakSet

import storage.times
import tasks.follow
from storage.append import _Tail
from tests.simulator.disk import Disk, File, KilledError, Process

_OPEN_TAIL = _Tail.__init__
_FIRST = 1 << 30  # no descriptor of the kernel's is that high, and none of ours is given twice


@dataclass(slots=True)
class _Handle:
    real: int
    path: str
    file: File | None
    process: Process | None
    appends: bool


class Seam:
    """What stands for `os` and `fcntl` while a simulation runs."""

    def __init__(self, disk: Disk) -> None:
        self.disk, self.home, self._root = disk, f"{disk.home}/", str(disk.home)
        self.wall = 0
        self._handles: dict[int, _Handle] = {}
        self._next = _FIRST
        self._real = SimpleNamespace(**{name: getattr(os, name) for name in _CALLS}, flock=fcntl.flock)
        self._passing = False
        self._tails: WeakSet[_Tail] = WeakSet()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put it in place of the kernel's calls, and of the wall clock."""
        clock = SimpleNamespace(time_ns=lambda: self.wall * 1_000_000)
        calls = {name: getattr(self, f"_{name}") for name in _CALLS}
        with (
            mock.patch.multiple(os, **calls),
            mock.patch.object(fcntl, "flock", self._flock),
            mock.patch.object(storage.times, "time", clock),
            mock.patch.object(
                tasks.follow, "time", SimpleNamespace(thread_time=lambda: 0.0)
            ),  # a slow call, and no seed's
            mock.patch.object(_Tail, "__init__", lambda *given: self._open_tail(*given)),
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

    def end(self, process: Process) -> None:
        """A process is no more: its descriptors are closed, and so its locks are free."""
        process.dead = True
        for number in sorted(process.handles):
            self._close_real(self._handles.pop(number).real)
        process.handles.clear()

    def let_go(self) -> None:
        """Have nobody close a descriptor of a dead process later, when it would be one of the kernel's."""
        for tail in self._tails:
            if tail.handle >= _FIRST:
                tail.handle = -1

    def _open_tail(self, tail: _Tail, base: int, path: Path) -> None:
        _OPEN_TAIL(tail, base, path)
        self._tails.add(tail)

    def _is_ours(self, path: Any) -> bool:
        return not self._passing and not isinstance(path, int) and os.fspath(path).startswith(self.home)

    def _open(self, path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        name = os.fspath(path)
        if self._passing or not (name.startswith(self.home) or name == self._root):
            return int(self._real.open(path, flags, mode, **more))
        creates = bool(flags & os.O_CREAT) and not self.disk.has(name)
        how = self.disk.enter("create" if creates else "open", name)
        creates = creates and not self.disk.has(name)  # another may have been quicker
        real, file = -1, None  # of a folder nothing but its fsync is wanted
        if name not in self.disk.folders:
            real = self._real.open(name, flags, mode, **more)
            folder, last = self.disk.folder_of(name)
            if creates:
                folder.put(last, File())
                self.disk.touch(name)
            file = folder.names[last]
        if how:
            self._close_real(real)
            self.disk.leave(how)
        self._next += 1
        process = self.disk.process
        self._handles[self._next] = _Handle(real, name, file, process, bool(flags & os.O_APPEND))
        if process is not None:
            process.handles.add(self._next)
        return self._next

    def _close(self, number: int) -> None:
        if number < _FIRST:
            self._real.close(number)
            return
        if (handle := self._handles.pop(number, None)) is not None:  # else it went with its process
            if handle.process is not None:
                handle.process.handles.discard(number)
            self._close_real(handle.real)

    def _close_real(self, real: int) -> None:
        if real >= 0:
            self._real.close(real)

    def _at(self, call: str, number: int) -> tuple[_Handle, str]:
        handle = self._handles.get(number)
        if handle is None:
            raise KilledError
        return handle, self.disk.enter(call, handle.path)

    def _read(self, number: int, length: int) -> bytes:
        if number < _FIRST:
            return bytes(self._real.read(number, length))
        return bytes(self._real.read(self._at("read", number)[0].real, length))

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
        self.disk.touch(handle.path)
        done = int(self._real.write(handle.real, data))
        self._touch(handle)
        self.disk.leave(how)
        return done

    def _pwrite(self, number: int, data: bytes, at: int) -> int:
        if number < _FIRST:
            return int(self._real.pwrite(number, data, at))
        handle, how = self._at("pwrite", number)
        assert handle.file is not None
        handle.file.write(at, data)
        self.disk.touch(handle.path)
        done = int(self._real.pwrite(handle.real, data, at))
        self.disk.leave(how)
        return done

    def _ftruncate(self, number: int, length: int) -> None:
        if number < _FIRST:
            self._real.ftruncate(number, length)
            return
        handle, how = self._at("ftruncate", number)
        assert handle.file is not None
        handle.file.write(length, None)
        self.disk.touch(handle.path)
        self._real.ftruncate(handle.real, length)
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

    def _fstat(self, number: int) -> os.stat_result:
        if number < _FIRST:
            found: os.stat_result = self._real.fstat(number)
            return found
        if (handle := self._handles.get(number)) is None:
            raise KilledError
        return self._real.fstat(handle.real)

    def _mkdir(self, path: Any, mode: int = 0o777, **more: Any) -> None:
        if not self._is_ours(path):
            self._real.mkdir(path, mode, **more)
            return
        name = os.fspath(path)
        how = self.disk.enter("mkdir", name)
        self._real.mkdir(path, mode)
        folder, last = self.disk.folder_of(name)
        folder.put(last, None)
        self.disk.touch(name)
        self.disk.folders[name] = type(folder)()
        self.disk.leave(how)

    def _unlink(self, path: Any, **more: Any) -> None:
        if not self._is_ours(path):
            self._real.unlink(path, **more)
            return
        how = self.disk.enter("unlink", os.fspath(path))
        self._real.unlink(path)
        folder, last = self.disk.folder_of(os.fspath(path))
        folder.remove(last)
        self.disk.touch(os.fspath(path))
        self.disk.leave(how)

    def _listdir(self, path: Any = ".") -> list[str]:
        if self._passing or isinstance(path, int) or not (name := os.fspath(path)).startswith(self.home):
            found: list[str] = self._real.listdir(path)
            return found
        folder = self.disk.folders.get(name)
        if folder is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return [*folder.names]

    def _flock(self, number: int, what: int) -> None:
        if number < _FIRST:
            self._real.flock(number, what)
            return
        handle, how = self._at("flock", number)
        try:
            self._real.flock(handle.real, what | fcntl.LOCK_NB)
        except BlockingIOError:
            if what & fcntl.LOCK_NB:
                raise
            # It waits for one that it interrupted, who cannot go on before it ends: it is killed while it waits.
            self.disk.die("kill")
        self.disk.leave(how)

    def _touch(self, handle: _Handle) -> None:
        os.utime(handle.real, ns=(self.wall * 1_000_000, self.wall * 1_000_000))


_CALLS = (
    "open", "close", "read", "write", "pread", "pwrite", "fsync", "fdatasync", "ftruncate", "fstat", "mkdir", "unlink", "listdir",
)  # fmt: skip
