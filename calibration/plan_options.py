"""``python -m calibration plan --trace ...``: what the joint plan is told, decided, compared and written."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from calibration.joint import Weighing, compare, decide_jointly, expert_costs, reference_bytes, slots_json
from calibration.plan import ExpertErrors
from calibration.plan_tables import decision_table, figures_table
from expertflow_quant.formats import ExpertFlowError, Format
from expertflow_quant.offload.budget import parse_budget
from expertflow_quant.offload.trace import RoutingTrace, Step, batched_requests
from expertflow_quant.pipeline.stream import ModelStream


@dataclass(frozen=True)
class JointOptions:
    """``traces`` to plan on and ``held_out`` ones to compare on; ``expert_memory`` of the reference's records; the
    others as in Weighing; ``rows`` requests are answered together."""

    traces: Sequence[Path]
    held_out: Sequence[Path]
    expert_memory: str
    link_weight: float
    damage_share: float
    link_gb_per_second: float
    rows: int
    time_limit: float


def plan_jointly(
    model: Path, errors: Sequence[ExpertErrors], formats: Sequence[Format], bits: float, options: JointOptions,
    console: Console,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """The plan file's value, and the results: settings, slots, decision and comparison. Raises ExpertFlowError."""
    stream = ModelStream(model)
    shapes, top_k = [layer.shape for layer in stream.layers], stream.layers[0].top_k
    stream.close()
    costs = expert_costs(errors, shapes, formats)
    uniform = _reference(formats, bits)
    total = reference_bytes(costs, uniform)
    weighing = Weighing(
        uniform,
        parse_budget(options.expert_memory, total),
        options.link_weight,
        options.damage_share,
        options.link_gb_per_second * 1e9,
        options.time_limit,
    )
    experts = [costs.damage.shape[1]] * len(shapes)
    planned_on, judged_on = (
        _steps(paths, experts, top_k, options.rows) for paths in (options.traces, options.held_out)
    )
    decision = decide_jointly(costs, planned_on, top_k, weighing)
    figures = compare(errors, costs, decision, planned_on, judged_on or planned_on, top_k, weighing)
    console.print(decision_table(costs, decision))
    console.print(figures_table(figures, "held-out traces" if judged_on else "the traces that were planned on"))
    console.print(
        f"best to within {100 * decision.gap:.1f} % of the program's objective, {decision.seconds:.1f} s",
        highlight=False,
    )
    settings = {
        "command": ["python", "-m", "calibration", *sys.argv[1:]],
        "traces": [path.name for path in options.traces],
        "held_out": [path.name for path in options.held_out],
        "reference": uniform.name,
        "device_bytes": weighing.device_bytes,
        "link_weight": options.link_weight,
        "damage_share": options.damage_share,
        "rows": options.rows,
        "steps": {"planned_on": len(planned_on), "judged_on": len(judged_on)},
    }
    found = {"gap": decision.gap, "seconds": round(decision.seconds, 2), "layers": slots_json(decision)}
    return decision.to_plan().to_json(), settings | found | {"plans": [asdict(plan) for plan in figures]}


def _reference(formats: Sequence[Format], bits: float) -> Format:
    found = [form for form in formats if form.bits == bits]
    if not found:
        raise ExpertFlowError(
            f"no format of {', '.join(map(str, formats))} has {bits:g} bits, and a joint plan is held against all "
            "experts in one: give --average-bits that a format has"
        )
    return found[0]


def _steps(paths: Sequence[Path], experts: Sequence[int], top_k: int, rows: int) -> list[Step]:
    return [step for path in paths for step in batched_requests(RoutingTrace.load_of(path, experts, top_k), rows)]
