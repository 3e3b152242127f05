"""Output errors by case, ours beside each peer's."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots import STYLE, color_of

TITLES = {"samples": "on the tokens that it was calibrated on", "unseen": "on tokens kept apart"}


def peers_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel for each kind of tokens, a group of bars for each case and format."""
    who = list(dict.fromkeys(name for row in rows for name in row["samples"]["error"]))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(11, 0.55 * len(rows) + 1.4), layout="constrained", sharey=True)
        for panel, (tokens, title) in zip(axes, TITLES.items(), strict=True):
            _draw(panel, rows, tokens, who)
            panel.set_title(title)
            panel.set_xlabel("relative output error (%)")
        axes[0].set_yticks(range(len(rows)), [f"{row['case']}\n{row['format']}" for row in rows])
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(who))
        return figure


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]], tokens: str, who: Sequence[str]) -> None:
    height = 0.8 / len(who)
    for side, name in enumerate(who):
        given = [(place, row[tokens]["error"][name]) for place, row in enumerate(rows) if name in row[tokens]["error"]]
        at = [place + (side - (len(who) - 1) / 2) * height for place, _ in given]
        widths = [100 * error for _, error in given]
        axes.barh(at, widths, 0.92 * height, color=color_of(side), label=name)
        for place, width in zip(at, widths, strict=True):
            axes.annotate(f"{width:.2f}", (width, place), (2, 0), textcoords="offset points", va="center", fontsize=6)
