"""Experts that batches touch, against how long requests may wait."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots import STYLE, color_of
from eval.schedule.measure import ARRIVAL

PANELS = {
    "whole_batch_step": "in the step that the whole batch takes",
    "batch": "over all decode steps of a batch",
    "loads_per_token": "wanted by steps, for a generated token",
}
AT_WORK = {
    "distinct_experts": "distinct experts in a layer's step",
    "bytes_per_token": "bytes moved, for a token",
    "hit_rate": "hit rate",
    "tokens_per_second": "tokens a second",
}
LABELS = {
    "task": "grouped by task",
    "words": "by words",
    "predicted": "by predicted path",
    "prompt": "by the prompt's own path",
    "oracle": "by the true path (oracle)",
}
TARGET = -0.1


def schedule_figure(orders: Sequence[Mapping[str, Any]], rows: int) -> Figure:
    """A panel a figure: change against order of arrival by patience, with 95 % intervals; dashed: the target."""
    return _panels(orders, PANELS, f"distinct experts in a layer,\nagainst arrival order, batch {rows} (%)", PANELS)


def at_work_figure(orders: Sequence[Mapping[str, Any]], rows: int) -> Figure:
    """The same of a real engine: what it wanted, moved and gave."""
    return _panels(orders, AT_WORK, f"at work, against arrival order,\nbatch {rows} (%)", ("distinct_experts",))


def _panels(
    orders: Sequence[Mapping[str, Any]], panels: Mapping[str, str], ylabel: str, with_target: Collection[str]
) -> Figure:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.6), layout="constrained", sharey=True)
        for panel, (name, title) in zip(axes, panels.items(), strict=True):
            _draw(panel, orders, name)
            if name in with_target:
                panel.axhline(100 * TARGET, color="#D55E00", linestyle="--", linewidth=0.9, label="target")
            panel.set_title(title)
            panel.set_xlabel("batches that a request may be late")
        axes[0].set_ylabel(ylabel)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(LABELS) + 1)
        return figure


def _draw(axes: Axes, orders: Sequence[Mapping[str, Any]], name: str) -> None:
    for color, (paths, label) in enumerate(LABELS.items()):
        found = [entry for entry in orders if entry["paths"] == paths != ARRIVAL]
        if not found:
            continue
        at = [entry["patience"] for entry in found]
        change = [entry["change"][name] for entry in found]
        mean = [100 * c["mean"] for c in change]
        error = [[100 * (c["mean"] - c["lower"]) for c in change], [100 * (c["upper"] - c["mean"]) for c in change]]
        axes.errorbar(at, mean, error, color=color_of(color), marker="o", markersize=4, capsize=2, label=label)
    axes.axhline(0, color="#000000", linewidth=0.8)
    axes.set_xscale("log", base=2)
    ticks = sorted({entry["patience"] for entry in orders if entry["patience"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(color="#e4e4e4", linewidth=0.6)
