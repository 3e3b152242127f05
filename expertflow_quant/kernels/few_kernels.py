# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the product for few tokens: rows of codes times one activation vector, read where they lie.

Each program multiplies a tile of rows by units (few_tile.py); every thread keeps the units' sums apart until the last
tile, so there is one reduction per row, and results do not depend on the order of programs.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertflow_quant.kernels.few_tile import layout_field, tile_sums
from expertflow_quant.kernels.table import COLUMNS

_BITS = tl.constexpr(COLUMNS.index("bits"))
_UP_BIAS = tl.constexpr(COLUMNS.index("gate_up.bias"))
_UP = tl.constexpr(tuple(COLUMNS.index(f"gate_up.{name}") for name in ("codes", "scales", "zeros", "group_units")))
_DOWN_BIAS = tl.constexpr(COLUMNS.index("down.bias"))
_DOWN = tl.constexpr(tuple(COLUMNS.index(f"down.{name}") for name in ("codes", "scales", "zeros", "group_units")))


@triton.jit
def _pair_rows(
    base,
    row,
    table,
    first,
    ahead,
    x,
    x_start,
    factor,
    total,
    FIELDS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    LAYOUT: tl.constexpr,
    ZEROS: tl.constexpr,
    INPUT_SCALE: tl.constexpr,
    WAIT: tl.constexpr,
):
    """``total [R, BLOCK]`` plus one expert's rows times the vector at ``x + x_start``, times ``factor``."""
    for start in tl.range(0, UNITS, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        part = tile_sums(
            base, row, table, first, ahead, unit, x, x_start + unit * 8, factor, unit < UNITS,
            FIELDS, UNITS, BITS, LAYOUT, ZEROS, INPUT_SCALE, WAIT,
        )  # fmt: skip
        total += part
    return total


@triton.jit
def _ahead(first, lane, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``lane``, held back where the last block has more rows than are left: it reads the last one again."""
    if ROWS % BLOCK == 0:
        return lane
    else:
        return tl.minimum(first + lane, ROWS - 1) - first


@triton.jit
def _bias(base, row, table, out_rows, COLUMN: tl.constexpr, LAYOUT: tl.constexpr):
    bias = (base + layout_field(table, row, COLUMN, LAYOUT)).to(tl.pointer_type(tl.bfloat16))
    return tl.load(bias + out_rows).to(tl.float32)


@triton.jit
def gate_up_kernel(
    hidden,
    ids,
    addresses,
    row_of,
    table,
    out,
    experts,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    FUSED: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    ZEROS: tl.constexpr,
    INPUT_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (b, p): block b of pair p's row in ``out [P, OUT]``. FUSED: OUT = I values silu(gate) * up, from ROWS
    rows, gate and up in turn; else OUT rows of gate_up as they are."""
    if OVERLAP:
        gdc_launch_dependents()
    pair = tl.program_id(1)
    expert = tl.load(ids + pair)
    if expert < experts:
        base = tl.load(addresses + expert)
        row = tl.load(row_of + expert)
        lane = tl.arange(0, ROWS)
        if FUSED:
            first = tl.program_id(0) * (ROWS // 2)
            ahead = _ahead(first, lane // 2, OUT, ROWS // 2) + (lane % 2) * OUT
        else:
            first = tl.program_id(0) * ROWS
            ahead = _ahead(first, lane, OUT, ROWS)
        bits = layout_field(table, row, _BITS, LAYOUT)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for index in tl.static_range(len(WIDTHS)):
            if len(WIDTHS) == 1 or bits == WIDTHS[index]:
                total = _pair_rows(
                    base, row, table, first, ahead, hidden, (pair // TOP_K) * HIDDEN, 1.0, total,
                    _UP, HIDDEN // 8, BLOCK, WIDTHS[index], LAYOUT, ZEROS, INPUT_SCALE, False,
                )  # fmt: skip
        sums = tl.sum(total, 1)
        if BIAS:
            sums += _bias(base, row, table, first + ahead, _UP_BIAS, LAYOUT)
        if FUSED:
            gate, up = tl.split(tl.reshape(sums, (ROWS // 2, 2)))
            place = first + tl.arange(0, ROWS // 2)
            value = gate * tl.sigmoid(gate) * up
        else:
            place = first + lane
            value = sums
        tl.store(out + pair * OUT + place, value.to(out.dtype.element_ty), mask=place < OUT)


@triton.jit
def down_kernel(
    inner,
    ids,
    weights,
    addresses,
    row_of,
    table,
    out,
    experts,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (b, t): ROWS outputs of token t in ``out [T, HIDDEN]``, from ``inner [P, INTERMEDIATE]``.

    One width: the pairs' units lie end to end in one long row, each with its own record's address, so that no tile is
    partly empty and all records are read at once. Several widths: one pair after the other, each in its width's branch.
    """
    UNITS: tl.constexpr = INTERMEDIATE // 8
    token = tl.program_id(1)
    first = tl.program_id(0) * ROWS
    ahead = _ahead(first, tl.arange(0, ROWS), HIDDEN, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    if len(WIDTHS) == 1:
        for start in tl.range(0, TOP_K * UNITS, BLOCK, loop_unroll_factor=UNROLL):
            place = start + tl.arange(0, BLOCK)
            pair = token * TOP_K + place // UNITS
            unit = place % UNITS
            expert = tl.load(ids + pair, mask=place < TOP_K * UNITS, other=experts)
            valid = expert < experts
            base = tl.load(addresses + expert, mask=valid, other=0)
            row = tl.load(row_of + expert, mask=valid, other=0)
            weight = tl.load(weights + pair, mask=valid, other=0.0).to(tl.float32)
            total += tile_sums(
                base[None, :], row[None, :], table, first, ahead, unit, inner, pair * INTERMEDIATE + unit * 8,
                weight[None, :], valid, _DOWN, UNITS, WIDTHS[0], LAYOUT, ZEROS, False, OVERLAP,
            )  # fmt: skip
    else:
        if OVERLAP:
            gdc_wait()
        for choice in tl.range(0, TOP_K):
            pair = token * TOP_K + choice
            expert = tl.load(ids + pair)
            if expert < experts:
                base = tl.load(addresses + expert)
                row = tl.load(row_of + expert)
                weight = tl.load(weights + pair).to(tl.float32)
                bits = layout_field(table, row, _BITS, LAYOUT)
                for index in tl.static_range(len(WIDTHS)):
                    if bits == WIDTHS[index]:
                        total = _pair_rows(
                            base, row, table, first, ahead, inner, pair * INTERMEDIATE, weight, total,
                            _DOWN, UNITS, BLOCK, WIDTHS[index], LAYOUT, ZEROS, False, False,
                        )  # fmt: skip
    sums = tl.sum(total, 1)
    if BIAS:
        for choice in tl.range(0, TOP_K):
            expert = tl.load(ids + token * TOP_K + choice)
            if expert < experts:
                weight = tl.load(weights + token * TOP_K + choice).to(tl.float32)
                base = tl.load(addresses + expert)
                row = tl.load(row_of + expert)
                bias = _bias(base, row, table, first + ahead, _DOWN_BIAS, LAYOUT)
                sums += weight * bias
    place = first + tl.arange(0, ROWS)
    tl.store(out + token * HIDDEN + place, sums.to(out.dtype.element_ty), mask=place < HIDDEN)
