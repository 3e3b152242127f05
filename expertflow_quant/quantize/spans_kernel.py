# mypy: disable-error-code="no-untyped-def"
"""Triton kernel of ``spans``: one program rounds a span of columns for ROWS rows of one expert.

Compiled without fused multiply-adds, and with divisions that round correctly: then it equals its twin bit by bit.
"""

import triton
import triton.language as tl

_ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2 ** 23: added and taken away again it rounds to whole numbers, ties to even."""
_FAR = tl.constexpr(1024.0)
"""Beyond any code, so values may be held there before they are rounded."""


@triton.jit
def round_span_kernel(
    work,
    factor,
    scales,
    zeros,
    codes,
    errors,
    start,
    count,
    rows,
    columns,
    scales_by_expert,
    scales_by_column,
    zeros_by_expert,
    zeros_by_column,
    TOP: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """work, codes ``[E, columns, rows]``, factor ``[E, columns, columns]``, errors ``[E, count, rows]``."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    lane = tl.arange(0, SPAN)
    first = (expert * columns + start) * rows
    covered = (lane < count)[:, None] & inside[None, :]
    left = tl.load(work + first + lane[:, None] * rows + row[None, :], mask=covered, other=0.0)
    diagonal = factor + (expert * columns + start) * columns + start
    for column in range(count):
        value = tl.sum(tl.where(lane[:, None] == column, left, 0.0), 0)
        scale_at = expert * scales_by_expert + column * scales_by_column
        zero_at = expert * zeros_by_expert + column * zeros_by_column
        scale = tl.load(scales + scale_at + row, mask=inside, other=1.0).to(tl.float32)
        zero = tl.load(zeros + zero_at + row, mask=inside, other=0).to(tl.float32)
        level = tl.minimum(tl.maximum(tl.div_rn(value, scale), -_FAR), _FAR)
        level = (level + _ROUNDER) - _ROUNDER + zero
        level = tl.minimum(tl.maximum(level, 0.0), TOP)
        spread = tl.load(diagonal + column * columns + lane, mask=lane < count, other=0.0)
        own = tl.load(diagonal + column * columns + column)
        error = tl.div_rn(value - (level - zero) * scale, tl.zeros((ROWS,), tl.float32) + own)
        tl.store(codes + first + column * rows + row, level.to(tl.int32).to(tl.uint8), mask=inside)
        tl.store(errors + (expert * count + column) * rows + row, error, mask=inside)
        left = left - tl.where(lane > column, spread, 0.0)[:, None] * error[None, :]
