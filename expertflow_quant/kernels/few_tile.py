# mypy: disable-error-code="no-untyped-def"
"""Device functions of the product for few tokens: a tile of packed codes, read where they lie, times one vector.

A unit is eight columns of one row.

A code needs no conversion: masked where it stands, at bit p of a word, p + bits <= 23, it is the subnormal float
code * 2 ** (p - 149), exactly, and GPUs multiply subnormals at full rate. The activation brings 2 ** (96 - p), so one
AND and one fused multiply-add serve a code; 2 ** 53 comes back with the zero point, once a unit. Activations up to
2 ** 31 stay finite, and those above 2 ** -49 lose nothing. Needs compilation without flushing to zero, Triton's way.
nf4's codes take a load from sixteen words in the first cache each, about as many as its loads can serve.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from expertflow_quant.kernels.decode_tile import looked_up
from expertflow_quant.kernels.table import COLUMNS, LOOKED_UP, WIDTH

_WIDTH = tl.constexpr(WIDTH)
_LOOKED_UP = tl.constexpr(LOOKED_UP)
_GROW = tl.constexpr(96)
_SHRINK = tl.constexpr(2.0**53)
_ZERO = tl.constexpr(COLUMNS.index("zero"))
_INPUT_SCALE = tl.constexpr(COLUMNS.index("gate_up.input_scale"))


@triton.jit
def layout_field(table, row, COLUMN: tl.constexpr, LAYOUT: tl.constexpr):
    """A layout's number: a constant where the table has one row (LAYOUT), else read, in ``row``'s shape."""
    if LAYOUT is None:
        return tl.load(table + row * _WIDTH + COLUMN)
    else:
        return LAYOUT[COLUMN]


@triton.jit
def _quotient(dividend, divisor, LAYOUT: tl.constexpr):
    """``dividend // divisor``; a divisor read from the table divides as a float, exact below 2 ** 20."""
    if LAYOUT is None:
        return ((dividend + 0.5) / divisor.to(tl.float32)).to(tl.int32)
    else:
        return dividend // divisor


@triton.jit
def _stored(mask, offset, LAYOUT: tl.constexpr):
    """``mask`` where the layout has the field at ``offset``; a kernel compiled for one layout knows that it has."""
    if LAYOUT is None:
        return mask & (tl.broadcast_to(offset, mask.shape) >= 0)
    else:
        return mask


@triton.jit
def _lanes(tile):
    """The eight columns of ``[B, 8]``, each as ``[1, B]``."""
    BLOCK: tl.constexpr = tile.shape[0]
    even, odd = tl.split(tl.reshape(tile, (BLOCK, 4, 2)))
    x04, x26 = tl.split(tl.reshape(even, (BLOCK, 2, 2)))
    x15, x37 = tl.split(tl.reshape(odd, (BLOCK, 2, 2)))
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return (
        x0[None, :],
        x1[None, :],
        x2[None, :],
        x3[None, :],
        x4[None, :],
        x5[None, :],
        x6[None, :],
        x7[None, :],
    )


@triton.jit
def _dot(total, word, x, FIRST: tl.constexpr, COUNT: tl.constexpr, AT: tl.constexpr, BITS: tl.constexpr):
    """``total`` plus code * x / _SHRINK over COUNT codes, the first at bit AT of ``word`` and lane FIRST of ``x``."""
    for j in tl.static_range(COUNT):
        tiny = (word & (((1 << BITS) - 1) << (AT + j * BITS))).to(tl.float32, bitcast=True)
        total += tiny * (x[FIRST + j] * 2.0 ** (_GROW - AT - j * BITS))
    return total


@triton.jit
def _words(address, at, mask, BITS: tl.constexpr):
    """The words of a unit, as a tuple of int32 or int64 tensors of ``at``'s shape; codes start at ``address``."""
    if BITS == 16:
        pair = address.to(tl.pointer_type(tl.int64)) + at * 2
        return tl.load(pair, mask=mask, other=0), tl.load(pair + 1, mask=mask, other=0)
    elif BITS == 8:
        return (tl.load(address.to(tl.pointer_type(tl.int64)) + at, mask=mask, other=0),)
    elif BITS == 4:
        return (tl.load(address.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0),)
    elif BITS == 3:
        byte = address.to(tl.pointer_type(tl.uint8)) + at * 3
        low = tl.load(byte, mask=mask, other=0).to(tl.int32)
        middle = tl.load(byte + 1, mask=mask, other=0).to(tl.int32)
        high = tl.load(byte + 2, mask=mask, other=0).to(tl.int32)
        return (low | (middle << 8) | (high << 16),)
    else:
        return (tl.load(address.to(tl.pointer_type(tl.int16)) + at, mask=mask, other=0).to(tl.int32),)


@triton.jit
def _four(total, word, x, FIRST: tl.constexpr):
    """``total`` plus the four bf16 weights in an int64 times lanes FIRST to FIRST + 3."""
    for half in tl.static_range(2):
        part = (word >> (32 * half)).to(tl.int32)
        total += (part << 16).to(tl.float32, bitcast=True) * x[FIRST + 2 * half]
        total += (part & -65536).to(tl.float32, bitcast=True) * x[FIRST + 2 * half + 1]
    return total


