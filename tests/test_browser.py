"""What a person sees: a real browser opens `afterlog up`, its runs, graphs and artifacts, and submits the form."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments import example
from deployments.server import free_port
from storage.contacts import Entry, save_contacts
from storage.door import append_events, append_lines
from storage.generations import LIVE, find_replay
from storage.settings import load_settings
from storage.store import Store
from storage.times import now
from tests import operations
from tests.conftest import ROOT, afterlog
from tests.operations import PATIENCE, prefect_ready

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="Debian's chromium is not installed")
WIDTHS = (1400, 800)
CUSTOMERS = 150
COUNTED = "By event.id, the new generation against what is live:"
NASTY = (
    '<script>window.hacked=1</script><img src=x onerror="window.hacked=2"> a|b `c` *d*\n'
    "[e](javascript:window.hacked=3) [f](/runs) <b>g</b>"
)
MARKED = [
    "**b** x", "a *em* b", "2*3*4", "***a***", "_u_", "__init__", "**a _b_ c**", "~~s~~ x", "H~2~O", "`c` x", "``a`` `b`", "~~~",
    "```js", "# head", "#", "- item", "-", "+ item", "* item", "1. one", "2024. x", "10) y", "> q", "---", "* * *", "_ _ _",
    "- [x] done", "[r]: http://x", "http://evil.example/x", "see www.evil.example", "a@b.co", "![i](http://x/y.png)", "[l](/runs)",
    "<b>x</b>", "<http://x>", "&lt;b&gt;", "&#60;", "\\*x\\*", "snake_case", "a | b", "$x$", "-5", "plain",
]  # fmt: skip
BROWSER = ["--no-sandbox", "--disable-gpu"]
# What turns and fades is drawn by the processor here, and is nothing that a test looks at.
STILL = """addEventListener("DOMContentLoaded", () => {
    const style = document.createElement("style");
    style.textContent = "*, *::before, *::after { animation: none !important; transition: none !important; }";
    document.head.append(style);
});"""
# One short shift works the example off, and the next one is a day away: what comes after is the runs' by hand.
SETTINGS = {"AFTERLOG_SHIFT_EVERY": "1d", "AFTERLOG_SHIFT_LONGEST": "12s"}


@dataclass
class Site:
    """`afterlog up` on a HOME with an example log, and a page of the browser."""

    home: Path
    url: str
    store: Store
    page: Any

    def api(self, path: str, **wanted: object) -> Any:
        return httpx.post(f"{self.url}/api{path}", json=wanted, timeout=PATIENCE).json()

    def runs(self, flow: str) -> list[dict[str, Any]]:
        """The runs of a flow that have begun, the newest first."""
        begun = {"state": {"type": {"not_any_": ["SCHEDULED", "PENDING"]}}}
        return self.api("/flow_runs/filter", flows={"name": {"any_": [flow]}}, flow_runs=begun, sort="START_TIME_DESC")

    def artifact(self, key: str) -> dict[str, Any]:
        """The newest version of an artifact."""
        found = self.api("/artifacts/filter", artifacts={"key": {"any_": [key]}}, sort="CREATED_DESC")
        return found[0] if found else {}

    def open(self, path: str, text: str) -> str:
        """Open a page, wait until it shows `text`, and give all that it shows."""
        self.page.goto(self.url + path)
        self.page.get_by_text(text).first.wait_for(timeout=A_LONG_TIME)
        return str(self.page.inner_text("body"))

    def leave(self) -> None:
        """Show nothing: a page of Prefect's asks its server every few seconds, for as long as it is open."""
        self.page.goto("about:blank")

    def keep(self, name: str) -> None:
        """A picture for whoever asks for it by AFTERLOG_TEST_PICTURES, to look at or for the docs."""
        if folder := os.environ.get("AFTERLOG_TEST_PICTURES"):
            self.page.wait_for_timeout(1000)
            self.page.screenshot(path=f"{folder}/{name}-{self.page.viewport_size['width']}.png")


