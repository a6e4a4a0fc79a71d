"""The hourly plot: what the last two days of the log brought, as a picture inside a Markdown artifact."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from storage.store import DELIVERIES, Store
from storage.times import show
from tasks.latest import HOUR, Hours, count_hours
from tasks.process import positions
from tasks.topology import Topology

HOURS = 48
_WIDTH, _LEFT, _STRIP, _GAP, _TOP, _FOOT = 760, 8, 62, 30, 26, 24
_LABEL = 36  # what the time of an hour takes
_COLOURS = {"events": "#4361a5", "abandonments": "#c4532d", "recoveries": "#2f8f5b", "mails sent": "#8250a8"}


@dataclass(frozen=True)
class Series:
    """A count in each hour from `since` on."""

    name: str
    counts: list[int]


@dataclass(frozen=True)
class Plot:
    """The series of the last hours of log time; `until` is the greatest clock or tick (ms), `since` a full hour."""

    since: int
    until: int
    series: list[Series]
    estimated: bool

    def is_empty(self) -> bool:
        """Whether nothing happened in all that time."""
        return not any(map(any, (series.counts for series in self.series)))


def read_plot(store: Store, topology: Topology, hours: int = HOURS) -> Plot:
    """Count the last hours up to the greatest clock or tick of any processor, which is now where shifts follow."""
    until = max((position.clock for position in positions(store)), default=0)
    since = max(0, (until // HOUR + 1 - hours) * HOUR)
    raw = [count_hours(store, log, since, hours, derived=False) for log in topology.raw_logs()]
    baskets = count_hours(store, "baskets", since, hours, derived=True)
    sent = count_hours(store, DELIVERIES, since, hours, derived=True)
    series = [
        Series("events", [sum(each) for each in zip(*(log.of("") for log in raw), strict=True)]),
        Series("abandonments", baskets.of("ABANDONED_BASKET")),
        Series("recoveries", baskets.of("RECOVERED_BASKET")),
        Series("mails sent", sent.of("SENT")),
    ]
    parts: list[Hours] = [*raw, baskets, sent]
    return Plot(since, until, series, any(part.estimated for part in parts))


def draw(plot: Plot) -> str:
    """The plot as SVG: a strip of bars a series, each to its own scale, one time below them all."""
    height = _TOP + len(plot.series) * (_STRIP + _GAP) + _FOOT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="system-ui,sans-serif" font-size="13" fill="#333">'
    )
    parts = [head, f'<rect width="{_WIDTH}" height="{height}" rx="6" fill="#fff"/>']
    for index, series in enumerate(plot.series):
        parts.append(_strip(series, _TOP + index * (_STRIP + _GAP)))
    parts.append(_axis(plot, height - _FOOT))
    return "".join([*parts, "</svg>"])


def markdown(plot: Plot) -> str:
    """The plot and its numbers as Markdown, the picture inline: it needs no network."""
    hours = len(plot.series[0].counts)
    title = f"The {hours} hours up to {show(plot.until)[:16].replace('T', ' ')} UTC"
    if plot.is_empty():
        return f"## {title}\n\nNothing happened."
    picture = base64.b64encode(draw(plot).encode()).decode()
    sums = ", ".join(f"{sum(series.counts):,} {series.name}" for series in plot.series)
    about = "\n\nOf hours with more than 1 MiB, samples were counted." if plot.estimated else ""
    return f"## {title}\n\n{sums}.{about}\n\n![{sums}](data:image/svg+xml;base64,{picture})"


def _strip(series: Series, top: int) -> str:
    most = max(series.counts, default=0)
    step = (_WIDTH - 2 * _LEFT) / max(1, len(series.counts))
    bars = "".join(
        f"M{_LEFT + index * step:.1f} {top + _STRIP}v-{max(1.0, count * _STRIP / most):.1f}h{step - 2:.1f}V{top + _STRIP}"
        for index, count in enumerate(series.counts)
        if count
    )
    base = top + _STRIP + 0.5
    return (
        f'<text x="{_LEFT}" y="{top - 7}"><tspan font-weight="600">{series.name}</tspan> '
        f'{sum(series.counts):,}</text><text x="{_WIDTH - _LEFT}" y="{top - 7}" text-anchor="end" fill="#777">'
        f'at most {most:,} an hour</text><path d="M{_LEFT} {base}H{_WIDTH - _LEFT}" stroke="#bbb"/>'
        f'<path d="{bars}" fill="{_COLOURS.get(series.name, "#555")}"/>'
    )


def _axis(plot: Plot, top: int) -> str:
    hours: Sequence[int] = range(len(plot.series[0].counts))
    step = (_WIDTH - 2 * _LEFT) / max(1, len(hours))
    marks = [hour for hour in hours if (plot.since // HOUR + hour) % 6 == 0]
    texts = []
    for hour in marks:
        at = show(plot.since + hour * HOUR)
        label = at[5:10] if at[11:13] == "00" else at[11:16]
        x = _LEFT + hour * step
        left = min(x, _WIDTH - _LEFT - _LABEL)
        texts.append(f'<text x="{left:.1f}" y="{top + 8}" fill="#777" font-size="12">{label}</text>')
        texts.append(f'<path d="M{x:.1f} {_TOP}V{top - 6}" stroke="#000" stroke-opacity=".08"/>')
    return "".join(texts)
