"""Plots of speed runs, drawn from their JSON files alone: ``python -m eval.speed.plots FILE [FILE ...]``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from eval.plots import STYLE, color_of, save
from eval.report import make_console
from eval.speed.profile import parts
from eval.speed.profile_table import profile_of
from eval.speed.report import number, title

BOUND_COLOR = "#222222"
PART_COLORS = {"link only": "#0072B2", "both": "#009E73", "others only": "#E69F00", "idle": "#cccccc"}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def speed_figure(results: Mapping[str, Any]) -> Figure:
    """A column of panels for every batch and prompt: tokens a second beside the bound, shares of link and bound, time
    to the first token. Raises ValueError when nothing ran."""
    ran = [figure for figure in results["figures"] if not figure["refused"]]
    if not ran:
        raise ValueError("no system ran in this file: nothing to draw")
    kinds = sorted({(figure["batch"], figure["prompt"]) for figure in ran})
    names = {name: i for i, name in enumerate(dict.fromkeys(figure["system"] for figure in results["figures"]))}
    tallest = max(sum((f["batch"], f["prompt"]) == kind for f in ran) for kind in kinds)
    with plt.rc_context(STYLE):
        size = (3 + 4.2 * len(kinds), 3 * (1.1 + 0.34 * tallest))
        figure, axes = plt.subplots(3, len(kinds), figsize=size, layout="constrained", squeeze=False)
        figure.suptitle(title(results), x=0.01, ha="left", fontsize=9, wrap=True)
        for column, kind in enumerate(kinds):
            chosen = [f for f in ran if (f["batch"], f["prompt"]) == kind]
            colors = [color_of(names[f["system"]]) for f in chosen]
            draw_tokens(axes[0][column], chosen, colors)
            draw_shares(axes[1][column], chosen, colors)
            draw_first_token(axes[2][column], chosen, colors)
        return figure


def draw_tokens(axes: Axes, figures: Sequence[Mapping[str, Any]], colors: Sequence[str]) -> None:
    """Tokens a second, and the bound of a system's own bytes, reads and products as a mark."""
    values = [figure["decode"]["tokens_per_s"] for figure in figures]
    _dots(axes, figures, values, [figure["decode"]["bound_tokens_per_s"]["bound"] for figure in figures], colors)
    axes.set_xlabel("tokens/s of all rows; mark: bound of the bytes moved and read")
    axes.set_title(f"decode, batch {figures[0]['batch']}, prompts of {figures[0]['prompt']} tokens")


def draw_shares(axes: Axes, figures: Sequence[Mapping[str, Any]], colors: Sequence[str]) -> None:
    """How near the link's rate (bar) and the largest bound (mark) a decode step came."""
    shares = [figure["decode"]["share_of"] for figure in figures]
    bars = axes.barh(range(len(figures)), [share["link"] for share in shares], 0.62, color=colors)
    axes.bar_label(bars, [f"{share['link']:.1%}" for share in shares], padding=5, fontsize=7.5)
    _marks(axes, [share["bound"] for share in shares])
    axes.set_xlim(0, max(1.05, *(share["bound"] for share in shares)) * 1.12)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("link's bound / time of a step; mark: the largest bound")
    axes.set_title("share of the bound")
    _name_rows(axes, figures)


def draw_first_token(axes: Axes, figures: Sequence[Mapping[str, Any]], colors: Sequence[str]) -> None:
    """Seconds of a prefill, and as a mark its largest bound."""
    values = [figure["prefill"]["ttft_s"] for figure in figures]
    _dots(axes, figures, values, [figure["prefill"]["bound_s"]["bound"] for figure in figures], colors)
    axes.set_xlabel("seconds to the first token; mark: bound")
    axes.set_title("prefill")


def profile_figure(results: Mapping[str, Any]) -> Figure | None:
    """A bar a captured system: what a profiled step's time was, and its bytes at the link's rate. None without any."""
    profiled = [figure for figure in results["figures"] if profile_of(figure)]
    if not profiled:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 1.9 + 0.55 * len(profiled)), layout="constrained")
        figure.suptitle(title(results), x=0.01, ha="left", fontsize=9, wrap=True)
        _draw_parts(axes, profiled)
        return figure


