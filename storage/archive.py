"""The archive: sealed segments, compressed, each an object that is read back and compared before its local file may go.

An object is one zstd frame of a segment's raw bytes, `<log>/<partition>/<base offset>.jsonl.zst`; `zstdcat` shows it. A reader
gets a local file of the raw bytes without a name, unpacked once and checked against the manifest; the last few are kept.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO

import zstandard

from storage.errors import AfterlogError, CorruptLogError, LostDataError
from storage.manifest import name_of, read_manifest
from storage.remote import Remote
from storage.segment import Entry, make_directory, segment_path
from storage.steps import reached

LEVEL = 6
_PIECE = 1 << 20
_PACKED = 16_384
_KEPT = 4


class Incomplete(AfterlogError):
    """An object is no whole frame: what a kill or a bad disk leaves."""


class Archive:
    """The archive of one HOME. To be shared between threads."""

    def __init__(self, remote: Remote, cache: Path) -> None:
        self.remote, self._cache = remote, cache
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], int] = OrderedDict()

    def put(self, directory: Path, entry: Entry) -> int:
        """Have a segment in the archive, durably, read back and compared; gives the object's size.

        Raises:
            CorruptLogError: the local file is not what its entry says, or the archive has another segment at its place.
            FileNotFoundError: the local file is gone.
        """
        name = object_name(directory, entry)
        try:
            return self.prove(directory, entry)
        except (FileNotFoundError, Incomplete):
            pass  # never put, or what a kill has left
        draft = self.remote.drafts(name, self._cache)
        self._compress(directory, entry, draft)
        reached("archive-compressed")
        self.remote.put(draft, name)
        reached("archive-put")
        return self.check(directory, entry)

    def prove(self, directory: Path, entry: Entry) -> int:
        """`check`, and have the object survive a power loss: only after that may anything rely on it."""
        size = self.check(directory, entry)
        self.remote.sync(object_name(directory, entry))
        return size

    def check(self, directory: Path, entry: Entry) -> int:
        """Read an object back and compare it with its entry; gives its size.

        Raises:
            FileNotFoundError: it is not there.
            Incomplete: it is no whole frame.
            CorruptLogError: it holds other bytes.
        """
        return self.unpack(directory, entry, lambda _: None)

    def unpack(self, directory: Path, entry: Entry, take: Callable[[bytes], object]) -> int:
        """Give the raw bytes of a segment to `take`, in pieces, and compare them on the way; gives the object's size."""
        digest, length, total = hashlib.sha256(), 0, 0
        name = object_name(directory, entry)
        where = self.remote.path(name)
        unpacker = zstandard.ZstdDecompressor().decompressobj()
        with self.remote.open(name) as file:
            try:
                while packed := file.read(_PACKED):
                    total += len(packed)
                    piece = unpacker.decompress(packed)  # some hundred KiB, of a log
                    digest.update(piece)
                    length += len(piece)
                    take(piece)
                    if unpacker.eof or length > entry.length:
                        break
            except zstandard.ZstdError as error:
                raise Incomplete(
                    f"the object is no whole zstd frame: {error}", where=where, found=f"an error after {length} bytes"
                ) from error
            whole = unpacker.eof or length > entry.length  # of what is longer the end does not matter
            if not whole:
                raise Incomplete("the object is cut off", where=where, found=f"{total} bytes of it")
            if unpacker.eof and (unpacker.unused_data or file.read(1)):
                raise Incomplete("the object goes on after its end", where=where, found=f"more than {total} bytes")
        if (length, digest.hexdigest()) != (entry.length, entry.sha256):
            raise CorruptLogError(
                "the archive has another segment than the manifest says", where=where,
                found=f"{length} bytes, SHA-256 {digest.hexdigest()}", expected=f"{entry.length} bytes, SHA-256 {entry.sha256}",
                do="Compare the two; where the log was put back older, the archive has what it lost. Move one of them away",
            )  # fmt: skip
        return total

    def remove(self, directory: Path) -> None:
        """Drop the objects of a partition that is dropped, whatever of them is there; nobody must be able to read it any more.

        Raises:
            AfterlogError: the place refused.
        """
        for entry in read_manifest(directory):
            self.remote.remove(object_name(directory, entry))

    def open(self, directory: Path, entry: Entry) -> int:
        """A descriptor of a file without a name that holds the raw bytes of an archived segment; the caller closes it.

        Raises:
            LostDataError: it is neither here nor in the archive.
            CorruptLogError: the object holds other bytes than the manifest says.
        """
        key = (str(directory), entry.sha256)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._fetch(directory, entry)
                while len(self._kept) > _KEPT:
                    os.close(self._kept.popitem(last=False)[1])
            self._kept.move_to_end(key)
            return os.dup(self._kept[key])

    def close(self) -> None:
        """Let go of what is kept."""
        with self._lock:
            while self._kept:
                os.close(self._kept.popitem()[1])

    def _fetch(self, directory: Path, entry: Entry) -> int:
        make_directory(self._cache)
        with tempfile.TemporaryFile(dir=self._cache) as file:
            try:
                self.unpack(directory, entry, into(file, self._cache))
            except FileNotFoundError as error:
                raise LostDataError(
                    "a segment is neither here nor in the archive",
                    where=f"{name_of(directory)}, offsets {entry.base} to {entry.end}",
                    expected=f"{segment_path(directory, entry.base).name} in {directory}, or {self.remote.path(object_name(directory, entry))}",
                    do="Put it back from a backup, or set AFTERLOG_ARCHIVE_URL to where it was archived",
                ) from error  # fmt: skip
            return os.dup(file.fileno())

    def _compress(self, directory: Path, entry: Entry, draft: Path) -> None:
        """Compress a segment's file into `draft`, durably.

        Raises:
            CorruptLogError: the file is not what its entry says; it must not take the place of what was sealed.
        """
        path = segment_path(directory, entry.base)
        with path.open("rb") as source:
            try:
                found = _compressed(source, draft)
            except OSError as error:
                draft.unlink(missing_ok=True)
                raise AfterlogError(
                    f"cannot compress a segment: {error.strerror}", where=str(draft),
                    do="Nothing local was removed; make room there, or check the disk",
                ) from error  # fmt: skip
        if found != entry.sha256:
            draft.unlink()
            raise CorruptLogError(
                "a sealed segment was changed; it is not archived", where=str(path), found=f"SHA-256 {found}",
                expected=entry.sha256, do="`afterlog verify` tells more; put it back from a backup",
            )  # fmt: skip


def into(file: IO[bytes], place: Path) -> Callable[[bytes], None]:
    """What has a file of ours take what is unpacked: where there is no space for it, its place is told, not the archive's."""

    def take(piece: bytes) -> None:
        try:
            file.write(piece)
            file.flush()
        except OSError as error:
            raise AfterlogError(f"cannot unpack a segment: {error.strerror}", where=str(place)) from error

    return take


def _compressed(source: BinaryIO, draft: Path) -> str:
    """Compress a file into `draft`, durably; gives the SHA-256 of what was read."""
    digest = hashlib.sha256()
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as target:
        compressor = zstandard.ZstdCompressor(LEVEL, write_checksum=True)
        with compressor.stream_writer(target, size=source.seek(0, os.SEEK_END), closefd=False) as writer:
            source.seek(0)
            while piece := source.read(_PIECE):
                digest.update(piece)
                writer.write(piece)
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest()


def object_name(directory: Path, entry: Entry) -> str:
    """The name of a segment's object in the archive."""
    return f"{name_of(directory)}/{segment_path(directory, entry.base).name}.zst"