@triton.jit
def _code_dots(words, x, BITS: tl.constexpr):
    """code * x / _SHRINK summed over each unit."""
    if BITS == 8:
        total = 0.0
        for half in tl.static_range(4):
            total = _dot(total, (words[0] >> (16 * half)).to(tl.int32), x, 2 * half, 2, 0, BITS)
        return total
    elif BITS == 4:
        return _dot(_dot(0.0, words[0], x, 0, 5, 0, BITS), words[0] >> 12, x, 5, 3, 8, BITS)
    elif BITS == 3:
        return _dot(_dot(0.0, words[0], x, 0, 7, 0, BITS), words[0] >> 12, x, 7, 1, 9, BITS)
    else:
        return _dot(0.0, words[0], x, 0, 8, 0, BITS)


@triton.jit
def _value_dots(word, table, x):
    """The table's value of each of eight 4-bit codes times x, summed over each unit."""
    total = 0.0
    for j in tl.static_range(8):
        total += looked_up(table, (word >> (4 * j)) & 15) * x[j]
    return total


@triton.jit
def _zero(base, row, table, group, mask, FIELDS: tl.constexpr, LAYOUT: tl.constexpr, ZEROS: tl.constexpr):
    """The units' zero points: the layout's where symmetric, else read at ``group``."""
    same = layout_field(table, row, _ZERO, LAYOUT)
    if ZEROS:
        offset = layout_field(table, row, FIELDS[2], LAYOUT)
        stored = (base + offset).to(tl.pointer_type(tl.uint8)) + group
        zeros = tl.load(stored, mask=_stored(mask, offset, LAYOUT), other=0).to(tl.float32)
        if LAYOUT is None:
            zeros += tl.maximum(same, 0).to(tl.float32)
        return zeros
    else:
        return same


@triton.jit
def tile_sums(
    base,
    row,
    table,
    first,
    ahead,
    unit,
    x,
    x_at,
    factor,
    mask,
    FIELDS: tl.constexpr,
    UNITS: tl.constexpr,
    BITS: tl.constexpr,
    LAYOUT: tl.constexpr,
    ZEROS: tl.constexpr,
    INPUT_SCALE: tl.constexpr,
    WAIT: tl.constexpr,
):
    """float32 ``[R, B]``: what each unit adds to the rows' products, times ``factor``.

    ``base`` (the record's address), ``row`` (in the table) and ``factor`` are scalars, or ``[1, B]`` where every unit
    has its own record; rows are ``first + ahead``, a scalar and ``[R]``; ``unit``, ``x_at`` (the unit's place in ``x``)
    and ``mask`` are ``[B]``. WAIT: ``x`` is being written by the launch before, so the codes are asked for first.
    """
    rows = ahead[:, None]
    units = unit[None, :]
    inside = mask[None, :]
    lane = tl.arange(0, 8)[None, :]
    if not WAIT:
        values = tl.load(x + (x_at[:, None] + lane), mask=mask[:, None], other=0.0)
    CODE_BITS: tl.constexpr = 4 if BITS > _LOOKED_UP else BITS
    codes = base + layout_field(table, row, FIELDS[0], LAYOUT) + first * (UNITS * CODE_BITS)
    words = _words(codes, rows * UNITS + units, inside, CODE_BITS)
    if BITS != 16:
        group_units = layout_field(table, row, FIELDS[3], LAYOUT)
        groups = _quotient(UNITS, group_units, LAYOUT)
        group = rows * groups + _quotient(units, group_units, LAYOUT)
        scales = base + layout_field(table, row, FIELDS[1], LAYOUT) + first * groups * 2
        scale = tl.load(scales.to(tl.pointer_type(tl.float16)) + group, mask=inside, other=0.0).to(tl.float32) * factor
    if WAIT:
        gdc_wait()
        values = tl.load(x + (x_at[:, None] + lane), mask=mask[:, None], other=0.0)
    if INPUT_SCALE:
        offset = layout_field(table, row, _INPUT_SCALE, LAYOUT)
        factors = (base + offset).to(tl.pointer_type(tl.float16)) + (unit[:, None] * 8 + lane)
        by = tl.load(factors, mask=_stored(mask[:, None], offset, LAYOUT), other=1.0).to(tl.float32)
        values = (values.to(tl.float32) * by).to(values.dtype)
    lanes = _lanes(values.to(tl.float32))
    if BITS == 16:
        return _four(_four(0.0, words[0], lanes, 0), words[1], lanes, 4) * factor
    elif BITS > _LOOKED_UP:
        return _value_dots(words[0], table, lanes) * scale
    else:
        sums = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))
        zero = _zero(base + first * groups, row, table, group, inside, FIELDS, LAYOUT, ZEROS)
        return (_code_dots(words, lanes, BITS) * _SHRINK - zero * sums) * scale
