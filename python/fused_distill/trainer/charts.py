"""Charts as inline SVG, which fit any width and take their colors from the page's style."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

WIDTH, HEIGHT = 400, 210  # units of the SVG, which is drawn as wide as its place in the page
LEFT, RIGHT, TOP, BOTTOM = 58, 390, 10, 184  # edges of the plotted area
MAX_POINTS = 400  # drawn per curve; of a longer run means over neighbouring steps are drawn


class Series(NamedTuple):
    """A curve."""

    label: str
    points: list[tuple[float, float]]  # of step and value
    dots: bool = False  # draw each value as a dot; else thinly, under a smoothed curve


class _Scale(NamedTuple):
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(title: str, series: Sequence[Series]) -> str:
    """Return a figure of curves by step, smoothed over raw; an empty text if no value is finite."""
    kept = [s._replace(points=[p for p in s.points if math.isfinite(p[1])]) for s in series]
    kept = [s for s in kept if s.points]
    if not kept:
        return ""
    x, y = _scales([point for s in kept for point in s.points], [])
    drawn = [_curve(s, x, y, color) for color, s in enumerate(kept, 1)]
    return _figure(title, x, y, drawn, [s.label for s in kept])


def stacked_chart(title: str, series: Sequence[Series]) -> str:
    """Return a figure of areas on top of each other; all series have values of the same steps."""
    columns = [binned(s.points) for s in series]
    if not columns or not columns[0]:
        return ""
    steps = [step for step, _ in columns[0]]
    tops = [[0.0] * len(steps)]
    for column in columns:
        tops.append([top + value for top, (_, value) in zip(tops[-1], column, strict=True)])
    x, y = _scales([*zip(steps, tops[-1], strict=True)], [0.0])
    drawn: list[str] = []
    for color, (lower, upper) in enumerate(pairwise(tops), 1):
        outline = [*zip(steps, upper, strict=True), *zip(steps[::-1], lower[::-1], strict=True)]
        if len(steps) == 1:  # an area needs some width
            outline = [(x.low, upper[0]), (x.high, upper[0]), (x.high, lower[0]), (x.low, lower[0])]
        drawn.append(f'<path class="area c{color}" d="{_path(outline, x, y)}Z"/>')
    return _figure(title, x, y, drawn, [s.label for s in series])


def binned(points: list[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Return at most `limit` points: means over equally many neighbours."""
    size = -(-len(points) // limit)
    if size <= 1:
        return points
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(g[-1][0], sum(value for _, value in g) / len(g)) for g in groups]


def smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return exponential moving averages over about a tenth of the points, unbiased at the start."""
    decay = 1 - 1 / max(1.0, len(points) / 10)
    total = weight = 0.0
    curve: list[tuple[float, float]] = []
    for step, value in points:
        total, weight = decay * total + value, decay * weight + 1
        curve.append((step, total / weight))
    return curve


def _curve(series: Series, x: _Scale, y: _Scale, color: int) -> str:
    points = binned(series.points)
    if series.dots:
        dots = "".join(
            f'<circle class="c{color}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3">'
            f"<title>step {step:g}: {value:.4g}</title></circle>"
            for step, value in points
        )
        return f'<path class="line c{color}" d="{_path(points, x, y)}"/>{dots}'
    raw = f'<path class="raw c{color}" d="{_path(points, x, y)}"/>'
    return f'{raw}<path class="line c{color}" d="{_path(smoothed(points), x, y)}"/>'


def _path(points: Iterable[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    # A line of no length has round ends, so that a single value is seen too.
    places = [f"{x(step):.1f} {y(value):.1f}" for step, value in points]
    return "M" + "L".join(places if len(places) > 1 else places * 2)


def _scales(points: Sequence[tuple[float, float]], values: Sequence[float]) -> tuple[_Scale, _Scale]:
    steps, heights = [step for step, _ in points], [*values, *(value for _, value in points)]
    low, high = min(heights), max(heights)
    room = (high - low or abs(high) or 1.0) * 0.05
    first, last = min(steps), max(steps)
    y = _Scale(low - room if low not in values else low, high + room, BOTTOM, TOP)
    return _Scale(first, last if last > first else first + 1, LEFT, RIGHT), y


def _ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Return about `count` round numbers between low and high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    spacing = max(spacing, 1.0) if whole else spacing
    first, last = math.ceil(low / spacing), math.floor(high / spacing)
    return [i * spacing for i in range(first, last + 1)]


def _figure(title: str, x: _Scale, y: _Scale, drawn: list[str], labels: list[str]) -> str:
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{LEFT - 5}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.4g}</text>'
        for v in _ticks(y.low, y.high, 4)
    )
    steps = "".join(
        f'<text x="{x(v):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{v:g}</text>'
        for v in _ticks(x.low, x.high, 5, whole=True)
    )
    legend = "".join(
        f'<span><i class="c{color}"></i>{escape(label)}</span>' for color, label in enumerate(labels, 1)
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" '
        f'role="img" aria-label="{escape(title)} by optimizer step">{grid}{steps}{"".join(drawn)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )
