"""Hits and bytes a token of every policy and predictor on a real engine, a row each."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from eval.plots import STYLE, color_of


def at_work_figure(results: Mapping[str, Any]) -> Figure:
    """Left: hit rates. Right: bytes moved for a token, those that were fetched ahead apart."""
    runs = results["runs"]
    names = [_name(run) for run in runs]
    with plt.rc_context(STYLE):
        figure, (hits, moved) = plt.subplots(
            1, 2, figsize=(10, 1.2 + 0.27 * len(runs)), layout="constrained", sharey=True
        )
        hits.barh(names, [run["hit_rate"] for run in runs], color=color_of(0))
        hits.xaxis.set_major_formatter(PercentFormatter(1, 0))
        hits.set_title(f"hit rate, {results['settings']['expert_memory']} of the experts on the device")
        ahead = [run["ahead_bytes_per_token"] / 1e3 for run in runs]
        asked = [run["bytes_per_token"] / 1e3 - early for run, early in zip(runs, ahead, strict=True)]
        moved.barh(names, asked, color=color_of(0), label="when asked for")
        moved.barh(names, ahead, left=asked, color=color_of(1), label="ahead")
        moved.set_title("kB moved for a generated token, prompts included")
        moved.legend(loc="upper left", bbox_to_anchor=(1, 1))
        hits.invert_yaxis()  # shared
        for panel in (hits, moved):
            panel.grid(axis="x", color="#e4e4e4", linewidth=0.6)
        return figure


def _name(run: Mapping[str, Any]) -> str:
    if run["predictor"] == "off":
        return run["policy"]
    return f"{run['policy']}; {run['predictor']}, {run['ahead']:g} ahead"
