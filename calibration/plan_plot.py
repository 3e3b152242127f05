"""Bits by layer and expert, as a picture beside the plan."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap

from calibration.plan import ExpertErrors
from expertflow_quant.checkpoint.plan import Plan
from expertflow_quant.formats import Format

# dark is wide; the lightest still differs from the page
_COLORS = ("#d7e6f4", "#9cc5e2", "#5a9ccb", "#2b6fae", "#123f73", "#08203f", "#000000")


def save_plot(plan: Plan, experts: Sequence[ExpertErrors], path: Path) -> None:
    """A row a layer, a cell an expert, coloured by its bits; experts in order of the tokens routed to them, most
    first, so that what popularity has to do with bits is seen."""
    layers = sorted({expert.layer for expert in experts})
    rows = [sorted((e for e in experts if e.layer == at), key=lambda e: (-e.tokens, e.expert)) for at in layers]
    used = sorted({plan.format(e.layer, e.expert) for e in experts}, key=lambda form: (form.bits, form.name))
    grid = np.full((len(layers), max(len(row) for row in rows)), np.nan)
    for at, row in enumerate(rows):
        grid[at, : len(row)] = [used.index(plan.format(e.layer, e.expert)) for e in row]
    figure, axes = plt.subplots(
        figsize=(2.4 + min(9.0, 0.32 * grid.shape[1]), 1.3 + min(9.0, 0.3 * len(layers))), layout="constrained"
    )
    colors = ListedColormap(_COLORS[: len(used)] if len(used) > 1 else _COLORS[2:3])
    shown = axes.imshow(grid, cmap=colors, norm=BoundaryNorm(np.arange(len(used) + 1) - 0.5, len(used)), aspect="auto")
    if grid.size <= 1024:
        _number(axes, rows)
    bar = figure.colorbar(shown, ax=axes, ticks=range(len(used)), pad=0.02)
    bar.ax.set_yticklabels([_label(form, plan, experts) for form in used], fontsize=8)
    bar.ax.tick_params(length=0)
    axes.set_yticks(range(len(layers)), layers)
    axes.set_xticks([])
    axes.set_xlabel("experts, most tokens first (numbers: the expert)")
    axes.set_ylabel("MoE layer")
    bits = sum(e.weights * plan.format(e.layer, e.expert).bits for e in experts) / sum(e.weights for e in experts)
    axes.set_title(f"formats by layer and expert, {bits:.2f} bits on average", loc="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(figure)


def _number(axes: "plt.Axes", rows: Sequence[Sequence[ExpertErrors]]) -> None:
    for at, row in enumerate(rows):
        for column, expert in enumerate(row):
            axes.text(
                column, at, str(expert.expert), ha="center", va="center", fontsize=6.5, color="#000000",
                bbox={"facecolor": "white", "alpha": 0.55, "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip


def _label(form: Format, plan: Plan, experts: Sequence[ExpertErrors]) -> str:
    return f"{form.name} ({sum(plan.format(e.layer, e.expert) == form for e in experts)})"
