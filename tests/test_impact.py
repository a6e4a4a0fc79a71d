"""Whose inbox a replay would change: who gets mails and who gets none, what was sent already, and what comes too late."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from storage.contacts import Entry, save_contacts
from storage.door import append_lines
from storage.store import Store
from storage.times import now
from tasks import impact
from tasks.diff import LogDiff
from tasks.impact import Comparison, Impact
from tests.helpers import process
from tests.test_promotion import deliver, recent
from tests.test_replay import MINUTE, again, line

MakeStore = Callable[..., Store]


def changed_by(store: Store, timeout: str) -> Impact:
    _, found = again(store, processors=("abandonment",), settings={"timeout": timeout})
    assert found.impact is not None
    return found.impact


def test_of_mails_that_are_gone_it_counts_those_that_were_sent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    save_contacts(store.database, [Entry("CUSTOMER", str(n), f"{n}@example.com", False) for n in (1, 2, 3)])
    append_lines(store, "events", [recent(n, 50) for n in (1, 2, 3, 4)])  # 4 has no address
    process(store.home, as_of=now() - 15 * MINUTE)  # flagged after half an hour, and not after three quarters yet
    deliver(store)
    for at_once in (500, 2):  # how many are asked for in one statement
        monkeypatch.setattr(impact, "_AT_ONCE", at_once)
        found = changed_by(store, "45m")
        assert (found.mails_removed, found.sent_already, found.mails_added, found.too_late) == (4, 3, 0, 0)
    assert found.no_longer == [f"CUSTOMER {n}" for n in (1, 2, 3, 4)]
    assert found.people == ("0 people would get a mail who now get none, 4 would get none who now get one")
    assert changed_by(store, "30m").sent_already == 0  # what is there in both is not gone


def test_of_mails_that_are_added_it_counts_those_that_are_past_their_time(make_store: MakeStore) -> None:
    store = make_store(timeout="45m")
    for minutes, verb in ((0, "ADDED_ITEM_TO_BASKET"), (40, "ADDED_ITEM_TO_BASKET"), (41, "ORDERED")):
        append_lines(store, "events", [line(n, minutes, verb) for n in range(25)])  # years ago
    append_lines(store, "events", [recent(50, 50)])
    process(store.home, timeout="45m", as_of=now() - 15 * MINUTE)
    found = changed_by(store, "30m")
    assert (found.mails_added, found.too_late, found.mails_removed, found.sent_already) == (26, 25, 0, 0)
    assert (found.newly_mailed, found.no_longer_mailed, found.no_longer) == (26, 0, [])
    assert found.newly == [f"CUSTOMER {n}" for n in range(20)], "the first of them, no more than a page takes"
    assert found.people == "26 people would get a mail who now get none, 0 would get none who now get one"


@pytest.mark.parametrize("kind", ["added", "removed", "changed"])
def test_two_generations_are_the_same_only_where_nothing_differs(kind: str) -> None:
    same = LogDiff("baskets", old=3, new=3, same=3)
    other = LogDiff("reminders", old=3, new=3, same=2, **{kind: 1})
    assert Comparison([same, same], None).is_nothing
    assert not Comparison([same, other], None).is_nothing


def test_the_terminal_and_the_page_say_it_with_every_figure_at_its_place(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    from deployments.cli_replay import show_comparison
    from flows.replay_report import report

    append_lines(store, "events", [line(1, 0), line(1, 40), line(1, 41, "ORDERED")])
    process(store.home)
    done, found = again(store, processors=("abandonment",), settings={"timeout": "45m"})
    moved = Impact(1111, 2, 3, 4, ["CUSTOMER a|b"], ["CUSTOMER 6", "CLIENT 7"], 8, 9)
    show_comparison(Comparison(found.logs, moved))
    said = capsys.readouterr()
    people = "3 people would get a mail who now get none, 4 would get none who now get one"
    assert said.err.splitlines()[-3:] == [
        f"mails: 1111 more, 2 fewer (of which 8 were sent already); {people}",
        "newly mailed: CUSTOMER a|b",
        "no longer mailed: CUSTOMER 6, CLIENT 7",
    ]
    parts = report(done.planned, Comparison(found.logs, moved)).split("\n\n")
    at = parts.index("### Whose inbox that would change")
    assert parts[at + 1 : at + 4] == [
        f"{people}. 1,111 mails are added, of which 9 are too old to be sent; 2 are gone, of which 8 were sent already.",
        r"Newly mailed: CUSTOMER a\|b",
        "No longer mailed: CUSTOMER 6, CLIENT 7",
    ]
    assert "| baskets | 2 | 0 | 0 | 2 | 0 | 0 |" in parts[2]
    assert "| removed | 1 | abandonment/events:0:0/abandoned | 2001-09-09 02:26 |  |" in "".join(parts)
    assert again(store, processors=("anomalies",))[1].impact is None, "it gives no mails"
    same = report(done.planned, Comparison([], moved))
    assert "Both generations are the same." in same
    assert "inbox" not in same
