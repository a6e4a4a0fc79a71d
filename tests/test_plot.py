"""The plot of the last two days: what is counted in which hour, how it is drawn, and what stands beside it."""

from __future__ import annotations

import re

import pytest

from storage.door import append_lines
from storage.store import Store
from tasks.latest import HOUR
from tasks.topology import build_topology
from tests.helpers import process
from tests.test_replay import MINUTE, START
from tests.test_tables import did


def test_each_series_is_counted_by_the_hour_up_to_the_last_clock(store: Store) -> None:
    from flows.plot import markdown, read_plot

    topology = build_topology(store.settings)
    empty = read_plot(store, topology)
    assert (empty.since, empty.until, empty.is_empty(), [s.counts for s in empty.series]) == (
        0,
        0,
        True,
        [[0] * 48] * 4,
    )
    append_lines(
        store,
        "events",
        [did(1, 0, item={"id": 1}), did(2, 13, "VISITED"), did(1, 60, "ORDERED"), did(3, 180, "VISITED")],
    )
    process(store.home)
    plot = read_plot(store, topology, hours=4)
    # It starts 13 minutes and 20 seconds before a full hour, and ends three hours later.
    assert (plot.since, plot.until, plot.estimated) == (START // HOUR * HOUR, START + 180 * MINUTE, False)
    assert {series.name: series.counts for series in plot.series} == {
        "events": [2, 1, 0, 1], "abandonments": [0, 1, 0, 0], "recoveries": [0, 1, 0, 0], "mails sent": [0] * 4,
    }  # fmt: skip
    assert [series.counts[0] for series in read_plot(store, topology, hours=3).series] == [1, 1, 1, 0]
    append_lines(store, "events", [did(4, 181, "VISITED", more="x" * 100_000)] * 12)
    assert read_plot(store, topology).estimated, "an hour of more than 1 MiB"
    title, sums, picture = markdown(plot).split("\n\n")
    assert title == "## The 4 hours up to 2001-09-09 04:46 UTC"
    assert sums == "4 events, 1 abandonments, 1 recoveries, 0 mails sent."
    assert picture.startswith(f"![{sums[:-1]}](data:image/svg+xml;base64,")
    assert markdown(empty).endswith("\n\nNothing happened.")


def test_a_bar_is_as_high_as_its_hour_and_never_too_low_to_be_seen() -> None:
    from flows.plot import Plot, Series, draw, markdown

    plot = Plot(0, 4 * HOUR, [Series("events", [1000, 500, 1, 0]), Series("mails sent", [0, 0, 0, 3])], True)
    paths = re.findall(r'<path d="([^"]*)" fill="(#\w+)"', drawn := draw(plot))
    assert paths == [
        ("M8.0 88v-62.0h184.0V88M194.0 88v-31.0h184.0V88M380.0 88v-1.0h184.0V88", "#4361a5"),
        ("M566.0 180v-62.0h184.0V180", "#8250a8"),
    ]
    assert re.findall(r">([^<]+)</(?:text|tspan)>", drawn)[:4] == [
        "events",
        "at most 1,000 an hour",
        "mails sent",
        "at most 3 an hour",
    ]
    assert "</tspan> 1,501</text>" in drawn
    assert "\n\nOf hours with more than 1 MiB, samples were counted." in markdown(plot)


@pytest.mark.parametrize(("hours", "labels"), [(6, ["06:00"]), (24, ["06:00", "12:00", "18:00", "09-09"])])
def test_the_axis_has_each_sixth_hour_and_at_midnight_the_day(hours: int, labels: list[str]) -> None:
    from flows.plot import Plot, Series, draw

    since = START // HOUR * HOUR - 24 * HOUR  # 01:00
    drawn = draw(Plot(since, since, [Series("events", [1] * hours)], False))
    found = re.findall(r'<text x="([\d.]+)" y="\d+" fill="#777" font-size="12">([^<]+)<', drawn)
    assert [label for _, label in found] == labels
    assert float(found[0][0]) == pytest.approx(8 + 5 * 744 / hours, abs=0.1)
    _, _, width, height = map(float, re.findall(r'viewBox="([^"]*)"', drawn)[0].split())
    texts = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"', drawn)
    assert all(0 < float(x) < width and 10 < float(y) < height for x, y in texts), "all of it is in the picture"
    assert len(texts) == len(labels) + 2
