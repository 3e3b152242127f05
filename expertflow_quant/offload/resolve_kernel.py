# mypy: disable-error-code="no-untyped-def"
"""The resolve kernel: one program per call, which holds a whole layer's slots and experts in registers. Where nothing
is missing it only stamps and counts.

Victims are ranked by one sort of 64-bit keys (pool, in use, stamp, slot), so the slots of a pool come out where the
pool starts, best victim first; the r-th missing expert of a pool looks at the r-th place from there. Under a ranked
policy the keys are (pool, in use, worth of the owner, stamp, slot): a float32 that is not negative has the order of its
bits. A second sort then brings the missing experts into the order of their worth, and all that follows goes by that.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertflow_quant.offload.layer_policy import RECENT
from expertflow_quant.offload.resident_tables import AGES, MOST, LayerTables

WARPS = 4
WARPS_WIDE = 8  # from 256 experts or slots on
COMPARED = 4096  # ids x experts compared at once

# a key by stamp: from bit 43 the pool, bit 42 whether the slot must stay, 32 bits of stamp, slot
SLOT_MASK = tl.constexpr(MOST - 1)
STAMP_BIT = tl.constexpr(10)
POOL_BIT = 42
# a key by worth: from bit 53 the pool, bit 52 whether the slot must stay, 31 bits of worth, 12 of recency, slot
RECENCY_BIT = tl.constexpr(9)
RECENCY_MASK = tl.constexpr(4095)
MOST_AGES = tl.constexpr(AGES)
WORTH_BIT = tl.constexpr(21)
WORTH_MASK = tl.constexpr(2**31 - 1)
RANKED_POOL_BIT = 52
NOT_MISSING_BIT = tl.constexpr(62)
RECENT_WORTH = tl.constexpr(RECENT)
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
        layer.rate,
        layer.used_at,
        layer.decay,
        layer.policy.use,
        layer.policy.gain,
        len(layer.decay),
        ids.numel(),
        layer.experts,
        layer.slots,
        layer.pools,
        COUNT=count and not keep_current,
        KEEP_CURRENT=keep_current,
        RANKED=layer.policy.ranked,
        REFUSES=layer.policy.refuses and not keep_current,
        POOL_BIT=RANKED_POOL_BIT if layer.policy.ranked else POOL_BIT,
        TILE=tile(ids.numel(), experts),
        EXPERTS=experts,
        SLOTS=slots,
        num_warps=num_warps or warps(max(experts, slots)),
        enable_fp_fusion=False,  # the twin rounds after each operation
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
def _worth(rate, used_at, decay, ages, now, expert, real):
    """float32: what each expert is worth before this call's uses."""
    age = (now - tl.load(used_at + expert, mask=real, other=0)).to(tl.uint32).to(tl.int64)
    left = tl.load(decay + tl.minimum(age, ages - 1), mask=real, other=0.0)
    return tl.load(rate + expert, mask=real, other=0.0) * left


@triton.jit
def _bits(worth):
    return worth.to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def _by_worth(missing, worth, expert):
    """int32 [EXPERTS]: the missing experts, greatest worth first, then all others."""
    key = (WORTH_MASK - _bits(worth) << RECENCY_BIT) | expert
    return (tl.sort(((missing == 0).to(tl.int64) << NOT_MISSING_BIT) | key) & SLOT_MASK).to(tl.int32)


@triton.jit
def _recency(owner, stamp, worth, step, KEEP_CURRENT: tl.constexpr):
    """int64 [SLOTS]: the worth of a slot's owner and its recency as bits, 0 where it is free."""
    age = (step - stamp).to(tl.uint32).to(tl.int64)
    there = tl.gather(worth, tl.maximum(owner, 0), 0)
    if KEEP_CURRENT:
        there = tl.where(age <= 1, there + RECENT_WORTH, there)
    recency = RECENCY_MASK - tl.minimum(age, MOST_AGES)
    return tl.where(owner >= 0, (_bits(there) << WORTH_BIT) | (recency << RECENCY_BIT), 0)


