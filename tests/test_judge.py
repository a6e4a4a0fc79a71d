"""The judge: which lines are good, the one reason why a line is bad, and when an event happened."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.batches import BatchCache
from storage.event import Bad, Batch, Block, Event, Rejected
from storage.judge import decode, judge
from storage.slow_judge import judge_slowly
from storage.store import Store
from storage.times import parse_time
from tests.conftest import SHARED, needs_shared

AT = 1598616201410
LIMIT = 1 << 20


def line(
    subject: str = '{"id": 15}', verb: str = '"X"', at: str | None = f"{AT}", more: str = "", obj: str = "{}"
) -> bytes:
    """One line from JSON literals; without `at` it has no context."""
    context = "" if at is None else f', "context": {{"at": {at}}}'
    return f'{{"subject": {subject}, "verb": {verb}, "object": {obj}{context}{more}}}'.encode("utf-8", "surrogatepass")


def added(item: str) -> bytes:
    return line(verb='"ADDED_ITEM_TO_BASKET"', obj=f'{{"item": {item}}}')


def stamped(stamp: str, at: str | None = f"{AT}") -> bytes:
    return line(at=at, more=f', "event": {{"inserted_at": {stamp}}}')


Outcome = tuple[object, ...]


def outcome(judging: Callable[[bytes, int, int], Event], text: bytes, clock: int = 0) -> Outcome:
    """What a judge says: every field of the event, or the reason's name, which is what stands before its colon."""
    try:
        event = judging(text, 7, clock)
    except Rejected as error:
        return "bad", str(error).partition(":")[0]
    kind = event.type if isinstance(event.type, str) else None  # any other type is nobody's
    return (
        "good", event.offset, event.raw, event.id, event.key, kind, event.verb, bytes(event.object), event.at,
        event.clock, event.item, event.event_id,
    )  # fmt: skip


def reason(text: bytes) -> str:
    with pytest.raises(Rejected) as raised:
        judge(text, 0, 0)
    return str(raised.value)


def times(text: bytes, clock: int = 0) -> tuple[int, int]:
    """When an event happened, and its clock."""
    event = judge(text, 0, clock)
    return event.at, event.clock


