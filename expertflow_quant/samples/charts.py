"""Charts: bars, lines, pies, groups and stacks."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from expertflow_quant.samples import words
from expertflow_quant.samples.canvas import SIZE, Canvas, Color
from expertflow_quant.samples.chart_questions import Table, ask_series, ask_simple
from expertflow_quant.samples.item import Question

Box = tuple[float, float, float, float]
WHITE: Color = (255, 255, 255)
TINTS: tuple[Color, ...] = (
    WHITE,
    WHITE,
    WHITE,
    (250, 250, 244),
    (244, 248, 252),
    (248, 244, 250),
    (240, 240, 240),
)
TEXT_FONTS = ("Aileron", "Aileron", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif")


@dataclass(frozen=True)
class Style:
    """How a chart looks."""

    size: int
    dark: bool
    grid: bool
    outline: bool

    @property
    def ink(self) -> Color:
        """The colour of text and axes."""
        return WHITE if self.dark else (0, 0, 0)


def shade(rng: random.Random, name: str) -> Color:
    """A named colour, a little lighter or darker."""
    shift = rng.randint(-14, 14)
    red, green, blue = (max(0, min(255, c + shift)) for c in words.COLORS[name])
    return red, green, blue


def pick_names(rng: random.Random, count: int, room: int) -> tuple[str, list[str]]:
    """A noun and `count` different names of it with at most `room` letters; years and months stay in order."""
    while True:
        noun = rng.choice(list(words.CATEGORIES))
        fitting = [name for name in words.CATEGORIES[noun] if len(name) <= room]
        if len(fitting) < count:
            continue
        if noun in ("year", "month", "day"):
            start = rng.randrange(len(fitting) - count + 1)
            return noun, fitting[start : start + count]
        return noun, rng.sample(fitting, count)


def pick_values(rng: random.Random, count: int, low: int = 3) -> list[str]:
    """Different printed values: mostly two digits, some three, some with one decimal."""
    scale = rng.random()
    if scale < 0.7:
        return [str(v) for v in rng.sample(range(low, 100), count)]
    if scale < 0.85:
        return [str(v) for v in rng.sample(range(low * 10, 1000), count)]
    return [f"{v / 10:.1f}" for v in rng.sample(range(low * 10, 1000), count)]


def axes(canvas: Canvas, style: Style, box: Box) -> None:
    """Axis lines and, where the style has one, a faint grid."""
    x0, y0, x1, y1 = box
    if style.grid:
        faint = (90, 90, 90) if style.dark else (222, 222, 222)
        for i in range(1, 4):
            y = y1 - (y1 - y0) * i / 4
            canvas.draw.line([(x0, y), (x1, y)], fill=faint)
    canvas.draw.line([(x0, y0), (x0, y1), (x1, y1)], fill=style.ink)


def legend(canvas: Canvas, style: Style, y: float, names: list[str], hues: list[str], colors: list[Color]) -> None:
    """Names with their colours on one line, centred."""
    widths = [canvas.width(name, style.size) + 18 for name in names]
    x = (SIZE - sum(widths)) / 2
    for name, width, hue, color in zip(names, widths, hues, colors, strict=True):
        canvas.draw.rectangle([x, y + 3, x + 8, y + 11], fill=color)
        canvas.text(x + 11, y, name, style.size, fill=style.ink, color=hue)
        x += width


def rectangle(canvas: Canvas, style: Style, box: Box, color: Color) -> None:
    """A filled bar."""
    x0, y0, x1, y1 = box
    canvas.draw.rectangle(
        [x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)], fill=color, outline=style.ink if style.outline else None
    )


def draw_bars(rng: random.Random, canvas: Canvas, style: Style, top: float) -> Table:
    """Upright or lying bars, a value at the end of each."""
    lying = rng.random() < 0.4
    count = rng.randint(2, 6 if lying else 5)
    noun, names = pick_names(rng, count, 8 if lying else 6 if count <= 4 else 4)
    values = pick_values(rng, count)
    one_color = rng.random() < 0.25
    colors = [rng.choice(list(words.COLORS))] * count if one_color else rng.sample(list(words.COLORS), count)
    fills = [shade(rng, c) for c in colors]
    high = max(float(v) for v in values)
    if lying:
        left = max(canvas.width(n, style.size) for n in names) + 8.0
        box = (left, top, SIZE - 36.0, SIZE - 8.0)
        canvas.draw.line([(left, top), (left, SIZE - 8)], fill=style.ink)
        slot = (box[3] - top) / count
        for i, name in enumerate(names):
            y = top + slot * i
            end = left + (box[2] - left) * float(values[i]) / high
            rectangle(canvas, style, (left, y + slot * 0.2, end, y + slot * 0.8), fills[i])
            canvas.text(left - 4, y + slot / 2 - 7, name, style.size, anchor="r", fill=style.ink, color=colors[i])
            canvas.text(end + 3, y + slot / 2 - 7, values[i], style.size, fill=style.ink, row=name, color=colors[i])
    else:
        box = (8.0, top + 14, SIZE - 6.0, SIZE - 20.0)
        axes(canvas, style, box)
        slot = (box[2] - box[0]) / count
        gap = rng.uniform(0.12, 0.25) * slot
        for i, name in enumerate(names):
            x = box[0] + slot * i
            y = box[3] - (box[3] - box[1]) * float(values[i]) / high
            rectangle(canvas, style, (x + gap, y, x + slot - gap, box[3]), fills[i])
            canvas.text(
                x + slot / 2,
                y - 14,
                values[i],
                style.size,
                anchor="m",
                fill=style.ink,
                row=name,
                color=colors[i],
            )
            canvas.text(x + slot / 2, box[3] + 2, name, style.size, anchor="m", fill=style.ink, color=colors[i])
    return Table(noun, names, [], [[v] for v in values], [] if one_color else colors)


def draw_line(rng: random.Random, canvas: Canvas, style: Style, top: float) -> Table:
    """One line with a value at each point."""
    count = rng.randint(3, 5)
    noun, names = pick_names(rng, count, 5 if count <= 4 else 4)
    values = pick_values(rng, count)
    color = shade(rng, rng.choice(list(words.COLORS)))
    box = (8.0, top + 16, SIZE - 6.0, SIZE - 22.0)
    axes(canvas, style, box)
    high, low = max(float(v) for v in values), min(float(v) for v in values)
    slot = (box[2] - box[0]) / count
    points = []
    for i, value in enumerate(values):
        share = 0.1 + 0.9 * (float(value) - low) / (high - low)
        points.append((box[0] + slot * (i + 0.5), box[3] - (box[3] - box[1]) * share))
    canvas.draw.line(points, fill=color, width=2)
    for (x, y), name, value in zip(points, names, values, strict=True):
        canvas.draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)
        half = canvas.width(value, style.size) / 2
        canvas.draw.rectangle([x - half, y - 15, x + half, y - 5], fill=canvas.background)
        canvas.text(x, y - 17, value, style.size, anchor="m", fill=style.ink, row=name)
        canvas.text(x, box[3] + 3, name, style.size, anchor="m", fill=style.ink)
    return Table(noun, names, [], [[v] for v in values], [])


def draw_pie(rng: random.Random, canvas: Canvas, style: Style, top: float) -> Table:
    """A pie whose legend gives each slice's name, and its value there or in the slice."""
    count = rng.randint(2, 5)
    noun, names = pick_names(rng, count, 7)
    shares = [rng.randint(8, 40) for _ in range(count)]
    total = sum(shares)
    parts = [max(6, round(100 * s / total)) for s in shares]
    parts[parts.index(max(parts))] += 100 - sum(parts)
    if len(set(parts)) < count or min(parts) < 5:
        return draw_pie(rng, canvas, style, top)
    colors = rng.sample(list(words.COLORS), count)
    fills = [shade(rng, c) for c in colors]
    in_legend = rng.random() < 0.6
    radius = 46.0
    centre = (52.0, (top + SIZE) / 2 + 2)
    angle = rng.uniform(0, 360)
    bounds = [centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius]
    labels = []
    for part, fill in zip(parts, fills, strict=True):
        sweep = 360 * part / 100
        canvas.draw.pieslice(bounds, angle, angle + sweep, fill=fill, outline=style.ink if style.outline else fill)
        middle = math.radians(angle + sweep / 2)
        labels.append((centre[0] + 30 * math.cos(middle), centre[1] + 30 * math.sin(middle)))
        angle += sweep
    row = min(24.0, (SIZE - top - 16) / count)
    y = centre[1] - row * count / 2
    for (lx, ly), name, part, fill, hue in zip(labels, names, parts, fills, colors, strict=True):
        canvas.draw.rectangle([106, y + 3, 114, y + 11], fill=fill)
        width = canvas.text(118, y, name, style.size, fill=style.ink, color=hue)
        if in_legend:
            canvas.text(118 + width + 4, y, str(part), style.size, fill=style.ink, row=name, color=hue)
        else:
            canvas.draw.rectangle([lx - 9, ly - 7, lx + 9, ly + 7], fill=WHITE)
            canvas.text(lx, ly - 7, str(part), style.size, anchor="m", row=name, color=hue)
        y += row
    return Table(noun, names, [], [[str(p)] for p in parts], colors)


