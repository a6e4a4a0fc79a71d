"""What runs show in the UI: names, states, tags, counts, tables and the plot, read back from a real server."""

from __future__ import annotations

import json
import random
import re
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from storage.contacts import Entry, save_contacts
from storage.door import append_events, append_lines
from storage.settings import load_settings
from storage.store import Store
from storage.times import now
from tasks.latest import HOUR, count_hours, latest_events
from tasks.local import side_by_side
from tasks.process import FinalTick, process_to_end
from tasks.run import Run
from tasks.status import read_status
from tasks.topology import build_topology
from tests.operations import PATIENCE, wait_for
from tests.smtp_server import SmtpServer
from tests.test_flows import customer_event, start_shift

NASTY = "<script>x()</script> <img src=x> a|b `c` *d* _e_ [f](javascript:x) \\ ~g~\nh www.evil.example https://evil.example &lt;"
LEMON = {"id": 3, "name": "Lemon", "price": 5, "count": 2}


def api(server: str, path: str, **wanted: object) -> Any:
    return httpx.post(f"{server}{path}", json=wanted, timeout=PATIENCE).raise_for_status().json()


def artifacts_of(server: str, run: Any) -> dict[str, str]:
    found = api(server, "/artifacts/filter", flow_runs={"id": {"any_": [str(run)]}})
    assert len({each["key"] for each in found}) == len(found), "a run has one version of each artifact"
    return {each["key"]: each["data"] for each in found}


def run_of(server: str, state: Any) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server}/flow_runs/{state.state_details.flow_run_id}", timeout=PATIENCE).json()
    return found


def left(ident: object, **item: object) -> bytes:
    """A customer who put something into the basket 40 minutes ago."""
    event = customer_event(ident, "ADDED_ITEM_TO_BASKET", item={**LEMON, **item})
    event["context"]["at"] -= 40 * 60_000
    return orjson.dumps({**event, "event": {"inserted_at": event["context"]["at"]}})


def process_here(store: Store) -> None:
    run, final = Run(store, build_topology(store.settings), "test"), FinalTick("now")
    assert not side_by_side(run, run.topology.on_raw_logs(), lambda r, name: process_to_end(r, name, final)).failures


@pytest.mark.parametrize("show", ["escape", "cell", "line_of"])
def test_shown_text_is_one_short_line_without_control_characters(show: str) -> None:
    from flows import markdown  # Prefect comes with it, and each of the processes that run tests imports this module

    shown = getattr(markdown, show)("a\r\n\tb\x00\x1b[31m\u202ec\u2028" + "d" * 500, 40)
    assert "\n" not in shown
    assert not re.search(r"[\x00-\x1f\u2028\u202e]", shown)
    assert shown.startswith("a b")
    assert shown.endswith("d…")


def test_markdown_of_an_event_is_escaped_character_by_character() -> None:
    from flows.markdown import cell, escape, line_of

    shown = escape(NASTY, 500)
    assert re.findall(r"(?<!\\)(?:\\\\)*[<>|`*_\[\]~&]", shown) == []
    assert re.sub(r"\\(.)", r"\1", shown) == line_of(NASTY, 500)
    assert "https://" not in shown
    assert "www." not in shown
    for dangerous in (r"<\w", r"\]\(", r"://", r"[wW]{3}\.", r"&\w", r"[*~]\w"):
        assert not re.search(dangerous, cell(NASTY, 500))
    assert cell("top_word by 15") == "top_word by 15", "what is searched for in the UI holds nothing that is not seen"