BAD = [
    (b"", "no JSON: an empty line"),
    (b" \t\r", "no JSON: an empty line"),
    (b"\x00", "no JSON: Expecting value: line 1 column 1 (char 0)"),
    (line() + b"\x00", "no JSON: Extra data"),
    (line(more=', "x": "\x00"'), "no JSON: Invalid control character"),
    (b"\xef\xbb\xbf" + line(), "no JSON: Unexpected UTF-8 BOM"),
    (line()[:-1], "no JSON: Expecting ',' delimiter"),
    (line() + line(), "no JSON: Extra data"),
    (line(more=', "x": NaN'), "no JSON: NaN is no JSON"),
    (line(obj='{"body": Infinity}'), "no JSON: Infinity is no JSON"),
    (line(more=', "x": -Infinity'), "no JSON: -Infinity is no JSON"),
    (line(more=', "x": 01'), "no JSON: Expecting ',' delimiter"),
    (line(more=', "x": +1'), "no JSON: Expecting value"),
    (line(more=', "x": .5'), "no JSON: Expecting value"),
    (line(more=", 'x': 1"), "no JSON: Expecting property name"),
    (line(more=', "x": 1,'), "no JSON: "),
    (line(more=', "x": "?"').replace(b"?", b"\xff"), "no JSON: byte 91 is not UTF-8"),
    (line(obj='{"body": "?"}').replace(b"?", b"\xc3\x28"), "no JSON: byte 57 is not UTF-8"),
    (line(more=', "x": "?"').replace(b"?", b"\xed\xa0\x80"), "no JSON: byte 91 is not UTF-8"),
    (line(more=', "x": "\\ud800"'), "no JSON: half of a surrogate pair"),
    (line(more=', "x": {"\\udc00": 1}'), "no JSON: half of a surrogate pair"),
    (line(obj='{"body": "\\ud800\\u0041"}'), "no JSON: half of a surrogate pair"),
    (line(subject='{"id": "\\ud800"}'), "no JSON: half of a surrogate pair"),
    (added('{"id": 1, "name": "\\ud800"}'), "no JSON: half of a surrogate pair"),
    (line(more=f', "x": {"[" * 500}{"]" * 500}'), "no JSON: nested deeper than 500"),
    (line(obj=f'{{"body": {"[" * 100_000}{"]" * 100_000}}}'), "no JSON: nested deeper than 500"),
    (b"[" * 100_000, "no JSON: nested deeper than 500"),
    (b"[]", "no JSON object: an array"),
    (b"null", "no JSON object: null"),
    (b"true", "no JSON object: true"),
    (b"-1.5e3", "no JSON object: a number"),
    (b'"{}"', "no JSON object: a string"),
    (b"{}", "no subject: expected an object with an id"),
    (line(subject="15"), "no subject: expected an object with an id"),
    (line(subject="null"), "no subject: expected an object with an id"),
    (line(subject='[{"id": 15}]'), "no subject: expected an object with an id"),
    (line(subject="{}"), "no subject: subject.id is missing, expected a string or an integer"),
    (line(subject='{"id": null}'), "no subject: subject.id is null, expected a string or an integer"),
    (line(subject='{"id": 15.0}'), "no subject: subject.id is a number, expected a string or an integer"),
    (line(subject='{"id": 1e2}'), "no subject: subject.id is a number, expected a string or an integer"),
    (line(subject='{"id": 1e400}'), "no subject: subject.id is a number, expected a string or an integer"),
    (line(subject='{"id": [1]}'), "no subject: subject.id is an array, expected a string or an integer"),
    (line(subject='{"id": {"id": 1}}'), "no subject: subject.id is an object, expected a string or an integer"),
    (line(subject='{"id": true}'), "boolean id: subject.id"),
    (line(subject='{"id": false}'), "boolean id: subject.id"),
    (line(verb="null"), "no verb: expected a string, or an object with a type"),
    (line(verb="1"), "no verb: expected a string, or an object with a type"),
    (line(verb="{}"), "no verb: expected a string, or an object with a type"),
    (line(verb='{"type": null}'), "no verb: expected a string, or an object with a type"),
    (line(verb='["X"]'), "no verb: expected a string, or an object with a type"),
    (b'{"subject": {"id": 1}, "context": {"at": 1}}', "no verb: expected a string, or an object with a type"),
    (line(at=None), "no time: neither context.at nor event.inserted_at"),
    (line(at=None, more=', "context": {}, "event": {}'), "no time: neither context.at nor event.inserted_at"),
    (line(at=None, more=', "context": 5'), "no time: context is a number, expected an object"),
    (line(at=None, more=', "context": null'), "no time: context is null, expected an object"),
    (line(more=', "event": null'), "no time: event is null, expected an object"),
    (line(more=', "event": [1]'), "no time: event is an array, expected an object"),
    (line(at='"soon"', more=f', "event": {{"inserted_at": {AT}}}'), "no time: context.at is 'soon'"),
    (stamped("null"), "no time: event.inserted_at is 'null'"),
    (stamped("true"), "no time: event.inserted_at is 'true'"),
    (stamped("-1"), "no time: event.inserted_at is '-1'"),
    (stamped('"2022-04-21"', at=None), "no time: event.inserted_at is '2022-04-21'"),
    (line(verb='"ADDED_ITEM_TO_BASKET"'), "no item: object.item is no object"),
    (line(verb='{"type": "CHANGED_ITEM_COUNT_IN_BASKET"}', obj="[]"), "no item: object.item is no object"),
    (added("3"), "no item: object.item is no object"),
    (added("{}"), "no item id: object.item.id is "),
    (added('{"id": null}'), "no item id: object.item.id is "),
    (added('{"id": 1.0}'), "no item id: object.item.id is "),
    (added('{"id": true}'), "boolean id: object.item.id"),
    (added('{"id": 1, "count": true}'), "no count: object.item.count is true"),
    (added('{"id": 1, "count": null}'), "no count: object.item.count is null"),
    (added('{"id": 1, "count": "2"}'), "no count: object.item.count is a string"),
    (added('{"id": 1, "count": {}}'), "no count: object.item.count is an object"),
]

