# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of ``blocks``: every program counts what it needs itself, so one launch is enough."""

import triton
import triton.language as tl
from torch import Tensor

TILE = 32
"""Pairs or blocks of one program, and pairs compared at a time."""


def launch_plan(
    ids: Tensor, order: Tensor, expert: Tensor, start: Tensor, end: Tensor, num_experts: int, block_tokens: int
) -> None:
    """Sort and cut at once, for few pairs."""
    pairs, bound = ids.numel(), expert.shape[0]
    grid = (triton.cdiv(max(pairs, bound), TILE),)
    _plan[grid](
        ids,
        order,
        expert,
        start,
        end,
        pairs,
        bound,
        num_experts,
        PAIRS=max(TILE, triton.next_power_of_2(pairs)),
        BLOCK=block_tokens,
        EXPERTS=max(TILE, triton.next_power_of_2(num_experts)),
        TILE=TILE,
        num_warps=_warps(num_experts),
    )


def launch_cut(
    offsets: Tensor, subset: Tensor | None, expert: Tensor, start: Tensor, end: Tensor, block_tokens: int
) -> None:
    """Cut sorted pairs."""
    count = offsets.shape[0] - 1 if subset is None else subset.shape[0]
    bound = expert.shape[0]
    _cut[(triton.cdiv(bound, TILE),)](
        offsets,
        offsets if subset is None else subset,
        expert,
        start,
        end,
        bound,
        count,
        SUBSET=subset is not None,
        BLOCK=block_tokens,
        EXPERTS=max(TILE, triton.next_power_of_2(count)),
        TILE=TILE,
        num_warps=_warps(count),
    )


def _warps(experts: int) -> int:
    """Enough threads that a TILE x experts comparison stays in registers."""
    return 4 if experts <= 256 else 8 if experts <= 512 else 16


@triton.jit
def _plan(
    ids,
    order,
    expert,
    start,
    end,
    pairs,
    bound,
    num_experts,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """order[rank of pair] = pair for this program's pairs, then this program's blocks. PAIRS: pairs, rounded up."""
    mine = tl.program_id(0) * TILE + tl.arange(0, TILE)
    key = _keys(ids, mine, pairs, num_experts)
    experts = tl.arange(0, EXPERTS)
    rank = tl.zeros((TILE,), tl.int32)
    first = tl.zeros((EXPERTS,), tl.int32)
    count = tl.zeros((EXPERTS,), tl.int32)
    for other in range(0, PAIRS, TILE):
        theirs = other + tl.arange(0, TILE)
        seen = _keys(ids, theirs, pairs, num_experts)
        ahead = (seen[None, :] < key[:, None]) | ((seen[None, :] == key[:, None]) & (theirs[None, :] < mine[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
        first += tl.sum((seen[None, :] < experts[:, None]).to(tl.int32), 1)
        count += tl.sum((seen[None, :] == experts[:, None]).to(tl.int32), 1)
    tl.store(order + rank, mine, mask=mine < pairs)
    count = tl.where(experts < num_experts, count, 0)
    _write_blocks(experts, first, first + count, expert, start, end, bound, mine, BLOCK)


@triton.jit
def _cut(
    offsets, subset, expert, start, end, bound, count, SUBSET: tl.constexpr, BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    number = tl.arange(0, EXPERTS)
    owner = number
    if SUBSET:
        owner = tl.load(subset + number, mask=number < count, other=-1)
    known = (number < count) & (owner >= 0)
    first = tl.load(offsets + owner, mask=known, other=0)
    last = tl.load(offsets + owner + 1, mask=known, other=0)
    mine = tl.program_id(0) * TILE + tl.arange(0, TILE)
    _write_blocks(owner, first, last, expert, start, end, bound, mine, BLOCK)


@triton.jit
def _keys(ids, pair, pairs, num_experts):
    """A pair's expert; num_experts for a sentinel, more for what is no pair."""
    routed = tl.load(ids + pair, mask=pair < pairs, other=0)
    key = tl.where((routed >= 0) & (routed < num_experts), routed, num_experts).to(tl.int32)
    return tl.where(pair < pairs, key, num_experts + 1)


@triton.jit
def _write_blocks(owner, first, last, expert, start, end, bound, mine, BLOCK: tl.constexpr):
    """Blocks ``mine`` of experts ``owner`` whose pairs are ``first`` to ``last``: at most one expert owns each."""
    needed = (last - first + BLOCK - 1) // BLOCK
    after = tl.cumsum(needed, 0)
    before = after - needed
    hit = (before[None, :] <= mine[:, None]) & (mine[:, None] < after[None, :])
    begin = first[None, :] + (mine[:, None] - before[None, :]) * BLOCK
    begin = tl.sum(tl.where(hit, begin, 0), 1)
    limit = tl.sum(tl.where(hit, last[None, :], 0), 1)
    whose = tl.sum(tl.where(hit, owner[None, :] + 1, 0), 1) - 1
    inside = mine < bound
    tl.store(expert + mine, whose, mask=inside)
    tl.store(start + mine, begin, mask=inside)
    tl.store(end + mine, tl.minimum(begin + BLOCK, limit), mask=inside)
