"""Rules in words: what they say of values that Python spells otherwise than the log does."""

from __future__ import annotations

import pytest

from tasks.rules import rule_of


def test_an_order_whose_value_nobody_knows_is_worth_unknown() -> None:
    event = {
        "verb": {"type": "RECOVERED_BASKET"},
        "object": {"type": "ORDER", "value": None},
        "context": {"at": 0},
        "event": {"id": "abandonment/events:0:0/recovered"},
    }
    assert rule_of(event, {}).endswith("; worth unknown")


@pytest.mark.parametrize(("value", "spelt"), [(True, "true"), (False, "false"), (float("inf"), "inf"), (12, "12")])
def test_a_value_is_spelt_as_the_event_has_it(value: object, spelt: str) -> None:
    obj = {"measure": "object.value", "value": value, "mean": 0, "std": 0, "score": None, "samples": 0}
    event = {"object": obj, "event": {"id": "anomalies/events:0:0/object.value"}}
    assert rule_of(event, {}).startswith(f"object.value is {spelt}, beyond any measure")
