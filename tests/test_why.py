"""Why something happened, and why nothing did: from the logs, the clock and the database, without Prefect."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest

from storage.brake import PAUSED, put_on
from storage.contacts import Entry, forget_contact, save_contacts
from storage.door import append_lines
from storage.errors import UsageError
from storage.look import Look
from storage.store import Store
from storage.times import now, show
from tasks.evidence import Evidence
from tasks.process import FinalTick, process_to_end
from tasks.promote import promote, rollback
from tasks.replay import drop_replay
from tasks.topology import build_topology
from tasks.why import Why
from tasks.why import why as answer_why
from tasks.why_not import WhyNot
from tasks.why_not import why_not as answer_why_not
from tasks.why_text import rows_of
from tests.conftest import ROOT, afterlog, log_bytes
from tests.helpers import process
from tests.test_deliver import ANN, GOOD, MINUTE, deliver, did, left_behind, run_of, submitted, with_mailer
from tests.test_promotion import LONGER, recent, replayed

LEMON = {"id": 3, "name": "Lemon", "price": 5, "count": 2}
LEFT = "abandonment/events:0:0/abandoned"
REMINDER = f"remind/{LEFT}/basket-reminder"
BOTH_DATABASES = True


def why(store: Store, ident: str) -> Why:
    evidence = Evidence(store, build_topology(store.settings), "http://ui")
    try:
        return answer_why(evidence, ident)
    finally:
        evidence.close()


def why_not(store: Store, customer: str = "15") -> WhyNot:
    evidence = Evidence(store, build_topology(store.settings))
    try:
        return answer_why_not(evidence, customer)
    finally:
        evidence.close()


def append(store: Store, *lines: bytes) -> None:
    append_lines(store, "events", list(lines))


def bring(store: Store, as_of: Any = "now") -> None:
    """Process everything, with a tick."""
    run, final = run_of(store), FinalTick(as_of)
    for name in run.topology.on_raw_logs():
        process_to_end(run, name, final)


def added(ago: float, inserted: float | None = None) -> bytes:
    return did("ADDED_ITEM_TO_BASKET", ago, inserted, item=LEMON)


def test_a_mail_is_followed_to_the_raw_bytes_by_its_id_its_message_id_and_its_place(store: Store) -> None:
    submitted(store, 1)
    save_contacts(store.database, [ANN])
    deliver(store)
    [eml] = (store.home / "outbox").rglob("*.eml")
    message_id = str(message_from_bytes(eml.read_bytes())["Message-ID"])
    mail = "derive/events:0:0/tax-received"
    found = why(store, mail)
    assert [(step.place, step.id, step.verb) for step in found.chain] == [
        ("reactions:0:0", mail, "EMAIL"), ("events:0:0", "", "SUBMIT_TAX"),
    ]  # fmt: skip
    first, raw = found.chain
    assert raw.line.encode() == store.reader("events", 0).line(0)
    assert first.rule == "SUBMIT_TAX gives the email tax-received to the CLIENT 1"
    assert first.settings == {"not_after": 86_400_000}
    assert first.code == build_topology(store.settings).make("derive").version()["code"]
    assert first.run is not None
    assert (first.run.run, first.run.link) == ("a test", "")
    assert found.sending is not None
    assert (found.sending.state, found.sending.message_id, found.sending.attempts) == ("SENT", message_id, 1)
    assert [(o.state, o.place, o.run and o.run.run) for o in found.sending.outcomes] == [
        ("SENT", "deliveries:0:0", "a test")
    ]
    for ident in (message_id, message_id.strip("<>"), "reactions:0:0"):
        assert why(store, ident).chain == found.chain
    assert [step.id for step in why(store, "events:0:0").came_of_it] == [mail]
    sent = why(store, f"deliver/{mail}/sent")
    assert [step.place for step in sent.chain] == ["deliveries:0:0", "reactions:0:0", "events:0:0"]


def test_an_abandonment_says_which_tick_showed_it_with_which_settings(make_store: Callable[..., Store]) -> None:
    store = make_store(timeout="20m")
    left_behind(store)
    deliver(store)
    found = why(store, LEFT)
    first = found.chain[0]
    assert first.rule == (
        f"1 item in the basket, and last there at {show(first.at)}: more than 20m passed after that without an interaction"
    )
    tick = re.fullmatch(r"the tick clock:0:(\d+) of (\S+)", first.shown_by)
    assert tick is not None
    assert tick[2] == show(first.known_at)
    assert json.loads(store.reader("clock", 0).line(int(tick[1])))["object"]["as_of"] == first.known_at
    assert first.settings == {"timeout": 20 * MINUTE, "excluded": []}
    assert [step.id for step in found.came_of_it] == [REMINDER]
    assert [step.place for step in why(store, REMINDER).chain] == ["reminders:0:0", "baskets:0:0", "events:0:0"]


def test_an_abandonment_that_the_customer_s_next_event_showed_names_it_and_what_closed_it(store: Store) -> None:
    lines = [added(100), did("VIEWED", 95, subject=1), added(10, 5), did("VIEWED", 90, 4), did("ORDERED", 3, value=9)]
    append(store, *lines)
    process(store.home)
    offset = sum(len(line) + 1 for line in lines[:2])
    lefts = [step for step in why(store, "baskets:0:0").chain if step.id]
    assert lefts[0].shown_by.startswith(f"the customer's next event, events:0:{offset}, of ")
    recovered = why(store, f"abandonment/events:0:{len(lines[0]) + 1}/recovered")
    assert recovered.chain[0].rule.endswith("within 7d after the abandonment; worth 9")
    assert recovered.chain[0].notes == [f"of the abandonment abandonment/events:0:{len(lines[0]) + 1}/abandoned"]
    assert recovered.chain[1].verb == "ORDERED"
    assert [s.verb for s in why(store, lefts[0].id).came_of_it] == ["EMAIL", "RECOVERED_BASKET"]


def test_an_empty_line_is_one(store: Store) -> None:
    lines = [added(20), b"", b"", added(10)]
    append(store, *lines)
    process(store.home)
    offset = len(lines[0]) + 1
    for place in (offset, offset + 1):
        found = why(store, f"quarantine/events:0:{place}/rejected")
        assert [(step.place, step.line) for step in found.chain[1:]] == [(f"events:0:{place}", "")]
        assert found.chain[0].notes == []
        assert why(store, f"events:0:{place}").came_of_it == found.chain[:1]
    with pytest.raises(UsageError, match=f"The line there starts at {offset + 2}"):
        why(store, f"events:0:{offset + 3}")


def test_whatever_came_first_of_a_tick_and_an_event_of_one_clock_showed_it(store: Store) -> None:
    # Ticks of the log's end: the first has the clock of 1's second event, which came before it. The second has it too,
    # and takes 2, whose line came late and without a stamp.
    second, late = recent(1, 100), json.loads(recent(2, 190))
    del late["event"]
    append(store, recent(1, 200), second)
    bring(store, "log-end")
    append(store, json.dumps(late).encode())
    bring(store, "log-end")
    shown = [why(store, f"baskets:0:{place}").chain[0].shown_by for place in _offsets(log_bytes(store.home, "baskets"))]
    known = show(json.loads(second)["event"]["inserted_at"])
    assert shown[0] == f"the customer's next event, events:0:{len(second) + 1}, of {known}"
    ticks = [place for place, line in _offsets(log_bytes(store.home, "clock")).items() if b'"TICK"' in line]
    assert shown[1:] == [f"the tick clock:0:{ticks[1]} of {known}"]


def test_what_lies_between_a_basket_and_the_tick_that_showed_it_is_not_read(make_store: Callable[..., Store]) -> None:
    """A catch-up shows those of years ago by a tick of now."""
    store = make_store(segment_bytes=100_000)
    append(store, added(500))
    for ago in range(499, 479, -1):
        append(store, *[did("VIEWED", ago, item=LEMON).replace(b'"id": 15,', b'"id": 77,')] * 500)
    bring(store)
    (left,) = _offsets(log_bytes(store.home, "baskets"))
    before = _read_so_far()
    assert why(store, f"baskets:0:{left}").chain[0].shown_by.startswith("the tick clock:0:")
    assert _read_so_far() - before < len(log_bytes(store.home, "events")) / 3


def _read_so_far() -> int:
    """How many bytes this process has read from files."""
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert found
    return int(found[1])


def test_what_was_put_in_after_the_timeout_is_shown_by_what_came_after_it(store: Store) -> None:
    """A basket that was empty when its customer's next event came: that event has not shown it."""
    lines = [did("VIEWED", 200), did("ADDED_ITEM_TO_BASKET", 210, 150, item=LEMON), did("VIEWED", 100)]
    append(store, *lines)
    process(store.home)
    (left,) = [why(store, f"baskets:0:{p}").chain for p in _offsets(log_bytes(store.home, "baskets"))]
    assert left[0].shown_by.startswith(f"the customer's next event, events:0:{len(lines[0]) + len(lines[1]) + 2}, of ")
    assert left[1].place == "events:0:0"