A_LONG_TIME = 1000 * PATIENCE
"""The same in milliseconds, as the browser counts."""
wait_for = functools.partial(operations.wait_for, every=0.5)
"""Each look is a request to a server that has other things to do."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home, port = tmp_path_factory.mktemp("browser") / "home", free_port()
    prefect_ready(home)
    store = Store(load_settings(home=home))
    append_lines(store, "events", list(example.history(now(), customers=CUSTOMERS)))
    save_contacts(store.database, [Entry(*contact) for contact in example.contacts(CUSTOMERS)])
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "AFTERLOG_"))}
    up = subprocess.Popen(
        [sys.executable, "-m", "deployments.cli", "up", "--port", str(port)], cwd=ROOT,
        env={**env, **SETTINGS, "AFTERLOG_HOME": str(home)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=BROWSER)
            page = browser.new_page(reduced_motion="reduce")
            page.add_init_script(STILL)
            site = Site(home, f"http://127.0.0.1:{port}", store, page)
            wait_for(lambda: (home / "prefect" / "api-url").is_file())
            for flow in ("process", "react"):
                wait_for(lambda flow=flow: any(run["state_type"] == "COMPLETED" for run in site.runs(flow)))
            if not site.artifact("mails"):  # the machine was so slow that the baskets came after the shift
                start(site, "react", {})
            wait_for(lambda: site.artifact("mails"))
            yield site
            browser.close()
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait(PATIENCE)


@pytest.fixture(params=WIDTHS)
def wide(site: Site, request: pytest.FixtureRequest) -> Site:
    """The site in a window of that many pixels."""
    site.page.set_viewport_size({"width": request.param, "height": 900})
    return site


def status(site: Site) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(afterlog(site.home, "status", "--json").stdout)
    return found


def cells(site: Site, heading: str) -> list[list[str]]:
    """The rows of the table that follows a heading on the page."""
    table = site.page.locator(f"xpath=//*[normalize-space()='{heading}']/following::table[1]")
    return [row.split("\t") for row in table.inner_text().splitlines() if "\t" in row]


def test_runs_are_named_by_range_and_outcome_and_lead_to_their_graph_and_artifacts(wide: Site) -> None:
    run = wide.runs("process")[-1]
    assert re.fullmatch(r"process events/0 0\.\.\d+: [\d,]+ read, \d+ quarantined, .*", run["name"])
    wide.open("/runs", run["name"])
    wide.keep("runs")
    wide.page.get_by_text(run["name"]).first.click()
    wide.page.wait_for_url(f"**/runs/flow-run/{run['id']}**", timeout=A_LONG_TIME)
    graph = wide.page.locator("canvas").first
    graph.wait_for(timeout=A_LONG_TIME)
    assert graph.bounding_box()["width"] > 0.5 * wide.page.viewport_size["width"]
    wide.keep("run")
    wide.page.get_by_text("Artifacts", exact=True).last.click()
    for key in ("process", "abandoned-baskets", "anomalies", "last-48-hours"):
        wide.page.get_by_text(key, exact=True).last.wait_for(timeout=A_LONG_TIME)


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("abandoned-baskets", ("customer", "items", "value", "idle for")),
        ("anomalies", ("measure", "value", "expected", "the sentence")),
        ("mails", ("to", "what", "state", "why")),
    ],
)
def test_tables_show_the_latest_and_their_first_columns_fit(wide: Site, key: str, shown: tuple[str, ...]) -> None:
    artifact = wide.artifact(key)
    rows = json.loads(artifact["data"])
    assert 5 < len(rows) <= 20
    wide.open(f"/artifacts/artifact/{artifact['id']}", rows[0][shown[0]])
    wide.keep(key)
    for name in shown[:3]:
        box = wide.page.get_by_role("columnheader", name=name, exact=True).bounding_box()
        assert box["x"] + box["width"] < wide.page.viewport_size["width"]
    text = wide.page.inner_text("table")
    assert all(row[name] in text for row in rows for name in shown)


def test_the_plot_is_drawn_in_its_place(wide: Site) -> None:
    artifact = wide.artifact("last-48-hours")
    wide.open(f"/artifacts/artifact/{artifact['id']}", "The 48 hours up to")
    picture = wide.page.locator("img[src^='data:image/svg']").first
    picture.wait_for()
    wide.keep("plot")
    assert picture.evaluate("image => image.complete && image.naturalWidth") == 760
    assert picture.bounding_box()["width"] > 500


def test_a_bad_value_in_the_form_gets_a_sentence_and_no_run(wide: Site) -> None:
    before = len(wide.runs("process"))
    fill_in(wide, "-5")
    wide.page.get_by_role("button", name="Submit").click()
    wide.page.get_by_text("is not valid").first.wait_for(timeout=A_LONG_TIME)
    wide.keep("form")
    assert len(wide.runs("process")) == before


def test_the_form_runs_process_to_a_time_and_its_artifact_has_the_numbers_of_status(site: Site) -> None:
    site.page.set_viewport_size({"width": 1400, "height": 900})
    left = {"subject": {"id": NASTY, "type": "CUSTOMER"}, "context": {"at": now() - 3_600_000}}
    item = {"id": 9, "name": NASTY, "price": 2, "count": 1}
    append_events(
        site.store,
        "events",
        [
            {**left, "verb": {"type": "ADDED_ITEM_TO_BASKET"}, "object": {"type": "ITEM", "item": item}},
            {**left, "verb": {"type": "REVIEWED"}, "object": {"type": "TEXT", "body": NASTY * 50}},
        ],
    )
    before = len(site.runs("process"))
    time.sleep(2.1)  # so that a time after the events has passed
    as_of = now()
    fill_in(site, str(as_of))
    sent(site)
    assert asked_for(site, as_of)
    site.leave()
    run = wait_for(
        lambda: (runs := site.runs("process"))[0]["state_type"] == "COMPLETED" and len(runs) > before and runs
    )[0]
    assert run["parameters"]["as_of"] == as_of
    assert re.search(r": 2 read, \d+ to baskets, \d+ to anomalies$", run["name"])
    assert {"by-hand", "baskets", "events"} <= set(run["tags"])
    artifact = site.artifact("process")
    assert artifact["flow_run_id"] == run["id"]
    site.open(f"/artifacts/artifact/{artifact['id']}", "Since the beginning")
    site.keep("process")
    shown = {row[0]: row for row in cells(site, "Since the beginning")[1:]}
    for row in (found := status(site)["processors"]):
        if row["processor"] != "deliver":
            counts = [f"{row[name]:,}" for name in ("read", "processed", "quarantined", "ignored", "derived")]
            place, behind, *shown_counts = shown[row["processor"]][1:]
            assert [place, *shown_counts] == [f"{row['log']}/0 {row['offset']:,}", *counts]
            # A tick may have become due since: nobody follows.
            assert behind.startswith(f"{row['lag_bytes']:,} bytes, " if row["lag_bytes"] else ("none", "a tick, "))
    assert len(found) >= 8
    link = site.page.get_by_role("link", name="this run").get_attribute("href")
    assert link is not None
    assert run["name"] in site.open(link.removeprefix(site.url), run["name"])
    assert run["id"] in site.page.url


def test_what_an_event_holds_is_shown_and_does_nothing(wide: Site) -> None:
    """Runs after the form has brought the nasty customer in."""
    for key in ("abandoned-baskets", "anomalies"):
        text = wide.open(f"/artifacts/artifact/{wide.artifact(key)['id']}", "<​script>")
        assert "window.hacked=1" in text
        assert wide.page.evaluate("window.hacked") is None
        assert wide.page.locator("table b, table script, table img, table a").count() == 0
    wide.keep("nasty")


def test_the_cell_of_a_table_shows_any_text_as_it_is(wide: Site) -> None:
    from flows.markdown import cell

    made = wide.api("/artifacts/", key="marked", type="table", data=json.dumps([{"x": cell(text)} for text in MARKED]))
    wide.open(f"/artifacts/artifact/{made['id']}", "plain")
    wide.keep("marked")
    shown = wide.page.evaluate("[...document.querySelectorAll('tbody td')].map(each => each.textContent)")
    assert [re.sub("[\u200b\ufeff]", "", text) for text in shown] == MARKED
    paragraphs = wide.page.evaluate(
        "[...document.querySelectorAll('tbody article > div')].map(each => each.childElementCount)"
    )
    assert paragraphs == [0] * len(MARKED), "nothing but text is in any of them"


def test_a_run_that_found_nothing_says_so_and_leaves_no_artifact(site: Site) -> None:
    run = start(site, "process", {"as_of": "log-end"})
    site.leave()
    wait_for(
        lambda: site.runs("process")[0]["id"] == run["id"] and site.runs("process")[0]["state_type"] == "COMPLETED"
    )
    done = site.runs("process")[0]
    assert (done["name"], done["state_name"]) == ("process: nothing new", "Nothing new")
    assert site.artifact("process")["flow_run_id"] != run["id"]
    site.open("/runs", "process: nothing new")
    site.page.get_by_text("Nothing new", exact=True).first.wait_for()


def test_a_replay_is_asked_for_by_the_form_seen_and_approved_by_a_click(site: Site) -> None:
    page = site.page
    page.set_viewport_size({"width": 1400, "height": 900})
    ask_for_a_replay(site, '{"timeout": "45m"}')
    sent(site)
    assert asked_for(site, {"timeout": "45m"})
    site.leave()
    run = wait_for(lambda: next((r for r in site.runs("replay") if r["state_type"] == "PAUSED"), None))
    generation = int(run["name"].rpartition(" ")[2])
    assert run["name"] == f"replay abandonment, remind timeout=45m: generation {generation}"
    assert run["parameters"]["settings"] == {"timeout": "45m"}
    artifact = site.artifact("replay")
    assert artifact["flow_run_id"] == run["id"]
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        site.open(f"/artifacts/artifact/{artifact['id']}", "Whose inbox that would change")
        site.keep("replay")
        check_counts(site, generation)
        site.open(f"/runs/flow-run/{run['id']}", "Resume")
        page.get_by_role("button", name="Resume").first.click()
        page.get_by_text("Whose inbox that would change").wait_for(timeout=A_LONG_TIME)
        page.get_by_text("On: the new generation becomes live. Off: it is discarded.").wait_for()
        site.keep("resume")
        check_counts(site, generation)
        header = page.get_by_role("columnheader", name="changed").bounding_box()
        dialog = page.get_by_role("dialog").last.bounding_box()
        assert header["x"] + header["width"] < dialog["x"] + dialog["width"]
    assert site.store.live_generation("baskets") == 1
    approve(site, run["id"])
    wait_for(lambda: find_replay(site.store.database, generation).state == LIVE)
    assert site.store.live_generation("baskets") == site.store.live_generation("reminders") == generation
    wait_for(lambda: site.runs("replay")[0]["state_type"] == "COMPLETED")
    site.open(f"/runs/flow-run/{run['id']}", f"Promoted: baskets generation {generation}")
    site.keep("promoted")


def approve(site: Site, run: str) -> None:
    """Say yes in the form that is open; once more where nothing comes of it, as when Prefect's server was too busy to take it."""
    for _ in range(4):
        site.page.get_by_role("switch").click()
        assert site.page.get_by_role("switch").get_attribute("aria-checked") == "true"
        site.page.get_by_role("button", name="Submit").click()
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if next(r for r in site.runs("replay") if r["id"] == run)["state_type"] != "PAUSED":
                return
            time.sleep(0.3)
        site.open(f"/runs/flow-run/{run}", "Resume")
        site.page.get_by_role("button", name="Resume").first.click()
        site.page.get_by_text("On: the new generation becomes live. Off: it is discarded.").wait_for(
            timeout=A_LONG_TIME
        )
    raise AssertionError("the answer was never taken")


