# mypy: disable-error-code="no-untyped-def"
"""Triton kernel of the k largest: see topk.py."""

import triton
import triton.language as tl


@triton.jit
def topk_kernel(scores, values, indices, columns, K: tl.constexpr, COLUMNS_PAD: tl.constexpr):
    """One row: k times the largest of what is left."""
    row = tl.program_id(0)
    place = tl.arange(0, COLUMNS_PAD)
    left = tl.load(scores + row * columns + place, mask=place < columns, other=float("-inf")).to(tl.float32)
    taken = place >= columns
    for rank in tl.static_range(K):
        candidates = tl.where(taken, float("-inf"), left)
        largest = tl.max(candidates, 0)
        index = tl.min(tl.where((candidates == largest) & (taken == 0), place, COLUMNS_PAD), 0)
        tl.store(values + row * K + rank, largest.to(values.dtype.element_ty))
        tl.store(indices + row * K + rank, index.to(tl.int64))
        taken = taken | (place == index)
