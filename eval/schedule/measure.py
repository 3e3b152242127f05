"""Orders of admission side by side on the same traffic, over random orders of arrival."""

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from eval.schedule.traffic import FIGURES, Touched, known_paths, touched
from expertflow_quant.offload.predict_paths import PathPredictor
from expertflow_quant.offload.trace import RoutingTrace
from expertflow_quant.runtime.schedule import admission_order

ARRIVAL = "arrival"
# 97.5 % quantile of Student's t with n - 1 degrees of freedom; beyond 30 the normal one is near enough
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 20: 2.093, 30: 2.045}


def compare_orders(
    trace: RoutingTrace,
    *,
    rows: int,
    patience: Sequence[int],
    seeds: int,
    shares: Sequence[float],
    progress: Callable[[], None],
    learned: PathPredictor | None = None,
) -> list[dict[str, Any]]:
    """Arrival order and every known path at every patience, over ``seeds`` random interleavings of the items.

    Each entry has means of its figures and, but for arrival order, their change against arrival order on the same
    interleavings with a 95 % interval of the mean (Student's t over the interleavings).
    """
    paths = known_paths(trace, learned)
    orders = [interleaved(trace.items, seed) for seed in range(seeds)]
    baseline = [touched(trace, in_turn(order, rows), shares) for order in orders]
    found = [_entry(ARRIVAL, 0, baseline)]
    for name, known in paths.items():
        for allowed in patience:
            results, late, seconds = [], [], 0.0
            for seed, order in enumerate(orders):
                started = time.perf_counter()
                batches = admission_order(known[order], rows, allowed, seed)
                seconds += time.perf_counter() - started
                late += [at - place // rows for at, batch in enumerate(batches) for place in batch]
                results.append(touched(trace, [[order[place] for place in batch] for batch in batches], shares))
            admissions = seeds * math.ceil(trace.items / rows)
            entry = _entry(name, allowed, results) | {"change": _changes(results, baseline)}
            entry |= {"latest": max(late), "mean_late": sum(max(0, batches) for batches in late) / len(late)}
            found.append(entry | {"admission_ms": 1000 * seconds / admissions})
            progress()
    return found


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean of at least two ``values`` and its two-sided 95 % interval."""
    mean, count = sum(values) / len(values), len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    t = _T[max(known for known in _T if known <= count)]
    half = t * spread / math.sqrt(count)
    return {"mean": mean, "lower": mean - half, "upper": mean + half}


def _entry(name: str, patience: int, results: Sequence[Touched]) -> dict[str, Any]:
    count = len(results)
    return {
        "paths": name,
        "patience": patience,
        "figures": {figure: sum(r.figures[figure] for r in results) / count for figure in FIGURES},
        "hit_rate": {share: sum(r.hit_rate[share] for r in results) / count for share in results[0].hit_rate},
        "misses_per_token": {share: sum(r.misses[share] for r in results) / count for share in results[0].misses},
    }


def _changes(results: Sequence[Touched], baseline: Sequence[Touched]) -> dict[str, dict[str, float]]:
    """Relative change of every figure and of the misses, absolute change of the hit rates."""
    pairs = list(zip(results, baseline, strict=True))
    changes = {figure: interval([r.figures[figure] / b.figures[figure] - 1 for r, b in pairs]) for figure in FIGURES}
    for share in results[0].hit_rate:
        changes[f"hit_rate {share}"] = interval([r.hit_rate[share] - b.hit_rate[share] for r, b in pairs])
        if all(b.misses[share] > 0 for b in baseline):
            changes[f"misses {share}"] = interval([r.misses[share] / b.misses[share] - 1 for r, b in pairs])
    return changes


def interleaved(items: int, seed: int) -> list[int]:
    """A random order of arrival."""
    order = list(range(items))
    random.Random(seed).shuffle(order)
    return order


def in_turn(order: Sequence[int], rows: int) -> list[Sequence[int]]:
    """Batches in this order."""
    return [order[first : first + rows] for first in range(0, len(order), rows)]
