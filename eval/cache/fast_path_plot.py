"""Hit rates of the fast path's policies at each budget: a panel for each case, a group of bars for each budget."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from eval.cache.fast_path import BOUND
from eval.plots import STYLE, color_of
from expertflow_quant.offload.layer_policy import LAYER_POLICIES

COLUMNS = 4
COLORS = {"lru": color_of(5), "lfu": color_of(1), "static": color_of(3), "predictive": color_of(2)}


def fast_path_figure(results: Mapping[str, Any]) -> Figure:
    cases, budgets = results["cases"], results["settings"]["budgets"]
    rows = -(-len(cases) // COLUMNS)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, COLUMNS, figsize=(12, 0.8 + 2.1 * rows), layout="constrained", squeeze=False, sharey=True
        )
        for panel in axes.flat[len(cases) :]:
            panel.set_visible(False)
        width = 0.8 / len(LAYER_POLICIES)
        for panel, case in zip(axes.flat, cases, strict=False):
            for place, policy in enumerate(LAYER_POLICIES):
                at = [group + (place - 1.5) * width for group in range(len(budgets))]
                panel.bar(at, case["hit_rate"][policy], width, label=policy, color=COLORS[policy])
            for group, best in enumerate(case["hit_rate"].get(BOUND, [])):
                label = BOUND if group == 0 else None
                panel.hlines(best, group - 0.45, group + 0.45, color="#222222", linewidth=1.4, label=label)
            panel.set_title(case["routes"], fontsize=8)
            panel.set_xticks(range(len(budgets)), [f"{share:.0%}" for share in budgets])
            panel.yaxis.set_major_formatter(PercentFormatter(1, 0))
            panel.set_ylim(0, 1)
            panel.grid(axis="y", alpha=0.25)
        for panel in axes[:, 0]:
            panel.set_ylabel("hit rate")
        shown = {
            name: handle
            for panel in axes.flat[: len(cases)]
            for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(shown.values(), shown.keys(), loc="outside upper left", ncols=5)
        return figure
