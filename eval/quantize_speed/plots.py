"""Seconds for a layer: batched, one by one, and the target."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from eval.plots import STYLE, color_of


def quantize_speed_figure(methods: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """A pair of bars for each method; dashed: what it may take."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        for place, found in enumerate(methods.values()):
            for side, (name, label) in enumerate(
                {"batched_seconds": "batched", "one_by_one_layer_seconds": "one by one"}.items()
            ):
                at, height = place + (side - 0.5) * 0.36, found[name]
                axes.bar(at, height, 0.34, color=color_of(side), label=label if place == 0 else None)
                axes.annotate(f"{height:.3g} s", (at, height), (0, 2), textcoords="offset points", ha="center")
            if found["target_seconds"] is not None:
                label = "at most" if place == 0 else None
                axes.hlines(found["target_seconds"], place - 0.4, place + 0.4, "#D55E00", "dashed", label=label)
        axes.margins(y=0.1)
        axes.set_xticks(range(len(methods)), [name.upper() for name in methods])
        axes.set_ylabel("seconds a layer")
        axes.set_title(title)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return figure