def test_a_run_is_named_by_its_range_and_outcome_and_a_second_one_says_that_nothing_is_new(
    home: Path, server: str
) -> None:
    from flows.process import process

    store = Store(load_settings())
    append_lines(store, "events", [left(7), b"no event", left(8)])
    size = sum(len(line) + 1 for line in (left(7), b"no event", left(8)))
    state = process(return_state=True)
    run = run_of(server, state)
    assert re.fullmatch(rf"process events/0 0\.\.{size}: 3 read, 1 quarantined, 2 to baskets", run["name"])
    assert {"baskets", "events", "quarantined"} <= set(run["tags"])
    shown = artifacts_of(server, run["id"])
    assert set(shown) == {"process", "abandoned-baskets", "last-48-hours"}
    assert f"](/runs/flow-run/{run['id']})" in shown["process"]
    assert f"| abandonment | 3 | 2 | 1 | 0 | 2 | {size:,} |" in shown["process"]
    assert (
        f"| abandonment | events/0 {size} | none | 3 | 2 | 1 | 0 | 2 |".replace(f"0 {size}", f"0 {size:,}")
        in shown["process"]
    )
    assert "| remind | baskets/0 0 | 1," in shown["process"], "how far behind is shown in bytes and seconds"
    assert "data:image/svg+xml;base64," in shown["last-48-hours"]
    assert [row["customer"] for row in json.loads(shown["abandoned-baskets"])] == ["8", "7"]

    again = process(return_state=True)
    assert (again.name, run_of(server, again)["name"]) == ("Nothing new", "process: nothing new")
    assert artifacts_of(server, again.state_details.flow_run_id) == {}
    assert process() == again.result()


