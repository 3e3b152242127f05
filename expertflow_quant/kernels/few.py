"""The product for few tokens: every routed pair reads its expert's codes where they lie, nothing is sorted or decoded
ahead. Bound by memory up to about eight tokens; ``grouped`` serves more, reading each expert once."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError, RecordLayout
from expertflow_quant.kernels.few_reference import few_product_reference
from expertflow_quant.kernels.gate import Gate
from expertflow_quant.kernels.launch import use_triton
from expertflow_quant.kernels.table import COLUMNS, LOOKED_UP, UNIT, LayoutTable, width_of

HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Tile:
    """What one program computes at a time: ``rows`` of a matrix (a power of two, at least 2) by ``units`` of eight
    columns (a power of two), with ``warps`` warps. ``unroll``: how many tiles of down are in flight together."""

    rows: int
    units: int
    warps: int
    unroll: int = 1


TILES = {
    2: (Tile(rows=8, units=256, warps=4), Tile(rows=4, units=1024, warps=8)),
    3: (Tile(rows=8, units=128, warps=4), Tile(rows=4, units=256, warps=2, unroll=6)),
    4: (Tile(rows=16, units=128, warps=4), Tile(rows=2, units=256, warps=1, unroll=3)),
    8: (Tile(rows=8, units=64, warps=2), Tile(rows=2, units=256, warps=2)),
    16: (Tile(rows=2, units=128, warps=2), Tile(rows=4, units=256, warps=2, unroll=6)),
    4 + LOOKED_UP: (Tile(rows=16, units=128, warps=4), Tile(rows=2, units=256, warps=1, unroll=3)),
}
"""gate_up's tile and down's by the width of the codes, for tables of one layout: the best of a sweep on an H100, groups
of 128, experts of 768 x 2048, 8 a token; nf4's are int4's."""
UP_TILE_MIXED = Tile(rows=16, units=128, warps=2)
"""For tables of several layouts, whose numbers take registers too: a larger tile spills."""
DOWN_TILE_MIXED = Tile(rows=8, units=128, warps=4)


def few_product(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    addresses: Tensor,
    row_of: Tensor,
    table: LayoutTable,
    gate: Gate,
    out: Tensor | None = None,
    *,
    up_tile: Tile | None = None,
    down_tile: Tile | None = None,
) -> Tensor:
    """Sum over k of ``weights[t, k] * expert(ids[t, k])(hidden[t])``, ``[T, H]`` in hidden's dtype.

    ``hidden [T, H]`` float32, bfloat16 or float16; ``ids [T, K]`` int32 or int64, ids from E on add nothing;
    ``weights [T, K]`` floating; ``addresses`` int64 ``[E]`` of records readable from hidden's device, on 16-byte
    boundaries; ``row_of`` int32 ``[E]`` into ``table``; all contiguous. ``out`` takes the result if given. Sums are
    float32 and rounded once; what lies between the two products is rounded to hidden's dtype. Two launches, no host
    synchronisation, no atomics: equal inputs give equal bits.
    Raises ExpertFlowError for tensors of other shapes, dtypes, strides or devices.
    """
    _check(hidden, ids, weights, addresses, row_of, table)
    if out is None:
        out = torch.empty_like(hidden)
    elif out.shape != hidden.shape or out.dtype != hidden.dtype or not out.is_contiguous():
        raise ExpertFlowError(
            f"out is {out.dtype} {tuple(out.shape)} with stride {out.stride()}: it must be like hidden, "
            f"{hidden.dtype} {tuple(hidden.shape)}, in one piece"
        )
    if not len(hidden):
        return out
    if not use_triton(hidden):
        return out.copy_(few_product_reference(hidden, ids, weights, addresses, row_of, table, gate))
    mixed = len(table.layouts) > 1
    usual = (UP_TILE_MIXED, DOWN_TILE_MIXED) if mixed else TILES[width_of(table.layouts[0].format)]
    up_tile, down_tile = up_tile or usual[0], down_tile or usual[1]
    overlap = gate.fused is not None and _overlaps(hidden.device)
    inner = _inner(hidden, ids, addresses, row_of, table, gate, up_tile, overlap)
    _down(inner, ids, weights, addresses, row_of, table, out, down_tile, overlap)
    return out


@lru_cache(maxsize=8)
def _overlaps(device: torch.device) -> bool:
    """Whether down may start while gate_up ends (programmatic dependent launch, from Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _inner(
    hidden: Tensor,
    ids: Tensor,
    addresses: Tensor,
    row_of: Tensor,
    table: LayoutTable,
    gate: Gate,
    tile: Tile,
    overlap: bool,
) -> Tensor:
    from expertflow_quant.kernels.few_kernels import gate_up_kernel

    shape = table.shape
    fused = gate.fused is not None and shape.has_gate
    width = shape.intermediate if fused else shape.matrices["gate_up"][0]
    inner = hidden.new_empty(ids.numel(), width)
    outputs_per_program = tile.rows // 2 if fused else tile.rows
    gate_up_kernel[(-(-width // outputs_per_program), ids.numel())](
        hidden,
        ids,
        addresses,
        row_of,
        table.rows,
        inner,
        len(addresses),
        TOP_K=ids.shape[1],
        HIDDEN=shape.hidden,
        OUT=width,
        FUSED=fused,
        INPUT_SCALE=table.has_input_scale,
        ROWS=tile.rows,
        BLOCK=_units(tile, shape.hidden),
        OVERLAP=overlap,
        **_constants(table.layouts),
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )
    return inner if fused else gate.apply(inner).contiguous()


def _down(
    inner: Tensor,
    ids: Tensor,
    weights: Tensor,
    addresses: Tensor,
    row_of: Tensor,
    table: LayoutTable,
    out: Tensor,
    tile: Tile,
    overlap: bool,
) -> None:
    from expertflow_quant.kernels.few_kernels import down_kernel

    shape, top_k = table.shape, ids.shape[1]
    down_kernel[(-(-shape.hidden // tile.rows), len(ids))](
        inner,
        ids,
        weights,
        addresses,
        row_of,
        table.rows,
        out,
        len(addresses),
        TOP_K=top_k,
        HIDDEN=shape.hidden,
        INTERMEDIATE=shape.intermediate,
        ROWS=tile.rows,
        BLOCK=_units(tile, shape.intermediate * (top_k if len(table.widths) == 1 else 1)),
        UNROLL=tile.unroll,
        OVERLAP=overlap,
        **_constants(table.layouts),
        num_warps=tile.warps,
        enable_fp_fusion=True,
        **({"launch_pdl": True} if overlap else {}),
    )


def _units(tile: Tile, columns: int) -> int:
    """The tile's units, fewer where the columns would fill only half of them."""
    return min(tile.units, 1 << (columns // UNIT - 1).bit_length())


@lru_cache(maxsize=256)
def _constants(layouts: tuple[RecordLayout, ...]) -> dict[str, Any]:
    """What kernels are compiled for: widths that occur, and all numbers of the layout where there is only one."""
    table = LayoutTable(layouts, torch.device("cpu"))
    return {
        "WIDTHS": tuple(sorted(table.widths)),
        "LAYOUT": tuple(table.rows[0, : len(COLUMNS)].tolist()) if len(layouts) == 1 else None,
        "ZEROS": table.has_zeros,
        "BIAS": table.shape.has_bias,
    }


def _check(hidden: Tensor, ids: Tensor, weights: Tensor, addresses: Tensor, row_of: Tensor, table: LayoutTable) -> None:
    shape = table.shape
    if hidden.dtype not in HIDDEN_DTYPES or hidden.ndim != 2 or hidden.shape[1] != shape.hidden:
        raise ExpertFlowError(
            f"hidden is {hidden.dtype} {tuple(hidden.shape)}: it must be float32, bfloat16 or float16 "
            f"[tokens, {shape.hidden}]"
        )
    if ids.dtype not in ID_DTYPES or ids.ndim != 2 or len(ids) != len(hidden) or not ids.shape[1]:
        raise ExpertFlowError(
            f"ids are {ids.dtype} {tuple(ids.shape)}: they must be int32 or int64 [{len(hidden)}, top_k]"
        )
    if weights.shape != ids.shape or not weights.is_floating_point():
        raise ExpertFlowError(
            f"weights are {weights.dtype} {tuple(weights.shape)}: they must be floating {tuple(ids.shape)}, like ids"
        )
    for name, tensor, dtype in (("addresses", addresses, torch.int64), ("row_of", row_of, torch.int32)):
        if tensor.dtype != dtype or tensor.shape != (addresses.numel(),):
            raise ExpertFlowError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}: it must be {dtype}, one for each expert"
            )
    for name, tensor in dict(hidden=hidden, ids=ids, weights=weights, addresses=addresses, row_of=row_of).items():
        if not tensor.is_contiguous() or tensor.device != hidden.device:
            raise ExpertFlowError(
                f"{name} is on {tensor.device} with stride {tensor.stride()}: it must be in one piece on "
                f"{hidden.device}, call .contiguous() or .to(device)"
            )
    if shape.hidden % UNIT or shape.intermediate % UNIT:
        raise ExpertFlowError(
            f"experts of {shape.hidden} by {shape.intermediate}: this product reads columns in eights, "
            "use expert_product for such sizes"
        )
