"""From a report to its page. Item texts come from data sets and models: the template escapes them, and a policy in the
page lets nothing run or load but its own script and the pictures inside it."""

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from eval.compare.report import (
    READING,
    Report,
    asked,
    difference_cells,
    group_cells,
    matched_cell,
    system_cells,
    verdict_cells,
)
from eval.comparison import DIMENSIONS, Comparison
from eval.html.charts import Dot, Interval, Row, dots_by_group, intervals, scatter
from eval.judge import Judgement
from eval.records import ItemResult
from eval.report import fine_points
from eval.stats import INCONCLUSIVE, INFERIOR, PASSED
from eval.tasks import Task

COLORS = 8
_NUMBER = re.compile(r"-|[+-]?[\d.,]+( (/|\.\.) ([+-]?[\d.,]+|-))*")
_HERE = Path(__file__).parent


def page(report: Report) -> str:
    """The whole page as one HTML text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"points": fine_points}
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    colors = {judgement.system.label: index % COLORS for index, judgement in enumerate(report.judgements)}
    return environment.get_template("page.html").render(
        report=report,
        pairs=report.pairs,
        asked=asked(report),
        reading=READING,
        titles={task.name: task.title for task in report.tasks},
        verdicts=(*PASSED, INFERIOR, INCONCLUSIVE),
        numbers=numeric_columns,
        made=describe_made(dict(report.made)),
        colors=colors,
        matched=matched_cell,
        tables={
            "Verdicts": verdict_cells(report),
            "Systems": system_cells(report),
            "Differences": difference_cells(report),
        },
        groups=[(pair, group_cells(report, pair)) for pair in report.pairs],
        charts=[(task.title, _charts(report, task, colors)) for task in report.tasks],
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _charts(report: Report, task: Task, colors: dict[str, int]) -> list[tuple[str, str, Markup]]:
    """Heading, note and chart of everything that is drawn of a task."""
    metric = task.metric.title[0].upper() + task.metric.title[1:]
    shown = [_interval(c, colors) for c in report.comparisons if c.task == task.name]
    by_bytes = [_dot(j, task, colors, j.expert_bytes / 2**20 or None) for j in report.judgements]
    by_speed = [_dot(j, task, colors, j.tokens_per_second) for j in report.judgements]
    found = [
        (f"Differences in {task.metric.title}", "90 % intervals; dashed: the margin.", intervals(shown)),
        (f"{metric}, %, against expert bytes", _NO_EXPERTS, scatter(by_bytes, "MiB of experts", metric)),
        (f"{metric}, %, against tokens/s", _HOVER, scatter(by_speed, "tokens/s", metric)),
    ]
    for dimension, name in _DIMENSION.items():
        if len(rows := _rows(report, task, dimension)) > 2:  # more than "all" and one group
            chart = dots_by_group(rows, list(colors), f"{metric} by {name}")
            found.append((f"{metric}, %, by {name}", "Beside the names: numbers of questions.", chart))
    return found


_NO_EXPERTS = "Dashed line: a system without experts."
_HOVER = "Hover a dot for its name and value."
_DIMENSION = {"kind": "kind of question", "split": "split or family of pictures"}


def _interval(c: Comparison, colors: dict[str, int]) -> Interval:
    d = c.difference
    in_points = (100 * value for value in (d.mean, d.lower, d.upper, c.margin))
    return Interval(f"{c.system} - {c.baseline}", colors[c.system], *in_points, c.verdict)


def _dot(judgement: Judgement, task: Task, colors: dict[str, int], x: float | None) -> Dot:
    label = judgement.system.label
    return Dot(label, colors[label], x, 100 * judgement.mean(task.name))


def _rows(report: Report, task: Task, dimension: str) -> list[Row]:
    results = [judgement.of_task(task.name) for judgement in report.judgements]
    group_of = DIMENSIONS[dimension]
    names = [group_of(result) for result in results[0]]
    ordered = sorted(dict.fromkeys(names), key=lambda name: (-names.count(name), name))
    rows = [Row("all", len(names), tuple(100 * judgement.mean(task.name) for judgement in report.judgements))]
    return rows + [_row(name, [[r for r in side if group_of(r) == name] for side in results]) for name in ordered]


def _row(name: str, sides: list[list[ItemResult]]) -> Row:
    means = tuple(100 * sum(r.score for r in side) / len(side) for side in sides)
    return Row(name, len(sides[0]), means)


def numeric_columns(rows: Sequence[Sequence[str]]) -> set[int]:
    """Columns that hold only numbers, intervals, counts like "3 / 4", and "-" for none."""
    columns = [[row[i] for row in rows] for i in range(len(rows[0]))] if rows else []
    return {i for i, cells in enumerate(columns) if all(map(_NUMBER.fullmatch, cells)) and set(cells) != {"-"}}


def describe_made(made: dict[str, Any]) -> str:
    """Device and versions in a line."""
    packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items() if version)
    return f"{made['device']}; Python {made['python']}; {packages}"