def save_profile(results: Mapping[str, Any], out: Path) -> Path | None:
    """``profile_figure`` beside the results file ``out``, and where that is; None without any profile."""
    figure, path = profile_figure(results), out.with_name(f"{out.stem}-profile.png")
    if figure is None:
        return None
    save(figure, path)
    return path


def _draw_parts(axes: Axes, figures: Sequence[Mapping[str, Any]]) -> None:
    profiles = [figure["decode"]["profile"] for figure in figures]
    rows, left = range(len(figures)), [0.0] * len(figures)
    for part, color in PART_COLORS.items():
        widths = [parts(profile)[part] for profile in profiles]
        axes.barh(rows, widths, 0.55, left, color=color, label=part)
        left = [start + width for start, width in zip(left, widths)]
    bounds = [profile["link_bound_ms"] for profile in profiles]
    middle = [row - 0.36 for row in rows], [row + 0.36 for row in rows]
    axes.vlines(bounds, *middle, colors="#D55E00", linewidth=2, label="bytes moved at the link's rate")
    for row, profile in zip(rows, profiles):
        said = f"{profile['ms']:.2f} ({profile['step_ms']:.2f} unprofiled)"
        axes.annotate(said, (profile["ms"], row), (5, 0), textcoords="offset points", fontsize=7.5, va="center")
    axes.set_xlim(0, max(*left, *bounds) * 1.3)
    axes.set_xlabel("ms a decode step, under the profiler")
    _name_rows(axes, figures, [f"{label(f)}\n{f['batch']} x {f['prompt']} tokens" for f in figures])
    axes.figure.legend(loc="outside lower left", ncols=5, fontsize=7.5)


def label(figure: Mapping[str, Any]) -> str:
    """System, memory and, where some were left out, layers."""
    memory = "" if figure["resident"] == "any" else f", {figure['resident']}"
    scaled = figure["scaled"]
    return f"{figure['system']}{memory}" + (
        f"\n{scaled['measured_layers']} of {scaled['layers']} layers" if scaled else ""
    )


def _dots(
    axes: Axes,
    figures: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    at_bound: Sequence[float],
    colors: Sequence[str],
) -> None:
    """A dot a system on a logarithmic axis, with a line to its bound."""
    rows = range(len(figures))
    axes.hlines(rows, values, at_bound, colors="#bbbbbb", linewidth=1.2)
    axes.scatter(values, rows, s=46, c=list(colors), zorder=3)
    _marks(axes, at_bound)
    for row, value in zip(rows, values, strict=True):
        axes.annotate(number(value), (value, row), (0, 6), textcoords="offset points", fontsize=7.5, ha="center")
    axes.set_xscale("log")
    axes.set_xlim(min(*values, *at_bound) / 2, max(*values, *at_bound) * 2)
    # most axes are narrower than a decade, where the powers of ten alone would leave them without a label
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _name_rows(axes, figures)


def _marks(axes: Axes, places: Sequence[float]) -> None:
    axes.plot(places, range(len(places)), "|", color=BOUND_COLOR, markersize=13, markeredgewidth=2)


def _name_rows(axes: Axes, figures: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> None:
    axes.set_yticks(range(len(figures)), names or [label(figure) for figure in figures], fontsize=7.5)
    axes.set_ylim(len(figures) - 0.4, -0.7)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.tick_params(axis="y", length=0)


@app.command()
def main(files: Annotated[list[Path], typer.Argument(help="JSON files that `python -m eval speed` wrote")]) -> None:
    """Draw each run beside its file, as a PNG of the same name."""
    console = make_console()
    try:
        for path in files:
            results = json.loads(path.read_text(encoding="utf-8"))
            if results.get("kind") != "speed":
                raise ValueError(f"{path} is no file of `python -m eval speed`")
            save(speed_figure(results), path.with_suffix(".png"))
            console.print(f"{path.with_suffix('.png')}", highlight=False)
            if (picture := save_profile(results, path)) is not None:
                console.print(f"{picture}", highlight=False)
    except (OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app(prog_name="python -m eval.speed.plots")
