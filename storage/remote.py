"""Where an archive lies: a folder, or any URL that fsspec knows (`s3://bucket/path`), its passwords kept out of every sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from storage.errors import AfterlogError, UsageError
from storage.segment import fsync_directory, fsync_file, make_directory

_USER = re.compile(r"(?<=://)[^/]*@")
_CUT_SHORT = re.compile(r"://[^/?#]*:[^/?#]*[/?#].*@")
"""A password that may go on behind what looks like the host: the rest would be taken for a path, and told."""
_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "r2"})
"""Where there are no folders to be made, and the attempt might make a bucket of a misspelt name."""


class Remote:
    """One place for objects, opened at first use: fsspec is imported only by whoever goes there."""

    def __init__(self, url: str) -> None:
        if _CUT_SHORT.search(url):
            raise UsageError(
                "setting AFTERLOG_ARCHIVE_URL: it cannot be read: an @ stands behind the host",
                do="Use a password without / ? # (most file systems take it as written, also a %2F), or none, and no @ in the path",
            )
        self._url = url
        self._fs: Any = None
        self._root = ""

    @property
    def shown(self) -> str:
        """The place as people may see it."""
        return _USER.sub("***@", self._url.partition("?")[0])

    @property
    def folder(self) -> Path | None:
        """The folder, where it is one."""
        if "://" not in self._url:
            return Path(self._url)
        return Path(self._url.removeprefix("file://")) if self._url.startswith("file://") else None

    @property
    def connected(self) -> bool:
        """Whether a file system that is no folder was opened: its connections and threads do not survive a fork."""
        return self._fs is not None

    def path(self, name: str) -> str:
        """An object as a sentence names it."""
        return f"{self.shown.rstrip('/')}/{name}"

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """An object's bytes.

        Raises:
            FileNotFoundError: there is no such object.
            AfterlogError: the place refused.
        """
        folder = self.folder
        if folder is not None:
            with self._in_a_sentence(), (folder / name).open("rb") as file:
                yield file
            return
        with self._in_a_sentence(), self._filesystem().open(f"{self._root}/{name}", "rb") as file:
            yield file

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name.

        Raises:
            AfterlogError: the place refused.
        """
        folder = self.folder
        with self._in_a_sentence(missing=False):
            if folder is not None:
                return (folder / name).exists()
            return bool(self._filesystem().exists(f"{self._root_of()}/{name}"))

    def put(self, draft: Path, name: str) -> None:
        """Have the file `draft` there under `name`, durably; the draft is gone after that. All of it or nothing is seen.

        Raises:
            AfterlogError: the place refused.
        """
        folder = self.folder
        with self._in_a_sentence(missing=False):
            if folder is not None:
                make_directory((folder / name).parent)
                draft.rename(folder / name)
                self.sync(name)
                return
            path = f"{self._root_of()}/{name}"
            if self._url.partition("://")[0] not in _BUCKETS:
                self._filesystem().makedirs(path.rpartition("/")[0], exist_ok=True)
            self._filesystem().put_file(str(draft), path)
            draft.unlink()

    def remove(self, name: str) -> None:
        """Drop an object, where there is one.

        Raises:
            AfterlogError: the place refused.
        """
        folder = self.folder
        with self._in_a_sentence(missing=False), suppress(FileNotFoundError):
            if folder is not None:
                (folder / name).unlink()
            elif self.exists(name):
                self._filesystem().rm_file(f"{self._root_of()}/{name}")

    def sync(self, name: str) -> None:
        """Make an object that is there survive a power loss: who put it may have died before it, or a name above it, was.

        Raises:
            AfterlogError: the place refused.
        """
        folder = self.folder
        if folder is None:
            return  # there an object is durable once it is seen
        with self._in_a_sentence(missing=False):
            fsync_file(folder / name)
            for above in (folder / name).parents:
                if above == folder.parent:
                    break
                fsync_directory(above)
            with suppress(PermissionError):  # in a folder that we may not read we have made nothing
                fsync_directory(folder.parent)

    def drafts(self, name: str, otherwise: Path) -> Path:
        """Where a draft of an object is to be written: on the same file system where that can be told."""
        folder = self.folder
        target = folder / name if folder is not None else otherwise / name.replace("/", "-")
        with self._in_a_sentence():
            make_directory(target.parent)
        return target.with_name(target.name + ".part")

    def _root_of(self) -> str:
        self._filesystem()
        return self._root

    def _filesystem(self) -> Any:
        if self._fs is None:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]  # it brings no types; nobody else waits for it

            try:
                # No listings kept: another archive or a person may have written there since.
                filesystem, root = url_to_fs(self._url, use_listings_cache=False)
            except (ImportError, ValueError) as error:
                raise UsageError(
                    f"setting AFTERLOG_ARCHIVE_URL: this kind of URL cannot be used: {self._plain(error)}",
                    where=self.shown,
                    do="For s3:// install afterlog[s3]; for others what fsspec asks for",
                ) from None  # its text may hold the URL
            self._root = str(root).rstrip("/")
            self._fs = filesystem  # last: other threads go on as soon as it is there
        return self._fs

    @contextmanager
    def _in_a_sentence(self, *, missing: bool = True) -> Iterator[None]:
        """Tell what went wrong there in one sentence, and never a password; what is `missing` may be told as it is."""
        try:
            yield
        except AfterlogError:
            raise
        except Exception as error:  # each file system has errors of its own
            if missing and isinstance(error, FileNotFoundError):
                raise
            raise AfterlogError(
                f"the archive refused: {self._plain(error)}",
                where=self.shown,
                do="Nothing local was removed; check that it can be reached, its rights and AFTERLOG_ARCHIVE_URL",
            ) from None  # its text may hold the URL

    def _plain(self, error: BaseException) -> str:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        for secret in self._secrets():
            said = said.replace(secret, "***")
        return said

    def _secrets(self) -> list[str]:
        user = _USER.search(self._url)
        query = self._url.partition("?")[2]
        raw = [user[0].rstrip("@"), *user[0].rstrip("@").split(":")] if user else []
        raw += [pair.partition("=")[2] for pair in query.split("&")]
        return sorted({text for part in raw for text in (part, unquote(part)) if text}, key=len, reverse=True)
