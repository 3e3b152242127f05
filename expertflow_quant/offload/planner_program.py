"""The planner's programs as HiGHS takes them (scipy): prices of limits, formats of experts, slots of pools."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.planner_choices import Allowance, Choices, Kept

_MOST_PRICE = 1e3
_SLOTS_SECONDS = 20.0
_SLOTS_GAP = 1e-4


@dataclass(frozen=True)
class Solution:
    """``chosen`` int64 [L, E] formats, ``slots`` int64 [L] as if shared, the program's ``value`` and its relative
    ``gap`` to the best bound."""

    chosen: Tensor
    slots: Tensor
    value: float
    gap: float


class _Rows:
    """Rows of a sparse system, written one after the other."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def add(self, columns: Sequence[int], values: Sequence[float], low: float, high: float) -> None:
        """``low <= sum values * x[columns] <= high``."""
        self.rows += [len(self.low)] * len(columns)
        self.columns += columns
        self.values += values
        self.low.append(low)
        self.high.append(high)

    def constraint(self, columns: int) -> Any:
        optimize, sparse = _scipy()
        shape = (len(self.low), columns)
        matrix = sparse.csr_array((self.values, (self.rows, self.columns)), shape=shape)
        return optimize.LinearConstraint(matrix, self.low, self.high)


def best_prices(cuts: Sequence[tuple[list[float], list[list[float]]]], scale: float) -> tuple[Tensor, float]:
    """The prices float64 [limits] that maximize the bound under all ``cuts`` (values of layers, their uses of each
    limit), and that maximum. ``scale``: about the size of the objective."""
    layers, limits = len(cuts[0][0]), len(cuts[0][1])
    rows = _Rows()
    for values, uses in cuts:
        for layer in range(layers):
            columns = [layer, *range(layers, layers + limits)]
            rows.add(columns, [1.0, *(-use[layer] for use in uses)], -torch.inf, values[layer] / scale)
    optimize, _ = _scipy()
    bounds = optimize.Bounds([-torch.inf] * layers + [0.0] * limits, [torch.inf] * layers + [_MOST_PRICE] * limits)
    objective = [-1.0] * layers + [1.0] * limits
    found = optimize.milp(objective, bounds=bounds, constraints=rows.constraint(layers + limits))
    if found.x is None:
        raise ExpertFlowError(f"the planner's bound was not found ({found.message}): report this with the errors file")
    return torch.tensor(found.x[layers:].tolist(), dtype=torch.float64) * scale, -found.fun * scale


def solve_formats(
    choices: Choices, allowance: Allowance, kept: Kept, *, gap: float, time_limit: float, whole_slots: bool = True
) -> Solution | None:
    """The best plan among the ``kept`` choices, or the best found within ``time_limit`` seconds; None when there is
    none. Without ``whole_slots`` a pool may have a part of a slot, which is solved much sooner."""
    layers, _, formats, _ = choices.value.shape
    picks: list[list[int]] = kept.mask.nonzero().tolist()
    pairs: list[list[int]] = kept.slots.nonzero().tolist()
    slot_column = {(layer, slot): len(picks) + i for i, (layer, slot) in enumerate(pairs)}
    pool_column = len(picks) + len(pairs)
    columns = pool_column + layers * formats
    rows = _Rows()
    _one_format_rows(rows, picks, slot_column)
    _pool_rows(rows, choices, picks, pool_column)
    pools = list(range(pool_column, columns))
    rows.add(pools, (choices.nbytes.flatten() / allowance.device_bytes).tolist(), 0.0, 1.0)
    uses = allowance.shares(choices)[1:]
    for use in uses:
        rows.add(list(range(len(picks))), use[kept.mask].tolist(), 0.0, 1.0)
    optimize, _ = _scipy()
    value = choices.value[kept.mask]
    scale = float(choices.value.amax((2, 3)).sum()) or 1.0
    most = [1.0] * pool_column + [float(choices.damage.shape[1])] * len(pools)
    found = optimize.milp(
        (value / scale).tolist() + [0.0] * (columns - len(picks)),
        integrality=[1] * pool_column + [int(whole_slots)] * len(pools),
        bounds=optimize.Bounds(0.0, most),
        constraints=rows.constraint(columns),
        options={"mip_rel_gap": gap, "time_limit": time_limit},
    )
    if found.x is None:
        return None
    return _solution(choices, picks, found.x, found.mip_dual_bound * scale, kept)


