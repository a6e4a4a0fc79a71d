"""What a replay found, as one artifact: counts, examples, whose inbox would change, and both generations over time."""

from __future__ import annotations

import base64
from collections.abc import Mapping

from flows.markdown import escape, table
from storage.times import show
from tasks.diff import HOUR, LogDiff
from tasks.impact import Comparison, Impact
from tasks.replay_plan import Planned, describe

_WIDTH, _LEFT, _STRIP, _TOP, _FOOT = 760, 8, 90, 30, 24
_BARS = 60
_LIVE, _REPLAYED = "#9aa7c7", "#c4532d"


def report(planned: Planned, found: Comparison) -> str:
    """Everything as Markdown, the pictures inline: they need no network."""
    parts = [
        f"## Generation {planned.generation}, {escape(planned.row.name)}: {escape(describe(planned))}",
        "Both generations are the same."
        if found.is_nothing
        else "By event.id, the new generation against what is live:",
        # The form in which a person decides is 436 pixels wide: what comes last is scrolled to there.
        table(
            ("log", "live", "new", "added", "removed", "changed", "same"),
            [(d.log, d.old, d.new, d.added, d.removed, d.changed, d.same) for d in found.logs],
        ),
    ]
    if found.impact is not None and not found.is_nothing:
        parts.append(_inbox(found.impact))
    for diff in found.logs:
        if not diff.is_nothing:
            parts += [f"### {diff.log}", _picture(diff), _examples(diff)]
    return "\n\n".join(parts)


def _inbox(impact: Impact) -> str:
    lines = [
        "### Whose inbox that would change",
        (
            f"{impact.people}. {impact.mails_added:,} mails are added, of which {impact.too_late:,} are too old to be sent; "
            f"{impact.mails_removed:,} are gone, of which {impact.sent_already:,} were sent already."
        ),
    ]
    for label, names in (("Newly mailed", impact.newly), ("No longer mailed", impact.no_longer)):
        if names:
            lines.append(f"{label}: {escape(', '.join(names), 600)}")
    return "\n\n".join(lines)


def _examples(diff: LogDiff) -> str:
    return table(
        ("kind", "who", "event", "live at (UTC)", "new at (UTC)"),
        [(e.kind, e.who, e.id, _at(e.old_at), _at(e.new_at)) for e in diff.examples],
    )


def _at(millis: int | None) -> str:
    return "" if millis is None else _minute(millis)


def _minute(millis: int) -> str:
    return show(millis)[:16].replace("T", " ")


def _picture(diff: LogDiff) -> str:
    picture = base64.b64encode(draw(diff).encode()).decode()
    return f"![{diff.log}, live and new](data:image/svg+xml;base64,{picture})"


def draw(diff: LogDiff) -> str:
    """Both generations over time as SVG, a pair of bars each piece of it."""
    hours = [*diff.old_hours, *diff.new_hours]
    first, last = min(hours), max(hours)
    width = max(1, -(-((last - first) // HOUR + 1) // _BARS)) * HOUR
    old, new = _pieces(diff.old_hours, first, width), _pieces(diff.new_hours, first, width)
    most = max([*old.values(), *new.values()])
    step = (_WIDTH - 2 * _LEFT) / ((last - first) // width + 1)
    base = _TOP + _STRIP
    bars = [
        f'<rect x="{_LEFT + piece * step + half * step / 2:.1f}" y="{base - count * _STRIP / most:.1f}" '
        f'width="{max(1.0, step / 2 - 1):.1f}" height="{count * _STRIP / most:.1f}" fill="{colour}"/>'
        for half, (pieces, colour) in enumerate(((old, _LIVE), (new, _REPLAYED)))
        for piece, count in sorted(pieces.items())
    ]
    height = base + _FOOT
    return "".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
                'font-family="system-ui,sans-serif" font-size="15" fill="#333">'
            ),
            f'<rect width="{_WIDTH}" height="{height}" rx="6" fill="#fff"/>',
            (
                f'<text x="{_LEFT}" y="18"><tspan fill="{_LIVE}">■</tspan> live {diff.old:,} '
                f'<tspan fill="{_REPLAYED}">■</tspan> new {diff.new:,}</text>'
            ),
            f'<text x="{_WIDTH - _LEFT}" y="18" text-anchor="end" fill="#777">at most {most:,} in {width // HOUR} h</text>',
            *bars,
            f'<path d="M{_LEFT} {base + 0.5}H{_WIDTH - _LEFT}" stroke="#bbb"/>',
            f'<text x="{_LEFT}" y="{height - 7}" fill="#777">{_minute(first)}</text>',
            f'<text x="{_WIDTH - _LEFT}" y="{height - 7}" text-anchor="end" fill="#777">{_minute(last)}</text></svg>',
        ]
    )


def _pieces(hours: Mapping[int, int], first: int, width: int) -> dict[int, int]:
    found: dict[int, int] = {}
    for hour, count in hours.items():
        piece = (hour - first) // width
        found[piece] = found.get(piece, 0) + count
    return found