def draw_groups(rng: random.Random, canvas: Canvas, style: Style, top: float) -> Table:
    """Two bars for each of two or three names."""
    count = rng.randint(2, 3)
    noun, names = pick_names(rng, count, 7)
    series = rng.sample(words.SERIES, 2)
    flat = [str(v) for v in rng.sample(range(3, 100), 2 * count)]
    values = [flat[2 * i : 2 * i + 2] for i in range(count)]
    hues = rng.sample(list(words.COLORS), 2)
    fills = [shade(rng, c) for c in hues]
    legend(canvas, style, top, series, hues, fills)
    box = (8.0, top + 30, SIZE - 6.0, SIZE - 20.0)
    axes(canvas, style, box)
    slot = (box[2] - box[0]) / count
    high = max(float(v) for v in flat)
    for i, name in enumerate(names):
        for j in range(2):
            x = box[0] + slot * i + slot * (0.08 + 0.42 * j)
            y = box[3] - (box[3] - box[1]) * float(values[i][j]) / high
            rectangle(canvas, style, (x, y, x + slot * 0.38, box[3]), fills[j])
            canvas.text(
                x + slot * 0.2,
                y - 14,
                values[i][j],
                style.size,
                anchor="m",
                fill=style.ink,
                row=name,
                column=series[j],
                color=hues[j],
            )
        canvas.text(box[0] + slot * (i + 0.5), box[3] + 2, name, style.size, anchor="m", fill=style.ink)
    return Table(noun, names, series, values, [])


