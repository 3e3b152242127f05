"""The fast path's policies: hits of every one in slots that belong to layers, on recorded routes and on drawn ones of
a real model's sizes.

By the host's versions, which have the device's hits exactly (tests/offload/test_simulator.py). Prompts stream past the
slots and leave no trace in them, as on the fast path.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from eval.cache.contenders import Case
from eval.cache.measure import NO_SLOT as BOUND
from eval.cache.measure import bound
from eval.speed.traces import calibrate, synthetic
from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.offload.layer_policy import LAYER_POLICIES
from expertflow_quant.offload.policies.by_layer import by_layer
from expertflow_quant.offload.policies.frequency import popularity
from expertflow_quant.offload.simulator import replay
from expertflow_quant.offload.slots import LayerRecords
from expertflow_quant.offload.synthetic_trace import RouteSizes

Steps = list[list[list[int]]]

ROWS = (1, 8)
WARM, TIMED = 32, 128
"""Steps of drawn routes that fill the slots, and that are counted, as in ``python -m eval speed``."""

USAGE_TOKENS = 512
"""Tokens before them that stand for a recorded run."""


@dataclass(frozen=True)
class Routes:
    """Steps that are asked for, the first ``warm`` uncounted; ``shares``: of a recorded run's steps, by expert."""

    name: str
    kind: str
    steps: Steps
    streamed: list[bool]
    shares: list[list[float]]
    top_k: int
    warm: int = 0


def parse_sizes(text: str) -> RouteSizes:
    """``48x128x8``: layers, experts, experts of a token. Raises ExpertFlowError for anything else."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts) or int(parts[2]) > int(parts[1]):
        raise ExpertFlowError(f"sizes of routes {text!r}: give layers x experts x experts of a token, like 48x128x8")
    return RouteSizes(*map(int, parts))


def drawn(sizes: RouteSizes, seeds: Sequence[int]) -> Iterator[Routes]:
    """Routes as ``python -m eval speed`` draws them, a draw for each of ``seeds`` and number of rows."""
    sticky = calibrate(sizes)
    for seed in seeds:
        trace = synthetic(sizes, steps=WARM + TIMED, rows=max(ROWS), prompt=USAGE_TOKENS, stickiness=sticky, seed=seed)
        before = trace.prefill[:, :, :1]
        shares = popularity(_steps(before), [sizes.experts] * sizes.layers)
        for rows in ROWS:
            steps = _steps(trace.decode[:, :, :rows])
            yield Routes(
                f"drawn, {rows} row(s), seed {seed}", "drawn", steps, [False] * len(steps), shares, sizes.top_k, WARM
            )


def recorded(case: Case) -> Routes:
    """A trace's steps, with the shares of the trace to fit on."""
    steps, fitted = case.workload.requests(case.trace), case.workload.requests(case.fit)
    name, prefills = f"{case.path.stem}, {case.workload.name}", case.workload.prefills(case.trace)
    return Routes(name, "recorded", steps, prefills, popularity(fitted, case.experts), case.trace.top_k)


def measured(routes: Routes, budgets: Sequence[float]) -> dict[str, Any]:
    """Hit rates of every policy, and of Belady's optimum where no step is left out, at each share of the experts. Only
    "static" is told of a recorded run."""
    experts = [len(row) for row in routes.shares]
    layers = [LayerRecords((1,) * count, routes.top_k) for count in experts]
    slots = [max(1, int(share * sum(experts))) for share in budgets]

    def rate(policy: str, budget: int) -> float:
        told = routes.shares if LAYER_POLICIES[policy].needs_shares else None
        hits = requests = 0
        for steps, sign in ((routes.steps, 1), (routes.steps[: routes.warm], -1)):
            found = replay(
                steps, layers, budget, by_layer(policy, told), None, routes.streamed, slots="layers", preload=True
            )
            hits, requests = hits + sign * found.hits, requests + sign * (found.hits + found.misses)
        return round(hits / requests, 4)

    rates = {policy: [rate(policy, budget) for budget in slots] for policy in LAYER_POLICIES}
    if not routes.warm:
        wanted = sum(len(experts) for step in routes.steps for experts in step)
        rates[BOUND] = [round(bound(routes.steps, layers, budget) / wanted, 4) for budget in slots]
    return {"routes": routes.name, "kind": routes.kind, "steps": len(routes.steps), "hit_rate": rates}


def leads(cases: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By kind of routes and policy: the least and the mean lead over "lru" over all cases and budgets, in points."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind in dict.fromkeys(case["kind"] for case in cases):
        for policy in LAYER_POLICIES:
            points = [
                100 * (ours - lru)
                for case in cases
                if case["kind"] == kind
                for ours, lru in zip(case["hit_rate"][policy], case["hit_rate"]["lru"], strict=True)
            ]
            figures = {"least": round(min(points), 2), "mean": round(fmean(points), 2)}
            found.setdefault(kind, {})[policy] = figures
    return found


def _steps(routes: Any) -> Steps:
    """Of every step, layer by layer, the distinct experts among ``routes`` [steps, layers, rows, top_k]."""
    return [[torch.from_numpy(layer).unique().tolist() for layer in step] for step in routes]