GOOD = [
    line(),
    line() + b"\r",
    b"  " + line() + b"\t ",
    line(subject='{"id": ""}'),
    line(subject='{"id": "15", "type": "CUSTOMER"}'),
    line(subject=f'{{"id": {2**70}}}'),
    line(subject='{"id": -0, "type": 0.1}'),
    line(subject='{"id": "\\ud83d\\ude00 \\u0000", "type": {"a": [1e400]}}'),
    line(verb='{"type": "X", "by": 1e400}'),
    line(verb='""'),
    line(obj="null"),
    line(obj='[1, {"id": true}]'),
    line(at="0"),
    line(at="1650549837.1697195"),
    line(at="1598616201410.5"),
    line(at="1e12"),
    line(at="1e-400"),
    line(at='"2022-04-21T16:03:57.1697195+02:00"'),
    line(at=None, more=f', "event": {{"inserted_at": {AT}}}'),
    stamped("1598616201.4115"),
    stamped('"2020-08-28T12:03:21.410Z"', at="1598616201"),
    line(more=', "event": {"id": "derive/events:0:1/x"}'),
    line(more=', "event": {"id": 5}'),
    line(more=', "x": 1e400'),
    line(more=', "x": [1e-400, -0.0, 1E+2, "\\ud834\\udd1e", {"": {}}]'),
    line(more=f', "x": {"[" * 499}{"]" * 499}'),
    line(more=f', "x": "{"[{" * 5_000}"'),
    line(more=f', "x": "\\"{"[" * 600}"'),
    line(more=', "subject": {"id": 16}'),
    line(more=', "context": {"at": 1}, "context": {}, "event": {"inserted_at": 2}'),
    b'{"subject": {}, ' + line()[1:],
    b'{"object": 5, "verb": 5, "context": 5, ' + line()[1:],
    added('{"id": 1}'),
    added('{"id": "1", "count": 0, "price": true}'),
    added('{"id": 1, "count": -2.5, "name": 1e400}'),
    added('{"id": 1, "count": 1e400}'),
    added('{"id": 1, "count": 1, "count": 2, "id": "b"}'),
]

# Found by looking for lines on which the two ways to judge disagree, or one of them gives up.
AWKWARD = [
    line(at="1e-99999999999999999999"),
    stamped("1e-99999999999999999999"),
    line(at="0e999"),
    line(at="1e99999999999999999999"),
    line(at="1" * 5_000),
    line(more=f', "x": {"1" * 5_000}'),
    line(more=f', "x": [{"1" * 5_000}], "x": "{"[" * 600}"'),
    b'{"subject": {}, "object": {}, ' + added('{"id": 1}')[1:],
    b'{"subject": {}, "object": 5, ' + added('{"id": 1}')[1:],
    added('{"id": 1}')[:-1] + b', "object": {"item": 5}}',
    line(subject='{"id": 1, "type": 1e400}', obj="[1e400]"),
    line(verb='{"type": "X", "type": 5}'),
    b'{"subject": {"id": 1, "type": "\\ud800"}, ' + line()[1:],
    b'{"event": {"id": "\\ud800"}, "object": "\\ud800", ' + line()[1:-1] + b', "event": {}}',
]


@pytest.mark.parametrize("text", [text for text, name in BAD if name.startswith("no JSON: half of a surrogate pair")])
def test_half_a_surrogate_pair_is_called_that(text: bytes) -> None:
    assert reason(text).startswith("no JSON: half of a surrogate pair, \\ud")
    assert reason(text).endswith(", is no character")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('"\\\\ud83d \\ud83d\\ude00 \\uDE00"', "no JSON: half of a surrogate pair, \\uDE00, is no character"),
        ('"\\ud83d" x', "no JSON: "),
        ('"\\ud8é"', "no JSON: "),
        ('"\\\\ud83d \\x"', "no JSON: "),
    ],
)
def test_what_else_is_wrong_is_not_taken_for_half_a_pair(body: str, expected: str) -> None:
    found = reason(line(obj=f'{{"body": {body}}}'))
    assert found.startswith(expected)
    assert ("half of" in found) == ("half of" in expected)


def test_a_byte_order_mark_is_called_that() -> None:
    assert reason(b"\xef\xbb\xbf" + line()) == "no JSON: a byte order mark before it"


@pytest.mark.parametrize(("text", "expected"), BAD, ids=[f"{i}-{name[:20]}" for i, (_, name) in enumerate(BAD)])
def test_a_bad_line_has_one_named_reason(text: bytes, expected: str) -> None:
    if expected.startswith("no JSON:"):  # what follows is the parser's own word
        assert reason(text).startswith("no JSON: ")
    else:
        assert reason(text).startswith(expected)


