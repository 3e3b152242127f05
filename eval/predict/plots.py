"""One figure of all predictors: recall at k by kind of token, and what they name of the misses that an LRU leaves."""

from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from eval.plots import STYLE, color_of

_KINDS = ("text", "image", "generated")


def predictors_figure(results: dict[str, Any]) -> Figure:
    """A row for a task. Left: recall at k by kind of token. Right: recall of missed experts against precision. Of every
    kind of predictor the one that learned from most tasks is shown."""
    tasks = list(results["tasks"])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(tasks), 2, figsize=(12, 3.9 * len(tasks)), squeeze=False, layout="constrained")
        for row, task in enumerate(tasks):
            shown = _shown(results, task)
            _draw_recall(axes[row][0], shown, task)
            _draw_misses(axes[row][1], shown, task, results["resident"])
        handles = axes[0][0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=3)
        return figure


def _shown(results: dict[str, Any], task: str) -> dict[str, Any]:
    """Label -> figures, of each kind of predictor the one that learned from most tasks."""
    widest: dict[str, tuple[int, dict[str, Any]]] = {}
    for label, entry in results["predictors"].items():
        name, tasks = label.rsplit(" (", 1)[0], len(entry["fitted"])
        if task in entry["on"] and tasks > widest.get(name, (0,))[0]:
            widest[name] = tasks, entry["on"][task]
    return {name: figures for name, (_, figures) in widest.items()}


def _draw_recall(axes: Axes, shown: dict[str, Any], task: str) -> None:
    kinds = [kind for kind in ("all", *_KINDS) if all(kind in figures["recall"]["k"] for figures in shown.values())]
    width = 0.84 / max(len(shown), 1)
    for index, (name, figures) in enumerate(shown.items()):
        heights = [figures["recall"]["k"][kind] for kind in kinds]
        at = np.arange(len(kinds)) + (index - (len(shown) - 1) / 2) * width
        spread = [figures["recall_at_k_interval"][kind] for kind in kinds]
        errors = np.abs(np.array(spread).T - np.array(heights))
        axes.bar(at, heights, width * 0.94, color=color_of(index), label=name, yerr=errors, error_kw={"linewidth": 0.7})
    axes.axhline(0.8, color="#000000", linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title(f"{task}: recall at k by kind of token, 90 % interval over items; dashed: 80 %")


def _draw_misses(axes: Axes, shown: dict[str, Any], task: str, resident: float) -> None:
    for index, (name, figures) in enumerate(shown.items()):
        points = [figures["misses"][width]["absent"] for width in ("k", "1.5k", "2k")]
        if all(point["recall"] is not None for point in points):
            axes.plot(
                [point["precision"] for point in points],
                [point["recall"] for point in points],
                "o-",
                color=color_of(index),
                label=name,
            )
    axes.set_xlabel("precision: used share of what is prefetched (k, 1.5k, 2k experts)")
    axes.set_ylabel("recall of missed experts")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_title(f"{task}: generated tokens' misses after LRU, {resident:.0%} resident")
