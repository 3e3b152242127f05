"""Routed pairs put in order by expert and cut into blocks of one expert each: the plan of a grouped product.

Everything stays on the device and every shape follows from sizes alone, so a CUDA graph can capture it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.kernels.launch import use_triton

SMALL = 512
"""Pairs up to which one launch sorts by comparing every pair with every other."""

MAX_KERNEL_EXPERTS = 1024
"""Experts (or subset entries) that one program holds; more go the way of PyTorch operations."""

BLOCK_TOKENS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Sorted:
    """Pairs by expert. ``order`` int32 ``[P]``: pair numbers, an expert's in their own order, sentinels last;
    ``offsets`` int32 ``[E + 1]``: expert e has ``order[offsets[e]:offsets[e + 1]]``."""

    order: Tensor
    offsets: Tensor
    top_k: int


@dataclass(frozen=True)
class Blocks:
    """Block b covers the pairs ``order[start[b]:end[b]]``, at most ``block_tokens``, all of expert ``expert[b]``.

    All int32, ``expert``, ``start`` and ``end`` ``[NB]``; ``expert`` is -1 (and start = end = 0) where there is nothing
    to do. Pair p belongs to token ``p // top_k``. No pair lies in two blocks; sentinels lie in none.
    """

    order: Tensor
    expert: Tensor
    start: Tensor
    end: Tensor
    block_tokens: int
    top_k: int


def plan_blocks(ids: Tensor, num_experts: int, block_tokens: int, subset: Tensor | None = None) -> Blocks:
    """Blocks of the pairs that ``ids`` (int32 or int64 ``[T, K]``) routes to experts below ``num_experts``.

    An id outside ``[0, num_experts)`` is a sentinel. ``subset`` as for ``blocks_of``. Raises ExpertFlowError for other
    shapes or dtypes and for a ``block_tokens`` that is none of 16, 32, 64, 128.
    """
    _check_ids(ids, num_experts)
    _check_block(block_tokens)
    if subset is None and ids.numel() <= SMALL and num_experts <= MAX_KERNEL_EXPERTS and use_triton(ids):
        return _plan_small(ids, num_experts, block_tokens)
    return blocks_of(sort_pairs(ids, num_experts), block_tokens, subset)


def sort_pairs(ids: Tensor, num_experts: int) -> Sorted:
    """The pairs of ``ids`` (int32 or int64 ``[T, K]``) sorted by expert, once for all of a layer's chunks."""
    _check_ids(ids, num_experts)
    flat = ids.reshape(-1)
    keys = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    ordered, order = torch.sort(keys, stable=True)
    edges = torch.arange(num_experts + 1, device=ids.device, dtype=ordered.dtype)
    offsets = torch.searchsorted(ordered, edges, out_int32=True)
    return Sorted(order.to(torch.int32), offsets, ids.shape[1])


def blocks_of(pairs: Sorted, block_tokens: int, subset: Tensor | None = None) -> Blocks:
    """Blocks of sorted pairs; with ``subset`` (int32 ``[n]``, distinct experts, -1 as padding) of these experts only.

    Blocks follow the order of ``subset``. Raises ExpertFlowError as ``plan_blocks`` does.
    """
    _check_block(block_tokens)
    if subset is not None and (subset.dtype != torch.int32 or subset.ndim != 1 or not subset.is_contiguous()):
        raise ExpertFlowError(f"a subset is contiguous int32 [n], got {subset.dtype} {tuple(subset.shape)}: convert it")
    experts = pairs.offsets.shape[0] - 1 if subset is None else subset.shape[0]
    bound = block_bound(pairs.order.shape[0], experts, block_tokens)
    if bound and experts <= MAX_KERNEL_EXPERTS and use_triton(pairs.order):
        return _cut_on_device(pairs, block_tokens, subset, bound)
    return blocks_reference(pairs, block_tokens, subset)


def block_bound(pairs: int, experts: int, block_tokens: int) -> int:
    """Blocks that ``pairs`` pairs of at most ``experts`` experts can need: every expert's last block may be short."""
    occurring = min(pairs, experts)
    return occurring + (pairs - occurring) // block_tokens


def blocks_reference(pairs: Sorted, block_tokens: int, subset: Tensor | None = None) -> Blocks:
    """The PyTorch twin of ``blocks_of``, on any device."""
    order, offsets = pairs.order, pairs.offsets
    device = order.device
    if subset is None:
        subset = torch.arange(offsets.shape[0] - 1, device=device, dtype=torch.int32)
    bound = block_bound(order.shape[0], subset.shape[0], block_tokens)
    if bound == 0:
        empty = torch.empty(0, dtype=torch.int32, device=device)
        return Blocks(order, empty, empty, empty, block_tokens, pairs.top_k)
    known = subset >= 0
    row = subset.clamp(min=0).long()
    first, last = offsets[row], torch.where(known, offsets[row + 1], offsets[row])
    ends = torch.cumsum((last - first + block_tokens - 1) // block_tokens, 0, dtype=torch.int32)
    number = torch.arange(bound, device=device, dtype=torch.int32)
    owner = torch.searchsorted(ends, number, right=True)
    used = owner < subset.shape[0]
    owner = owner.clamp(max=subset.shape[0] - 1)
    before = torch.where(owner > 0, ends[(owner - 1).clamp(min=0)], 0)
    start = first[owner] + (number - before) * block_tokens
    end = torch.minimum(start + block_tokens, last[owner])
    return Blocks(
        order,
        torch.where(used, subset[owner], -1).int(),
        torch.where(used, start, 0).int(),
        torch.where(used, end, 0).int(),
        block_tokens,
        pairs.top_k,
    )


def _plan_small(ids: Tensor, num_experts: int, block_tokens: int) -> Blocks:
    from expertflow_quant.kernels import blocks_kernel

    ids = ids.contiguous()
    pairs = ids.numel()
    bound = block_bound(pairs, num_experts, block_tokens)
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    blocks = _empty(order, bound, block_tokens, ids.shape[1])
    if pairs:
        blocks_kernel.launch_plan(ids, order, blocks.expert, blocks.start, blocks.end, num_experts, block_tokens)
    return blocks


def _cut_on_device(pairs: Sorted, block_tokens: int, subset: Tensor | None, bound: int) -> Blocks:
    from expertflow_quant.kernels import blocks_kernel

    blocks = _empty(pairs.order, bound, block_tokens, pairs.top_k)
    blocks_kernel.launch_cut(pairs.offsets, subset, blocks.expert, blocks.start, blocks.end, block_tokens)
    return blocks


def _empty(order: Tensor, bound: int, block_tokens: int, top_k: int) -> Blocks:
    expert, start, end = torch.empty(3, bound, dtype=torch.int32, device=order.device).unbind(0)
    return Blocks(order, expert, start, end, block_tokens, top_k)


def _check_ids(ids: Tensor, num_experts: int) -> None:
    if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64) or ids.shape[1] < 1:
        raise ExpertFlowError(
            f"routed ids are int32 or int64 [tokens, top_k], got {ids.dtype} {tuple(ids.shape)}: "
            "pass the router's indices"
        )
    if num_experts < 1:
        raise ExpertFlowError(f"{num_experts} experts: a layer has at least one")


def _check_block(block_tokens: int) -> None:
    if block_tokens not in BLOCK_TOKENS:
        raise ExpertFlowError(f"blocks of {block_tokens} tokens: use one of {', '.join(map(str, BLOCK_TOKENS))}")
