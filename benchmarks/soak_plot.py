"""A plot of what was seen over time: a strip for each kind of value, kills as vertical lines, as SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass

Points = list[tuple[float, float]]

_WIDTH, _LEFT, _RIGHT, _STRIP, _GAP, _TOP, _FOOT = 880, 60, 30, 130, 44, 40, 40
_COLOURS = ("#4361a5", "#c4532d", "#2f8f5b")


@dataclass(frozen=True)
class Line:
    """One strip: values of one unit by name, each with its seconds."""

    title: str
    unit: str
    points: dict[str, Points]
    logarithmic: bool = False


def draw(title: str, seconds: float, lines: list[Line], kills: list[float]) -> str:
    """The whole picture; `kills` are the seconds at which something was killed."""
    height = _TOP + len(lines) * (_STRIP + _GAP) + _FOOT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="system-ui,sans-serif" font-size="13" fill="#333">'
    )
    parts = [
        head,
        f'<rect width="{_WIDTH}" height="{height}" rx="6" fill="#fff"/>',
        f'<text x="{_LEFT}" y="20">{title}: {seconds / 60:.0f} minutes, {len(kills)} kills (grey lines)</text>',
    ]
    for index, line in enumerate(lines):
        parts += _strip(line, _TOP + index * (_STRIP + _GAP) + 20, seconds, kills)
    for minute in range(0, int(seconds / 60) + 1, max(1, int(seconds / 600))):
        parts.append(
            f'<text x="{_x(minute * 60, seconds):.0f}" y="{height - 18}" text-anchor="middle">{minute} min</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _strip(line: Line, top: int, seconds: float, kills: list[float]) -> list[str]:
    values = [value for points in line.points.values() for _, value in points] or [1.0]
    least, most = (max(min(values), 1e-3), max(values)) if line.logarithmic else (0.0, max(values) * 1.1)

    def y(value: float) -> float:
        if line.logarithmic:
            share = math.log(max(value, least) / least) / (math.log(most / least) or 1)
        else:
            share = value / (most or 1)
        return top + _STRIP * (1 - share)

    parts = [f'<path d="M{_x(at, seconds):.1f} {top}v{_STRIP}" stroke="#ccc"/>' for at in kills]
    parts += [
        f'<text x="{_LEFT - 6}" y="{y(value):.0f}" text-anchor="end">{value:.3g}</text>' for value in (least, most)
    ]
    names = []
    for (name, points), colour in zip(line.points.items(), _COLOURS, strict=False):
        names.append(f'<tspan fill="{colour}">{name}</tspan>')
        places = [f"{_x(at, seconds):.1f} {y(value):.1f}" for at, value in points]
        if line.logarithmic:  # single probes: dots
            path, pen = "".join(f"M{place}h0" for place in places), 'stroke-width="2" stroke-linecap="round"'
        else:
            path, pen = "M" + "L".join(places), 'stroke-width="1.5"'
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" {pen}/>')
    parts.append(f'<text x="{_LEFT}" y="{top - 6}">{line.title}, {line.unit}: {", ".join(names)}</text>')
    parts.append(f'<path d="M{_LEFT} {top + _STRIP + 0.5}H{_WIDTH - _RIGHT}" stroke="#bbb"/>')
    return parts


def _x(at: float, seconds: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * at / seconds
