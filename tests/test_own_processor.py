"""A processor of one's own that has nothing to do its work with is told so in a sentence, as any fault of it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from storage.door import append_lines
from storage.errors import AfterlogError
from storage.store import Store
from tasks.process import process_to_end
from tasks.run import Run
from tasks.topology import build_topology
from tests.test_replay import line, use

EMPTY = """
from tasks.processors import contract
class Processor(contract.Processor):
    name, reads, writes = "empty", "events", "empties"
"""


def test_one_without_event_and_process_says_what_is_missing(
    make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tmp_path, monkeypatch, EMPTY)
    store = make_store(processors=("own_mailer",))
    append_lines(store, "events", [line(1, 0)])
    with pytest.raises(AfterlogError, match=r"events:0:0: .*empty has neither `event` nor `process`.*own_mailer.py$"):
        process_to_end(Run(store, build_topology(store.settings), "test"), "empty", None)