@pytest.mark.parametrize("text", GOOD, ids=range(len(GOOD)))
def test_whatever_else_a_line_carries_it_is_good_and_kept_as_it_came(text: bytes) -> None:
    assert judge(text, 7, 0).raw == text


EVERY = [*GOOD, *(text for text, _ in BAD), *AWKWARD]


@pytest.mark.parametrize("text", EVERY, ids=range(len(EVERY)))
def test_the_fast_and_the_slow_judge_agree(text: bytes) -> None:
    assert outcome(judge, text) == outcome(judge_slowly, text)
    assert outcome(judge, text, AT + 5) == outcome(judge_slowly, text, AT + 5)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (line(more=f', "x": {"1" * 5_000}'), True),
        (line(more=f', "x": {"1" * 5_000}, "y": "{"[" * 600}"'), True),
        (b'{"subject": {}, "object": {}, ' + added('{"id": 1}')[1:], True),
        (line(at="1e-99999999999999999999"), True),
    ],
    ids=["a long integer", "a long integer among brackets", "a key twice", "an exponent out of reach"],
)
def test_a_line_that_is_json_is_good_whatever_is_in_the_fields_that_nobody_reads(text: bytes, good: bool) -> None:
    assert (outcome(judge, text)[0] == "good") is good


@pytest.mark.parametrize(
    ("subject", "ident", "key"),
    [
        ("15", 15, "15"),
        ('"15"', "15", "15"),
        ('""', "", ""),
        ("-1", -1, "-1"),
        ("-0", 0, "0"),
        (f"{2**70}", 2**70, "1180591620717411303424"),
        (f"-{2**64}", -(2**64), "-18446744073709551616"),
        ('"\\u00e9\\ud83d\\ude00"', "é\U0001f600", "é\U0001f600"),
        ('"a:b/c\\u0000"', "a:b/c\x00", "a:b/c\x00"),
    ],
)
def test_a_string_and_an_integer_of_the_same_digits_are_one_subject(subject: str, ident: int | str, key: str) -> None:
    event = judge(line(subject=f'{{"id": {subject}}}'), 0, 0)
    assert (event.id, event.key) == (ident, key)


def test_a_subjects_type_a_verb_in_an_object_and_the_items_own_bytes_are_read() -> None:
    text = (
        b'{"subject": {"id": 1, "type": "CUSTOMER"}, "verb": {"type": "ADDED_ITEM_TO_BASKET"}, '
        b'"object": {"item": {"id": 3, "count":  2.50 }}, "context": {"at": 5}, "event": {"id": "a/b/c"}}'
    )
    event = judge(text, 9, 0)
    assert (event.offset, event.type, event.verb, event.event_id) == (9, "CUSTOMER", "ADDED_ITEM_TO_BASKET", "a/b/c")
    assert bytes(event.object) == b'{"item": {"id": 3, "count":  2.50 }}'
    assert event.item is not None
    assert (event.item.key, event.item.count, event.item.raw) == ("3", 2.5, b'{"id": 3, "count":  2.50 }')


@pytest.mark.parametrize(
    ("item", "key", "count"),
    [('{"id": "x"}', "x", 1), ('{"id": 3, "count": 0}', "3", 0), ('{"id": 3, "count": -1}', "3", -1),
     ('{"id": "", "count": 1.5}', "", 1.5), (f'{{"id": {2**70}}}', str(2**70), 1),
     ('{"id": 3, "count": 1e400}', "3", float("inf"))],
)  # fmt: skip
def test_an_absent_count_is_one_and_any_number_is_a_count(item: str, key: str, count: float) -> None:
    found = judge(added(item), 0, 0).item
    assert found is not None
    assert (found.key, found.count) == (key, count)


