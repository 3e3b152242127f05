"""How often each expert misses in a least recently used cache of any number of slots, from one pass over a trace.

A least recently used cache of s slots holds the s most recently used experts, whatever s is (Mattson, Gecsei, Slutz,
Traiger 1970), so one stack of experts in the order of their last use answers for every s at once: a request hits with s
slots when its expert lies above depth s. A step asks for all its experts together: they are looked up in the stack
that the step found, then they move to its top, the lowest id first. The first step finds experts 0, 1, ... from the
top down, as a cache that was filled in order.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.offload.trace import Step

_POOL_STRIDE = 1 << 40


@dataclass(frozen=True)
class MissCurves:
    """Of every expert, by slots of its pool: ``misses`` float32 [L, E, E + 1] misses in a step, ``resident`` float32
    [L, E, E + 1] share of the steps that find it resident. ``steps`` were replayed."""

    steps: int
    misses: Tensor
    resident: Tensor

    @property
    def used(self) -> Tensor:
        """float32 [L, E]: requests in a step."""
        return self.misses[:, :, 0]

    def of_pool(self, layer: int, experts: Iterable[int]) -> Tensor:
        """float32 [n + 1]: misses in a step of a pool with 0 .. n slots, n its experts."""
        ids = torch.tensor(list(experts), dtype=torch.int64)
        return self.misses[layer, ids].sum(0)[: len(ids) + 1]


def measure_curves(steps: Iterable[Step], num_experts: int, pools: Tensor | None = None) -> MissCurves:
    """Replay ``steps``. ``pools`` int64 [L, E] names the pool of each expert within its layer, each with a stack of its
    own (default: one pool a layer). Raises ExpertFlowError when there is no step or an expert that is not there.
    """
    wanted = demand(steps, num_experts)
    count, layers, experts = wanted.shape
    missed = torch.zeros(layers, experts, experts + 1)
    resting = torch.zeros(layers, experts, experts + 1)
    for asked, depth in zip(wanted, _depths(wanted, pools), strict=True):
        missed.scatter_add_(2, depth[..., None] + 1, asked[..., None].float())
        resting.scatter_add_(2, depth[..., None] + 1, torch.ones(layers, experts, 1))
    asked_at = wanted.sum(0)[..., None].float()
    return MissCurves(count, (asked_at - missed.cumsum(2)) / count, resting.cumsum(2) / count)


def replay_pools(steps: Iterable[Step], pools: Tensor, slots: Tensor) -> Tensor:
    """float32 [L, E]: misses in a step of each expert, pool ``pools[l, e]`` having ``slots[l, e]`` slots."""
    wanted = demand(steps, pools.shape[1])
    missed = torch.zeros(pools.shape)
    for asked, depth in zip(wanted, _depths(wanted, pools), strict=True):
        missed += asked & (depth >= slots)
    return missed / len(wanted)


def demand(steps: Iterable[Step], num_experts: int) -> Tensor:
    """bool [steps, L, E]: which experts each step wants. Raises ExpertFlowError for no steps, layers that differ, or
    an expert above ``num_experts``."""
    kept = list(steps)
    if not kept or len({len(step) for step in kept}) != 1:
        raise ExpertFlowError(f"{len(kept)} steps to replay: give at least one, each with the same layers")
    flat = [
        (at * len(step) + layer) * num_experts + expert
        for at, step in enumerate(kept)
        for layer, experts in enumerate(step)
        for expert in experts
    ]
    highest = max((expert for step in kept for experts in step for expert in experts), default=0)
    if highest >= num_experts:
        raise ExpertFlowError(f"a step wants expert {highest}, a layer has {num_experts}: give the trace of this model")
    wanted = torch.zeros(len(kept) * len(kept[0]) * num_experts, dtype=torch.bool)
    wanted[torch.tensor(flat, dtype=torch.int64)] = True
    return wanted.view(len(kept), len(kept[0]), num_experts)


def _depths(wanted: Tensor, pools: Tensor | None) -> Iterator[Tensor]:
    """int64 [L, E] before each step: how many experts of its pool lie above each expert in the stack."""
    _, layers, experts = wanted.shape
    ids = torch.arange(experts).expand(layers, experts)
    pool = torch.zeros_like(ids) if pools is None else pools.long()
    first = (pool[:, None, :] < pool[:, :, None]).sum(2)
    stamp = -ids
    for step, asked in enumerate(wanted):
        order = (pool * _POOL_STRIDE - stamp).argsort(1)
        yield torch.empty_like(order).scatter_(1, order, ids) - first
        stamp = torch.where(asked, (step + 1) * experts + ids, stamp)
