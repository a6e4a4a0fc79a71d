"""`afterlog up` around its processes: told to end, started twice, left behind, with settings that can never work.

What stands in for server and runner starts at once; tests/test_unattended.py has the real ones.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage.errors import AfterlogError
from storage.locks import is_held
from tests.conftest import ROOT
from tests.operations import PATIENCE, wait_for

STOOD_IN = """
import os, signal, sys, time
from pathlib import Path
from deployments import cli, up

class Processes(up.Processes):
    def start_server(self, progress, limit=0):
        self.place = Path(self.settings.home)
        (self.place / "starting").touch()
        while (self.place / "hold").exists():
            time.sleep(0.05)
            progress(0)
    def start_runner(self):
        (self.place / "started").touch()
    def check(self):
        return []
    def stop(self):
        (self.place / "stopping").touch()
        time.sleep(1)
        (self.place / "stopped").touch()

up.Processes = Processes
if "demo" in sys.argv:
    from deployments import demo
    demo.Processes = None
cli.main(sys.argv[1:])
"""


def environment(home: Path, **settings: str) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("AFTERLOG_", "PREFECT_"))}
    return {**env, "AFTERLOG_HOME": str(home), **{f"AFTERLOG_{key.upper()}": value for key, value in settings.items()}}


def _heed_interrupts() -> None:
    """A shell that runs these tests in the background has its children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def started(home: Path, until: str) -> Iterator[subprocess.Popen[bytes]]:
    """`afterlog up` on HOME, once it has come as far as `until`."""
    with subprocess.Popen(
        [sys.executable, "-c", STOOD_IN, "up"], env=environment(home), cwd=ROOT, stderr=subprocess.PIPE,
        preexec_fn=_heed_interrupts,
    ) as process:  # fmt: skip
        try:
            wait_for((home / until).exists, every=0.02)
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGTERM,), 0),
        ((signal.SIGHUP,), 0),
        ((signal.SIGINT, signal.SIGINT), 130),
        ((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), 0),
    ],
)
def test_told_to_end_it_ends_everything_whatever_comes_meanwhile(
    tmp_path: Path, signals: tuple[signal.Signals, ...], code: int
) -> None:
    with started(tmp_path, "started") as process:
        for each in signals:
            process.send_signal(each)
            wait_for((tmp_path / "stopping").exists, every=0.02)
        _, told = process.communicate(timeout=PATIENCE)
    assert (process.returncode, (tmp_path / "stopped").exists(), b"Traceback" in told) == (code, True, False), told
    assert not is_held(tmp_path / "locks" / "up")


def test_told_to_end_while_its_server_starts_it_ends_that(tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    with started(tmp_path, "starting") as process:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert (tmp_path / "stopped").exists()
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("arguments", [("up",), ("up", "--port", "1"), ("demo", "--once")])
def test_a_second_one_on_the_same_home_is_refused_and_touches_nothing(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / ".afterlog-demo").touch()
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "api-url").write_text("http://127.0.0.1:1/api")
    with started(tmp_path, "started") as process:
        before = sorted(path for path in tmp_path.rglob("*"))
        done = subprocess.run(
            [sys.executable, "-c", STOOD_IN, *arguments], env=environment(tmp_path), cwd=ROOT, capture_output=True,
            check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1
        assert f"at work on this HOME already; found process {process.pid}. Stop it first" in done.stderr.decode()
        assert sorted(path for path in tmp_path.rglob("*")) == before
        process.terminate()
        process.communicate(timeout=PATIENCE)


@pytest.mark.parametrize(
    ("name", "module"), [("server", ["prefect", "server", "start"]), ("runner", ["deployments.serve"])]
)
def test_what_one_that_was_killed_has_left_at_work_is_named(tmp_path: Path, name: str, module: list[str]) -> None:
    from deployments.alone import alone, pid_file

    pid_file(tmp_path, name).parent.mkdir()
    idle = [sys.executable, "-c", "import time; time.sleep(600)", *module, "--port"]
    with subprocess.Popen(idle, env=environment(tmp_path)) as left:
        try:
            pid_file(tmp_path, name).write_text(str(left.pid))
            wait_for(lambda: b"time.sleep" in Path(f"/proc/{left.pid}/cmdline").read_bytes())
            told = f"found process {left.pid}. End them first: kill {left.pid}"
            with pytest.raises(AfterlogError, match=told), alone(tmp_path):
                pass
        finally:
            left.kill()
    # The number is another's now: of something else on this HOME, or of the same on another one.
    for command, home in ((idle[:3], tmp_path), (idle, tmp_path / "other")):
        with subprocess.Popen(command, env=environment(home)) as another:
            try:
                pid_file(tmp_path, name).write_text(str(another.pid))
                wait_for(lambda pid=another.pid: b"time.sleep" in Path(f"/proc/{pid}/cmdline").read_bytes())
                with alone(tmp_path):
                    pass
            finally:
                another.kill()


@pytest.mark.parametrize(
    ("setting", "value", "part"),
    [
        ("mail_url", "foo", "setting AFTERLOG_MAIL_URL: scheme of the mail URL"),
        ("mail_from", "nobody", "setting AFTERLOG_MAIL_FROM: "),
        ("processors", '["nope"]', "setting AFTERLOG_PROCESSORS: nope: cannot import the module"),
        ("archive_url", "bogus://ann:hunter2@x", "bogus://***@x: setting AFTERLOG_ARCHIVE_URL: this kind of URL cannot be used"),
        ("archive_url", "simplecache::bogus://x", "setting AFTERLOG_ARCHIVE_URL: this kind of URL cannot be used"),
        ("archive_url", "s3://ann:hunter/2@x", "setting AFTERLOG_ARCHIVE_URL: it cannot be read"),
    ],
)  # fmt: skip
def test_a_setting_that_can_never_work_is_refused_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, value: str, part: str
) -> None:
    from deployments.up import run_until_stopped

    monkeypatch.setattr("deployments.up.Processes", None)
    monkeypatch.setenv("AFTERLOG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(f"AFTERLOG_{setting.upper()}", value)
    with pytest.raises(AfterlogError) as refused:
        run_until_stopped(1)
    assert (refused.value.exit_code, part in str(refused.value), "hunter" in str(refused.value)) == (2, True, False)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("url", ["folder", "file:///nowhere", "s3://bucket/path", "simplecache::memory://x"])
def test_an_archive_that_may_only_be_away_is_no_reason_not_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    from deployments.up import _check
    from storage.settings import load_settings

    monkeypatch.setenv("AFTERLOG_ARCHIVE_URL", url)
    _check(load_settings(home=tmp_path))