def check_counts(site: Site, generation: int) -> None:
    """The table of counts is that of both generations, and each log that differs is drawn."""
    table = site.page.locator(f"xpath=//*[normalize-space()='{COUNTED}']/following::table[1]")
    rows = table.evaluate("table => [...table.rows].map(row => [...row.cells].map(cell => cell.innerText.trim()))")
    counts = {row[0]: [int(cell.replace(",", "")) for cell in row[1:]] for row in rows[1:]}
    assert list(counts) == ["baskets", "reminders"]
    for log, (live, new, added, removed, changed, same) in counts.items():
        found = [site.store.reader(log, 0, each) for each in (1, generation)]
        assert [live, new] == [sum(piece.count(b"\n") for piece in one.raw(0, one.end())) for one in found]
        assert (live - removed, new - added) == (same + changed, same + changed)
    assert counts["baskets"][3] > 0
    pictures = site.page.locator("img[src^='data:image/svg']")
    assert pictures.count() == sum(any(row[2:5]) for row in counts.values())
    assert pictures.first.evaluate("image => image.complete && image.naturalWidth") == 760


def ask_for_a_replay(site: Site, settings: str) -> None:
    """Fill the form of `replay` in as a person does, so that it asks."""
    site.open(f"/deployments/deployment/{by_hand(site, 'replay')}/run", "Validate parameters")
    site.page.locator(".p-code-input__textarea").fill(settings)
    site.page.locator(".p-select-button__control").last.focus()
    site.page.keyboard.press("ArrowDown")
    site.page.get_by_role("option", name="ask").click()
    site.keep("replay-form")


