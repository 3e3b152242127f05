# mypy: disable-error-code="no-untyped-def"
"""The resolve kernel: one program per call, which holds a whole layer's slots and experts in registers.

Victims are ranked by one sort of 64-bit keys (pool, in use, stamp, slot), so the slots of a pool come out where the
pool starts, best victim first; the r-th missing expert of a pool looks at the r-th place from there.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertflow_quant.offload.resident_tables import MOST, LayerTables

WARPS = 4
WARPS_WIDE = 8  # from 256 experts or slots on
COMPARED = 4096  # ids x experts compared at once

SLOT_MASK = tl.constexpr(1023)  # a key: from bit 43 the pool, bit 42 whether the slot must stay, 32 bits of stamp, slot
STAMP_BIT = tl.constexpr(10)
POOL_BIT = tl.constexpr(42)
NO_POOL = tl.constexpr(MOST)  # of padding: above every pool


def launch_resolve(
    layer: LayerTables, ids: Tensor, count: bool, keep_current: bool, num_warps: int | None = None
) -> None:
    """``resolve.resolve`` in one launch; the ids were checked."""
    experts, slots = power(layer.experts), power(layer.slots)
    _resolve[(1,)](
        ids,
        layer.step,
        layer.address,
        layer.host_address,
        layer.slot_of,
        layer.pool_of_expert,
        layer.nbytes,
        layer.owner,
        layer.stamp,
        layer.pool_of_slot,
        layer.slot_address,
        layer.pool_start,
        layer.todo_src,
        layer.todo_dst,
        layer.todo_nbytes,
        layer.todo_count,
        layer.counters,
        ids.numel(),
        layer.experts,
        layer.slots,
        layer.pools,
        COUNT=count and not keep_current,
        KEEP_CURRENT=keep_current,
        TILE=tile(ids.numel(), experts),
        EXPERTS=experts,
        SLOTS=slots,
        num_warps=num_warps or warps(max(experts, slots)),
    )


def launch_count_hits(layer: LayerTables, ids: Tensor) -> None:
    """``resolve.count_hits`` in one launch."""
    experts = power(layer.experts)
    _count_hits[(1,)](
        ids,
        layer.counters,
        ids.numel(),
        layer.experts,
        TILE=tile(ids.numel(), experts),
        EXPERTS=experts,
        num_warps=warps(experts),
    )


def power(count: int) -> int:
    return max(16, triton.next_power_of_2(count))


def tile(pairs: int, experts: int) -> int:
    return min(max(8, COMPARED // experts), max(8, triton.next_power_of_2(pairs)))


def warps(width: int) -> int:
    return WARPS if width < 256 else WARPS_WIDE


@triton.jit
def wanted_experts(ids, pairs, experts, TILE: tl.constexpr, EXPERTS: tl.constexpr):
    """int32 [EXPERTS]: whether each expert is among the ids."""
    expert = tl.arange(0, EXPERTS)
    seen = tl.zeros([TILE, EXPERTS], dtype=tl.int32)
    start = 0
    while start < pairs:  # not range: older interpreters do not take a tensor there
        pair = start + tl.arange(0, TILE)
        wanted = tl.load(ids + pair, mask=pair < pairs, other=-1).to(tl.int32)
        seen |= (wanted[:, None] == expert[None, :]).to(tl.int32)
        start += TILE
    return tl.where(expert < experts, tl.max(seen, axis=0), 0)


@triton.jit(do_not_specialize=["pairs", "experts"], do_not_specialize_on_alignment=["ids"])
def _count_hits(ids, counters, pairs, experts, TILE: tl.constexpr, EXPERTS: tl.constexpr):
    hits = tl.sum(wanted_experts(ids, pairs, experts, TILE, EXPERTS))
    tl.atomic_add(counters, hits.to(tl.int64), sem="relaxed")


@triton.jit
def _victims(wanted, owner, stamp, pool, slots, step, KEEP_CURRENT: tl.constexpr, SLOTS: tl.constexpr):
    """int64 [SLOTS], sorted: pool, then whether the slot must stay, then stamp, then slot."""
    slot = tl.arange(0, SLOTS)
    stays = (owner >= 0) & (tl.gather(wanted, tl.maximum(owner, 0), 0) > 0)
    if KEEP_CURRENT:
        stays = stays | (stamp == step)
    group = tl.where(slot < slots, pool, NO_POOL) * 2 + stays.to(tl.int32)
    # As unsigned, so that a step counter that wraps after years cannot reach into the bits of the pool.
    age = (stamp + 1).to(tl.uint32).to(tl.int64)
    return tl.sort((group.to(tl.int64) << POOL_BIT) | (age << STAMP_BIT) | slot)


@triton.jit(
    do_not_specialize=["pairs", "experts", "slots", "pools"],
    do_not_specialize_on_alignment=["ids", "todo_count"],
)
def _resolve(
    ids,
    step,
    address,
    host_address,
    slot_of,
    pool_of_expert,
    nbytes,
    owner,
    stamp,
    pool_of_slot,
    slot_address,
    pool_start,
    todo_src,
    todo_dst,
    todo_nbytes,
    todo_count,
    counters,
    pairs,
    experts,
    slots,
    pools,
    COUNT: tl.constexpr,
    KEEP_CURRENT: tl.constexpr,
    TILE: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    expert = tl.arange(0, EXPERTS)
    slot = tl.arange(0, SLOTS)
    real = expert < experts
    now = tl.load(step)
    old_slot = tl.load(slot_of + expert, mask=real, other=-1)
    host = tl.load(host_address + expert, mask=real, other=0)
    size = tl.load(nbytes + expert, mask=real, other=0)
    pool = tl.load(pool_of_expert + expert, mask=real, other=-1)
    owners = tl.load(owner + slot, mask=slot < slots, other=-1)
    stamps = tl.load(stamp + slot, mask=slot < slots, other=-1)
    pool_at = tl.load(pool_of_slot + slot, mask=slot < slots, other=0)

    wanted = wanted_experts(ids, pairs, experts, TILE, EXPERTS)
    hit = (wanted > 0) & (old_slot >= 0)
    miss = (wanted > 0) & (old_slot < 0)
    ranked = _victims(wanted, owners, stamps, pool_at, slots, now, KEEP_CURRENT, SLOTS)

    place = tl.zeros([EXPERTS], dtype=tl.int32)
    each = 0
    while each < pools:
        rank = tl.cumsum((miss & (pool == each)).to(tl.int32), 0) - 1
        place = tl.where(pool == each, tl.load(pool_start + each) + rank, place)
        each += 1
    inside = miss & (place < SLOTS)
    victim = tl.gather(ranked, tl.where(inside, place, 0), 0)
    moved = inside & ((victim >> POOL_BIT) == pool * 2)
    new_slot = tl.where(moved, (victim & SLOT_MASK).to(tl.int32), old_slot)
    evicted = tl.gather(owners, tl.where(moved, new_slot, 0), 0)
    gone = moved & (evicted >= 0)
    there = tl.load(slot_address + new_slot, mask=moved, other=0)
    evicted_host = tl.load(host_address + evicted, mask=gone, other=0)

    # Threads that hold the same elements twice must have read the tables before any thread writes them.
    tl.debug_barrier()
    tl.store(stamp + new_slot, tl.zeros_like(new_slot) + now, mask=hit | moved)
    tl.store(owner + new_slot, expert, mask=moved)
    tl.store(slot_of + expert, new_slot, mask=moved)
    tl.store(address + expert, there, mask=moved)
    tl.store(slot_of + evicted, tl.full([EXPERTS], -1, tl.int32), mask=gone)
    tl.store(address + evicted, evicted_host, mask=gone)

    entry = tl.cumsum(moved.to(tl.int32), 0) - 1
    tl.store(todo_src + entry, host, mask=moved)
    tl.store(todo_dst + entry, there, mask=moved)
    tl.store(todo_nbytes + entry, size, mask=moved)
    tl.store(todo_count, tl.sum(moved.to(tl.int32)))
    if COUNT:
        tl.atomic_add(counters, tl.sum(hit.to(tl.int64)), sem="relaxed")
        tl.atomic_add(counters + 1, tl.sum(miss.to(tl.int64)), sem="relaxed")
        tl.atomic_add(counters + 2, tl.sum(tl.where(miss, size, 0).to(tl.int64)), sem="relaxed")
    if KEEP_CURRENT:
        tl.atomic_add(counters + 3, tl.sum(tl.where(moved, size, 0).to(tl.int64)), sem="relaxed")
