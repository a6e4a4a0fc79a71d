"""The whole way in one command: a temporary Prefect server where there is none, and the demo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, afterlog
from tests.operations import PATIENCE, prefect_ready

pytestmark = pytest.mark.long


def test_without_a_server_process_starts_a_temporary_one_and_says_so(tmp_path: Path) -> None:
    home = tmp_path / "home"
    golden = b'{"subject":{"id":1},"verb":"X","context":{"at":1650549837170}}\n'
    assert afterlog(home, "append", "events", stdin=golden).returncode == 0
    prefect_ready(home)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "AFTERLOG_"))}
    done = subprocess.run(
        [sys.executable, "-m", "deployments.cli", "process"], cwd=ROOT, capture_output=True, check=False, timeout=PATIENCE,
        env={**env, "AFTERLOG_HOME": str(home), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert b"No Prefect server is set or found: starting a temporary one" in done.stderr
    assert b"abandonment\t1\t0\t0\t1\t0\t63" in done.stdout


def test_the_demo_shows_baskets_anomalies_and_a_mail_and_leaves_nothing_running(tmp_path: Path) -> None:
    home, ready = tmp_path / "demo", tmp_path / "ready"
    prefect_ready(ready)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "AFTERLOG_"))}
    env["PREFECT_HOME"] = str(ready / "prefect")  # the demo's own HOME is to be new
    done = subprocess.run(
        [sys.executable, "-m", "deployments.cli", "demo", "--once"], cwd=ROOT, capture_output=True, check=False,
        timeout=2 * PATIENCE, env={**env, "AFTERLOG_HOME": str(home)},
    )  # fmt: skip
    shown = done.stdout.decode()
    assert done.returncode == 0, shown + done.stderr.decode()
    assert re.search(r"\d+ abandoned baskets", shown)
    assert re.search(r"\d+ anomalies", shown)
    assert "Subject: " in shown
    assert " anomaly " in shown  # not in a table's title alone, which a pipe does not get
    assert re.search(r"http://127\.0\.0\.1:\d+", shown)
    running = subprocess.run(["pgrep", "-f", str(home)], capture_output=True, check=False).stdout
    assert running == b""
