"""How tests are dealt out to several processes (`pytest -n auto`); conftest.py has these hooks.

Each test goes to whoever is free, but those that share a server or `afterlog up` go to one process. These begin first, then
the long ones: they wait for most of their time, while the others compute.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

SHARE = {
    "tests/test_artifacts.py": "server",
    "tests/test_flows.py": "server",
    "tests/test_flows_by_hand.py": "server",
    "tests/test_replay_flow.py": "server",
    "tests/test_browser.py": "browser",
    "tests/test_unattended.py": "unattended",
}
"""Files whose tests share something that takes long to start, by what it is."""


def pytest_xdist_auto_num_workers() -> int:
    """Two for each processor, since tests wait as much as they compute."""
    return 2 * (os.cpu_count() or 1)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _Scheduling(config, log)


class _Scheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        """What is dealt out as one; the largest come first."""
        return SHARE.get(nodeid.partition("::")[0], nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