def _offsets(log: bytes) -> dict[int, bytes]:
    found, place = {}, 0
    for line in log.splitlines(keepends=True):
        found[place] = line
        place += len(line)
    return found


def test_a_mail_that_was_sent_is_told_of_the_generation_that_gave_it_whatever_is_live_now(store: Store) -> None:
    """Another customer's event lies at its place in what is live now."""
    save_contacts(store.database, [Entry("CUSTOMER", str(n), f"{n}@example.com", False) for n in (1, 2)])
    # 1 paused for 40 minutes: reminded of what she left before that; by 45 minutes of what she left after it.
    append(store, recent(2, 110), recent(1, 100), recent(1, 60), recent(1, 5))
    bring(store, now() - 2000)
    deliver(store)
    letters = [message_from_bytes(path.read_bytes()) for path in (store.home / "outbox").rglob("*.eml")]
    sent = [json.loads(line)["event"]["id"] for line in log_bytes(store.home, "deliveries").splitlines()]
    asked = [*(str(letter["Message-ID"]) for letter in letters), *sent]
    before = {ident: why(store, ident) for ident in asked}
    came = why(store, before[asked[0]].chain[-2].id).came_of_it
    replayed(store, **LONGER)
    topology = build_topology(store.settings)
    promote(store, topology, "longer", "test")
    gone = 0
    for ident, then in before.items():
        found = why(store, ident)
        assert [(step.verb, step.id, step.at) for step in found.chain] == [(s.verb, s.id, s.at) for s in then.chain]
        assert found.chain[-1] == then.chain[-1]
        others = [
            step for step in found.chain if any(n.startswith("of generation 1, which is not") for n in step.notes)
        ]
        assert [(step.place, step.line, step.settings, step.run) for step in others] == [
            (step.place, step.line, step.settings, step.run)
            for step in then.chain
            if step.place in {other.place for other in others}
        ]
        gone += len(others)
    assert gone >= 6
    assert [step.id for step in why(store, before[asked[0]].chain[-2].id).came_of_it] == [step.id for step in came]
    rollback(store, topology, "longer", "test")
    assert {ident: why(store, ident) for ident in asked} == before


