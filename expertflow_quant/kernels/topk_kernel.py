# mypy: disable-error-code="no-untyped-def"
"""Triton kernel of the k largest: see topk.py."""

import triton
import triton.language as tl


@triton.jit
def topk_kernel(scores, values, indices, columns, K: tl.constexpr, COLUMNS_PAD: tl.constexpr):
    """One row: k times the largest of what is left. Score and place are one number, so a maximum finds both; a score's
    bits, but for the sign, are ordered like the scores."""
    row = tl.program_id(0)
    place = tl.arange(0, COLUMNS_PAD)
    score = tl.load(scores + row * columns + place, mask=place < columns, other=float("-inf")).to(tl.float32) + 0.0
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) + (COLUMNS_PAD - place)
    key = tl.where(place < columns, key, -(1 << 62) * 2)
    for rank in tl.static_range(K):
        largest = tl.max(key, 0)
        index = COLUMNS_PAD - (largest & 0x7FFFFFFF).to(tl.int32)
        found = (largest >> 32).to(tl.int32)
        value = (found ^ ((found >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(values + row * K + rank, value.to(values.dtype.element_ty))
        tl.store(indices + row * K + rank, index.to(tl.int64))
        key = tl.where(place == index, -(1 << 62) * 2, key)
