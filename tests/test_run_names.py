"""What a run is called while it works and once it has ended, what its log says, and what it can be found by."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from storage.door import append_lines
from storage.store import Store
from tasks.deliver import DeliverySummary
from tasks.process import Summary, positions, process_to_end
from tasks.run import Run
from tasks.topology import build_topology
from tests.test_tables import did

RAW = [
    Summary("quarantine", 1200, 1180, 20, 0, 20, 9000, 500, 9500),
    Summary("abandonment", 1100, 100, 18, 982, 3, 9000, 400, 9400),
]
MAILS = DeliverySummary(
    taken_in=5, waiting=2, retries=1, held="a person <said> so",
    states=Counter({"SUPPRESSED": 1, "SENT": 4, "FAILED": 0}), reasons=Counter({"no address": 1, "too old": 3}),
)  # fmt: skip


def run_of(store: Store) -> Run:
    return Run(store, build_topology(store.settings), "test")


def test_a_run_that_has_ended_is_named_by_where_and_what_the_worst_first(store: Store) -> None:
    from flows.naming import Done, ended, outcome_tags

    run = run_of(store)
    assert ended(run, "process", Done(RAW)) == ("process events/0 400..9500: 1,200 read, 20 quarantined, 3 to baskets")
    assert outcome_tags(run, Done(RAW)) == {"events", "baskets", "quarantined"}
    done = Done([Summary("remind", 3, 3, derived=2, first=10, last=70)], [MAILS], {"derive": "it broke"})
    assert ended(run, "react", done) == (
        "react baskets/0 10..70: derive failed, 3 read, 2 to reminders, 4 sent, 1 suppressed, 2 waiting"
    )
    assert outcome_tags(run, done) == {"baskets", "reminders", "sent", "suppressed"}
    late = Done([Summary("abandonment", derived=1, first=70, last=70), Summary("normalise")])
    assert ended(run, "process", late) == "process events/0 at 70: 1 to baskets", "a tick reads nothing"
    idle = Done([Summary("derive", 3, ignored=3, first=0, last=70)])
    assert ended(run, "process", idle) == "process events/0 0..70: 3 read"
    for little, told in (
        (Done(mails=[DeliverySummary(taken_in=1, waiting=1)]), "1 waiting"),
        (Done(mails=[DeliverySummary(retries=1, waiting=1)]), "1 waiting"),
        (Done(mails=[DeliverySummary(waiting=1)]), "nothing new"),
        (Done(mails=[DeliverySummary(states=Counter({"FAILED": 1}))]), "1 failed"),
        (Done(failures={"derive": "it broke"}), "derive failed"),
        (Done([Summary("derive")], [DeliverySummary(states=Counter({"SENT": 0}))]), "nothing new"),
    ):
        assert ended(run, "react", little) == f"react: {told}"
    assert outcome_tags(run, Done([Summary("derive")])) == {"nothing-new"}


def test_with_more_partitions_than_one_no_offset_is_named(make_store: Callable[..., Store]) -> None:
    from flows.naming import Done, ended, following

    store = make_store(partitions=2)
    append_lines(store, "events", [did(n, n) for n in range(9)])
    run = run_of(store)
    assert ended(run, "process", Done(RAW)).startswith("process events in 2 partitions: 1,200 read")
    assert following(run, "process", ["derive", "abandonment"], positions(run.store)) == "process following events"


def test_a_run_at_work_is_named_by_what_it_follows_from_where_on(store: Store) -> None:
    from flows.naming import following

    append_lines(store, "events", [did(1, 0)])
    run = run_of(store)
    end = store.reader("events", 0).end()
    process_to_end(run, "derive", None)
    append_lines(store, "events", [did(1, 1)])
    process_to_end(run, "abandonment", None)
    name = following(run, "process", ["derive", "abandonment", "deliver", "remind"], positions(run.store))
    assert name == f"process following events/0 from {end}, baskets/0 from 0"


def test_its_log_says_what_each_did_and_its_page_the_same_and_how_things_stand(store: Store) -> None:
    from flows.counts import counts_markdown
    from flows.naming import Done, done_of, lines_of

    done = done_of([*RAW, None, Summary("normalise"), MAILS], {"derive": "it <broke>"})
    assert done == Done([*RAW, Summary("normalise")], [MAILS], {"derive": "it <broke>"})
    assert lines_of(done) == [
        "quarantine: 1,200 read = 1,180 processed + 20 quarantined + 0 ignored; 20 derived",
        "abandonment: 1,100 read = 100 processed + 18 quarantined + 982 ignored; 3 derived",
        "deliver: 5 taken in, 4 SENT, 1 SUPPRESSED, 2 waiting",
        "deliver: 3 x too old",
        "deliver: 1 x no address",
    ]
    assert lines_of(Done(mails=[DeliverySummary(taken_in=2)])) == ["deliver: 2 taken in, none decided, 0 waiting"]
    failed = Done(mails=[DeliverySummary(states=Counter({"FAILED": 1}))])
    assert lines_of(failed) == ["deliver: 0 taken in, 1 FAILED, 0 waiting"]
    assert lines_of(Done(mails=[DeliverySummary(waiting=2)])) == []
    read = Done([Summary("derive", 3, ignored=3)])
    assert lines_of(read) == ["derive: 3 read = 0 processed + 0 quarantined + 3 ignored; 0 derived"]
    ticked = Done([Summary("abandonment", derived=1)])
    assert lines_of(ticked) == ["abandonment: 0 read = 0 processed + 0 quarantined + 0 ignored; 1 derived"]

    run = run_of(store)
    run.notes.append("a note")
    page = counts_markdown(run, "react", done, at_work=False)
    parts = page.split("\n\n")
    assert parts[0].startswith("## react events/0 400..9500: derive failed, 1,200 read, ")
    assert parts[1].startswith("By [this run](")
    assert parts[2:4] == [r"**derive failed**: it \<broke\>", "Note: a note"]
    assert "| abandonment | 1,100 | 100 | 18 | 982 | 3 | 9,000 |" in page
    assert "normalise | 0 | 0 | 0 | 0 | 0 | 0 |" not in page.partition("### Since the beginning")[0]
    assert "5 taken in, 2 waiting, 1 to be tried again" in parts
    assert r"**Mails are held:** a person \<said\> so" in parts
    assert "| state | mails |\n| --- | --: |\n| SENT | 4 |\n| SUPPRESSED | 1 |" in parts
    assert "| why not | mails |\n| --- | --: |\n| too old | 3 |\n| no address | 1 |" in parts
    assert "\n| processor | read | processed | quarantined | ignored | derived | bytes |\n" in f"\n{page}"
    assert "\n| processor | at | behind | read | processed | quarantined | ignored | derived |\n" in f"\n{page}"
    assert "| quarantine | events/0 0 | none | 0 | 0 | 0 | 0 | 0 |" in parts[-1]

    page = counts_markdown(run, "react", Done(), at_work=True)
    assert re.match(
        r"As it was at \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d UTC, with \[this run\]\(.*\) at work\.$", page.split("\n\n")[1]
    )
    assert "### In this run" not in page
    free = counts_markdown(run, "react", Done(mails=[DeliverySummary(taken_in=2, waiting=2)]), at_work=False)
    assert "2 taken in, 2 waiting, 0 to be tried again\n\n### Since the beginning" in free
    assert "| abandonment | 0 | 0 | 0 | 0 | 1 | 0 |" in counts_markdown(run, "process", ticked, at_work=False)