def test_a_mail_whose_generation_was_discarded_says_so(store: Store) -> None:
    save_contacts(store.database, [Entry("CUSTOMER", "1", "1@example.com", False)])
    append(store, recent(1, 120), recent(1, 80))
    bring(store, now() - 2000)
    topology = build_topology(store.settings)
    replayed(store, **LONGER)
    promote(store, topology, "longer", "test")
    deliver(store)
    [mail] = [row["event_id"] for row in Look(store).rows("SELECT event_id FROM delivery WHERE state = 'SENT'")]
    assert why(store, mail).chain[0].notes == []
    rollback(store, topology, "longer", "test")
    assert why(store, mail).chain[0].notes == ["of generation 2, which is not live: generation 1 of reminders is"]
    drop_replay(store, "longer", "test")
    with pytest.raises(
        UsageError, match="the event of this mail is gone; found generation 2 of reminders, which was dis"
    ):
        why(store, mail)
    [step] = why(store, f"deliver/{mail}/sent").chain
    assert step.notes == [
        "its cause cannot be read (reminders:0:0: generation 2 of reminders is gone: it was discarded)"
    ]


def test_a_mail_that_a_promotion_has_passed_over_says_why(store: Store) -> None:
    """What is too old or too soon by then has no row, and never will have one."""
    save_contacts(store.database, [Entry("CUSTOMER", str(n), f"{n}@example.com", False) for n in (1, 2)])
    append(store, recent(2, 1600), recent(2, 1560), recent(2, 1500), recent(1, 100), recent(1, 60))
    process(store.home, timeout="35m", as_of=now() - 2000)
    deliver(store)
    topology = build_topology(store.settings)
    replayed(store, **LONGER)
    before, after = (
        set(re.findall(rb"remind/[^\"]+", log_bytes(store.home, log))) for log in ("reminders", "reminders@2")
    )
    old, soon = sorted(
        (ident.decode() for ident in after - before), key=lambda ident: int(ident.split(":")[2].split("/")[0])
    )

    def told(ident: str) -> str:
        found = why(store, ident)
        assert found.sending is not None
        assert (found.sending.state, found.sending.outcomes) == ("", [])
        [state] = [value for _, what, value in rows_of(found) if what == "mail"]
        assert state == ("not queued" if found.sending.reason else "not queued yet")
        return found.sending.reason

    assert told(old).startswith("generation 2 is not live; what it alone has is queued when it is promoted, if")
    promote(store, topology, "longer", "test")
    assert told(old) == "too old: past its not_after when generation 2 became live"
    assert told(soon).startswith(
        "too soon: its recipient had been mailed within the gap between two reminders when gen"
    )
    assert why_not(store, "1").answer == f"not queued because {told(soon)}"
    rollback(store, topology, "longer", "test")
    assert told(old).startswith("generation 2 is not live")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("object", None),
        ("object", {"id": 1.5, "type": "CLIENT"}),
        ("context", {"at": 1650549837170, "source": "none"}),
        ("context", {"source": GOOD["context"]["source"]}),  # without a time the judge takes it for no event
        ("event", {}),
        ("event", {"id": "mailer/bad", "inserted_at": 1650549837170}),
    ],
)
def test_a_mail_that_can_never_be_sent_is_told_at_the_place_that_its_reason_names(
    make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, change: Any
) -> None:
    store = with_mailer(make_store, tmp_path, monkeypatch)
    bad = GOOD | {"event": {"id": "mailer/bad"}} | {part: change}
    event = {"subject": {"id": 1}, "verb": "X", "object": bad, "context": {"at": now() - MINUTE}}
    append(store, json.dumps(event).encode())
    process_to_end(run_of(store), "mailer", None)
    deliver(store)
    found = why(store, "own-mails:0:0")
    told = {what: value for _, what, value in rows_of(found)}
    state, reason = (
        ("FAILED, 0 tries", "no mail, see own-mails:0:0: ")
        if "at" in bad["context"]
        else ("not queued", "delivery took it for no event: ")
    )
    assert told["mail"].startswith(state)
    assert told["reason"].startswith(reason)
    assert json.loads(found.chain[0].line) == bad


