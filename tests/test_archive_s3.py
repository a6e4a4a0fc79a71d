"""The archive in an S3 bucket: a real server that speaks the protocol, and a real client."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]  # it brings no types
import pytest
from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]  # likewise

from storage import subject
from storage.door import append_lines
from storage.errors import AfterlogError, UsageError
from storage.remote import Remote
from storage.store import Store
from storage.subject import subject_events
from tasks.verify import verify_all
from tests.conftest import afterlog, log_bytes
from tests.test_archive import archive, local, whole
from tests.test_basket import T, as_seen, line
from tests.test_commit import process, processed, result, tax

MakeStore = Callable[..., Store]
SECRET = "hunter2marked"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket on a server of these tests; how it is reached stands in the environment, as S3's own tools have it."""
    import boto3
    from moto.server import ThreadedMotoServer  # only here: each of the processes that run tests imports this module

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "ann", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name, value)
        place = {"LocationConstraint": "eu-central-1"}
        boto3.client("s3").create_bucket(Bucket="logs", CreateBucketConfiguration=place)
        yield "s3://logs/afterlog"
    server.stop()


def test_segments_go_to_a_bucket_and_are_read_from_there(make_store: MakeStore, bucket: str, tmp_path: Path) -> None:
    store = make_store(segment_bytes=2000, live_window="1ms", archive_url=bucket)
    for part in range(4):
        processed(store, *(tax(n + part * 20) for n in range(20)))
    before, rows = log_bytes(store.home, "events"), result(store)
    done = archive(store)["events/0"]
    assert (done.put, done.removed) == (3, 3)
    assert len(local(store)) == 1
    assert whole(store) == before
    found, problems = verify_all(store, store.settings)
    assert problems == []
    assert {each.name: each.archived for each in found}["events/0"] == 3
    assert process(store)[1] == {}
    assert result(store) == rows
    assert archive(store)["events/0"].put == 0
    command = afterlog(store.home, "read", "events", archive_url=bucket)  # a process of its own, that knows nothing yet
    assert (command.returncode, command.stdout) == (0, before), command.stderr.decode()
    directory, names = store.directory("events", 0), [f"events/0/{n:020d}.jsonl.zst" for n in (0, 1)]
    assert [store.archive.remote.exists(name) for name in names] == [True, False]
    for _ in range(2):  # the second time there is nothing left
        store.archive.remove(directory)
    assert not store.archive.remote.exists(names[0])
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_a_search_by_several_processes_does_not_fork_what_is_connected_to_a_bucket(
    make_store: MakeStore, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "_WORTH_A_PROCESS", 2_000)
    fork, forks = os.fork, []
    monkeypatch.setattr(os, "fork", lambda: forks.append(1) or fork())
    found = {}
    for place in ("", bucket + "/searched"):
        small: dict[str, Any] = {"segment_bytes": 1_500, "live_window": "1ms"} | (
            {"archive_url": place} if place else {}
        )
        store = make_store(f"home{len(place)}", **small)
        for part in range(4):
            append_lines(store, "events", [line(n % 3, T + n, T + n) for n in range(part * 10, part * 10 + 10)])
        process(store)
        assert archive(store)["events/0"].removed > 1
        again = Store(store.settings)  # one that has opened nothing yet
        found[place] = as_seen(subject_events(again, "events", 0, "1", processes=3)), len(forks)
        forks.clear()
    (here, forked), (there, not_forked) = found.values()
    assert (len(here), forked, not_forked) == (13, 2, 0)
    assert there == here


@pytest.mark.parametrize(
    "login", ["ann:hunter/2", "ann@home:hunter/2", "ann:h@hunter/2", "ann:hunter?2", "ann:hunter#2"]
)
def test_a_password_that_would_be_taken_for_a_host_or_path_is_refused_untold(login: str) -> None:
    with pytest.raises(
        UsageError, match=r"AFTERLOG_ARCHIVE_URL: it cannot be read.*a password without / \? #"
    ) as raised:
        Remote(f"sftp://{login}@host/bucket")
    assert "hunter" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/ann@home", "s3://bucket/ann@home"),
        ("sftp://host/ann@home", "sftp://host/ann@home"),
        ("sftp://ann:hunter@2@host:22/bucket", "sftp://***@host:22/bucket"),
        ("sftp://ann:hunter2@host/bucket?token=hunter", "sftp://***@host/bucket"),
    ],
)
def test_a_place_is_shown_without_its_password(url: str, shown: str) -> None:
    assert Remote(url).shown == shown


def test_threads_that_open_a_place_at_once_all_look_in_the_same_folder() -> None:
    looked = threading.Event()

    class Folder(str):
        """As it is to a thread that is interrupted just there."""

        __slots__ = ()

        def __str__(self) -> str:
            looked.wait(1)
            return self[:]

    class Slow(MemoryFileSystem):  # type: ignore[misc]  # fsspec brings no types
        protocol = "slow"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return Folder(path.removeprefix("slow://"))

        def exists(self, path: str, **_: Any) -> bool:
            looked.set()
            return path == "place/folder/x"

    fsspec.register_implementation("slow", Slow, clobber=True)
    remote = Remote("slow://place/folder")
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(remote.exists, ["x"] * 2)) == [True, True]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        (f"s3://ann:{SECRET}@nowhere/x", r"s3://\*\*\*@nowhere/x: the archive refused: "),
        (
            f"none://ann:{SECRET}@nowhere",
            r"none://\*\*\*@nowhere: setting AFTERLOG_ARCHIVE_URL: this kind of URL cannot be used",
        ),
        (
            f"ftp://ann:{SECRET}@127.0.0.1:9/x?token={SECRET}",
            r"ftp://\*\*\*@127.0.0.1:9/x: the archive refused: ConnectionRefused",
        ),
    ],
)
def test_a_place_that_refuses_is_told_in_a_sentence_without_its_password(
    make_store: MakeStore, bucket: str, url: str, sentence: str
) -> None:
    store = make_store(segment_bytes=1, live_window="1ms", archive_url=url)
    for n in range(3):
        append_lines(store, "events", [tax(n)])
    process(store)
    there = local(store)
    with pytest.raises(AfterlogError, match=sentence) as raised:
        archive(store)
    assert SECRET not in f"{raised.value!r} {raised.value.__cause__!r}"
    assert local(store) == there
