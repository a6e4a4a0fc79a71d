"""A REMOVED event that names no item takes nothing out, and keeps no other row back."""

from __future__ import annotations

import pytest

from storage.door import append_lines
from storage.store import Store
from tests.helpers import process, rows_of
from tests.test_tables import did


@pytest.mark.parametrize("named", [{}, {"item": {}}, {"item": {"id": True}}, {"item": 3}, {"item": {"id": "4"}}])
def test_rows_are_as_they_were_before_an_event_that_takes_out_nothing(store: Store, named: dict[str, object]) -> None:
    first = did(1, 0, item={"id": 3, "name": "Lemon", "price": 5, "count": 2})
    append_lines(store, "events", [first, did(1, 1, "REMOVED_ITEM_FROM_BASKET", **named)])
    process(store.home)
    [line] = rows_of(store, ("basket_line",))["basket_line"]
    assert (line.customer, line.item, line.name, line.count, line.set_by) == ("1", "3", "Lemon", 2, "events:0:0")
    append_lines(store, "events", [did(1, 2, "REMOVED_ITEM_FROM_BASKET", item={"id": "3"})])
    process(store.home)
    assert rows_of(store, ("basket_line",))["basket_line"] == []
