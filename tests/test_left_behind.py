"""What `afterlog up` says where one that was killed has left both its processes at work."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from storage.errors import AfterlogError
from tests.operations import wait_for
from tests.test_up import environment


def test_both_are_named_and_how_to_end_them(tmp_path: Path) -> None:
    from deployments.alone import alone, pid_file

    pids = []
    with ExitStack() as stack:
        for name, module in (("server", ["prefect", "server", "start"]), ("runner", ["deployments.serve"])):
            idle = [sys.executable, "-c", "import time; time.sleep(600)", *module, "--port"]
            left = stack.enter_context(subprocess.Popen(idle, env=environment(tmp_path)))
            stack.callback(left.kill)
            pid_file(tmp_path, name).parent.mkdir(exist_ok=True)
            pid_file(tmp_path, name).write_text(str(left.pid))
            wait_for(lambda pid=left.pid: b"time.sleep" in Path(f"/proc/{pid}/cmdline").read_bytes(), every=0.01)
            pids.append(str(left.pid))
        with pytest.raises(AfterlogError) as raised, alone(tmp_path):
            pass
    one, other = pids
    assert str(raised.value) == (
        f"{tmp_path}: an `afterlog up` that was killed has left its server or runner at work; "
        f"found process {one} and {other}. End them first: kill {one} {other}"
    )
    with alone(tmp_path):  # they have ended
        pass
