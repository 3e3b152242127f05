"""Plots of judgements: accuracy by kind of question, against bytes of experts and against speed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from eval.comparison import Comparison
from eval.judge import Judgement
from eval.tasks import Task

# Okabe and Ito's colours, which stay apart for colour-blind readers, and two more
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000", "#8A8A8A", "#7A3E9D")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "text.parse_math": False,  # a label may have two dollars in it
}


def judgement_figure(judgements: Sequence[Judgement], tasks: Sequence[Task]) -> Figure:
    """A row a task: score by kind of question, against bytes of experts, against tokens a second."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13.5, 3.4 * len(tasks)), layout="constrained")
        grid = figure.add_gridspec(len(tasks), 3, width_ratios=(1.9, 1, 1))
        for row, task in enumerate(tasks):
            left = figure.add_subplot(grid[row, 0])
            draw_kinds(left, judgements, task)
            if row == 0:
                name_systems(figure, left, abreast=9)
            draw_bytes(figure.add_subplot(grid[row, 1]), judgements, task)
            draw_speed(figure.add_subplot(grid[row, 2]), judgements, task)
        return figure


def comparison_figure(
    judgements: Sequence[Judgement], comparisons: Sequence[Comparison], tasks: Sequence[Task]
) -> Figure:
    """Upper: score against bytes of experts, a panel a task. Lower: differences with their 90 % intervals."""
    colors = {judgement.system.label: color_of(i) for i, judgement in enumerate(judgements)}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, len(tasks), figsize=(11, 8.4), layout="constrained", squeeze=False)
        for column, task in enumerate(tasks):
            draw_bytes(axes[0][column], judgements, task)
            draw_differences(axes[1][column], [c for c in comparisons if c.task == task.name], task, colors)
        name_systems(figure, axes[0][0], abreast=5)
        return figure


def name_systems(figure: Figure, axes: Axes, abreast: int) -> None:
    """A legend above everything, in as many lines as leave no more than ``abreast`` in one."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), abreast))


def color_of(system: int) -> str:
    """The colour of the i-th system, the same in every panel."""
    return PALETTE[system % len(PALETTE)]


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without the date and version that would change its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def draw_kinds(axes: Axes, judgements: Sequence[Judgement], task: Task) -> None:
    """Grouped bars: for each kind of question one bar a system; all items together come first."""
    counts = {kind: n for kind, (_, n) in judgements[0].by_kind(task.name).items()}
    total = sum(counts.values())
    ticks = [f"all\n{total}", *(f"{kind}\n{n}" for kind, n in counts.items())]
    width = 0.8 / len(judgements)
    for i, judgement in enumerate(judgements):
        kinds = judgement.by_kind(task.name)
        heights = [judgement.mean(task.name), *(kinds[kind][0] for kind in counts)]
        offset = (i - (len(judgements) - 1) / 2) * width
        at = np.arange(len(ticks)) + offset
        axes.bar(at, heights, width * 0.92, label=judgement.system.label, color=color_of(i))
    axes.axvline(0.5, color="#bbbbbb", linewidth=0.8)
    axes.set_xticks(range(len(ticks)), ticks, fontsize=8)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.tick_params(axis="x", length=0)
    axes.set_title(f"{task.title}: {task.metric.title} by kind of question (items below)")


def draw_bytes(axes: Axes, judgements: Sequence[Judgement], task: Task) -> None:
    """Score against the bytes of all experts; a system without experts is a dashed line."""
    _draw_cost(axes, judgements, task, [judgement.expert_bytes / 2**20 for judgement in judgements])
    axes.set_xlabel("bytes of all experts, MiB")


def draw_speed(axes: Axes, judgements: Sequence[Judgement], task: Task) -> None:
    """Score against generated tokens a second of the whole run, prefills included."""
    _draw_cost(axes, judgements, task, [judgement.tokens_per_second for judgement in judgements])
    axes.set_xlabel("tokens/s, prefills included")


def _draw_cost(axes: Axes, judgements: Sequence[Judgement], task: Task, costs: Sequence[float]) -> None:
    scores = [judgement.mean(task.name) for judgement in judgements]
    for i, (judgement, score, cost) in enumerate(zip(judgements, scores, costs, strict=True)):
        color, label = color_of(i), judgement.system.label
        if cost:
            axes.plot(cost, score, "o", color=color, markersize=8, alpha=0.9, label=label, zorder=3)
        else:
            axes.axhline(score, color=color, linestyle="--", linewidth=1.4, label=label)
    axes.set_xlim(0, max(costs, default=0) * 1.1 or 1)
    room = max(0.02, 0.08 * (max(scores) - min(scores)))
    axes.set_ylim(min(scores) - room, min(max(scores) + room, 1 + room / 8))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=False, min_n_ticks=3))
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_title(f"{task.title}: {task.metric.title}")


def draw_differences(axes: Axes, comparisons: Sequence[Comparison], task: Task, colors: Mapping[str, str]) -> None:
    """Differences to the baseline in points with their 90 % intervals; the line of the margin is dashed."""
    if not comparisons:
        raise ValueError(f"no comparison on {task.title} to draw: compare at least one system with a baseline")
    for row, comparison in enumerate(comparisons):
        d, color = comparison.difference, colors[comparison.system]
        axes.plot([100 * d.lower, 100 * d.upper], [row, row], color=color, linewidth=1.8)
        axes.plot(100 * d.mean, row, "o", color=color, markersize=7, zorder=3)
        axes.annotate(
            comparison.verdict, (100 * d.mean, row), (0, 7), textcoords="offset points", fontsize=7.5,
            ha="center", color="#444444", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    axes.axvline(0, color="#000000", linewidth=0.8)
    margin = min(comparison.margin for comparison in comparisons)
    axes.axvline(-100 * margin, color="#D55E00", linestyle="--", linewidth=0.9)
    axes.set_yticks(range(len(comparisons)), [comparison.system for comparison in comparisons])
    axes.set_ylim(len(comparisons) - 0.4, -0.8)
    axes.margins(x=0.1)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_xlabel(f"points against {comparisons[0].baseline}, 90 % interval; dashed: margin of {100 * margin:g}")
    axes.set_title(f"{task.title}: difference in {task.metric.title}")
