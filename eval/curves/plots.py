"""Accuracy and divergence against average bits."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from eval.plots import PALETTE, STYLE

_TITLES = {"chart": "charts: relaxed accuracy", "document": "documents: ANLS"}
_OFFSET = 0.035  # side by side, so that intervals at the same bits are told apart


def curves_figure(results: Mapping[str, Any]) -> Figure:
    """Two panels of tasks above, divergence as is and softened below; a line a method, dashed where all experts are in
    one format."""
    points: Sequence[Mapping[str, Any]] = results["points"]
    methods = list(dict.fromkeys(point["method"] for point in points))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(11.5, 7.6), layout="constrained")
        for panel, (task, title) in zip(axes[0], _TITLES.items(), strict=True):
            _lines(panel, points, methods, lambda point, task=task: point["tasks"][task])
            for name, color, style in (("self", "#000000", "-"), ("dense", "#8A8A8A", ":")):
                if results.get(name):
                    panel.axhline(
                        results[name]["tasks"][task]["mean"], color=color, linestyle=style, linewidth=1.2,
                        label={"self": "full precision", "dense": "dense twin"}[name],
                    )  # fmt: skip
            least = min(0.99, *(point["tasks"][task]["lower"] for point in points))
            panel.set_ylim(least - 0.05 * (1 - least) - 0.001, 1 + 0.05 * (1 - least) + 0.001)
            panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
            panel.set_title(title)
        softened = f"predictions softened by {results['settings']['softened']:g}"
        for panel, key, title in zip(
            axes[1], ("kl", "kl_softened"), ("divergence from full precision", f"the same, {softened}"), strict=True
        ):
            _lines(panel, points, methods, lambda point, key=key: point["fidelity"][key])
            panel.set_yscale("log")
            panel.set_ylabel("nats an answer token")
            panel.set_title(title)
        for panel in axes.flat:
            panel.set_xlabel("bits of codes, average over experts' weights")
            panel.set_xticks([2, 3, 4, 5, 6, 7, 8])
            panel.grid(color="#e4e4e4", linewidth=0.6)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
        return figure


def _lines(axes: Axes, points: Sequence[Mapping[str, Any]], methods: Sequence[str], figure_of: Any) -> None:
    for number, method in enumerate(methods):
        for kind, style, marker in (("mixed", "-", "o"), ("uniform", "--", "s")):
            here = sorted((p for p in points if (p["method"], p["kind"]) == (method, kind)), key=lambda p: p["bits"])
            if not here:
                continue
            found = [figure_of(point) for point in here]
            at = [point["bits"] + _OFFSET * (number - 1) for point in here]
            means = [each["mean"] for each in found]
            spread = [
                [each["mean"] - each["lower"] for each in found],
                [each["upper"] - each["mean"] for each in found],
            ]
            axes.errorbar(
                at, means, yerr=spread, color=PALETTE[number], linestyle=style, marker=marker, markersize=4.5,
                linewidth=1.3, elinewidth=0.8, capsize=2, label=f"{method.upper()}, {kind}",
                markerfacecolor=PALETTE[number] if kind == "mixed" else "white",
            )  # fmt: skip