def test_settings_and_run_are_those_of_then_whatever_came_later(make_store: Callable[..., Store]) -> None:
    begin = now()
    turns = [("30m", "first", [added(500), did("VIEWED", 400)], 300), ("45m", "second", [did("VIEWED", 200)], 0)]
    for timeout, by, lines, ago in turns:
        store = make_store(timeout=timeout)
        append(store, *lines)
        run = run_of(store)
        run.author = run.author._replace(run=by, flow_run_id=f"id-{by}")
        process_to_end(run, "abandonment", FinalTick(begin - ago * MINUTE))
    steps = [why(store, f"baskets:0:{offset}").chain[0] for offset, _ in lines_of(store, "baskets")]
    assert [step.settings["timeout"] for step in steps] == [30 * MINUTE, 30 * MINUTE, 45 * MINUTE]
    assert steps[0].shown_by.split(",")[0] == "the customer's next event"
    assert [(step.run.run, step.run.link) for step in steps if step.run] == [
        ("first", "http://ui/runs/flow-run/id-first"), ("first", "http://ui/runs/flow-run/id-first"),
        ("second", "http://ui/runs/flow-run/id-second"),
    ]  # fmt: skip


def lines_of(store: Store, log: str) -> list[tuple[int, bytes]]:
    found, offset = [], 0
    for line in b"".join(store.reader(log, 0).raw(0, store.committed_end(log, 0))).splitlines(keepends=True):
        found.append((offset, line))
        offset += len(line)
    return found


