"""What a trace is like: hits of a least-recently-used cache, experts met together, spread, repetition."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Routes = NDArray[np.int32]


def slots_per_layer(experts: int, top_k: int, resident: float) -> int:
    """Slots of one layer that keeps the share ``resident`` of its experts: never fewer than one token's."""
    return min(experts, max(top_k, int(experts * resident)))


def lru_hit_rate(routes: Routes, experts: int, slots: int, skip: int | None = None) -> float:
    """Share of requests that a least-recently-used cache of ``slots`` in every layer answers.

    ``routes`` [steps, layers, rows, top_k]; a request is one distinct expert of a step. Within a step, experts are
    asked for in ascending order and none of them is evicted. The first ``skip`` steps (default: a quarter) fill the
    cache and are not counted. 1 where every expert has a slot, since such a cache is filled before it is asked.

    By Mattson's stack property a request hits when fewer than ``slots`` distinct experts were used since its last use.
    """
    if slots >= experts:
        return 1.0
    steps, layers = routes.shape[:2]
    skip = steps // 4 if skip is None else skip
    never = -1
    last_use = np.full((layers, experts), never, dtype=np.int64)
    requests = hits = 0
    for step in range(steps):
        needed = used_experts(routes[step], experts)
        newer = np.argsort(np.argsort(-last_use, axis=1, kind="stable"), axis=1)
        if step >= skip:
            requests += int(needed.sum())
            hits += int((needed & (newer < slots) & (last_use != never)).sum())
        last_use = np.where(needed, step * experts + np.arange(experts), last_use)
    return hits / requests if requests else 1.0


def used_experts(routes: Routes, experts: int) -> NDArray[np.bool_]:
    """Which experts each layer needs, [layers, experts], for ``routes`` [layers, ...]."""
    used = np.zeros((routes.shape[0], experts), dtype=bool)
    np.put_along_axis(used, routes.reshape(routes.shape[0], -1), True, axis=1)
    return used


def distinct_per_step(routes: Routes, experts: int) -> float:
    """Distinct experts of a layer in one step, on average; ``routes`` [steps, layers, rows, top_k]."""
    return float(np.mean([used_experts(step, experts).sum(axis=1).mean() for step in routes]))


def effective_experts(routes: Routes, experts: int) -> float:
    """exp(entropy) of how often a layer's experts are used, on average over layers: ``experts`` when even."""
    perplexities = []
    for layer in range(routes.shape[1]):
        counts = np.bincount(routes[:, layer].ravel(), minlength=experts)
        share = counts[counts > 0] / counts.sum()
        perplexities.append(float(np.exp(-(share * np.log(share)).sum())))
    return float(np.mean(perplexities))


def repeat_rate(routes: Routes) -> float:
    """Share of a token's experts that the same row's previous token used in the same layer; 0 for one step."""
    if routes.shape[0] < 2:
        return 0.0
    same = routes[1:, :, :, :, None] == routes[:-1, :, :, None, :]
    return float(same.any(axis=-1).mean())


def statistics(decode: Routes, prefill: Routes, experts: int, residents: Iterable[float]) -> dict[str, Any]:
    """Everything about a trace that its figures depend on, as JSON; both are [steps, layers, rows, top_k]."""
    rows, top_k = decode.shape[2:]
    counts = sorted({1 << power for power in range(rows.bit_length())} | {rows})
    return {
        "steps": decode.shape[0],
        "layers": decode.shape[1],
        "rows": rows,
        "prompt_tokens": prefill.shape[0],
        "lru_hit_rate": {
            str(n): {
                f"{share:g}": round(lru_hit_rate(decode[:, :, :n], experts, slots_per_layer(experts, top_k, share)), 4)
                for share in sorted(set(residents))
            }
            for n in counts
        },
        "distinct_by_rows": {str(n): round(distinct_per_step(decode[:, :, :n], experts), 3) for n in counts},
        "distinct_in_prefill": round(float(used_experts(prefill.swapaxes(0, 1), experts).sum(axis=1).mean()), 3),
        "effective_experts": round(effective_experts(decode, experts), 2),
        "repeat_rate": round(repeat_rate(decode), 4),
    }