@pytest.mark.parametrize(
    ("literal", "millis"),
    [
        ("0", 0),
        ("-0", 0),
        ("1", 1_000),
        ("1598616201", 1598616201000),
        ("1598616201410", 1598616201410),
        ("4102444800", 4102444800000),
        ("4102444800000", 4102444800000),
        ("100000000000", 100000000000),
        ("1e12", 1000000000000),
        ("1598616201.41", 1598616201410),
        ("1650549837.1697195", 1650549837170),
        ("1598616201410.5", 1598616201410),
        ("1598616201411.5", 1598616201412),
        ("1598616201410.51", 1598616201411),
        ("1598616201410.50000000000000000000000000000001", 1598616201411),
        ("1598616201411.49999999999999999999999999999999", 1598616201411),
        ("1598616201.0005", 1598616201000),
        ("1598616201.0015", 1598616201002),
        ("1598616201.4105", 1598616201410),
        ("1598616201.41150", 1598616201412),
        ("1598616201.41050000000000000000000000000001", 1598616201411),
        ("1.5986162014105e9", 1598616201410),
        ("0.0005", 0),
        ("0e99", 0),
        ("1e-400", 0),
        ("1e-99999999999999999999", 0),
        ('"1970-01-01T00:00:00Z"', 0),
        ('"2022-04-21T14:03:57Z"', 1650549837000),
        ('"2022-04-21t14:03:57z"', 1650549837000),
        ('"2022-04-21 16:03:57+02:00"', 1650549837000),
        ('"2022-04-21T13:33:57-00:30"', 1650549837000),
        ('"2022-04-21T14:03:57.1697195Z"', 1650549837170),
        ('"2022-04-21T14:03:57.0005Z"', 1650549837000),
        ('"2022-04-21T14:03:57.0015Z"', 1650549837002),
        ('"2022-04-21T14:03:57.00050000000000000000000000000001Z"', 1650549837001),
        ('"2024-02-29T23:59:59.9996Z"', 1709251200000),
        ('"2100-01-01T00:00:00Z"', 4102444800000),
    ],
)
def test_a_time_is_milliseconds_rounded_half_to_even_from_its_own_digits(literal: str, millis: int) -> None:
    assert times(line(at=literal)) == (millis, millis)
    assert times(stamped(literal, at=None)) == (millis, millis)


@pytest.mark.parametrize(
    "literal",
    ["true", "false", "null", "[]", "{}", '""', '"1598616201410"', "-1", "-0.001", "99999999999", "99999999999.9",
     "4102444801", "4102444800001", "4102444800000.51", "1e300", "1e400", "-1e400", "1e99999999999999999999",
     '"2022-04-21T14:03:57"', '"2022-04-21"', '"2022-04-21T14:03Z"', '"2022-02-29T00:00:00Z"', '"2022-13-01T00:00:00Z"',
     '"2022-04-21T24:00:00Z"', '"2022-04-21T14:60:00Z"', '"2016-12-31T23:59:60Z"', '"2022-04-21T14:03:57+24:00"', '"2022-04-21T14:03:57+0200"',
     '"2022-04-21T14:03:57.Z"', '"1969-12-31T23:59:59Z"', '"1970-01-01T00:30:00+01:00"', '"2100-01-01T00:00:00.001Z"',
     '"\\u0662022-04-21T14:03:57Z"', '"2022-04-21T14:03:57Z "', '"0000-01-01T00:00:00Z"'],
)  # fmt: skip
def test_anything_else_is_no_time_also_beside_a_usable_one(literal: str) -> None:
    assert reason(line(at=literal)).startswith("no time: context.at is ")
    assert reason(line(at=literal, more=f', "event": {{"inserted_at": {AT}}}')).startswith("no time: context.at is ")
    assert reason(stamped(literal)).startswith("no time: event.inserted_at is ")


def test_a_number_counts_seconds_below_1e11_and_milliseconds_from_there_on() -> None:
    assert (parse_time(4102444800), parse_time(99_999_999_999)) == (4102444800000, None)
    assert parse_time(100_000_000_000) == 100_000_000_000


@pytest.mark.parametrize(
    ("text", "before", "at", "clock"),
    [
        (stamped("1598616202000", at="1598616201000"), 0, 1598616201000, 1598616202000),
        (stamped("1598616201000", at="1598616202000"), 0, 1598616201000, 1598616201000),
        (stamped("1598616202000", at=None), 0, 1598616202000, 1598616202000),
        (line(at="1598616201000"), 0, 1598616201000, 1598616201000),
        (line(at="1598616201000"), 1598616209000, 1598616201000, 1598616209000),
        (stamped("1598616202000", at="1598616203000"), 1598616209000, 1598616203000, 1598616209000),
        (stamped("1598616202000", at="1598616210000"), 1598616209000, 1598616209000, 1598616209000),
        (stamped("1598616202000", at=None), 1598616209000, 1598616209000, 1598616209000),
    ],
    ids=["late", "early", "no at", "no stamp", "behind", "stamp behind", "at ahead", "no at, behind"],
)
def test_the_clock_never_goes_back_and_an_event_happened_no_later_than_its_clock(
    text: bytes, before: int, at: int, clock: int
) -> None:
    assert times(text, before) == (at, clock)


