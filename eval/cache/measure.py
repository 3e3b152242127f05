"""Every contender at every budget, in both arrangements of slots."""

from collections.abc import Iterator, Sequence
from typing import Any

from eval.cache.contenders import BELADY, LRU_NAME, Case, Contender, contenders, predictions
from eval.cache.workload import recall
from expertflow_quant.offload.layer_slots import plan_layer_slots
from expertflow_quant.offload.policies.belady import Requests, most_hits
from expertflow_quant.offload.simulator import Link, Slots, replay
from expertflow_quant.offload.slots import LayerRecords

ARRANGEMENTS: tuple[Slots, ...] = ("shared", "layers")
NO_SLOT = "Belady, slots optional"


def case_figures(
    case: Case, records: Sequence[LayerRecords], shares: Sequence[float], link: Link
) -> Iterator[dict[str, Any]]:
    """One figure after the other; ``link``'s layer_seconds is the unit of time."""
    requests, fitted = case.workload.requests(case.trace), case.workload.requests(case.fit)
    compared = contenders(case, requests, fitted, predictions(case, requests, fitted))
    total = sum(sum(layer.nbytes) for layer in records)
    for slots in ARRANGEMENTS:
        for share in shares:
            where = {"slots": slots, "budget": share}
            best: int | None = None
            if slots == "layers":
                best = bound(requests, records, int(share * total))
                yield where | {"policy": NO_SLOT, "predictor": None, "ahead": False, **_bound_figures(requests, best)}
            for contender in compared:
                found = _figures(requests, records, int(share * total), contender, slots, link)
                best = found["hits"] if best is None else best
                yield where | found | {"of_belady": round(found["hits"] / best, 4) if best else None}


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


def verdicts(figures: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of every predictive contender over all budgets of a case and arrangement: the least lead over LRU, in points of
    the hit rate, and the least share of Belady's hits."""
    lru = {figure["budget"]: figure["hit_rate"] for figure in figures if figure["policy"] == LRU_NAME}
    rows: dict[str, list[dict[str, Any]]] = {}
    for figure in figures:
        if figure["policy"] not in (BELADY, NO_SLOT, LRU_NAME):
            rows.setdefault(label(figure), []).append(figure)
    return {
        name: {
            "least_lead_over_lru": round(min(100 * (each["hit_rate"] - lru[each["budget"]]) for each in found), 2),
            "least_share_of_belady": min(each["of_belady"] for each in found),
        }
        for name, found in rows.items()
    }


def label(figure: dict[str, Any]) -> str:
    """A contender's name with its predictor."""
    return figure["policy"] + (f" ({figure['predictor']})" if figure["predictor"] else "")


def _figures(
    requests: Requests,
    records: Sequence[LayerRecords],
    budget_bytes: int,
    contender: Contender,
    slots: Slots,
    link: Link,
) -> dict[str, Any]:
    found = replay(
        requests,
        records,
        budget_bytes,
        contender.make,
        contender.scores,
        slots=slots,
        link=link,
        ahead=contender.ahead,
    )
    return {
        "policy": contender.name,
        "predictor": contender.predictor,
        "ahead": contender.ahead,
        "hits": found.hits,
        "hit_rate": round(found.hit_rate, 4),
        "bytes_per_step": round(found.bytes_moved / found.steps),
        "ahead_bytes_per_step": round(found.fetched_ahead_bytes / found.steps),
        "time_per_layer": round(found.seconds / (found.steps * len(records) * link.layer_seconds), 4),
    }


def _bound_figures(requests: Requests, hits: int) -> dict[str, Any]:
    wanted = sum(len(experts) for step in requests for experts in step)
    return {"hits": hits, "hit_rate": round(hits / wanted, 4), "of_belady": 1.0}
