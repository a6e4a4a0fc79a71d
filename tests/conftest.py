"""What tests share: a fresh store, the real data where it is, and the switch under which nothing may skip."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from storage.settings import load_settings
from storage.store import Store
from tests import processes
from tests.postgres import Cluster, find_programs
from tests.workers import (  # noqa: F401  # hooks of pytest
    pytest_collection_modifyitems,
    pytest_xdist_auto_num_workers,
    pytest_xdist_make_scheduler,
    shared_by,
)

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("AFTERLOG_TEST_SHARED", ROOT.parent / "shared")) / "data"

os.environ.pop("PYTHONUNBUFFERED", None)  # as a person has it: what is written may wait in a buffer

_SERVER = ExitStack()
"""What ends with the server that tests share."""

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data (../shared/data) is not here")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Under AFTERLOG_TEST_NO_SKIP a skipped test is a failed one."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("AFTERLOG_TEST_NO_SKIP"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may skip: {report.longrepr}"


@pytest.fixture(scope="session", autouse=True)
def _forks() -> None:
    """Commands are forked from a server that was started where the project is."""
    processes.begin()


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the person who runs the tests reaches them."""
    for name in list(os.environ):
        if name.startswith("AFTERLOG_") and not name.startswith("AFTERLOG_TEST_"):
            monkeypatch.delenv(name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module that says BOTH_DATABASES runs each of its tests that uses a database on SQLite and on PostgreSQL."""
    if getattr(metafunc.module, "BOTH_DATABASES", False) and "database" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("only")
        metafunc.parametrize("database", only.args if only else ("sqlite", "postgresql"), indirect=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A cluster of the tests' own."""
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    cluster = Cluster(programs)
    yield cluster
    cluster.remove()


_urls: dict[Path, str] = {}  # of each HOME whose database is not in it


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which database the test runs on: sqlite, unless it asks for another; every HOME has its own."""
    kind: str = getattr(request, "param", "sqlite")
    if kind == "postgresql":
        cluster: Cluster = request.getfixturevalue("postgres")
        _new_url.append(cluster.create)
    yield kind
    urls = [url for url in _urls.values() if kind == "postgresql"]
    _new_url.clear()
    _urls.clear()
    for url in urls:
        cluster.drop(url)


_new_url: list[Callable[[], str]] = []


def settings_of(home: Path) -> dict[str, str]:
    """The settings of a HOME: where its database is. One that is not there yet is made, with an empty database."""
    if _new_url and home not in _urls:
        _urls[home] = _new_url[0]()
    if home in _urls:
        return {"home": str(home), "database_url": _urls[home]}
    if not home.exists():
        home.mkdir(mode=0o700, parents=True)
        shutil.copy(empty_database(), home / "afterlog.db")
    return {"home": str(home)}


@functools.cache
def empty_database() -> Path:
    """The file of a database that was made and never used: to make one takes 50 ms, to copy one 2."""
    folder = tempfile.TemporaryDirectory(prefix="afterlog-")
    _kept.append(folder)
    store = Store(load_settings(home=Path(folder.name)))
    store.database.engine.dispose()
    return Path(folder.name) / "afterlog.db"


_kept: list[tempfile.TemporaryDirectory[str]] = []


def use_database(home: Path, url: str) -> None:
    """Have the database of a HOME elsewhere, until the test that asks for `database` next ends."""
    _urls[home] = url


@pytest.fixture
def make_store(tmp_path: Path, database: str) -> Iterator[Callable[..., Store]]:
    """Make a store on a HOME under the test's folder, with settings of the test's own."""
    made: list[Store] = []

    def make(folder: str = "home", **settings: object) -> Store:
        made.append(Store(load_settings(**settings_of(tmp_path / folder), **settings)))
        return made[-1]

    yield make
    for store in made:
        if "database" in store.__dict__:
            store.database.dispose()


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    """A store with default settings on a fresh HOME."""
    return make_store()


def afterlog(
    home: Path, *arguments: str, stdin: bytes | None = None, **settings: str
) -> subprocess.CompletedProcess[bytes]:
    """Run the command line as a process of its own on `home`; settings by their names, `timeout="45m"` say."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("AFTERLOG_") or k.startswith("AFTERLOG_TEST_")}
    env |= {f"AFTERLOG_{k.upper()}": v for k, v in (settings_of(home) | settings).items()}
    with tempfile.TemporaryDirectory(prefix="afterlog-") as name:
        given, out, err = (Path(name) / each for each in ("in", "out", "err"))
        given.write_bytes(stdin or b"")
        process = processes.start(processes.command, *arguments, env=env, stdin=given, stdout=out, stderr=err, cwd=ROOT)
        code = processes.ended(process, 300)
        return subprocess.CompletedProcess(arguments, code, out.read_bytes(), err.read_bytes())


def log_bytes(home: Path, log: str, partition: int = 0) -> bytes:
    """A partition's segments put together, as they are on the disk."""
    folder = home / "logs" / log / str(partition)
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.jsonl")))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Prefect server for all tests that share it (tests/workers.py), started as `afterlog up` starts it."""
    from prefect.context import _temporary_global_settings_context, get_settings_context  # for threads of its own
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tests.operations import prefect_server

    with _SERVER:
        url = _SERVER.enter_context(prefect_server(load_settings(home=tmp_path_factory.mktemp("server") / "home")))
        _SERVER.enter_context(temporary_settings({PREFECT_API_URL: url}))
        _SERVER.enter_context(_temporary_global_settings_context(get_settings_context()))
        _SERVER.callback(EventsWorker.drain_all)
        _SERVER.callback(APILogWorker.instance().drain)
        yield url


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """The server ends with the last test that shares it: it costs even when idle, and the session may last minutes longer."""
    if nextitem is None or shared_by(nextitem.nodeid) != "server":
        _SERVER.close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str) -> Path:
    """A fresh HOME that this process's settings name."""
    home = tmp_path / "home"
    monkeypatch.setenv("AFTERLOG_HOME", settings_of(home)["home"])
    monkeypatch.setenv("AFTERLOG_RETRY_DELAY", "10ms")
    return home