def test_a_line_that_takes_a_second_look_moves_the_clock_of_those_after_it() -> None:
    lines = [line(at="2000", obj="5"), line(at="1000"), line(at="1500", obj="5")]
    batch = decode(Block(0, 1, lines, {}), "events", 0, 0, LIMIT)
    assert [(event.at, event.clock) for event in batch.events] == [
        (2_000_000, 2_000_000), (1_000_000, 2_000_000), (1_500_000, 2_000_000),
    ]  # fmt: skip


def test_the_clock_runs_on_over_a_batch_and_a_bad_line_keeps_the_one_before_it() -> None:
    lines = [line(at="1000"), b"{", line(at="500"), line(at="2000"), b"x"]
    batch = decode(Block(100, 400, lines, {}), "events", 3, 700_000, LIMIT)
    assert [(event.at, event.clock) for event in batch.events] == [
        (1_000_000, 1_000_000), (500_000, 1_000_000), (2_000_000, 2_000_000),
    ]  # fmt: skip
    assert [(bad.offset, bad.clock, bad.length, bad.head) for bad in batch.bad] == [
        (100 + len(lines[0]) + 1, 1_000_000, 1, b"{"),
        (100 + sum(len(text) + 1 for text in lines[:4]), 2_000_000, 1, b"x"),
    ]
    assert (batch.log, batch.partition, batch.start, batch.end, batch.lines, batch.clock) == (
        "events", 3, 100, 400, 5, 2_000_000,
    )  # fmt: skip


def test_one_line_in_bad_utf8_does_not_condemn_its_batch() -> None:
    lines = [line(), line(more=', "x": "?"').replace(b"?", b"\xff"), line(at="1598616201411")]
    batch = decode(Block(0, 1, lines, {}), "events", 0, 0, LIMIT)
    assert [event.at for event in batch.events] == [AT, AT + 1]
    assert [bad.reason for bad in batch.bad] == ["no JSON: byte 91 is not UTF-8"]


@pytest.mark.parametrize(
    "odd",
    [
        [b"{"], [b""], [b"5"], [b'{"a":', b"1}"], [line(), b"[" * 501 + b"]" * 501, b"\xff"], [line() + b" " + line(), b""],
        [line()[:20], line()[20:], line() + line()], [line()[:-1] + b', "x":', b"}", b" " + line() + b"\t" + line()],
    ],
)  # fmt: skip
def test_many_lines_judged_at_once_are_judged_as_one_by_one(odd: list[bytes]) -> None:
    many = [line(at=str(AT + number)) for number in range(400)]
    lines = [*many[:150], *odd, *many[150:]]
    batch = decode(Block(0, 1, lines, {}), "events", 0, 0, LIMIT)
    alone = [decode(Block(0, 1, [text], {}), "events", 0, 0, LIMIT) for text in lines]
    assert [event.raw for event in batch.events] == [event.raw for one in alone for event in one.events]
    assert [bad.reason for bad in batch.bad] == [bad.reason for one in alone for bad in one.bad]
    assert len(batch.events) == 400 + odd.count(line())
    assert [batch.text[event.offset :][: len(event.raw)] for event in batch.events] == [e.raw for e in batch.events]


def test_events_that_hold_a_word_are_found_in_order_and_bad_lines_are_none() -> None:
    one, other = line(more=', "word": 1'), line(more=', "x": "word", "word": 2')
    lines = [b'"word"', line(), b'"word" "word"', one, other, line(), b'"word']
    batch = decode(Block(700, 701, lines, {}), "events", 0, 0, LIMIT)
    assert [event.raw for event in batch.holding([b'"x"', b'"word"'])] == [one, other]
    assert batch.holding([b"nowhere"]) == []


def test_the_lines_that_hold_a_word_come_in_log_order_however_few_they_are() -> None:
    with_word = {9, 1000, 1001, 4096}
    lines = [line(more=', "x": 1') if number in with_word else line() for number in range(5000)]
    batch = decode(Block(0, 1, lines, {}), "events", 0, 0, LIMIT)
    offsets = [event.offset for event in batch.holding([b'"x"'])]
    assert offsets == [batch.events[number].offset for number in sorted(with_word)]


