"""Slots that a plan gives each layer, as ``python -m calibration plan --trace`` writes them, for the runtime.

A JSON file; of every layer in model order its pools, other keys are for the reader::

    {"layers": [{"pools": [{"nbytes": 41472, "slots": 3}, {"nbytes": 60416, "slots": 2}]}, ...]}

``read_slots`` gives pools of each layer's own (layer_slots.Pools), which the fast path takes as they are;
``layer_classes`` makes them the plain path's, where every missing expert needs a slot.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.budget import BudgetError, format_bytes, format_bytes_up
from expertflow_quant.offload.layer_slots import Pools
from expertflow_quant.offload.slots import LayerRecords, SizeClass


def read_slots(path: Path | str, layers: Sequence[LayerRecords]) -> tuple[Pools, ...]:
    """The pools in a file, for records ``layers``.

    A layer's sizes are matched in ascending order, since a method may add scales to records that the plan did not
    count; a pool never has more slots than records. Raises ExpertFlowError for a file that cannot be read or that was
    made for another model or plan of formats.
    """
    found = _pools(Path(path))
    if len(found) != len(layers):
        raise ExpertFlowError(
            f"{path} has slots for {len(found)} layers, the checkpoint has {len(layers)}: give the file of its own plan"
        )
    return tuple(_matched(Path(path), at, pools, records) for at, (pools, records) in enumerate(zip(found, layers)))


def pools_bytes(plan: Sequence[Pools]) -> int:
    """Device bytes of all slots."""
    return sum(nbytes * slots for pools in plan for nbytes, slots in pools)


def layer_classes(layers: Sequence[LayerRecords], plan: Sequence[Pools], budget_bytes: int) -> tuple[SizeClass, ...]:
    """Slots of ExpertCache that belong to layers: the plan's, but at least one token's working set in each pool.

    Raises BudgetError when they take more than ``budget_bytes``.
    """
    classes = []
    for at, (records, pools) in enumerate(zip(layers, plan, strict=True)):
        for nbytes, slots in pools:
            count = records.nbytes.count(nbytes)
            least = min(records.top_k, count)
            classes.append(SizeClass(nbytes, count, least, max(slots, least), at))
    total = sum(size.nbytes * size.slots for size in classes)
    if total > budget_bytes:
        raise BudgetError(
            f"the plan's slots take {format_bytes_up(total)}, where one token's experts have room in every layer, and "
            f"expert memory is {format_bytes(budget_bytes)}: raise --expert-memory, or plan for less"
        )
    return tuple(classes)


def _pools(path: Path) -> list[list[tuple[int, int]]]:
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        pools = [[(int(pool["nbytes"]), int(pool["slots"])) for pool in layer["pools"]] for layer in value["layers"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ExpertFlowError(
            f"{path} is no file of slots ({type(error).__name__}: {error}): `python -m calibration plan --trace` "
            "writes one"
        ) from error
    if any(nbytes <= 0 or slots < 0 for layer in pools for nbytes, slots in layer):
        raise ExpertFlowError(f"{path} has a pool of no bytes or of less than no slots: make the plan again")
    return pools


def _matched(path: Path, layer: int, pools: Sequence[tuple[int, int]], records: LayerRecords) -> Pools:
    sizes = sorted(set(records.nbytes))
    planned = sorted(pools)
    if len(planned) != len(sizes):
        raise ExpertFlowError(
            f"{path} has {len(planned)} record sizes in layer {layer}, the checkpoint {len(sizes)}: quantize with the "
            "plan that the file belongs to"
        )
    return tuple((size, min(slots, records.nbytes.count(size))) for size, (_, slots) in zip(sizes, planned))
