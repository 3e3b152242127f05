"""Tables of judgements and comparisons, and the results file that they are read from later."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.comparison import Comparison, overall_verdict, pairs_of
from eval.judge import Judgement
from eval.stats import INCONCLUSIVE, INFERIOR, NON_INFERIOR, PASSED, SUPERIOR
from eval.tasks import Task

COLORS = {SUPERIOR: "green", NON_INFERIOR: "green", INFERIOR: "red", INCONCLUSIVE: "yellow"}


def systems_table(judgements: Sequence[Judgement], tasks: Sequence[Task], title: str = "") -> Table:
    """One row a system: what it costs, then its scores in percent."""
    columns, rows = table_cells(judgements, [], tasks)
    table = cells_table(title, columns, rows)
    if any(judgement.failures for judgement in judgements):
        failed = ", ".join(f"{j.system.label}: {j.failures}" for j in judgements if j.failures)
        table.caption = Text(f"items that failed and count as 0: {failed}", style="red")
    return table


def comparisons_table(comparisons: Sequence[Comparison], tasks: Sequence[Task]) -> Table:
    """One row a comparison, in points: difference, 90 % interval, verdict at the margin."""
    titles = {task.name: task.title for task in tasks}
    columns = ["compared", "task", "difference", "90 % interval", "better / worse", "margin", "verdict"]
    rows: list[list[str | Text]] = []
    for comparison in comparisons:
        d = comparison.difference
        rows.append(
            [
                f"{comparison.system} - {comparison.baseline}",
                titles[comparison.task],
                fine_points(d.mean),
                f"{fine_points(d.lower)} .. {fine_points(d.upper)}",
                f"{d.better} / {d.worse}",
                f"{100 * comparison.margin:g}",
                Text(comparison.verdict, style=COLORS[comparison.verdict]),
            ]
        )
    return cells_table("differences in points, paired by item, clustered by image", columns, rows)


def items_to_decide(comparisons: Sequence[Comparison]) -> int | None:
    """How many items a task would settle every inconclusive comparison; None when more would not help."""
    open_ones = [c for c in comparisons if c.verdict == INCONCLUSIVE]
    needed = [c.difference.items_to_decide(c.margin) for c in open_ones]
    more = [n for n, c in zip(needed, open_ones, strict=True) if n > c.difference.items]
    return max(more, default=None)


def overall_verdicts(comparisons: Sequence[Comparison]) -> dict[str, bool]:
    """For every pair of systems: whether every task passed (so no correction for several tests is needed)."""
    pairs = pairs_of(comparisons).items()
    return {f"{system} - {baseline}": overall_verdict(found) in PASSED for (system, baseline), found in pairs}


def table_cells(
    judgements: Sequence[Judgement],
    comparisons: Sequence[Comparison],
    tasks: Sequence[Task],
    alone: Mapping[str, float] | None = None,
) -> tuple[list[str], list[list[str]]]:
    """Column names and rows, as text; in brackets the difference to the baseline in points.

    ``alone``: by system's name, the hit rate of questions asked one at a time, for a column of its own.
    """
    columns = ["system", "expert MiB", "on device MiB", "tokens/s", "hit rate %"]
    columns += ["hit rate alone %"] if alone else []
    columns += [f"{task.title}: {task.metric.title} %" for task in tasks]
    differences = {(c.system, c.task): c.difference.mean for c in comparisons}
    rows = []
    for judgement in judgements:
        row = [judgement.system.label, *cost_cells(judgement)]
        if alone:
            row.append(share_cell(alone.get(judgement.system.name)))
        for task in tasks:
            difference = differences.get((judgement.system.label, task.name))
            behind = "" if difference is None else f" ({points(difference)})"
            row.append(percent(judgement.mean(task.name)) + behind)
        rows.append(row)
    return columns, rows


def cells_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Table:
    """Text cells as a narrow table: headers wrap at blanks, cells never do; numbers to the right. Labels and kinds come
    from users and data sets, so brackets in a cell are brackets; what has a style is a ``Text``."""
    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        cells = [str(row[i]) for row in rows]
        width = max(map(len, (*cells, *column.split())))
        is_number = any(cell[-1:].isdigit() or cell.endswith(")") for cell in cells) and i > 0
        table.add_column(column, justify="right" if is_number else "left", width=width)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def cost_cells(judgement: Judgement) -> list[str]:
    """MiB of all experts, MiB of those on the device, tokens a second, hit rate; "-" where there is none."""
    sizes = [mebibytes(judgement.expert_bytes), mebibytes(judgement.device_expert_bytes)]
    return [*sizes, f"{judgement.tokens_per_second:.1f}", share_cell(judgement.hit_rate)]


def share_cell(share: float | None) -> str:
    """A share in percent, "-" for none."""
    return "-" if share is None else percent(share)


def results_json(
    made: dict[str, Any],
    settings: dict[str, Any],
    tasks: Sequence[Task],
    judgements: Sequence[Judgement],
    comparisons: Sequence[Comparison],
) -> dict[str, Any]:
    """Everything a table or plot shows, with how it was made."""
    return {
        "made": made,
        "settings": settings,
        "tasks": [task.description for task in tasks],
        "systems": [judgement.to_json() for judgement in judgements],
        "comparisons": [comparison.to_json() for comparison in comparisons],
        "all_tasks_passed": overall_verdicts(comparisons),
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a results file, indented, ASCII, with a final line end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def percent(share: float) -> str:
    """0.5 -> "50.0"."""
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """A difference of shares in points, signed; a difference of zero has no sign."""
    return _signed(difference, 1)


def fine_points(difference: float) -> str:
    """The same with two decimals, for what is held against a margin."""
    return _signed(difference, 2)


def _signed(difference: float, decimals: int) -> str:
    text = f"{100 * difference:+.{decimals}f}"
    return text if text.strip("+-0.") else text[1:]


def mebibytes(nbytes: int) -> str:
    """Bytes in MiB with two decimals; "-" for none."""
    return f"{nbytes / 2**20:.2f}" if nbytes else "-"


def make_console() -> Console:
    """A console as wide as its terminal, or 120 columns where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
