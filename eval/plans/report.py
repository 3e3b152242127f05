"""Figures of all contenders, their paired differences to the first one, a table and a plot."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from eval.plans.measure import ItemFigures
from eval.plots import STYLE, color_of
from eval.report import cells_table
from eval.stats import clustered_error, paired_difference

Part = Callable[[ItemFigures], float]
_Z = 1.96
CACHES = {"equal shares": "o", "planned slots": "^"}
RATIOS: dict[str, tuple[Part, Part]] = {
    "bytes_per_token": (lambda item: item.moved, lambda item: item.tokens),
    "kl": (lambda item: item.kl, lambda item: 1.0),
}


def ratios(items: Sequence[ItemFigures]) -> dict[str, tuple[Part, Part]]:
    """RATIOS and, of each of the device's caches, its bytes of a decode step."""

    def of(name: str) -> tuple[Part, Part]:
        return lambda item: item.device[name], lambda item: item.steps

    return RATIOS | {f"device_bytes_per_step, {name}": of(name) for name in items[0].device}


def figures(items: Sequence[ItemFigures]) -> dict[str, Any]:
    """Mean score by task, and each ratio over all items."""
    tasks = list(dict.fromkeys(item.task for item in items))
    scores = {task: float(np.mean([item.score for item in items if item.task == task])) for task in tasks}
    return {"scores": scores} | {name: _ratio(items, *parts) for name, parts in ratios(items).items()}


def differences(items: Sequence[ItemFigures], base: Sequence[ItemFigures], seed: int = 0) -> dict[str, Any]:
    """Against ``base`` on the same items, the image being the unit: scores as eval.stats compares them (two-sided
    90 %), ratios as relative changes with 95 % intervals (linearised). A cache that ``base`` does not have is compared
    with its equal shares."""
    found: dict[str, Any] = {"scores": {}}
    for task in dict.fromkeys(item.task for item in items):
        mine, other = ([item for item in each if item.task == task] for each in (items, base))
        found["scores"][task] = _interval(
            paired_difference([i.score for i in mine], [i.score for i in other], [i.image for i in mine], seed=seed)
        )
    theirs = ratios(base)
    for name, parts in ratios(items).items():
        found[name] = _relative(items, parts, base, theirs.get(name) or theirs["device_bytes_per_step, equal shares"])
    return found


def _interval(difference: Any) -> dict[str, float]:
    return {name: round(getattr(difference, name), 5) for name in ("mean", "lower", "upper")}


def _ratio(items: Sequence[ItemFigures], over: Part, under: Part) -> float:
    return sum(map(over, items)) / max(sum(map(under, items)), 1e-9)


def _relative(
    items: Sequence[ItemFigures], parts: tuple[Part, Part], base: Sequence[ItemFigures], others: tuple[Part, Part]
) -> dict[str, float]:
    mine, other = _ratio(items, *parts), _ratio(base, *others)
    parted = _influence(items, *parts) / mine - _influence(base, *others) / other
    _, cluster = np.unique([item.image for item in items], return_inverse=True)
    sums, sizes = np.bincount(cluster, weights=parted), np.bincount(cluster).astype(np.float64)
    half = _Z * clustered_error(sums, sizes) * mine / other
    change = mine / other - 1
    return {"mean": round(change, 5), "lower": round(change - half, 5), "upper": round(change + half, 5)}


def _influence(items: Sequence[ItemFigures], over: Part, under: Part) -> Any:
    """What each item adds to the ratio, linearised: its mean over items is 0."""
    above, below = np.array([over(item) for item in items]), np.array([under(item) for item in items], dtype=float)
    return (above - above.sum() / below.sum() * below) / below.mean()


def plans_table(contenders: Sequence[Mapping[str, Any]]) -> Table:
    """A row a contender; changes are against the first, their intervals are in the file."""
    tasks = list(contenders[0]["figures"]["scores"])
    rows = []
    for entry in contenders:
        own, change = entry["figures"], entry.get("change")
        row = [entry["name"], f"{entry['record_bytes'] / 2**20:.2f}"]
        scores = change["scores"] if change else {}
        row += [f"{100 * own['scores'][task]:.1f}" + _points(scores.get(task)) for task in tasks]
        row.append(f"{own['kl']:.4f}")
        names = ["bytes_per_token", *(key for key in own if key.startswith("device"))]
        row += [f"{own[name] / 1024:.1f}" + (_percent(change[name]) if change else "") for name in names]
        rows.append(row)
    extra = sorted({key for entry in contenders for key in entry["figures"] if key.startswith("device")}, key=len)
    columns = ["plan", "MiB", *tasks, "KL", "KiB/token", *(key.split(", ")[1] for key in extra)]
    full = max(map(len, rows))
    return cells_table("plans at equal bytes", columns[:full], [row + [""] * (full - len(row)) for row in rows])


def plans_figure(contenders: Sequence[Mapping[str, Any]]) -> Figure:
    """Changes against the first contender with their intervals: of each task's score and of the divergence, against
    bytes moved in a decode step."""
    tasks = list(contenders[0]["figures"]["scores"])
    panels = [(f"{task}: score", ("scores", task), "points") for task in tasks]
    panels.append(("divergence from full precision", ("kl",), "%"))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(3.9 * len(panels), 3.8), layout="constrained")
        for panel, (title, path, unit) in zip(axes, panels, strict=True):
            panel.plot(0, 0, "s", color="#000000", label=contenders[0]["name"])
            for at, entry in enumerate(contenders[1:]):
                for cache, marker in CACHES.items():
                    if f"device_bytes_per_step, {cache}" in entry["change"]:
                        _draw(panel, entry, path, cache, {"color": color_of(at), "marker": marker})
            panel.set_title(title)
            panel.set_ylabel(f"change, {unit}")
            panel.set_xlabel("bytes moved in a decode step: change, %")
            panel.axhline(0, color="#8a8a8a", linewidth=0.8)
            panel.axvline(0, color="#8a8a8a", linewidth=0.8)
            panel.grid(alpha=0.25)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
        return figure


def _draw(panel: Axes, entry: Mapping[str, Any], path: Sequence[str], cache: str, style: dict[str, Any]) -> None:
    across, up = entry["change"][f"device_bytes_per_step, {cache}"], entry["change"]
    for key in path:
        up = up[key]
    x, y = (100 * change["mean"] for change in (across, up))
    errors = [
        [[max(value - 100 * change["lower"], 0)], [max(100 * change["upper"] - value, 0)]]
        for value, change in ((x, across), (y, up))
    ]
    label = entry["name"] + (f", {cache}" if cache != "equal shares" else "")
    panel.errorbar(x, y, errors[1], errors[0], markersize=5, capsize=2, linewidth=1, label=label, **style)


def _points(change: Mapping[str, float] | None) -> str:
    return "" if change is None else f" ({100 * change['mean']:+.1f})"


def _percent(change: Mapping[str, float]) -> str:
    return f" ({100 * change['mean']:+.1f} %)"
