"""What a plan decided, as tables."""

from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from calibration.joint import PlanFigures
from expertflow_quant.offload.budget import format_bytes
from expertflow_quant.offload.planner import ExpertCosts, PlanDecision


def decision_table(costs: ExpertCosts, decision: PlanDecision) -> Table:
    """One row a layer: how many experts have which format, and their slots."""
    names = [form.name for form in decision.formats]
    title = "experts by format, and in brackets the slots of their pool"
    table = Table("layer", *names, "slots", "bytes of slots", title=title, title_justify="left")
    for layer, pools in enumerate(decision.pools):
        counts, slots = Counter(decision.chosen[layer].tolist()), dict(pools)
        cells = [
            f"{counts[i]} ({slots[nbytes]})" if counts[i] else ""
            for i, nbytes in enumerate(costs.nbytes[layer].tolist())
        ]
        held = sum(nbytes * count for nbytes, count in pools)
        table.add_row(str(layer), *cells, str(sum(slots.values())), format_bytes(held))
    return table


def figures_table(figures: Sequence[PlanFigures], judged_on: str) -> Table:
    """One row a plan, its damage and missed bytes also against the first one's."""
    title = f"plans of equal bytes, replayed on {judged_on}"
    table = Table("plan", "damage", "", "missed a step", "bytes a step", "", "all records", "slots", title=title)
    table.title_justify = "left"
    first = figures[0]
    for plan in figures:
        table.add_row(
            plan.name,
            f"{plan.damage:.4g}",
            _change(plan.damage, first.damage),
            f"{plan.misses:.2f}",
            format_bytes(round(plan.missed_bytes)),
            _change(plan.missed_bytes, first.missed_bytes),
            format_bytes(plan.record_bytes),
            format_bytes(plan.device_bytes),
        )
    return table


def _change(value: float, first: float) -> str:
    return f"{100 * (value / first - 1):+.1f} %" if first and value != first else ""