def solve_slots(nbytes: Sequence[int], missed: Sequence[Sequence[float]], device_bytes: int) -> list[int]:
    """Slots of every pool, of records of ``nbytes``, so that their ``missed[pool][slots]`` sum to the least."""
    rows = _Rows()
    begins = [0]
    for row in missed:
        begins.append(begins[-1] + len(row))
        rows.add(list(range(begins[-2], begins[-1])), [1.0] * len(row), 1.0, 1.0)
    sizes = [slots * size / device_bytes for size, row in zip(nbytes, missed, strict=True) for slots in range(len(row))]
    rows.add(list(range(begins[-1])), sizes, 0.0, 1.0)
    optimize, _ = _scipy()
    scale = sum(row[0] for row in missed) or 1.0
    found = optimize.milp(
        [value / scale for row in missed for value in row],
        integrality=[1] * begins[-1],
        bounds=optimize.Bounds(0.0, 1.0),
        constraints=rows.constraint(begins[-1]),
        options={"mip_rel_gap": _SLOTS_GAP, "time_limit": _SLOTS_SECONDS},
    )
    if found.x is None:
        raise ExpertFlowError(f"no slots were found within {_SLOTS_SECONDS:g} s ({found.message}): use fewer formats")
    taken = found.x.tolist()
    shares = [taken[begin:end] for begin, end in itertools.pairwise(begins)]
    return [share.index(max(share)) for share in shares]


def _one_format_rows(rows: _Rows, picks: list[list[int]], slot_column: dict[tuple[int, int], int]) -> None:
    """A layer has one number of slots; at that number an expert has one format, at every other none."""
    formats_of: dict[tuple[int, int, int], list[int]] = {}
    for column, (layer, expert, _, slot) in enumerate(picks):
        formats_of.setdefault((layer, expert, slot), []).append(column)
    for (layer, _, slot), of_expert in formats_of.items():
        rows.add([*of_expert, slot_column[layer, slot]], [1.0] * len(of_expert) + [-1.0], 0.0, 0.0)
    of_layer: dict[int, list[int]] = {}
    for (layer, _), column in slot_column.items():
        of_layer.setdefault(layer, []).append(column)
    for found in of_layer.values():
        rows.add(found, [1.0] * len(found), 1.0, 1.0)


def _pool_rows(rows: _Rows, choices: Choices, picks: list[list[int]], pool_column: int) -> None:
    """A pool has at least as many slots as its experts occupy on average."""
    formats = choices.value.shape[2]
    members: dict[int, list[int]] = {}
    for column, (layer, _, form, _) in enumerate(picks):
        members.setdefault(layer * formats + form, []).append(column)
    for pool, found in members.items():
        shares = [-float(choices.resident[picks[i][0], picks[i][1], picks[i][3]]) for i in found]
        rows.add([*found, pool_column + pool], [*shares, 1.0], 0.0, torch.inf)


def _solution(choices: Choices, picks: list[list[int]], taken: Any, dual_bound: float, kept: Kept) -> Solution:
    layers, experts, _, _ = choices.value.shape
    chosen = torch.zeros(layers, experts, dtype=torch.int64)
    slots = torch.zeros(layers, dtype=torch.int64)
    value = 0.0
    for share, (layer, expert, form, slot) in zip(taken.tolist(), picks, strict=False):
        if share > 0.5:
            chosen[layer, expert] = form
            slots[layer] = choices.slots[slot]
            value += float(choices.value[layer, expert, form, slot])
    bound = max(kept.bound, min(dual_bound, kept.bound + kept.reach))
    return Solution(chosen, slots, value, max(0.0, value - bound) / value if value else 0.0)


def _scipy() -> tuple[Any, Any]:
    try:
        import scipy.optimize
        import scipy.sparse
    except ImportError as error:
        raise ExpertFlowError(
            "planning needs scipy, which is not installed: pip install 'expertflow-quant[plan]'"
        ) from error
    return scipy.optimize, scipy.sparse
