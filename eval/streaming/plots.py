"""Resident memory against time, one panel a method, drawn from the results file alone."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots import STYLE, color_of

GIB = 1 << 30


def memory_figure(results: Mapping[str, Any]) -> Figure:
    """Curves of resident and anonymous memory, the limit, what libraries take, and where layers begin."""
    runs = results["runs"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(runs), 1, figsize=(8, 2.7 * len(runs)), layout="constrained", squeeze=False)
        for panel, run in zip(axes[:, 0], runs, strict=True):
            _draw(panel, run, results)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
        return figure


def _draw(axes: Axes, run: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    curve, model = run["curve"], results["model"]
    for begin in run["layers_begin"]:
        axes.axvline(begin, color="#DDDDDD", linewidth=0.6, label="_")
    for place, (name, label) in enumerate((("rss", "resident, files included"), ("anonymous", "anonymous"))):
        values = [value / GIB for value in curve[name]]
        axes.plot(curve["seconds"], values, color=color_of(place), linewidth=1, label=label)
    layers = (run["start_bytes"] + 2 * model["decoder_layer_bytes"]) / GIB
    axes.axhline(layers, color=color_of(2), linewidth=1, linestyle=":", label="libraries + 2 layers in bf16")
    axes.axhline(results["limit_bytes"] / GIB, color="#222222", linewidth=1, linestyle="--", label="limit")
    axes.set_ylim(0, results["limit_bytes"] / GIB * 1.1)
    axes.set_xlim(0)
    axes.set_ylabel("GiB")
    axes.set_xlabel("seconds (grey: a layer's first expert is done)")
    axes.set_title(
        f"{run['method']}, {results['format']}: {model['bytes'] / 1e9:.2f} GB in bf16, {model['layers']} layers; "
        f"peak {run['peak_bytes'] / GIB:.2f} GiB",
        fontsize=9,
    )