def test_an_anomaly_a_bad_line_and_bytes_that_have_changed_are_told(store: Store) -> None:
    lines = [did("ORDERED", 100 - n, value=10 + n % 2) for n in range(40)]
    append(store, *lines, did("ORDERED", 50, value=900), b"{torn")
    bring(store)
    offset = sum(len(line) + 1 for line in lines)
    odd = why(store, f"anomalies/events:0:{offset}/object.value").chain
    assert re.fullmatch(
        r"object.value is 900, 1.78e\+03 standard deviations off, more than 2: mean 10.5, deviation 0.5, 40 samples before it",
        odd[0].rule,
    )
    assert odd[1].notes == []
    [(_, rejected)] = lines_of(store, "quarantine")
    bad = why(store, json.loads(rejected)["event"]["id"]).chain
    assert bad[0].rule.startswith("the judge refused the line: no JSON")
    assert bad[1].notes[0].startswith("no event: no JSON")
    [segment] = store.directory("events", 0).glob("*.jsonl")
    segment.write_bytes(segment.read_bytes().replace(b'"value": 900', b'"value": 901'))
    changed = why(store, f"anomalies/events:0:{offset}/object.value").chain
    assert changed[1].notes == ["the bytes here are other ones than the event carries as its cause"]


@pytest.mark.parametrize(
    ("ident", "sentence"),
    [
        ("abandonment/events:0:7/abandoned", "no such event; found 'abandonment/events:0:7/abandoned'. See: afterlog read baskets"),
        ("nobody/events:0:7/x", "no such event; found an id of 'nobody', expected one of abandonment, "),
        ("normalise/events:0:7/x", "no such event; found an id of 'normalise'"),
        ("events:0:7", "events:0:7: not the start of a line. The line there starts at 0"),
        ("events:0:99999", "events:0:99999: there is no such line; expected an offset below "),
        (f"baskets:{10**20}:0", f"baskets:{10**20}:0: there is no such line; expected one of the partitions 0"),
        (f"baskets:0:{10**20}", f"baskets:0:{10**20}: there is no such line; expected an offset below "),
        (f"abandonment/events:{10**20}:0/abandoned", "no such event; found 'abandonment/events:1000"),
        ("baskets:" + "9" * 5000 + ":0", "no such event; found an id of 'baskets:9999"),
        ("remind/\udcff", "no such id: what stands in a log is UTF-8; found 'remind/\\udcff'"),
        ("\ud800", "no such id: what stands in a log is UTF-8; found '\\ud800'"),
        ("0" * 64, "no mail has this Message-ID"),
    ],
)  # fmt: skip
@pytest.mark.only("sqlite")
def test_what_is_not_there_is_said_in_a_sentence(store: Store, ident: str, sentence: str) -> None:
    left_behind(store)
    with pytest.raises(UsageError) as raised:
        why(store, ident)
    assert str(raised.value).startswith(sentence)


