"""Hit rate against budget, a panel for each case and arrangement of slots, with Belady's curve."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from eval.cache.contenders import BELADY, LRU_NAME
from eval.cache.measure import NO_SLOT, label
from eval.plots import STYLE, color_of

SLOTS = {"shared": "one pool for all layers", "layers": "pools of each layer"}
BOUND = {"color": "#222222", "linewidth": 1.6}
LINES: tuple[tuple[str, dict[str, Any]], ...] = (
    (LRU_NAME, {"color": color_of(5), "marker": "o"}),
    ("LRU, scan-resistant", {"color": color_of(5), "linestyle": ":"}),
    ("LFU, decayed", {"color": color_of(1), "marker": "s"}),
    ("static popularity", {"color": color_of(3), "linestyle": "--"}),
    ("predictive", {"color": color_of(2), "marker": "^"}),
    ("predictive + ahead (affinity)", {"color": color_of(0), "marker": "D"}),
    ("predictive + ahead (affinity and token table)", {"color": color_of(0), "marker": "v", "linestyle": "--"}),
    ("predictive + ahead (oracle)", {"color": color_of(4), "linestyle": "--"}),
)
TRAINED = {"color": color_of(8), "marker": "v"}


def cache_figure(results: Mapping[str, Any]) -> Figure:
    """A row of panels for each arrangement, a column for each case; the curves share a legend."""
    cases = results["cases"]
    with plt.rc_context(STYLE):
        size = (1.2 + 3.2 * len(cases), 7.2)
        figure, axes = plt.subplots(2, len(cases), figsize=size, layout="constrained", squeeze=False, sharey="col")
        for column, case in enumerate(cases):
            for row, slots in enumerate(SLOTS):
                draw_case(axes[row][column], case, slots, results["settings"]["budgets"])
            axes[1][column].set_xlabel("resident share of the experts")
        for row, name in enumerate(SLOTS.values()):
            axes[row][0].set_ylabel(f"hit rate, {name}")
        handles = {
            name: handle for row in axes for each in row for handle, name in zip(*each.get_legend_handles_labels())
        }
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4)
        return figure


def draw_case(axes: Axes, case: Mapping[str, Any], slots: str, budgets: Sequence[float]) -> None:
    """Curves of one case in one arrangement."""
    curves = {label(curve): curve["hit_rate"] for curve in case["curves"] if curve["slots"] == slots}
    best = curves[NO_SLOT if slots == "layers" else BELADY]
    axes.plot(budgets, best, label="Belady's optimum (nothing fetched ahead)", **BOUND)
    trained = [(name, TRAINED) for name in curves if name.startswith("predictive + ahead (encoder")]
    for name, style in (*LINES, *trained):
        if name in curves:
            axes.plot(budgets, curves[name], label=name, markersize=3.5, linewidth=1.2, **style)
    axes.set_title(f"{case['trace'].removesuffix('.safetensors')}, {case['workload']}")
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.25)
