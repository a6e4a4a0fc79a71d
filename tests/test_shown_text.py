"""Text in the UI: one line, never longer than its place, and in a table the numbers on the right."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x" * 40, "x" * 40),
        ("x" * 41, "x" * 39 + "…"),
        ("x" * 150, "x" * 39 + "…"),
        ("x" * 1000, "x" * 39 + "…"),
        (f"a{' ' * 100}b", "a b"),
        (f"a{' ' * 1000}b", "a…"),  # no further than four times its place is looked
        ("one, two, three, four, five, six, seven, eight", "one, two, three, four, five, six, seven…"),
        ("a\u2028b\u2029c\u202ed\u0085e\ud800f", "a b c d e f"),
        (-42, "-42"),
        (None, "None"),
    ],
)
def test_a_value_is_one_line_of_a_length_at_most(value: object, shown: str) -> None:
    from flows.markdown import cell, escape, line_of

    assert line_of(value, 40) == shown
    assert cell(value, 40) == escape(value, 40) == shown


def test_in_a_table_a_column_of_numbers_stands_right_with_thousands_apart() -> None:
    from flows.markdown import table

    assert table(("name", "count", "of both"), [("a|b", 1_234_567, 5), ("c", 0, "none")]).splitlines() == [
        "| name | count | of both |",
        "| --- | --: | --- |",
        r"| a\|b | 1,234,567 | 5 |",
        "| c | 0 | none |",
    ]
    assert table(("name",), []).splitlines() == ["| name |", "| --- |"]