def test_a_line_of_the_greatest_length_is_good_and_one_byte_more_is_too_long() -> None:
    text = line(more=', "x": "' + "y" * 900 + '"')
    batch = decode(Block(0, 1, [text, text + b" "], {}), "events", 0, 0, len(text))
    assert len(batch.events) == 1
    assert batch.bad[0].reason == f"too long: {len(text) + 1} bytes, at most {len(text)}"


def _judged(store: Store, size: int) -> tuple[list[Event], list[Bad], int]:
    """Everything in partition 0 of `events`, read in blocks of about `size` bytes."""
    reader, cache = store.reader("events", 0), BatchCache(size, store.settings.max_line)
    events: list[Event] = []
    bad: list[Bad] = []
    start = clock = lines = 0
    while batch := cache.get(reader, "events", 0, start, reader.end(), clock):
        assert isinstance(batch, Batch)
        events += batch.events
        bad += batch.bad
        start, clock, lines = batch.end, batch.clock, lines + batch.lines
    reader.close()
    return events, bad, lines


@pytest.mark.parametrize("size", [1, 1000, 65_536, LIMIT, 4 * LIMIT, 64 * LIMIT])
def test_a_line_of_3_mib_is_quarantined_as_too_long_and_its_neighbours_are_unharmed(store: Store, size: int) -> None:
    long = b'{"x": "' + random.Random(3).randbytes(3 * LIMIT // 2 - 8).hex().encode() + b'abcdefg"}'
    lines = [line(at="1"), long, line(at="2"), long[: LIMIT + 1], long[:LIMIT], line(at="3")]
    offsets = store.writer("events", 0).append(lines)
    events, bad, count = _judged(store, size)
    assert [(event.offset, event.at) for event in events] == [
        (offsets[0], 1000),
        (offsets[2], 2000),
        (offsets[5], 3000),
    ]
    assert [(found.offset, found.length) for found in bad] == [
        (offsets[1], 3145728), (offsets[3], 1048577), (offsets[4], 1048576),
    ]  # fmt: skip
    assert [found.reason[:40] for found in bad] == [
        "too long: 3145728 bytes, at most 1048576", "too long: 1048577 bytes, at most 1048576",
        "no JSON: Input data was truncated",
    ]  # fmt: skip
    assert [found.head for found in bad] == [long[:65_536]] * 3
    assert count == 6


@pytest.mark.parametrize("size", [1, 1000, 65_536, LIMIT, 4 * LIMIT])
def test_a_good_line_is_read_whole_however_long_it_is_and_small_the_blocks(store: Store, size: int) -> None:
    room = LIMIT - len(line(more=', "x": ""'))
    lines = [line(), *(line(more=f', "x": "{"y" * length}"') for length in (65_600, 200_000, 700_000, room)), line()]
    store.writer("events", 0).append(lines)
    events, bad, _ = _judged(store, size)
    assert (len(events), bad) == (6, [])
    assert [event.raw for event in events] == lines


@pytest.mark.parametrize("size", [1000, 4 * LIMIT])
def test_a_long_line_without_its_end_is_not_there_yet(store: Store, size: int) -> None:
    [offset] = store.writer("events", 0).append([line()])
    with (store.directory("events", 0) / f"{0:020d}.jsonl").open("ab") as file:
        file.write(b"[" * (3 * LIMIT))
    events, bad, _ = _judged(store, size)
    assert [event.offset for event in events] == [offset]
    assert bad == []


ODD = [
    "1", "15", '"a"', '""', "true", "false", "null", "{}", "[]", '{"id": 1}', '{"type": "X"}', "-1", "15.0", "1e400", "0.1",
    "1e-400", "1e-99999999999999999999", "1e99999999999999999999", "NaN", "01", f"{2**63}", f"{2**70}", "1" * 4400,
    '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', "1598616201410", "1598616201.4105", "1598616201410.5", "99999999999",
    '"2022-04-21T14:03:57Z"', '"2022-04-21T14:03:57.00050000000000000000000000000000001+02:00"', '"ADDED_ITEM_TO_BASKET"',
    '{"type": "CHANGED_ITEM_COUNT_IN_BASKET"}', '{"item": {"id": 1}}', '{"item": {"id": 1, "count": 0.5}}', '{"at": 1}',
    '{"at": 1598616201410.5}', '{"inserted_at": 1598616201.0005}', '{"inserted_at": 5, "id": "x"}',
    "[" * 501 + "]" * 501, '"' + "[" * 600 + '"', '{"a": 1, "a": 2}', "\udcff", "1 2", "",
]  # fmt: skip
odd = st.sampled_from(ODD)


@st.composite
def odd_lines(draw: st.DrawFn) -> bytes:
    """A line whose every part may be anything, missing, or there twice."""
    usual = {
        "subject": ['{"id": 15}', f'{{"id": {draw(odd)}, "type": {draw(odd)}}}', draw(odd)],
        "verb": ['"X"', '"ADDED_ITEM_TO_BASKET"', f'{{"type": {draw(odd)}}}', draw(odd)],
        "object": [
            "{}",
            f'{{"item": {{"id": {draw(odd)}, "count": {draw(odd)}}}}}',
            f'{{"body": {draw(odd)}}}',
            draw(odd),
        ],
        "context": ['{"at": 1598616201410}', f'{{"at": {draw(odd)}}}', draw(odd)],
        "event": ["{}", f'{{"inserted_at": {draw(odd)}, "id": {draw(odd)}}}', draw(odd)],
        "x": ["1", draw(odd)],
    }
    names = draw(st.permutations(sorted(usual)))
    parts = [(name, draw(st.sampled_from(usual[name]))) for name in names if draw(st.integers(0, 9)) > 0]
    parts += [(name, draw(st.sampled_from(usual[name]))) for name in draw(st.lists(st.sampled_from(names), max_size=2))]
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in parts) + "}").encode("utf-8", "surrogateescape")


