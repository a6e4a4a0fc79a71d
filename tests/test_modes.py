"""Everything under HOME is for its owner only, whatever the umask; and its owner may still append by hand."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.times import now
from tests.conftest import ROOT, afterlog

CONTACTS = "type,id,email\nCLIENT,1,ann@example.com\n"


def run(home: Path, command: str, umask: str) -> str:
    """A shell command under a umask."""
    env = {**os.environ, "AFTERLOG_HOME": str(home), "PYTHONPATH": str(ROOT)}
    script = f"umask {umask}; set -e; {command}"
    done = subprocess.run(["sh", "-c", script], env=env, cwd=home.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def open_to_others(home: Path) -> dict[str, str]:
    """Whatever somebody else could look at."""
    wanted = {path: 0o700 if path.is_dir() else 0o600 for path in (home, *home.rglob("*"))}
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in wanted}
    return {str(path.relative_to(home)): oct(mode) for path, mode in modes.items() if mode != wanted[path]}


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[str]:
    """That of this process, and so of all that it starts."""
    before = os.umask(int(request.param, 8))
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", ["000", "077"], indirect=True)
def test_nobody_else_can_look_into_home(tmp_path: Path, umask: str) -> None:
    home = tmp_path / "home"
    tax = {"subject": {"id": "UK"}, "verb": "SUBMIT_TAX", "object": {"id": 1}, "context": {"at": now() - 60_000}}
    (tmp_path / "contacts.csv").write_text(CONTACTS)
    (tmp_path / "events.jsonl").write_text(json.dumps(tax) + "\nbad\n")
    library = "from storage.store import *; from storage.settings import *; Store(load_settings()).database.engine"
    run(home, f"{sys.executable} -c '{library}'", umask)  # the first that is there makes HOME
    command(home, "append", "events", stdin=(tmp_path / "events.jsonl").read_bytes())
    command(home, "contacts", "import", str(tmp_path / "contacts.csv"))
    command(home, "process", "--no-prefect")
    command(home, "deliver", "--no-prefect")
    found = {str(path.relative_to(home)) for path in home.rglob("*")}
    assert {"afterlog.db", "locks/deliver.lock", "logs/events/0/.lock", "logs/deliveries/0"} <= found
    assert any(name.startswith("outbox/") and name.endswith(".eml") for name in found)
    assert open_to_others(home) == {}
    by_hand = "cd home/logs/events/0; flock .lock sh -c 'cat >> \"$(ls *.jsonl | tail -1)\"' < ../../../../events.jsonl"
    run(home, by_hand, umask)
    command(home, "process", "--no-prefect")
    assert command(home, "read", "events").count(b"SUBMIT_TAX") == 2
    assert open_to_others(home) == {}


def command(home: Path, *arguments: str, stdin: bytes | None = None) -> bytes:
    """The same of the command line: what it writes."""
    done = afterlog(home, *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_the_files_beside_a_database_in_use_are_private_too(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; os.umask(0)\n"
        "from storage.settings import load_settings; from storage.store import Store\n"
        "store = Store(load_settings())\n"
        "with store.database.write() as c: c.exec_driver_sql('DELETE FROM contact')\n"
        "print(sorted((p.name, oct(p.stat().st_mode & 0o777)) for p in store.home.glob('afterlog.db*')))\n"
    )
    env = {**os.environ, "AFTERLOG_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    modes = [("afterlog.db", "0o600"), ("afterlog.db-shm", "0o600"), ("afterlog.db-wal", "0o600")]
    assert done.stdout.strip() == str(modes)


def test_a_database_of_an_older_version_is_made_private(tmp_path: Path) -> None:
    home = tmp_path / "home"
    command(home, "contacts", "list")
    (home / "afterlog.db").chmod(0o644)
    command(home, "contacts", "list")
    assert open_to_others(home) == {}
