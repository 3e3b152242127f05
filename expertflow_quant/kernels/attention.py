"""Grouped-query attention of one new token per row over a static KV cache whose rows have their own lengths.

The cache is read once for all query heads of a KV head. Keys are split among programs so that one row alone keeps
the device busy (Flash-Decoding, Dao, Haziza, Massa, Sizov 2023), and the parts are joined by their maxima and sums.
The new token's key and value are stored into the cache on the way.
"""

import torch
from torch import Tensor
from torch.nn import functional

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.kernels.launch import interpreted, use_triton

NO_WINDOW = 2**30
PROGRAMS = 256
"""Programs that a launch aims at: about two for every multiprocessor of a large GPU."""

MAX_SPLITS = 64
JOIN_WARPS = 4
BLOCK = 32
"""Keys that a program takes at a time."""

WIDEST_TILE = BLOCK * 512
"""Bytes of a tile of keys: in float32 two stages of those of 256 numbers took 146 KiB of the 99 that a consumer's GPU
has for a program."""


def decode_attention(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scaling: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    *,
    splits: int | None = None,
) -> Tensor:
    """Attention output ``[B, 1, heads, D]`` in q's dtype; softmax and sums in float32.

    ``q [B, heads, 1, D]``, ``k_new`` and ``v_new [B, kv_heads, 1, D]``; caches ``[R, kv_heads, room, D]``, R >= B,
    contiguous; ``lengths`` int32 ``[R]``: tokens that row b has in the cache before this one, below ``room``. The
    new token's key and value are written at ``lengths[b]``; lengths stay as they are. ``window``: a token sees that
    many tokens, itself included. ``sinks [heads]``: logits that only take part in the softmax's sum. Raises
    ExpertFlowError for shapes or dtypes that do not fit together.
    """
    _check(q, k_new, v_new, k_cache, v_cache, lengths)
    if not use_triton(q):
        return decode_attention_reference(q, k_new, v_new, k_cache, v_cache, lengths, scaling, window, sinks)
    from expertflow_quant.kernels.attention_kernels import join_kernel, split_kernel

    rows, heads, _, d = q.shape
    kv_heads = k_new.shape[1]
    group = heads // kv_heads
    shares = splits or _splits(rows * kv_heads, k_cache.shape[2])
    group_pad, d_pad = max(16, _power(group)), max(16, _power(d))
    out = torch.empty(rows, 1, heads, d, dtype=q.dtype, device=q.device)
    parts = rows * kv_heads * shares * group_pad
    part_out = torch.empty(parts * d_pad, dtype=torch.float32, device=q.device)
    part_max, part_sum = torch.empty(2, parts, dtype=torch.float32, device=q.device).unbind()
    strides = [t.stride(axis) for t in (q, k_new, v_new) for axis in (0, 1)]
    sizes = {"KV_HEADS": kv_heads, "GROUP": group, "GROUP_PAD": group_pad, "D": d, "D_PAD": d_pad, "SPLITS": shares}
    split_kernel[(rows * kv_heads, shares)](
        *(q, k_new, v_new, k_cache, v_cache, lengths, part_out, part_max, part_sum, scaling, window or NO_WINDOW),
        *(*strides, k_cache.stride(0), k_cache.stride(1)),
        **sizes,
        BLOCK=keys_at_a_time(q.dtype, d_pad),
        WIDE=q.dtype == torch.float32 or interpreted(),
        num_warps=4,
    )
    join_kernel[(rows * heads,)](
        *(q, k_new, v_new, q if sinks is None else sinks, part_out, part_max, part_sum, out, scaling, *strides),
        HEADS=heads,
        **sizes,
        HAS_SINKS=sinks is not None,
        num_warps=JOIN_WARPS,
    )
    return out


def decode_attention_reference(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scaling: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The plain PyTorch twin of ``decode_attention``: every row over the whole room, masked."""
    rows, heads = q.shape[:2]
    at = lengths[:rows].long()
    index = torch.arange(rows, device=q.device)
    k_cache[index, :, at] = k_new[:, :, 0]
    v_cache[index, :, at] = v_new[:, :, 0]
    group = heads // k_new.shape[1]
    keys, values = (cache[:rows].float().repeat_interleave(group, dim=1) for cache in (k_cache, v_cache))
    place = torch.arange(k_cache.shape[2], device=q.device)
    seen = (place <= at[:, None]) & (place > at[:, None] - (window or NO_WINDOW))
    scores = (q.float() @ keys.transpose(2, 3) * scaling).masked_fill(~seen[:, None, None], float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(rows, -1, 1, 1)], dim=-1)
    weights = functional.softmax(scores, dim=-1)[..., : place.shape[0]]
    safe = values.masked_fill(~seen[:, None, :, None], 0.0)  # the room beyond a row's tokens may hold anything
    return (weights @ safe).transpose(1, 2).to(q.dtype)


def keys_at_a_time(dtype: torch.dtype, d_pad: int) -> int:
    """BLOCK, or as many keys of ``d_pad`` numbers as ``WIDEST_TILE`` holds, at least 16."""
    return max(16, min(BLOCK, WIDEST_TILE // (d_pad * dtype.itemsize)))


def _splits(pairs: int, room: int) -> int:
    """A power of two: enough shares for ``PROGRAMS`` programs, none smaller than one block of a full cache."""
    wanted = max(1, PROGRAMS // pairs)
    return min(MAX_SPLITS, _power(min(wanted, -(-room // BLOCK))))


def _power(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _check(q: Tensor, k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> None:
    rows, heads, new, d = q.shape
    kv_heads = k_new.shape[1]
    fits = (
        new == 1
        and k_new.shape == v_new.shape == (rows, kv_heads, 1, d)
        and heads % kv_heads == 0
        and k_cache.shape == v_cache.shape
        and k_cache.shape[0] >= rows
        and (k_cache.shape[1], k_cache.shape[3]) == (kv_heads, d)
    )
    if not fits:
        raise ExpertFlowError(
            f"decode attention of q {tuple(q.shape)}, k {tuple(k_new.shape)}, v {tuple(v_new.shape)} over caches "
            f"{tuple(k_cache.shape)}, {tuple(v_cache.shape)}: it takes one new token a row, with one head size"
        )
    if len({t.dtype for t in (q, k_new, v_new, k_cache, v_cache)}) != 1 or lengths.dtype != torch.int32:
        raise ExpertFlowError(
            f"decode attention needs one dtype for q, k, v and caches and int32 lengths, got {q.dtype}, "
            f"{k_new.dtype}, {v_new.dtype}, {k_cache.dtype}, {v_cache.dtype} and {lengths.dtype}"
        )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous() and {t.stride(3) for t in (q, k_new, v_new)} == {1}):
        raise ExpertFlowError("decode attention needs contiguous caches, and heads whose values lie side by side")