@given(odd_lines())
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_judges_agree_on_lines_with_odd_parts(text: bytes) -> None:
    assert outcome(judge, text, 1_600_000_000_000) == outcome(judge_slowly, text, 1_600_000_000_000)


@given(
    st.sampled_from([*GOOD, *AWKWARD]).filter(lambda text: len(text) < 2_000),
    st.lists(
        st.tuples(
            st.floats(0, 1), st.integers(0, 3), st.one_of(st.binary(max_size=2), odd.map(lambda t: t.encode(errors="ignore")))
        ),
        min_size=1, max_size=3,
    ),
)  # fmt: skip
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_judges_agree_on_mutated_lines(text: bytes, cuts: list[tuple[float, int, bytes]]) -> None:
    for place, gone, new in cuts:
        at = round(place * len(text))
        text = text[:at] + new + text[at + gone :]
    assert outcome(judge, text) == outcome(judge_slowly, text)


def _documents(kind: str) -> list[Path]:
    return sorted((SHARED / "badjson" / kind).glob("*.json"))


def _embedded(document: bytes) -> list[bytes]:
    """A document as the whole line, as `object.body`, and as a field that nobody knows."""
    before, after = line(obj='{"body": @}').split(b"@")
    return [document, before + document + after, line()[:-1] + b', "x": ' + document + b"}"]


@needs_shared
def test_every_document_that_a_json_reader_must_accept_is_accepted() -> None:
    documents = [path.read_bytes().replace(b"\n", b" ") for path in _documents("accept")]
    assert len(documents) == 95
    for document in documents:
        whole, body, unknown = _embedded(document)
        assert reason(whole).partition(":")[0] in ("no JSON object", "no subject"), document
        assert outcome(judge, body)[0] == outcome(judge, unknown)[0] == "good", document
        assert all(outcome(judge, text) == outcome(judge_slowly, text) for text in (whole, body, unknown)), document


@needs_shared
def test_every_document_that_a_json_reader_must_reject_is_no_json() -> None:
    documents = [text for path in _documents("reject") if b"\n" not in (text := path.read_bytes())]
    assert len(documents) == 182
    for document in documents:
        for text in _embedded(document):
            assert outcome(judge, text) == outcome(judge_slowly, text) == ("bad", "no JSON"), document


@needs_shared
def test_documents_cut_at_their_newlines_are_judged_line_by_line() -> None:
    documents = [path.read_bytes() for kind in ("accept", "reject") for path in _documents(kind)]
    pieces = {piece for text in documents if b"\n" in text for whole in _embedded(text) for piece in whole.split(b"\n")}
    assert len(pieces) > 10
    for piece in pieces:
        assert outcome(judge, piece) == outcome(judge_slowly, piece)