class TestWhyNot:
    def test_nobody_ever_heard_of_them(self, store: Store) -> None:
        assert why_not(store).answer == "the log events has no interaction of a customer 15 that counts"

    def test_the_basket_is_empty_since_nothing_was_put_in_it_or_it_was_taken_out_or_ordered(self, store: Store) -> None:
        append(store, did("VIEWED", 9))
        assert why_not(store).answer == "the basket is empty: nothing was ever put in it"
        append(store, added(8), did("REMOVED_ITEM_FROM_BASKET", 7, item={"id": 3}))
        assert why_not(store).answer.startswith("the basket is empty: the last item was taken out at ")
        append(store, added(6), did("ORDERED", 5, value=1))
        found = why_not(store)
        assert found.answer.startswith("the basket is empty: ordered at ")
        place = found.checks[0].place
        assert b'"ORDERED"' in store.reader("events", 0).line(int(place.rpartition(":")[2]))

    def test_it_is_too_early_or_nobody_has_looked_yet(self, store: Store) -> None:
        append(store, added(18))
        assert re.match(r"11m 5\ds to go: last there at \S+, and abandoned 30m later$", why_not(store).answer)
        append(store, did("VIEWED", 17, 17))
        bring(store)
        assert re.match(r"12m 5\ds to go: ", why_not(store).answer)

    def test_a_basket_that_is_due_waits_for_process_and_then_for_deliver(self, store: Store) -> None:
        append(store, added(40))
        assert re.search(r"due for (10m|9m 59s).*: `process` has not shown it by a tick yet$", why_not(store).answer)
        bring(store)
        assert why_not(store).answer == "no reminder yet: `deliver` has not read the abandonment"
        process_to_end(run_of(store), "remind", None)
        assert why_not(store).answer == "no address: a mail to them is suppressed (`afterlog contacts`)"
        save_contacts(store.database, [Entry("CUSTOMER", "15", "kim@example.com", True)])
        assert why_not(store).answer == "unsubscribed: a mail to them is suppressed"
        save_contacts(store.database, [Entry("CUSTOMER", "15", "kim@example.com", False)])
        assert why_not(store).answer == "not queued yet: `deliver` has not taken it in"

    def test_it_was_sent_or_is_held_or_was_suppressed(self, make_store: Callable[..., Store]) -> None:
        store = make_store("sent")
        left_behind(store)
        deliver(store)
        forget_contact(store.database, "CUSTOMER", "15")  # too late to matter
        assert re.fullmatch(r"nothing stands in the way: SENT at \S+", why_not(store).answer)
        held = make_store("held")
        left_behind(held)
        put_on(held.database, PAUSED, "a wrong template")
        deliver(held)
        assert why_not(held).answer == "WAITING, held: delivery is PAUSED, a wrong template"
        allowed = make_store("allowed", mail_allow=("@example.org",))
        left_behind(allowed)
        deliver(allowed)
        said = r"SUPPRESSED at \S+ because not on the list of allowed recipients"
        assert re.fullmatch(said, why_not(allowed).answer)

    def test_it_was_retracted_or_ordered_or_one_came_a_little_before(self, make_store: Callable[..., Store]) -> None:
        store = make_store("retracted")
        left_behind(store)
        append(store, did("VIEWED", 25, 0))
        bring(store)
        found = why_not(store)
        retracted = [check for check in found.checks if check.what == "since then"]
        assert re.match(r"retracted by an interaction of \S+ \(events:0:\d+\)$", retracted[0].detail)
        ordered = make_store("ordered")
        left_behind(ordered)
        append(ordered, did("ORDERED", 5, value=4))
        bring(ordered)
        found = why_not(ordered)
        assert found.answer.startswith("the basket is empty: ordered at ")
        assert [c.detail.split(" ")[0] for c in found.checks if c.what == "since then"] == ["ordered"]
        again = make_store("again")
        append(again, added(200), did("VIEWED", 100))
        bring(again)
        deliver(again)
        assert re.match(r"no reminder: one of \S+ is less than 1d before \(remind/", why_not(again).answer)

    def test_the_gap_and_the_timeout_are_those_of_then(self, make_store: Callable[..., Store]) -> None:
        store = make_store(timeout="10m")
        append(store, added(75), did("VIEWED", 15))
        bring(store)
        process_to_end(run_of(store), "remind", None)
        answer = why_not(store).answer
        assert re.match(r"no reminder: one of \S+ is less than 1d before \(remind/", answer)
        later = make_store(timeout="20m", reminder_gap="30m")
        found = why_not(later)
        assert found.answer == answer
        assert re.search(r", 15m( [0-9]s)? ago$", found.checks[1].detail)

    def test_who_has_not_been_read_is_not_told_by_a_generation_that_is_not_live(self, store: Store) -> None:
        append(store, *[recent(1, 500 - 40 * n) for n in range(10)])
        bring(store, now() - 2000)
        deliver(store)
        replayed(store, **LONGER)
        promote(store, build_topology(store.settings), "longer", "test")
        append(store, recent(2, 50))
        bring(store)
        assert why_not(store, "2").answer == "no reminder yet: `deliver` has not read the abandonment"


