"""Every contender at every budget, in both arrangements of slots, each with the prefills of its own path: the plain
path brings all that a prompt wants into its shared slots, the fast path streams what is missing past its layers' slots.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from eval.cache.contenders import BELADY, LRU_NAME, Case, Contender, contenders, predictions
from eval.cache.workload import recall
from expertflow_quant.offload.layer_slots import plan_layer_slots
from expertflow_quant.offload.policies.belady import Requests, most_hits
from expertflow_quant.offload.simulator import Link, Replay, Slots, replay
from expertflow_quant.offload.slots import LayerRecords

ARRANGEMENTS: tuple[Slots, ...] = ("shared", "layers")
NO_SLOT = "Belady, slots optional"


def case_curves(
    case: Case, records: Sequence[LayerRecords], shares: Sequence[float], link: Link
) -> Iterator[dict[str, Any]]:
    """One curve over the budgets ``shares`` after the other, Belady's first in each arrangement. ``link``'s
    layer_seconds is the unit of time."""
    requests, fitted = case.workload.requests(case.trace), case.workload.requests(case.fit)
    compared = contenders(case, requests, fitted, predictions(case, requests, fitted))
    wanted = sum(len(experts) for step in requests for experts in step)
    budgets = [int(share * sum(sum(layer.nbytes) for layer in records)) for share in shares]
    for slots in ARRANGEMENTS:
        best: list[int] = []
        if slots == "layers":
            best = [bound(requests, records, budget) for budget in budgets]
            rates = {"hit_rate": [round(hits / wanted, 4) for hits in best], "of_belady": [1.0] * len(best)}
            yield {"slots": slots, "policy": NO_SLOT, "predictor": None, "ahead": False} | rates
        streamed = case.workload.prefills(case.trace) if slots == "layers" else None
        for contender in compared:
            found = [_replay(requests, streamed, records, budget, contender, slots, link) for budget in budgets]
            best = best or [each.hits for each in found]
            yield {"slots": slots} | _curve(contender, found, best, len(records) * link.layer_seconds)


def described(case: Case) -> dict[str, Any]:
    """The case in figures: steps, requests, and the recall of its predictions at top_k and twice that."""
    requests, fitted = case.workload.requests(case.trace), case.workload.requests(case.fit)
    told = {
        name: {
            str(names): round(recall(requests, scores, names), 4) for names in (case.trace.top_k, 2 * case.trace.top_k)
        }
        for name, scores in predictions(case, requests, fitted).items()
    }
    return {
        "trace": case.path.name,
        "tasks": sorted(set(case.trace.tasks)),
        "items": case.trace.items,
        "workload": case.workload.name,
        "steps": len(requests),
        "requests": sum(len(wanted) for step in requests for wanted in step),
        "fitted_steps": len(fitted),
        "recall": told,
    }


def bound(requests: Requests, records: Sequence[LayerRecords], budget_bytes: int) -> int:
    """The most hits of pools of each layer's own, where a missing expert can be read where it lies."""
    plan = plan_layer_slots(records, budget_bytes)
    return sum(
        most_hits(requests, layer, [e for e, each in enumerate(records[layer].nbytes) if each == nbytes], slots)
        for layer, pools in enumerate(plan)
        for nbytes, slots in pools
    )


def verdicts(curves: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of every contender of one arrangement over all budgets: the least lead over LRU, in points of the hit rate, and
    the least share of Belady's hits."""
    lru = next(curve["hit_rate"] for curve in curves if curve["policy"] == LRU_NAME)
    return {
        label(curve): {
            "least_lead_over_lru": round(min(100 * (a - b) for a, b in zip(curve["hit_rate"], lru, strict=True)), 2),
            "least_share_of_belady": min(curve["of_belady"]),
        }
        for curve in curves
        if curve["policy"] not in (BELADY, NO_SLOT, LRU_NAME)
    }


def label(curve: dict[str, Any]) -> str:
    """A contender's name with its predictor."""
    return curve["policy"] + (f" ({curve['predictor']})" if curve["predictor"] else "")


def _replay(
    requests: Requests,
    streamed: Sequence[bool] | None,
    records: Sequence[LayerRecords],
    budget_bytes: int,
    contender: Contender,
    slots: Slots,
    link: Link,
) -> Replay:
    told, ahead = contender.scores, contender.ahead
    return replay(requests, records, budget_bytes, contender.make, told, streamed, slots=slots, link=link, ahead=ahead)


def _curve(contender: Contender, found: Sequence[Replay], best: Sequence[int], step_seconds: float) -> dict[str, Any]:
    return {
        "policy": contender.name,
        "predictor": contender.predictor,
        "ahead": contender.ahead,
        "hit_rate": [round(each.hit_rate, 4) for each in found],
        "of_belady": [round(each.hits / most, 4) if most else 1.0 for each, most in zip(found, best, strict=True)],
        "bytes_per_step": [round(each.bytes_moved / each.steps) for each in found],
        "ahead_bytes_per_step": [round(each.fetched_ahead_bytes / each.steps) for each in found],
        "time": [round(each.seconds / (each.steps * step_seconds), 4) for each in found],
    }
