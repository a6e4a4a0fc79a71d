"""One heap for all threads, as glibc itself tells of it."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

COUNT = """
import ctypes, sys, threading
from storage.heap import share_heap
if sys.argv[1] == "shared":
    share_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.fopen.restype = ctypes.c_void_p, ctypes.c_void_p
all_there = threading.Barrier(4)
def work():
    libc.malloc(100_000)
    all_there.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc tells of its heaps")
@pytest.mark.parametrize(("way", "is_one"), [("shared", True), ("own", False)])
def test_threads_share_one_heap(tmp_path: Path, way: str, is_one: bool) -> None:
    told = tmp_path / "heaps"
    subprocess.run([sys.executable, "-c", COUNT, way, str(told)], cwd=ROOT, check=True, timeout=60)
    assert (told.read_text().count("<heap nr=") == 1) is is_one