def test_what_failed_stands_in_the_name_and_on_the_artifact_with_its_reason(
    home: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.process import process
    from tests.test_flows import FAILING

    (tmp_path / "picky_too.py").write_text(FAILING.replace("cannot take", "<b>cannot</b> take"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("AFTERLOG_PROCESSORS", '["picky_too"]')
    append_events(Store(load_settings()), "events", [customer_event("poison")])
    state = process(return_state=True)
    run = run_of(server, state)
    assert run["name"].endswith(": picky failed, 1 read")
    assert r"ValueError: \<b\>cannot\</b\> take poison" in artifacts_of(server, run["id"])["process"]


def test_mails_are_shown_by_recipient_and_reason_and_neither_address_nor_password_anywhere(
    home: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.process import process
    from flows.react import react

    with SmtpServer(tls="starttls", login=("ann", "p4ss-w0rd")) as smtp:
        monkeypatch.setenv("AFTERLOG_MAIL_URL", smtp.url.replace("://", "://ann:p4ss-w0rd@"))
        store = Store(load_settings())
        save_contacts(store.database, [Entry("CUSTOMER", "7", "seven@example.com", False)])
        append_lines(store, "events", [left(7), left(8)])
        runs = [run_of(server, flow(return_state=True)) for flow in (process, react)]
    assert "2 to reminders, 1 sent, 1 suppressed" in runs[1]["name"]
    shown = artifacts_of(server, runs[1]["id"])
    rows = {row["to"]: row for row in json.loads(shown["mails"])}
    assert (rows["CUSTOMER 7"]["what"], rows["CUSTOMER 7"]["state"]) == ("basket-reminder", "SENT")
    assert (rows["CUSTOMER 8"]["state"], rows["CUSTOMER 8"]["why"]) == ("SUPPRESSED", "no address")
    assert "| no address | 1 |" in shown["react"]
    ids = [run["id"] for run in runs]
    logs = api(server, "/logs/filter", logs={"flow_run_id": {"any_": ids}})
    told = json.dumps([runs, logs, *(artifacts_of(server, ident) for ident in ids)])
    assert len(logs) > 5
    assert "p4ss-w0rd" not in told
    assert "seven@example.com" not in told


def test_why_mails_were_not_sent_is_counted_by_reason_and_accounts_for_all() -> None:
    from flows.naming import Done, lines_of, why_not
    from tasks.deliver import DeliverySummary

    reasons = Counter({f"ordered since: at 2026-11-28T17:{n}:05.772Z": 1 for n in range(10, 40)})
    reasons |= {"too soon: mailed at 2026-11-28T17:34:05Z, when another generation was live": 2}
    reasons |= Counter({f"550 no such user {n}": 1 for n in range(25)})
    mails = DeliverySummary(57, Counter(SUPPRESSED=57), reasons)
    assert why_not(mails, 2) == [
        ("ordered since", 30), ("too soon: mailed, when another generation was live", 2), ("other reasons", 25),
    ]  # fmt: skip
    assert sum(count for _, count in why_not(mails, 20)) == 57
    lines = lines_of(Done([], [mails]))
    assert "deliver: 30 x ordered since" in lines
    assert lines[-1] == "deliver: 22 x other reasons"


def test_a_shift_says_what_it_follows_and_tells_on_its_way(home: Path, server: str, tmp_path: Path) -> None:
    store = Store(load_settings())
    append_lines(store, "events", [left(7)])
    shift = start_shift("process", server, tmp_path / "shift.log")
    try:
        newest = {"flows": {"name": {"any_": ["process"]}}, "sort": "START_TIME_DESC", "limit": 1}
        wait_for(lambda: "following" in api(server, "/flow_runs/filter", **newest)[0]["name"])
        run = api(server, "/flow_runs/filter", **newest)[0]
        assert run["name"] == "process following events/0 from 0"
        wait_for(lambda: {"process", "abandoned-baskets"} <= set(artifacts_of(server, run["id"])))
        assert "at work." in artifacts_of(server, run["id"])["process"]
    finally:
        shift.terminate()
        shift.wait(PATIENCE)


def test_the_rows_of_baskets_tell_what_became_of_them_and_values_are_exact(store: Store) -> None:
    from flows.tables import abandoned_baskets, basket_value

    back = customer_event(7, "ORDERED", value=12.5)
    append_lines(store, "events", [left(7), left(8, price=0.1, count=3), left(9, price="dear")])
    process_here(store)
    append_events(store, "events", [back])
    process_here(store)
    rows = {row["customer"]: row for row in abandoned_baskets(store)}
    assert (rows["7"]["items"], rows["7"]["value"], rows["7"]["since then"]) == (
        "2 × Lemon",
        "10.00",
        "ordered for 12.50",
    )
    assert (rows["8"]["value"], rows["9"]["value"]) == ("0.30", "not known")
    assert str(basket_value([{"price": 0.1, "count": 3}])) == "0.3"


def test_what_events_hold_is_inert_in_every_table(store: Store) -> None:
    from flows.tables import abandoned_baskets, anomalies, mails

    reviews = [customer_event(n, "REVIEWED", body=f"It is good, number {n % 10}.") for n in range(40)]
    append_lines(store, "events", [left(NASTY, name=NASTY)])
    append_events(store, "events", [*reviews, customer_event(NASTY, "REVIEWED", body=NASTY * 99)])
    process_here(store)
    told = abandoned_baskets(store) + anomalies(store) + mails(store)
    assert any("script" in row.get("the sentence", "") for row in told)
    assert any("script" in row.get("items", "") for row in told)
    for value in (value for row in told for value in row.values()):
        assert not re.search(r"<\w|\]\(|[\x00-\x1f]", value)


def derived_log(store: Store, rng: random.Random, lines: int, hours: int) -> tuple[list[Counter[str]], int]:
    """A raw log with clocks that ascend over so many hours, and its true counts by hour."""
    since = now() // HOUR * HOUR - hours * HOUR
    clocks = sorted(since + rng.randrange(hours * HOUR) for _ in range(lines))
    pad = "x" * 900
    for start in range(0, lines, 1000):
        append_lines(
            store, "events",
            [b"not an event" if clock % 50 == 0 else orjson.dumps({
                "subject": {"id": 1}, "verb": "X", "context": {"at": clock}, "object": {"pad": pad[: clock % 900]},
            }) for clock in clocks[start : start + 1000]],
        )  # fmt: skip
    counts = [Counter[str]() for _ in range(hours)]
    for clock in clocks:
        counts[(clock - since) // HOUR][""] += 1
    return counts, since


def test_hours_are_counted_from_places_found_by_halving(make_store: Callable[..., Store]) -> None:
    store = make_store(segment_bytes=300_000)
    truth, since = derived_log(store, random.Random(1), 5_000, 30)
    found = count_hours(store, "events", since, 30, derived=False)
    assert not found.estimated
    # A line that is no event has no clock, and may be counted in the hour beside.
    assert sum(found.of("")) == 5_000
    assert all(abs(a - b[""]) <= 3 for a, b in zip(found.of(""), truth, strict=True))
    later = count_hours(store, "events", since + 28 * HOUR, 2, derived=False)
    assert later.of("") == found.of("")[28:]


@pytest.mark.parametrize("late", [b"no event, and no clock" * 5, None])
def test_hours_are_counted_past_lines_that_came_late_or_are_no_events(store: Store, late: bytes | None) -> None:
    """A client that was offline for a month, or a producer that broke, is counted where it lies, and moves no other hour."""
    since = 1_700_000_000_000 // HOUR * HOUR
    lines, truth = [], [200] * 48
    for hour in range(48):
        visits = [_visit(since + hour * HOUR + n * HOUR // 200) for n in range(200)]
        if hour in (12, 24, 30):
            visits[100:100] = [late or _visit(since - 720 * HOUR + n) for n in range(400)]
            truth[hour] += 400
        lines += visits
    append_lines(store, "events", lines)
    found = count_hours(store, "events", since, 48, derived=False).of("")
    assert sum(found) == len(lines)
    assert all(abs(a - b) <= 20 for a, b in zip(found, truth, strict=True))
    assert count_hours(store, "events", since + 40 * HOUR, 8, derived=False).of("") == found[40:]


def _visit(at: int) -> bytes:
    return orjson.dumps({"subject": {"id": 1}, "verb": "VISITED", "object": {}, "context": {"at": at}})


def test_a_full_hour_is_estimated_from_samples_and_says_so(store: Store) -> None:
    truth, since = derived_log(store, random.Random(2), 12_000, 2)
    found = count_hours(store, "events", since, 2, derived=False)
    assert found.estimated
    assert all(abs(a - b[""]) < 0.1 * b[""] for a, b in zip(found.of(""), truth, strict=True))


def test_the_latest_lines_come_from_the_end_of_a_long_log_at_once(store: Store) -> None:
    append_lines(store, "events", [orjson.dumps({"n": n, "pad": "x" * 5_000}) for n in range(6_000)])
    append_lines(store, "events", [b"no json", orjson.dumps({"n": 6_000, "pad": "x" * 200_000})])
    begun = time.thread_time()
    found = latest_events(store, "events", 20, derived=False)
    took = time.thread_time() - begun
    assert [event["n"] for event in found] == list(range(6_000, 5_980, -1))
    begun = time.thread_time()
    assert len(latest_events(store, "events", 10**6, derived=False)) < 2_000, "no further back than a few MiB"
    assert took < 0.2


def test_a_tick_that_is_due_is_behind_too(store: Store) -> None:
    from flows.counts import _behind

    append_lines(store, "events", [left(1)])
    row = read_status(store, build_topology(store.settings)).processors[0]
    assert _behind(row).startswith(f"{row.lag_bytes} bytes, 40m")
    assert _behind(replace(row, lag_bytes=0, lag_ms=90_000)) == "a tick, 1m 30s"
    assert _behind(replace(row, lag_bytes=0, lag_ms=0, state="idle")) == "none"
    assert _behind(replace(row, lag_bytes=0, lag_ms=0, state="stuck")) == "not known"


def test_a_plot_is_a_picture_with_a_bar_an_hour_that_had_any() -> None:
    from flows.plot import Plot, Series, draw

    plot = Plot(0, 48 * HOUR, [Series("events", [0, 5, 10] * 16), Series("mails sent", [0] * 48)], False)
    picture = ElementTree.fromstring(draw(plot))  # noqa: S314  # a picture of our own
    bars = [path.get("d") or "" for path in picture.iter("{http://www.w3.org/2000/svg}path") if path.get("fill")]
    assert [bar.count("M") for bar in bars] == [32, 0]
    assert "at most 10 an hour" in draw(plot)
    for since in range(6):  # wherever the last six hours end, their label is whole
        drawn = ElementTree.fromstring(draw(Plot(since * HOUR, since * HOUR, plot.series, False)))  # noqa: S314  # likewise
        labels = [each for each in drawn.iter() if each.get("font-size") == "12"]
        assert labels
        assert max(float(each.get("x", "")) for each in labels) + 34 < float(drawn.get("width", ""))
