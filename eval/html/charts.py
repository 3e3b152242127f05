"""Charts as SVG that takes its colours from the page's style sheet, so that they follow light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 8, 38
_HEIGHT = 240
_ROW = 26


@dataclass(frozen=True)
class Dot:
    """A system in a scatter plot: number of its colour, its place; ``x`` None draws a dashed line at ``y``."""

    label: str
    color: int
    x: float | None
    y: float


@dataclass(frozen=True)
class Interval:
    """A difference with its interval; ``margin`` is where its dashed mark goes (at minus it). All in points."""

    label: str
    color: int
    mean: float
    lower: float
    upper: float
    margin: float
    verdict: str


@dataclass(frozen=True)
class Row:
    """A group with a value for each system, in percent, in the order of their colours."""

    label: str
    items: int
    values: tuple[float, ...]


def scatter(dots: Sequence[Dot], x_title: str, y_title: str) -> Markup:
    """Scores in percent against a cost that begins at zero."""
    xs, ys = [dot.x for dot in dots if dot.x is not None], [dot.y for dot in dots]
    right = _ticks(0, max(xs, default=1.0) * 1.08 or 1.0, 5)
    room = max(1.0, 0.15 * (max(ys) - min(ys)))
    up = _ticks(min(ys) - room, min(100.0, max(ys) + room), 5)
    across = _Scale(right[0], right[-1], _LEFT, WIDTH - _RIGHT)
    down = _Scale(up[0], up[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [_horizontal(down(tick), _number(tick), WIDTH) for tick in up]
    parts += [_vertical(across(tick), _number(tick), _HEIGHT - _BOTTOM) for tick in right]
    for dot in dots:
        told = Markup("<title>{}: {:.1f} %{}</title>").format(
            dot.label, dot.y, "" if dot.x is None else f", {_number(dot.x)} {x_title}"
        )
        y = down(dot.y)
        if dot.x is None:
            line = '<line class="s{} dash" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}">{}</line>'
            parts.append(Markup(line).format(dot.color, _LEFT, WIDTH - _RIGHT, y, y, told))
        else:
            circle = '<circle class="s{}" cx="{:.1f}" cy="{:.1f}" r="5.5">{}</circle>'
            parts.append(Markup(circle).format(dot.color, across(dot.x), y, told))
    parts.append(_x_title(x_title, _HEIGHT))
    return _svg(_HEIGHT, f"{y_title} against {x_title}", parts)


def intervals(rows: Sequence[Interval]) -> Markup:
    """A row a comparison: the mean difference, its 90 % interval, the line of zero, a dashed mark at the margin."""
    ends = [value for row in rows for value in (row.lower, row.upper, -row.margin, 0.0)]
    room = 0.06 * (max(ends) - min(ends))
    ticks = _ticks(min(ends) - room, max(ends) + room, 6)
    height = 2 * _ROW * len(rows) + _TOP + _BOTTOM
    scale = _Scale(ticks[0], ticks[-1], 12, WIDTH - _RIGHT)
    bottom = height - _BOTTOM
    parts = [_vertical(scale(tick), f"{tick:+g}" if tick else "0", bottom) for tick in ticks]
    parts.append(
        Markup('<line class="zero" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(scale(0), _TOP, bottom)
    )
    for index, row in enumerate(rows):
        top = _TOP + 2 * _ROW * index
        text = '<text x="12" y="{}" class="row">{} <tspan class="{}">{}</tspan></text>'
        parts.append(Markup(text).format(top + 16, row.label, row.verdict, row.verdict))
        y = top + 34
        mark = '<line class="margin" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
        parts.append(Markup(mark).format(scale(-row.margin), y - 9, y + 9))
        bar = '<line class="s{} bar" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>'
        parts.append(Markup(bar).format(row.color, scale(row.lower), scale(row.upper), y, y))
        told = f"{row.label}: {row.mean:+.2f} ({row.lower:+.2f} .. {row.upper:+.2f}), margin {row.margin:g}"
        circle = '<circle class="s{}" cx="{:.1f}" cy="{}" r="5"><title>{}</title></circle>'
        parts.append(Markup(circle).format(row.color, scale(row.mean), y, told))
    parts.append(_x_title("points", height))
    return _svg(height, "differences in points with 90 % intervals", parts)


def dots_by_group(rows: Sequence[Row], labels: Sequence[str], title: str) -> Markup:
    """A row a group, a dot a system, on a scale up to 100 %."""
    height, left = _ROW * len(rows) + _TOP + _BOTTOM, 132
    ticks = _ticks(max(0.0, min(value for row in rows for value in row.values) - 5), 100, 5)
    scale = _Scale(ticks[0], ticks[-1], left, WIDTH - _RIGHT)
    parts = [_vertical(scale(tick), _number(tick), height - _BOTTOM) for tick in ticks]
    for index, row in enumerate(rows):
        y = _TOP + _ROW * index + _ROW / 2
        text = '<text x="{}" y="{}" class="row end">{} <tspan class="dim">{}</tspan></text>'
        parts.append(Markup(text).format(left - 10, y + 4, row.label, row.items))
        line = '<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>'
        parts.append(Markup(line).format(left, WIDTH - _RIGHT, y))
        for color, value in reversed(list(enumerate(row.values))):
            circle = '<circle class="s{} see" cx="{:.1f}" cy="{:.1f}" r="5"><title>{}</title></circle>'
            place = y + 2.4 * (color - (len(row.values) - 1) / 2)
            told = f"{row.label}, {labels[color]}: {value:.1f} %"
            parts.append(Markup(circle).format(color, scale(value), place, told))
    parts.append(_x_title("%", height))
    return _svg(height, title, parts)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round values from at most ``low`` to at least ``high``."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _horizontal(y: float, text: str, width: int) -> Markup:
    line = '<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>'
    line += '<text x="{3}" y="{4:.1f}" class="end">{5}</text>'
    return Markup(line).format(_LEFT, width - _RIGHT, y, _LEFT - 7, y + 4, text)


def _vertical(x: float, text: str, bottom: float) -> Markup:
    line = '<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
    line += '<text x="{0:.1f}" y="{3}" class="mid">{4}</text>'
    return Markup(line).format(x, _TOP, bottom, bottom + 16, text)


def _x_title(text: str, height: int) -> Markup:
    return Markup('<text x="{}" y="{}" class="end dim">{}</text>').format(WIDTH - _RIGHT, height - 5, text)


def _svg(height: int, title: str, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, escape(title))
    return head + Markup("").join(parts) + Markup("</svg>")