def by_hand(site: Site, flow: str) -> str:
    """The id of the deployment for runs of a flow by hand."""
    deployments = site.api("/deployments/filter")
    return next(d["id"] for d in deployments if d["name"] == "by-hand" and d["entrypoint"].endswith(flow))


def start(site: Site, flow: str, parameters: dict[str, object]) -> dict[str, Any]:
    run: dict[str, Any] = site.api(f"/deployments/{by_hand(site, flow)}/create_flow_run", parameters=parameters)
    return run


def sent(site: Site) -> None:
    """Press Submit, again where the form still stands there: on a busy machine a press was lost, once."""
    from playwright.sync_api import TimeoutError as NothingCame

    for _ in range(3):
        site.page.get_by_role("button", name="Submit").click()
        with contextlib.suppress(NothingCame):
            site.page.wait_for_url(lambda url: not url.endswith("/run"), timeout=A_LONG_TIME)
            return
    raise AssertionError("the form was not taken")


def asked_for(site: Site, value: object) -> bool:
    """Whether there is a run, begun or not, that has `value` among its parameters."""
    return any(value in run["parameters"].values() for run in site.api("/flow_runs/filter"))


def fill_in(site: Site, as_of: str) -> None:
    """Fill the form of `process` in as a person does."""
    site.open(f"/deployments/deployment/{by_hand(site, 'process')}/run", "Validate parameters")
    site.page.get_by_text("int", exact=True).click()
    box = site.page.locator("input[type=number]").first
    box.fill(as_of)
    box.blur()
