"""Shares of studies that pass at the margin, by the verdict and by plain standard errors."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from eval.plots import STYLE, color_of
from eval.verdict.rates import HIGHEST, LOWEST, NOMINAL, Rates

COLUMNS = {
    "verdict": ("the verdict", color_of(0), "o"),
    "clustered": ("clustered standard error alone", color_of(1), "D"),
    "naive": ("questions taken for independent", color_of(5), "x"),
}
CUT = 0.25


def rates_figure(rates: Sequence[Rates]) -> Figure:
    """One row a setting at the margin: false passes; the band is 4 to 6.5 %. What lies beyond 25 % sits at its edge."""
    groups = list(dict.fromkeys(rate.setting.group for rate in rates))
    shown = sorted((r for r in rates if r.setting.truth), key=lambda rate: groups.index(rate.setting.group))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.6, 1.1 + 0.145 * max(len(shown), 4)), layout="constrained")
        axes.axvspan(100 * LOWEST, 100 * HIGHEST, color="#009E73", alpha=0.15, linewidth=0)
        axes.axvline(100 * NOMINAL, color="#009E73", linewidth=0.8)
        for name, (label, color, marker) in COLUMNS.items():
            at = [100 * min(getattr(rate, name), CUT) for rate in shown]
            axes.plot(at, range(len(shown)), marker, color=color, markersize=3.2, label=label, clip_on=False)
        axes.set_yticks(range(len(shown)), [_name(rate) for rate in shown], fontsize=6)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0, 100 * CUT)
        axes.set_xlabel(f"false passes at the margin, % of {rates[0].studies} studies")
        axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
        figure.legend(loc="outside upper left", ncols=len(COLUMNS))
        return figure


def _name(rate: Rates) -> str:
    s = rate.setting
    size = f"{s.images} x {s.per_image}, {s.kind}, margin {100 * s.margin:g}"
    return f"{s.group}: {size}"