@triton.jit
def _victims(
    wanted,
    owner,
    stamp,
    pool,
    worth,
    slots,
    step,
    KEEP_CURRENT: tl.constexpr,
    RANKED: tl.constexpr,
    POOL_BIT: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """int64 [SLOTS], sorted: pool, then whether the slot must stay, then worth or stamp, then slot."""
    slot = tl.arange(0, SLOTS)
    stays = (owner >= 0) & (tl.gather(wanted, tl.maximum(owner, 0), 0) > 0)
    if KEEP_CURRENT:
        stays = stays | (stamp == step)
    group = tl.where(slot < slots, pool, NO_POOL) * 2 + stays.to(tl.int32)
    if RANKED:
        order = _recency(owner, stamp, worth, step, KEEP_CURRENT)
    else:
        # As unsigned, so that a step counter that wraps after years cannot reach into the bits of the pool.
        order = (stamp + 1).to(tl.uint32).to(tl.int64) << STAMP_BIT
    return tl.sort((group.to(tl.int64) << POOL_BIT) | order | slot)


@triton.jit(
    do_not_specialize=["ages", "pairs", "experts", "slots", "pools"],
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
    rate,
    used_at,
    decay,
    use,
    gain,
    ages,
    pairs,
    experts,
    slots,
    pools,
    COUNT: tl.constexpr,
    KEEP_CURRENT: tl.constexpr,
    RANKED: tl.constexpr,
    REFUSES: tl.constexpr,
    POOL_BIT: tl.constexpr,
    TILE: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    number = tl.arange(0, EXPERTS)
    now = tl.load(step)
    asked = wanted_experts(ids, pairs, experts, TILE, EXPERTS)
    slot_now = tl.load(slot_of + number, mask=number < experts, other=0)
    missing = (asked > 0) & (slot_now < 0)
    worth = number
    if RANKED:
        worth = _worth(rate, used_at, decay, ages, now, number, number < experts)
        if not KEEP_CURRENT:
            worth = tl.where(asked > 0, worth + use, worth)
            # Threads that hold the same elements twice must have read the tables before any thread writes them.
            tl.debug_barrier()
            tl.store(rate + number, worth, mask=asked > 0)
            tl.store(used_at + number, tl.zeros_like(number) + now, mask=asked > 0)
    if tl.max(missing.to(tl.int32)) == 0:
        tl.store(stamp + slot_now, tl.zeros_like(number) + now, mask=asked > 0)
        tl.store(todo_count, 0)
        if COUNT:
            tl.atomic_add(counters, tl.sum(asked.to(tl.int64)), sem="relaxed")
    else:
        slot = tl.arange(0, SLOTS)
        expert = number
        wanted = asked
        if RANKED:
            expert = _by_worth(missing, worth, expert)
            wanted = tl.gather(asked, expert, 0)
        real = expert < experts
        old_slot = tl.load(slot_of + expert, mask=real, other=-1)
        host = tl.load(host_address + expert, mask=real, other=0)
        size = tl.load(nbytes + expert, mask=real, other=0)
        pool = tl.load(pool_of_expert + expert, mask=real, other=-1)
        owners = tl.load(owner + slot, mask=slot < slots, other=-1)
        stamps = tl.load(stamp + slot, mask=slot < slots, other=-1)
        pool_at = tl.load(pool_of_slot + slot, mask=slot < slots, other=0)

        hit = (wanted > 0) & (old_slot >= 0)
        miss = (wanted > 0) & (old_slot < 0)
        ranked = _victims(asked, owners, stamps, pool_at, worth, slots, now, KEEP_CURRENT, RANKED, POOL_BIT, SLOTS)

        place = tl.zeros([EXPERTS], dtype=tl.int32)
        each = 0
        while each < pools:
            rank = tl.cumsum((miss & (pool == each)).to(tl.int32), 0) - 1
            place = tl.where(pool == each, tl.load(pool_start + each) + rank, place)
            each += 1
        inside = miss & (place < SLOTS)
        victim = tl.gather(ranked, tl.where(inside, place, 0), 0)
        moved = inside & ((victim >> POOL_BIT) == pool * 2)
        if REFUSES:
            free = ((victim >> RECENCY_BIT) & RECENCY_MASK) == 0
            cost = ((victim >> WORTH_BIT) & WORTH_MASK).to(tl.int32).to(tl.float32, bitcast=True)
            moved = moved & (free | (tl.gather(worth, expert, 0) + gain > cost))
        new_slot = tl.where(moved, (victim & SLOT_MASK).to(tl.int32), old_slot)
        evicted = tl.gather(owners, tl.where(moved, new_slot, 0), 0)
        gone = moved & (evicted >= 0)
        there = tl.load(slot_address + new_slot, mask=moved, other=0)
        evicted_host = tl.load(host_address + evicted, mask=gone, other=0)

        tl.debug_barrier()  # as above
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
