"""Slots that belong to layers: how many each layer gets for every record size, when no host decides during a step.

With the controller on the device one launch sees one layer, so a slot never changes its layer; slots.py plans slots
that all layers share.
"""

from collections.abc import Sequence

from expertflow_quant.offload.budget import BudgetError, format_bytes
from expertflow_quant.offload.slots import LayerRecords

Pools = tuple[tuple[int, int], ...]
"""One layer's (record bytes, slots), smallest record first; zero slots are legal."""


def plan_layer_slots(layers: Sequence[LayerRecords], budget_bytes: int) -> tuple[Pools, ...]:
    """Pools of each layer, worth at most ``budget_bytes`` together.

    Every pool gets the same share of its own records, in whole slots; what is left goes one slot at a time to the
    pool whose records are least covered, the first of equals. A pool without slots is exact too: its records are
    read from the host. Raises BudgetError for a budget that is not above zero.
    """
    if budget_bytes <= 0:
        raise BudgetError(f"expert memory {format_bytes(budget_bytes)} holds nothing: give an amount above zero")
    total = sum(sum(layer.nbytes) for layer in layers)
    sizes = [(i, nbytes, layer.nbytes.count(nbytes)) for i, layer in enumerate(layers) for nbytes in _sizes(layer)]
    slots = [min(records, records * budget_bytes // total) for _, _, records in sizes]
    left = budget_bytes - sum(nbytes * count for (_, nbytes, _), count in zip(sizes, slots, strict=True))
    while True:
        growing = [
            (slots[pool] / records, pool)
            for pool, (_, nbytes, records) in enumerate(sizes)
            if slots[pool] < records and nbytes <= left
        ]
        if not growing:
            break
        chosen = min(growing)[1]
        slots[chosen] += 1
        left -= sizes[chosen][1]
    plan: list[list[tuple[int, int]]] = [[] for _ in layers]
    for (layer, nbytes, _), count in zip(sizes, slots, strict=True):
        plan[layer].append((nbytes, count))
    return tuple(map(tuple, plan))


def _sizes(layer: LayerRecords) -> list[int]:
    return sorted(set(layer.nbytes))