def draw_stacks(rng: random.Random, canvas: Canvas, style: Style, top: float) -> Table:
    """Two parts on top of each other for each of two to four names."""
    count = rng.randint(2, 4)
    noun, names = pick_names(rng, count, 6)
    series = rng.sample(words.SERIES, 2)
    values = [[str(rng.randint(12, 60)) for _ in range(2)] for _ in range(count)]
    hues = rng.sample(list(words.COLORS), 2)
    fills = [shade(rng, c) for c in hues]
    legend(canvas, style, top, series, hues, fills)
    box = (8.0, top + 18, SIZE - 6.0, SIZE - 20.0)
    axes(canvas, style, box)
    slot = (box[2] - box[0]) / count
    high = max(int(a) + int(b) for a, b in values)
    for i, name in enumerate(names):
        x, bottom = box[0] + slot * i, box[3]
        for j in range(2):
            height = max(16.0, (box[3] - box[1]) * int(values[i][j]) / high)
            rectangle(canvas, style, (x + slot * 0.15, bottom - height, x + slot * 0.85, bottom), fills[j])
            middle = bottom - height / 2
            canvas.draw.rectangle([x + slot / 2 - 9, middle - 6, x + slot / 2 + 9, middle + 7], fill=WHITE)
            canvas.text(
                x + slot / 2,
                middle - 7,
                values[i][j],
                style.size,
                anchor="m",
                row=name,
                column=series[j],
                color=hues[j],
            )
            bottom -= height
        canvas.text(x + slot / 2, box[3] + 2, name, style.size, anchor="m", fill=style.ink)
    return Table(noun, names, series, values, [])


FAMILIES: dict[str, Callable[[random.Random, Canvas, Style, float], Table]] = {
    "bar": draw_bars,
    "line": draw_line,
    "pie": draw_pie,
    "grouped": draw_groups,
    "stacked": draw_stacks,
}


def draw_chart(rng: random.Random, title: str) -> tuple[Canvas, str, list[Question]]:
    """A chart under the given title: the page, the family, and every question that can be asked of it."""
    family = rng.choice(list(FAMILIES))
    dark = rng.random() < 0.1
    canvas = Canvas((35, 38, 48) if dark else rng.choice(TINTS), rng.choice(TEXT_FONTS))
    style = Style(11, dark, rng.random() < 0.4, rng.random() < 0.3)
    size = style.size
    if rng.random() < 0.5:
        canvas.text(SIZE / 2, 3, title, size, anchor="m", fill=style.ink)
    else:
        canvas.text(5, 3, title, size, fill=style.ink)
    table = FAMILIES[family](rng, canvas, style, 22.0)
    asked = ask_series(rng, table) if table.series else ask_simple(rng, table, family)
    asked.append(Question("title", "What is the title of the chart?", (title,)))
    return canvas, family, asked
