"""Tables of judgements and comparisons, and the results file that they are read from later."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.judge import Comparison, Judgement
from eval.stats import INCONCLUSIVE, INFERIOR, NON_INFERIOR, SUPERIOR
from eval.tasks import Task

COLORS = {SUPERIOR: "green", NON_INFERIOR: "green", INFERIOR: "red", INCONCLUSIVE: "yellow"}


def systems_table(judgements: Sequence[Judgement], tasks: Sequence[Task]) -> Table:
    """One row a system: both scores in percent, then what they cost."""
    table = Table(title=f"{_items(tasks)} held-out items", title_justify="left")
    table.add_column("system", no_wrap=True)
    for task in tasks:
        table.add_column(f"{task.metric.title}\n{task.title}, %", justify="right")
    for name in ("hit rate\n%", "tokens/s\n", "expert bytes\nMiB", "on device\nMiB"):
        table.add_column(name, justify="right")
    for judgement in judgements:
        scores = [percent(judgement.mean(task.name)) for task in tasks]
        table.add_row(judgement.system.label, *scores, *cost_cells(judgement))
    if any(judgement.failures for judgement in judgements):
        failed = ", ".join(f"{j.system.label}: {j.failures}" for j in judgements if j.failures)
        table.caption = f"[red]items that failed and count as 0: {failed}[/red]"
    return table


def cost_cells(judgement: Judgement) -> list[str]:
    """Hit rate, tokens a second, bytes of all experts and of those on the device; "-" where there is none."""
    hit_rate = "-" if judgement.hit_rate is None else percent(judgement.hit_rate)
    speed = f"{judgement.tokens_per_second:.1f}"
    return [hit_rate, speed, mebibytes(judgement.expert_bytes), mebibytes(judgement.device_expert_bytes)]


def comparisons_table(comparisons: Sequence[Comparison], tasks: Sequence[Task]) -> Table:
    """One row a comparison, in points: difference, 90 % interval, verdict at the margin."""
    titles = {task.name: task.title for task in tasks}
    table = Table(title="differences in points, paired by item, clustered by image", title_justify="left")
    table.add_column("compared", no_wrap=True)
    for name in ("task", "difference", "90 % interval", "better / worse", "margin", "verdict"):
        table.add_column(name, justify="left" if name in ("task", "verdict") else "right")
    for comparison in comparisons:
        d = comparison.difference
        table.add_row(
            f"{comparison.system} - {comparison.baseline}",
            titles[comparison.task],
            points(d.mean),
            f"{points(d.lower)} .. {points(d.upper)}",
            f"{d.better} / {d.worse}",
            f"{100 * comparison.margin:g}",
            verdict_cell(comparison),
        )
    return table


def verdict_cell(comparison: Comparison) -> str:
    """The verdict in its colour; an inconclusive one says how many items would decide."""
    verdict = comparison.verdict
    more = ""
    needed = comparison.difference.items_to_decide(comparison.margin)
    if verdict == INCONCLUSIVE and needed > comparison.difference.items:
        more = f" (about {needed:,} items would decide)"
    return f"[{COLORS[verdict]}]{verdict}[/{COLORS[verdict]}]{more}"


def overall_verdicts(comparisons: Sequence[Comparison]) -> dict[str, bool]:
    """For every pair of systems: whether every task passed (so no correction for several tests is needed)."""
    passed: dict[str, bool] = {}
    for comparison in comparisons:
        pair = f"{comparison.system} - {comparison.baseline}"
        passed[pair] = passed.get(pair, True) and comparison.verdict in (SUPERIOR, NON_INFERIOR)
    return passed


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
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def mebibytes(nbytes: int) -> str:
    """Bytes in MiB with two decimals; "-" for none."""
    return f"{nbytes / 2**20:.2f}" if nbytes else "-"


def _items(tasks: Sequence[Task]) -> str:
    return " + ".join(f"{len(task.items)} {task.title}" for task in tasks)
