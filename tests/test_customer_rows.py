"""A customer's row has when they were first and last there, by what happened when, whatever came in when."""

from __future__ import annotations

import pytest

from storage.door import append_lines
from storage.store import Store
from tests.helpers import process, rows_of
from tests.test_replay import MINUTE, START
from tests.test_tables import did


@pytest.mark.parametrize("at_once", [True, False])
def test_what_comes_late_moves_the_first_and_not_the_last(store: Store, at_once: bool) -> None:
    lines = [did(1, minutes, "VISITED") for minutes in (10, 20, 3, 15)]
    for some in [lines] if at_once else [[line] for line in lines]:
        append_lines(store, "events", some)
        process(store.home, "normalise")
    [row] = rows_of(store, ("customer",))["customer"]
    third = sum(len(line) + 1 for line in lines[:3])
    assert tuple(row) == ("1", START + 3 * MINUTE, START + 20 * MINUTE, f"events:0:{third}")
