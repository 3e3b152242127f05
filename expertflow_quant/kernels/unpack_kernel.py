# mypy: disable-error-code="no-untyped-def"
"""Triton kernel of ``unpack``: one program decodes a few rows of one record's matrix from end to end."""

import triton
import triton.language as tl

from expertflow_quant.kernels.decode_tile import decode_tile, matrix_parts
from expertflow_quant.kernels.table import WIDTH

_WIDTH = tl.constexpr(WIDTH)


@triton.jit
def unpack_kernel(
    addresses,
    row_of,
    table,
    out,
    CODES: tl.constexpr,
    GROUP_AT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTHS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``out[record]`` is a matrix ``[ROWS, COLUMNS]``; TALL rows a program, WIDE columns a step."""
    record = tl.program_id(1)
    base = tl.load(addresses + record)
    row = tl.program_id(0) * TALL + tl.arange(0, TALL)
    inside = row < ROWS
    source = tl.where(inside, row, 0)
    fields = table + tl.load(row_of + record) * _WIDTH
    bits = tl.load(fields)
    units = tl.load(fields + GROUP_AT)
    codes, scales, zeros, zero = matrix_parts(base, fields, CODES)
    target = out + record.to(tl.int64) * (ROWS * COLUMNS) + row[:, None] * COLUMNS
    for BITS in tl.static_range(2, 21):
        if (WIDTHS >> BITS) % 2 == 1:  # noqa: SIM102 - tested when the kernel is compiled, the next when it runs
            if bits == BITS:
                for column in range(0, COLUMNS, WIDE):
                    at = column + tl.arange(0, WIDE)
                    covered = inside[:, None] & (at < COLUMNS)[None, :]
                    if BITS == 16:
                        plain = codes.to(tl.pointer_type(tl.bfloat16))
                        value = tl.load(plain + source[:, None] * COLUMNS + at[None, :], mask=covered, other=0.0)
                        value = value.to(tl.float32)
                    else:
                        value = decode_tile(
                            fields, codes, scales, zeros, zero, units, source, column,
                            COLUMNS, BITS, GROUP, HAS_ZEROS, WIDE,
                        )  # fmt: skip
                    tl.store(target + at[None, :], value.to(out.dtype.element_ty), mask=covered)