@pytest.mark.only("sqlite")
def test_the_commands_answer_in_lines_and_in_json_without_prefect(store: Store) -> None:
    left_behind(store)
    deliver(store)
    shown = afterlog(store.home, "why", REMINDER)
    assert shown.returncode == 0
    rows = [line.split("\t") for line in shown.stdout.decode().splitlines()]
    assert rows[0] == ["place", "what", "value"]
    assert ["events:0:0", "verbatim", store.reader("events", 0).line(0).decode()] in rows
    assert [value for _, what, value in rows if what == "mail"] == ["SENT, 1 try, to CUSTOMER 15"]
    assert shown.stderr.decode().startswith("an abandoned basket gives a reminder")
    document = json.loads(afterlog(store.home, "why-not", "15", "--json").stdout)
    assert document["answer"].startswith("nothing stands in the way: SENT at ")
    missing = afterlog(store.home, "why", "abandonment/events:0:9/abandoned")
    assert missing.returncode == 2
    assert missing.stderr.startswith(b"afterlog: no such event; found ")


@pytest.mark.only("sqlite")
def test_what_answers_imports_neither_prefect_nor_sqlalchemy(store: Store) -> None:
    left_behind(store)
    code = (
        "import sys\nfrom deployments.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print({'prefect', 'sqlalchemy', 'sqlmodel'} & set(sys.modules), file=sys.stderr)"
    )
    for command in (["why", LEFT], ["why-not", "15"], ["basket", "15"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *command], env={"AFTERLOG_HOME": str(store.home), "PYTHONPATH": str(ROOT)},
            cwd=ROOT, capture_output=True, check=True,
        )  # fmt: skip
        assert done.stderr.endswith(b"set()\n")
        assert done.stdout


def test_the_flow_answers_the_same_and_links_the_run(home: Path) -> None:
    import asyncio

    from prefect.artifacts import Artifact

    from flows.process import process as process_flow
    from flows.why import why as why_flow
    from storage.settings import load_settings

    store = Store(load_settings())
    append(store, added(40))
    process_flow()
    said = why_flow(LEFT)
    assert said.startswith("1 item in the basket, and last there at ")
    step = why(store, LEFT).chain[0]
    assert step.run is not None
    assert re.fullmatch(r"http://ui/runs/flow-run/[0-9a-f-]{36}", step.run.link)
    artifact = asyncio.run(Artifact.aget("why"))  # type: ignore[arg-type]  # Prefect's own decorator confuses the types
    assert artifact is not None
    assert f"](/runs/flow-run/{step.run.flow_run_id})" in str(artifact.data)
    assert "events:0:0" in str(artifact.data)
    assert why_flow("nonsense", return_state=True).is_failed()


@pytest.mark.only("sqlite")
def test_a_partition_and_a_generation_that_no_column_holds_are_empty(store: Store) -> None:
    left_behind(store)
    look = Look(store)
    assert look.committed_end("baskets", 0) > 0
    assert look.committed_end("baskets", 10**20) == look.committed_end("baskets", 0, 10**20) == 0
    look.close()
