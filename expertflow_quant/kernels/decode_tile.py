# mypy: disable-error-code="no-untyped-def"
"""Device functions that decode a tile of packed codes in their natural order, for products and for unpacking."""

import triton
import triton.language as tl

from expertflow_quant.kernels.table import LOOKED_UP, VALUES

_LOOKED_UP = tl.constexpr(LOOKED_UP)
_VALUES = tl.constexpr(VALUES)
MAGIC_BITS = tl.constexpr(0x4B000000)
"""Float32 2 ** 23: with a code in its low bits it is 2 ** 23 + code, so one subtraction converts and centres it."""


@triton.jit
def matrix_parts(base, fields, CODES: tl.constexpr):
    """Pointers to codes (uint8), scales (fp16) and zeros (uint8), the symmetric zero, and units per group.

    ``fields`` points at the layout's row, CODES is the matrix's first column there; scales and zeros follow it.
    """
    codes_at = tl.load(fields + CODES)
    zeros_at = tl.load(fields + CODES + 2)
    zeros_at = tl.where(zeros_at < 0, codes_at, zeros_at)  # read by layouts without zeros too, and not used
    codes = (base + codes_at).to(tl.pointer_type(tl.uint8))
    scales = (base + tl.load(fields + CODES + 1)).to(tl.pointer_type(tl.float16))
    zeros = (base + zeros_at).to(tl.pointer_type(tl.uint8))
    return tl.multiple_of(codes, 16), tl.multiple_of(scales, 16), tl.multiple_of(zeros, 16), tl.load(fields + 1)


@triton.jit
def raw_codes(codes, rows, unit, inside, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """Codes int32 ``[rows, units, 8]`` from packed rows of COLUMNS codes; units that are not ``inside`` give 0."""
    at = rows[:, None] * (COLUMNS // 8) + unit[None, :]
    mask = inside[None, :]
    if BITS == 8:
        word = tl.load(codes.to(tl.pointer_type(tl.int64)) + at, mask=mask, other=0)
    elif BITS == 4:
        word = tl.load(codes.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0)
    elif BITS == 2:
        word = tl.load(codes.to(tl.pointer_type(tl.uint16)) + at, mask=mask, other=0).to(tl.int32)
    else:  # three bytes from an even address on or one before it: two loads, the last may reach one byte further
        half = codes.to(tl.pointer_type(tl.uint16)) + at * 3 // 2
        word = tl.load(half, mask=mask, other=0).to(tl.int32)
        word |= tl.load(half + 1, mask=mask, other=0).to(tl.int32) << 16
        word = word >> (at % 2 * 8)
    return _spread(word, BITS).to(tl.int32) & ((1 << BITS) - 1)


@triton.jit
def looked_up(table, code):
    """nf4's values of ``code``, float32; ``table`` is any row of the layout table: sixteen words that stay in cache."""
    return tl.load(table + _VALUES + code).to(tl.float32, bitcast=True)


@triton.jit
def _spread(word, BITS: tl.constexpr):
    """``[rows, units, 8]``: word shifted to each of its codes. Joined, not broadcast: the eight stay in one thread."""
    word = tl.join(word, word >> (4 * BITS))
    word = tl.join(word, word >> (2 * BITS))
    word = tl.join(word, word >> BITS)
    return tl.reshape(word, (word.shape[0], word.shape[1], 8))


@triton.jit
def decode_tile(
    fields,
    codes,
    scales,
    zeros,
    zero,
    group_units,
    rows,
    column,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``(code - zero) * scale`` in float32, ``[rows, DEPTH]``: columns ``column`` to ``column + DEPTH`` of ``rows``.

    ``column`` is a multiple of DEPTH; columns past the matrix hold anything finite. BITS above LOOKED_UP: a code's
    value in the table, ``fields`` being a row of it, times its scale. GROUP: units that share a scale if all layouts
    agree, else 0 and ``group_units`` counts them.
    """
    UNITS: tl.constexpr = DEPTH // 8
    unit = column // 8 + tl.arange(0, UNITS)
    inside = unit < COLUMNS // 8
    CODE_BITS: tl.constexpr = 4 if BITS > _LOOKED_UP else BITS
    code = raw_codes(codes, rows, unit, inside, COLUMNS, CODE_BITS)
    if GROUP > 0:
        groups = COLUMNS // 8 // GROUP
        if GROUP % UNITS == 0:  # one scale for a row of the tile
            group = column // (8 * GROUP) + tl.zeros((1, 1), tl.int32)
        else:
            group = tl.minimum(unit // GROUP, groups - 1)[None, :]
    else:
        groups = COLUMNS // 8 // group_units
        group = tl.minimum(unit // group_units, groups - 1)[None, :]
    at = rows[:, None] * groups + group
    scale = tl.load(scales + at).to(tl.float32)[:, :, None]
    value = (code | MAGIC_BITS).to(tl.float32, bitcast=True)
    if BITS > _LOOKED_UP:
        weight = looked_up(fields, code) * scale
    elif HAS_ZEROS:
        own = tl.load(zeros + at).to(tl.int32)
        centre = (tl.where(zero < 0, own, zero) | MAGIC_BITS).to(tl.float32, bitcast=True)
        weight = (value - centre[:, :, None]) * scale
    else:
        weight = (value - (zero | MAGIC_BITS).to(tl.float32, bitcast=True)) * scale
    return tl.reshape(weight, (rows.shape[0], DEPTH))
