"""Dequantization on load: whole records decoded to dense matrices, for products with many tokens per expert."""

import torch
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.kernels.grouped import DTYPES, common_group
from expertflow_quant.kernels.grouped_reference import weights_at
from expertflow_quant.kernels.launch import use_triton
from expertflow_quant.kernels.table import COLUMNS, LayoutTable

TALL, WIDE = 8, 256
"""Rows of a program and columns of a step."""
NUM_WARPS = 4


def unpack_records(
    addresses: Tensor,
    row_of: Tensor,
    table: LayoutTable,
    gate_up: Tensor,
    down: Tensor,
    tall: int = TALL,
    wide: int = WIDE,
    num_warps: int = NUM_WARPS,
) -> None:
    """Decode n records into gate_up ``[n, 2I or I, H]`` and down ``[n, H, I]``, equal to ``dequantize`` bit by bit.

    addresses int64 ``[n]`` of the records, row_of int32 ``[n]`` their layouts' rows in ``table``; gate_up and down are
    of one floating dtype, to which float32 values are rounded once. All contiguous on one device. Input scales and
    biases stay where they are. Raises ExpertFlowError for other shapes or dtypes.
    """
    _check(addresses, row_of, table, gate_up, down)
    if not use_triton(gate_up):
        unpack_reference(addresses, row_of, table, gate_up, down)
        return
    for name, out in (("gate_up", gate_up), ("down", down)):
        _launch(name, addresses, row_of, table, out, tall, wide, num_warps)


def unpack_reference(addresses: Tensor, row_of: Tensor, table: LayoutTable, gate_up: Tensor, down: Tensor) -> None:
    """Twin of ``unpack_records``, on the CPU."""
    for index, (address, row) in enumerate(zip(addresses.tolist(), row_of.tolist(), strict=True)):
        weights = weights_at(address, table.layouts[row], gate_up.dtype)
        gate_up[index] = weights.gate_up
        down[index] = weights.down


def _launch(
    name: str, addresses: Tensor, row_of: Tensor, table: LayoutTable, out: Tensor, tall: int, wide: int, num_warps: int
) -> None:
    from expertflow_quant.kernels.unpack_kernel import unpack_kernel

    count, rows, columns = out.shape
    if count == 0:
        return
    unpack_kernel[(-(-rows // tall), count)](
        addresses,
        row_of,
        table.rows,
        out,
        CODES=COLUMNS.index(f"{name}.codes"),
        GROUP_AT=COLUMNS.index(f"{name}.group_units"),
        ROWS=rows,
        COLUMNS=columns,
        WIDTHS=sum(1 << bits for bits in table.widths),
        HAS_ZEROS=table.has_zeros,
        GROUP=common_group(table, name),
        TALL=tall,
        WIDE=wide,
        num_warps=num_warps,
    )


def _check(addresses: Tensor, row_of: Tensor, table: LayoutTable, gate_up: Tensor, down: Tensor) -> None:
    if addresses.dtype != torch.int64 or row_of.dtype != torch.int32 or addresses.shape != row_of.shape:
        raise ExpertFlowError(
            f"addresses are {addresses.dtype} {tuple(addresses.shape)}, row_of {row_of.dtype} {tuple(row_of.shape)}: "
            "they are int64 and int32 of one entry per record"
        )
    for name, out in (("gate_up", gate_up), ("down", down)):
        expected = (addresses.shape[0], *table.shape.matrices[name])
        if out.shape != expected or out.dtype not in DTYPES or out.dtype != gate_up.dtype:
            raise ExpertFlowError(
                f"{name} is {out.dtype} {tuple(out.shape)}: it must be {expected}, both of the same of float32, "
                "bfloat16, float16"
            )
    if not all(tensor.is_contiguous() for tensor in (addresses, row_of, gate_up, down)):
        raise ExpertFlowError("addresses, row_of, gate_up and down must be contiguous: call .contiguous()")
