# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of decode attention: see attention.py."""

import triton
import triton.language as tl


@triton.jit
def split_kernel(
    q,
    k_new,
    v_new,
    k_cache,
    v_cache,
    lengths,
    part_out,
    part_max,
    part_sum,
    scaling,
    window,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_cr,
    stride_ch,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One share of one row's cached keys, for all query heads of one KV head; share 0 also stores the new token."""
    row = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    length = tl.load(lengths + row)
    d = tl.arange(0, D_PAD)
    d_in = d < D
    base = row.to(tl.int64) * stride_cr + head * stride_ch
    if split == 0:
        at = base + length.to(tl.int64) * D + d
        tl.store(k_cache + at, tl.load(k_new + row * stride_kb + head * stride_kh + d, mask=d_in), mask=d_in)
        tl.store(v_cache + at, tl.load(v_new + row * stride_vb + head * stride_vh + d, mask=d_in), mask=d_in)
    first = tl.maximum(length + 1 - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK) * BLOCK
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    g = tl.arange(0, GROUP_PAD)
    g_in = g < GROUP
    q_at = row * stride_qb + (head * GROUP + g[:, None]) * stride_qh + d[None, :]
    query = tl.load(q + q_at, mask=g_in[:, None] & d_in[None, :], other=0.0)
    if WIDE:
        query = query.to(tl.float32)
    top = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    acc = tl.zeros((GROUP_PAD, D_PAD), tl.float32)
    for start in range(begin, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        t_in = t < end
        at = base + t[:, None].to(tl.int64) * D + d[None, :]
        keys = tl.load(k_cache + at, mask=t_in[:, None] & d_in[None, :], other=0.0)
        values = tl.load(v_cache + at, mask=t_in[:, None] & d_in[None, :], other=0.0)
        if WIDE:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
            scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scaling
        else:
            scores = tl.dot(query, tl.trans(keys)) * scaling
        scores = tl.where(t_in[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        scale = tl.exp(top - higher)
        total = total * scale + tl.sum(weights, 1)
        if WIDE:
            acc = acc * scale[:, None] + tl.dot(weights, values, input_precision="ieee")
        else:
            acc = acc * scale[:, None] + tl.dot(weights.to(values.dtype), values)
        top = higher
    part = (row * KV_HEADS + head) * SPLITS + split
    tl.store(part_max + part * GROUP_PAD + g, top)
    tl.store(part_sum + part * GROUP_PAD + g, total)
    out_at = (part * GROUP_PAD + g[:, None]) * D_PAD + d[None, :]
    tl.store(part_out + out_at, acc)


@triton.jit
def join_kernel(
    q,
    k_new,
    v_new,
    sinks,
    part_out,
    part_max,
    part_sum,
    out,
    scaling,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """The shares of one query head put together, with the new token itself and the head's sink."""
    row = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    kv_head = head // GROUP
    g = head % GROUP
    d = tl.arange(0, D_PAD)
    d_in = d < D
    s = tl.arange(0, SPLITS)
    part = ((row * KV_HEADS + kv_head) * SPLITS + s) * GROUP_PAD + g
    tops = tl.load(part_max + part)
    sums = tl.load(part_sum + part)
    parts = tl.load(part_out + part[:, None] * D_PAD + d[None, :])
    query = tl.load(q + row * stride_qb + head * stride_qh + d, mask=d_in, other=0.0).to(tl.float32)
    key = tl.load(k_new + row * stride_kb + kv_head * stride_kh + d, mask=d_in, other=0.0).to(tl.float32)
    value = tl.load(v_new + row * stride_vb + kv_head * stride_vh + d, mask=d_in, other=0.0).to(tl.float32)
    own = tl.sum(query * key) * scaling
    top = tl.maximum(tl.max(tops), own)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        top = tl.maximum(top, sink)
    scales = tl.exp(tops - top)
    own_weight = tl.exp(own - top)
    total = tl.sum(sums * scales) + own_weight
    if HAS_SINKS:
        total += tl.exp(sink - top)
    result = (tl.sum(parts * scales[:, None], 0) + own_weight * value) / total
    tl.store(out + (row * HEADS + head) * D + d, result.to(out.dtype.element_ty), mask=d_in)
