# mypy: disable-error-code="no-untyped-def"
"""Triton kernel of ``grouped``: one matrix of every block's expert times the rows of the block.

One program computes OUT columns of one block. Blocks in groups of GROUP_BLOCKS run column tile by column tile, so that
neighbours in time share weight tiles, and the rows of a group stay in the second-level cache.
"""

import triton
import triton.language as tl

from expertflow_quant.kernels.decode_tile import decode_tile, matrix_parts
from expertflow_quant.kernels.table import COLUMNS, WIDTH

_WIDTH = tl.constexpr(WIDTH)
_INPUT_SCALE = tl.constexpr(COLUMNS.index("gate_up.input_scale"))


@triton.jit
def grouped_kernel(
    x,
    out,
    order,
    block_expert,
    block_start,
    block_end,
    addresses,
    row_of,
    table,
    dense,
    index_of,
    blocks,
    CODES: tl.constexpr,
    BIAS: tl.constexpr,
    GROUP_AT: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH_ALL: tl.constexpr,
    DOWN: tl.constexpr,
    FUSED: tl.constexpr,
    DENSE: tl.constexpr,
    WIDTHS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_INPUT_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """gate_up (DOWN = False): x is hidden, read by token, out is by position in ``order``, gated when FUSED. down:
    x is by position, out by pair. ROWS, DEPTH_ALL: the matrix ``[out, in]``. WIDE weight rows a program, DEPTH
    columns a step. WIDTHS: bit n is set where the table's ``bits`` are n. FUSED: gate row n and up row n + ROWS / 2 lie
    side by side in a tile, so that one thread holds both."""
    block, tile = _place(blocks, (ROWS + WIDE - 1) // WIDE, GROUP_BLOCKS)
    expert = tl.load(block_expert + block)
    slab = expert
    if DENSE:
        slab = tl.load(index_of + tl.maximum(expert, 0))
    if (expert >= 0) & (slab >= 0):
        start = tl.load(block_start + block)
        end = tl.load(block_end + block)
        position = tl.minimum(start + tl.arange(0, BLOCK), end - 1)  # the last pair again and again, never stored
        pair = tl.load(order + position)
        source = position if DOWN else pair // TOP_K
        x_rows = x + source.to(tl.int64) * DEPTH_ALL
        column = tile * WIDE + tl.arange(0, WIDE)
        row = (column // 2 + column % 2 * (ROWS // 2)) if FUSED else column
        row = tl.where(column < ROWS, row, 0)
        fields = table + tl.load(row_of + expert) * _WIDTH
        base = tl.load(addresses + expert)
        scale_at = tl.load(fields + _INPUT_SCALE) if HAS_INPUT_SCALE else 0
        scale_in = (base + scale_at).to(tl.pointer_type(tl.float16))
        acc = tl.zeros((BLOCK, WIDE), tl.float32)
        if DENSE:
            weight = dense + slab.to(tl.int64) * (ROWS * DEPTH_ALL)
            acc = _plain(acc, x_rows, weight, row, scale_in, scale_at, DEPTH_ALL, DEPTH, HAS_INPUT_SCALE, WIDEN)
        else:
            acc = _from_record(
                acc, x_rows, base, fields, row, scale_in, scale_at,
                CODES, GROUP_AT, DEPTH_ALL, DEPTH, WIDTHS, HAS_INPUT_SCALE, HAS_ZEROS, GROUP, WIDEN,
            )  # fmt: skip
        if HAS_BIAS:
            bias = (base + tl.load(fields + BIAS)).to(tl.pointer_type(tl.bfloat16))
            acc += tl.load(bias + row).to(tl.float32)[None, :]
        target = (pair if DOWN else position).to(tl.int64)
        covered = start + tl.arange(0, BLOCK) < end
        if FUSED:
            gate, up = tl.split(tl.reshape(acc, (BLOCK, WIDE // 2, 2)))
            narrow = tile * (WIDE // 2) + tl.arange(0, WIDE // 2)
            _store(out, gate * tl.sigmoid(gate) * up, target, covered, narrow, ROWS // 2)
        else:
            _store(out, acc, target, covered, column, ROWS)


@triton.jit
def _place(blocks, TILES: tl.constexpr, GROUP_BLOCKS: tl.constexpr):
    """This program's block and column tile."""
    program = tl.program_id(0)
    first = program // (GROUP_BLOCKS * TILES) * GROUP_BLOCKS
    height = tl.minimum(blocks - first, GROUP_BLOCKS)
    inside = program % (GROUP_BLOCKS * TILES)
    return first + inside % height, inside // height


@triton.jit
def _store(out, value, target, covered, column, WIDTH: tl.constexpr):
    spot = out + target[:, None] * WIDTH + column[None, :]
    tl.store(spot, value.to(out.dtype.element_ty), mask=covered[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _from_record(
    acc, x_rows, base, fields, row, scale_in, scale_at,
    CODES: tl.constexpr, GROUP_AT: tl.constexpr, DEPTH_ALL: tl.constexpr, DEPTH: tl.constexpr, WIDTHS: tl.constexpr,
    HAS_INPUT_SCALE: tl.constexpr, HAS_ZEROS: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc + x @ W[row].T of a record's matrix, by the loop for its own width."""
    bits = tl.load(fields)
    units = tl.load(fields + GROUP_AT)
    codes, scales, zeros, zero = matrix_parts(base, fields, CODES)
    for BITS in tl.static_range(2, 21):
        if (WIDTHS >> BITS) % 2 == 1:  # noqa: SIM102 - tested when the kernel is compiled, the next when it runs
            if bits == BITS:
                if BITS == 16:
                    weight = codes.to(tl.pointer_type(tl.bfloat16))
                    acc = _plain(acc, x_rows, weight, row, scale_in, scale_at, DEPTH_ALL, DEPTH, HAS_INPUT_SCALE, WIDEN)
                else:
                    acc = _coded(
                        acc, x_rows, fields, codes, scales, zeros, zero, units, row, scale_in, scale_at,
                        BITS, DEPTH_ALL, DEPTH, HAS_INPUT_SCALE, HAS_ZEROS, GROUP, WIDEN,
                    )  # fmt: skip
    return acc


@triton.jit
def _input_tile(
    x_rows, column, scale_in, scale_at, DEPTH_ALL: tl.constexpr, DEPTH: tl.constexpr, HAS_INPUT_SCALE: tl.constexpr
):
    """``[rows, DEPTH]`` of x, times the input scale in float32 and rounded, as the plain path does."""
    at = column + tl.arange(0, DEPTH)
    if DEPTH_ALL % DEPTH == 0:
        value = tl.load(x_rows[:, None] + at[None, :])
    else:
        value = tl.load(x_rows[:, None] + at[None, :], mask=(at < DEPTH_ALL)[None, :], other=0.0)
    if HAS_INPUT_SCALE:
        known = tl.where(scale_at >= 0, DEPTH_ALL, 0)  # this layout may have none where another has one
        scale = tl.load(scale_in + at, mask=at < known, other=1.0).to(tl.float32)
        value = (value.to(tl.float32) * scale[None, :]).to(value.dtype)
    return value


@triton.jit
def _plain(
    acc, x_rows, weight, row, scale_in, scale_at,
    DEPTH_ALL: tl.constexpr, DEPTH: tl.constexpr, HAS_INPUT_SCALE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc + x @ weight[row].T of a floating matrix."""
    dtype = x_rows.dtype.element_ty
    w_rows = weight + row[:, None] * DEPTH_ALL
    for column in range(0, DEPTH_ALL, DEPTH):
        value = _input_tile(x_rows, column, scale_in, scale_at, DEPTH_ALL, DEPTH, HAS_INPUT_SCALE)
        at = column + tl.arange(0, DEPTH)
        if DEPTH_ALL % DEPTH == 0:
            own = tl.load(w_rows + at[None, :])
        else:
            own = tl.load(w_rows + at[None, :], mask=(at < DEPTH_ALL)[None, :], other=0.0)
        acc = _dot(value, own.to(dtype), acc, WIDEN)
    return acc


@triton.jit
def _coded(
    acc, x_rows, fields, codes, scales, zeros, zero, group_units, row, scale_in, scale_at,
    BITS: tl.constexpr, DEPTH_ALL: tl.constexpr, DEPTH: tl.constexpr, HAS_INPUT_SCALE: tl.constexpr,
    HAS_ZEROS: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc + x @ W[row].T of a matrix of codes, W rounded once to x's dtype."""
    dtype = x_rows.dtype.element_ty
    for column in range(0, DEPTH_ALL, DEPTH):
        value = _input_tile(x_rows, column, scale_in, scale_at, DEPTH_ALL, DEPTH, HAS_INPUT_SCALE)
        own = decode_tile(
            fields, codes, scales, zeros, zero, group_units, row, column, DEPTH_ALL, BITS, GROUP, HAS_ZEROS, DEPTH
        )
        acc = _dot(value, own.to(dtype), acc, WIDEN)
    return acc


@triton.jit
def _dot(value, own, acc, WIDEN: tl.constexpr):
    """acc + value @ own.T, float32 without shortcuts. WIDEN: the interpreter multiplies no bfloat16."""
    if WIDEN:
        value = value.to(tl.float32)
        own = own.to(tl.float32)
    return tl.dot(value, tl.trans(own), acc, input_precision="ieee")


@triton.jit
def combine_kernel(
    rows, ids, weights, out, num_experts, WIDTH: tl.constexpr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[t] = float32 sum over k in order of weights[t, k] * rows[t * TOP_K + k], sentinels never read."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(TOP_K):
        expert = tl.load(ids + token * TOP_K + choice)
        known = (expert >= 0) & (expert < num_experts)
        weight = tl.load(weights + token * TOP_K + choice).to(tl.float32)
        row = tl.load(rows + (token * TOP_K + choice) * WIDTH + at, mask=at < tl.where(known, WIDTH, 0), other=0.0)
        total += tl.where(known, weight, 0.0) * row.to(tl.float32)
    tl.store(out + token * WIDTH + at, total.to(out.dtype.element_ty), mask=at < WIDTH)
