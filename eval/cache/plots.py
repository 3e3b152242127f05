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
    """A row of panels for each trace and arrangement, a column for each workload; one legend."""
    cases = {(case["trace"], case["workload"]): case for case in results["cases"]}
    rows = [(trace, slots) for trace in dict.fromkeys(trace for trace, _ in cases) for slots in SLOTS]
    workloads = list(dict.fromkeys(workload for _, workload in cases))
    with plt.rc_context(STYLE):
        size = (1.4 + 3.4 * len(workloads), 1.2 + 2.7 * len(rows))
        figure, axes = plt.subplots(len(rows), len(workloads), figsize=size, layout="constrained", squeeze=False)
        for row, (trace, slots) in enumerate(rows):
            for column, workload in enumerate(workloads):
                draw_case(axes[row][column], cases[trace, workload], slots, results["settings"]["budgets"])
            axes[row][0].set_ylabel(f"hit rate\n{SLOTS[slots]}")
        for panel in axes[-1]:
            panel.set_xlabel("resident share of the experts")
        panels = [panel.get_legend_handles_labels() for panel in axes.flat]
        shown = {name: handle for handles, names in panels for handle, name in zip(handles, names, strict=True)}
        figure.legend(shown.values(), shown.keys(), loc="outside upper left", ncols=3)
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
