"""Everything under HOME is for its owner only, whatever the umask; and its owner may still append by hand."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from storage.times import now
from tests.conftest import ROOT

CONTACTS = "type,id,email\nCLIENT,1,ann@example.com\n"


def run(home: Path, command: str, umask: str) -> str:
    """A shell command under a umask; `afterlog` is the command line."""
    env = {**os.environ, "AFTERLOG_HOME": str(home), "PYTHONPATH": str(ROOT)}
    script = f'umask {umask}; afterlog() {{ {sys.executable} -m deployments.cli "$@"; }}; set -e; {command}'
    done = subprocess.run(["sh", "-c", script], env=env, cwd=home.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def open_to_others(home: Path) -> dict[str, str]:
    """Whatever somebody else could look at."""
    wanted = {path: 0o700 if path.is_dir() else 0o600 for path in (home, *home.rglob("*"))}
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in wanted}
    return {str(path.relative_to(home)): oct(mode) for path, mode in modes.items() if mode != wanted[path]}


@pytest.mark.parametrize("umask", ["000", "077"])
def test_nobody_else_can_look_into_home(tmp_path: Path, umask: str) -> None:
    home = tmp_path / "home"
    (tmp_path / "contacts.csv").write_text(CONTACTS)
    tax = {"subject": {"id": "UK"}, "verb": "SUBMIT_TAX", "object": {"id": 1}, "context": {"at": now() - 60_000}}
    (tmp_path / "events.jsonl").write_text(json.dumps(tax) + "\nbad\n")
    library = f"{sys.executable} -c 'from storage.store import *; from storage.settings import *; Store(load_settings()).database.engine'"
    run(home, f"{library}; afterlog append events events.jsonl; afterlog contacts import contacts.csv", umask)
    run(home, "afterlog process --no-prefect; afterlog deliver --no-prefect", umask)
    found = {str(path.relative_to(home)) for path in home.rglob("*")}
    assert {"afterlog.db", "locks/deliver.lock", "logs/events/0/.lock", "logs/deliveries/0"} <= found
    assert any(name.startswith("outbox/") and name.endswith(".eml") for name in found)
    assert open_to_others(home) == {}
    by_hand = "cd home/logs/events/0; flock .lock sh -c 'cat >> \"$(ls *.jsonl | tail -1)\"' < ../../../../events.jsonl; cd ../../../.."
    run(home, f"{by_hand}; afterlog process --no-prefect", umask)
    assert run(home, "afterlog read events", umask).count("SUBMIT_TAX") == 2
    assert open_to_others(home) == {}


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
    run(home, "afterlog contacts list", "077")
    (home / "afterlog.db").chmod(0o644)
    run(home, "afterlog contacts list", "077")
    assert open_to_others(home) == {}
