"""How tests are dealt out to several processes (`pytest -n auto`); conftest.py has these hooks.

Each test goes to whoever is free, but those that share a server or `afterlog up` go to one process. What takes long waits for
half of its time, so two of these begin, and the others come in between what computes.
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
    "tests/test_runner.py": "server",
    "tests/test_why.py::test_the_flow_answers_the_same_and_links_the_run": "server",
    "tests/test_alerts.py::test_every_alert_reaches_the_block_and_applying_twice_leaves_one_of_each": "server",
    # Without a server, but Prefect is imported there already: that takes two seconds a process.
    "tests/test_plot.py": "server",
    "tests/test_run_names.py": "server",
    "tests/test_shown_text.py": "server",
    "tests/test_tables.py": "server",
    "tests/test_impact.py::test_the_terminal_and_the_page_say_it_with_every_figure_at_its_place": "server",
    "tests/test_browser.py": "browser",
    "tests/test_unattended.py": "unattended",
}
"""Files, and tests, that share something that takes long to start, by what it is."""


def pytest_xdist_auto_num_workers() -> int:
    """Two for each processor, since tests wait as much as they compute."""
    return 2 * (os.cpu_count() or 1)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    config.option.loadscopereorder = False  # the order is that of the items
    return _Scheduling(config, log)


class _Scheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        """What is dealt out as one."""
        return shared_by(nodeid)


def shared_by(nodeid: str) -> str:
    """What a test shares with others; its own id where it shares nothing."""
    return SHARE.get(nodeid) or SHARE.get(nodeid.partition("::")[0], nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long, the largest first, spread over the first part of the rest."""
    long: dict[str, list[pytest.Item]] = {}
    short: list[pytest.Item] = []
    for item in items:
        scope = shared_by(item.nodeid)
        is_long = scope != item.nodeid or item.get_closest_marker("long") is not None
        (long.setdefault(scope, []) if is_long else short).append(item)
    every, items[:] = int(0.6 * len(short)) // (len(long) or 1), []
    for number, group in enumerate(sorted(long.values(), key=len, reverse=True)):
        if number > 1:
            items += short[:every]
            del short[:every]
        items += group
    items += short
