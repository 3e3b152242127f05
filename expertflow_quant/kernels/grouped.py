"""Experts' product for many tokens: blocks of pairs that share an expert, two launches for all blocks.

Weights come as records, decoded tile by tile in the kernel, or as matrices that ``unpack`` has decoded on load.
``(code - zero) * scale`` is rounded once to the dtype of ``hidden``, so both equal the plain path up to the order of
sums. The grouped product in blocks of one expert is that of MegaBlocks (Gale et al., 2023) and vLLM's fused_moe.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.kernels.blocks import Blocks
from expertflow_quant.kernels.gate import Gate
from expertflow_quant.kernels.launch import interpreted, use_triton
from expertflow_quant.kernels.table import COLUMNS, LayoutTable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tiling:
    """How a launch is cut: weight rows a program (``wide``; a gate and its up row count as two), columns a step
    (``depth``), warps, pipeline stages, and blocks that run side by side (``group_blocks``)."""

    wide: int
    depth: int
    num_warps: int
    num_stages: int
    group_blocks: int = 16


CODED = {
    16: Tiling(wide=64, depth=64, num_warps=4, num_stages=3),
    32: Tiling(wide=64, depth=64, num_warps=4, num_stages=3),
    64: Tiling(wide=128, depth=64, num_warps=4, num_stages=3),
    128: Tiling(wide=128, depth=64, num_warps=8, num_stages=3),
}
"""Tiling by block size where weights are decoded in the kernel; 16-bit hidden states."""

DENSE = {
    16: Tiling(wide=128, depth=64, num_warps=4, num_stages=4),
    32: Tiling(wide=128, depth=64, num_warps=4, num_stages=4),
    64: Tiling(wide=128, depth=64, num_warps=4, num_stages=4),
    128: Tiling(wide=256, depth=64, num_warps=8, num_stages=3),
}
"""Tiling by block size for weights that are dense already; 16-bit hidden states."""

FLOAT32 = Tiling(wide=32, depth=32, num_warps=8, num_stages=2)
"""For float32 hidden states, which tensor cores do not multiply exactly: meant for checks, not for speed."""


def grouped_rows(
    hidden: Tensor,
    blocks: Blocks,
    addresses: Tensor,
    row_of: Tensor,
    table: LayoutTable,
    gate: Gate,
    rows: Tensor,
    tiling: Tiling | None = None,
) -> Tensor:
    """``rows[p] = expert(hidden[p // K])`` for every pair p that ``blocks`` covers; other rows are left as they are.

    hidden ``[T, H]`` float32, bfloat16 or float16; addresses int64 ``[E]`` of each expert's record; row_of
    int32 ``[E]``; rows ``[P, H]`` in hidden's dtype, returned.
    All contiguous on one device. Raises ExpertFlowError otherwise.
    """
    _check(hidden, blocks, addresses, row_of, table, rows)
    if not use_triton(hidden):
        from expertflow_quant.kernels.grouped_reference import grouped_rows_reference

        return grouped_rows_reference(hidden, blocks, addresses, row_of, table, gate, rows)
    return _Launches(hidden, blocks, addresses, row_of, table, gate, rows, tiling).run(None)


def grouped_dense(
    hidden: Tensor,
    blocks: Blocks,
    gate_up: Tensor,
    down: Tensor,
    index_of: Tensor,
    addresses: Tensor,
    row_of: Tensor,
    table: LayoutTable,
    gate: Gate,
    rows: Tensor,
    tiling: Tiling | None = None,
) -> Tensor:
    """``grouped_rows`` with weights that are decoded already: gate_up ``[n, 2I or I, H]``, down ``[n, H, I]``.

    Both in hidden's dtype. index_of int32 ``[E]``: where in them an expert's matrices lie; blocks of an expert with -1
    are left out. Input scales and biases are still read from the records at ``addresses``.
    """
    _check(hidden, blocks, addresses, row_of, table, rows)
    _check_dense(hidden, gate_up, down, index_of, table)
    if not use_triton(hidden):
        from expertflow_quant.kernels.grouped_reference import grouped_dense_reference

        return grouped_dense_reference(hidden, blocks, gate_up, down, index_of, addresses, row_of, table, gate, rows)
    return _Launches(hidden, blocks, addresses, row_of, table, gate, rows, tiling).run((gate_up, down, index_of))


def combine(rows: Tensor, ids: Tensor, weights: Tensor, num_experts: int, out: Tensor | None = None) -> Tensor:
    """``out[t]``: float32 sum over k, in order, of ``weights[t, k] * rows[t * K + k]``, rounded once to rows' dtype.

    rows ``[T * K, H]``; ids int32 or int64 and weights floating, ``[T, K]``. Pairs whose id is outside
    ``[0, num_experts)`` add nothing, whatever their rows hold. Raises ExpertFlowError for other shapes.
    """
    tokens, top_k = ids.shape
    if rows.ndim != 2 or rows.shape[0] != tokens * top_k or weights.shape != ids.shape:
        raise ExpertFlowError(
            f"rows {tuple(rows.shape)} and weights {tuple(weights.shape)} do not belong to ids {tuple(ids.shape)}: "
            "rows has one row per routed pair"
        )
    out = rows.new_empty(tokens, rows.shape[1]) if out is None else out
    if out.shape != (tokens, rows.shape[1]) or not (out.is_contiguous() and rows.is_contiguous()):
        raise ExpertFlowError(f"out {tuple(out.shape)} and rows must be contiguous, out one row per token: copy them")
    if not use_triton(rows):
        from expertflow_quant.kernels.grouped_reference import combine_reference

        return out.copy_(combine_reference(rows, ids, weights, num_experts))
    if out.numel():
        from expertflow_quant.kernels.grouped_kernel import combine_kernel

        columns = 512
        combine_kernel[(tokens, -(-rows.shape[1] // columns))](
            rows,
            ids.contiguous(),
            weights.contiguous(),
            out,
            num_experts,
            WIDTH=rows.shape[1],
            TOP_K=top_k,
            COLUMNS=columns,
            num_warps=2,
        )
    return out


@dataclass(frozen=True)
class _Launches:
    """The two launches of one grouped product, and the rows between them."""

    hidden: Tensor
    blocks: Blocks
    addresses: Tensor
    row_of: Tensor
    table: LayoutTable
    gate: Gate
    rows: Tensor
    tiling: Tiling | None

    def run(self, dense: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
        """rows, written; ``dense``: gate_up, down and index_of where weights are decoded already."""
        if self.blocks.expert.shape[0] == 0:
            return self.rows
        shape = self.table.shape
        fused = self.gate.fused is not None and shape.has_gate
        width = shape.intermediate if fused else shape.matrices["gate_up"][0]
        inner = self.hidden.new_empty(self.rows.shape[0], width)
        self._launch("gate_up", self.hidden, inner, fused, dense)
        if not fused:
            inner = self.gate.apply(inner).contiguous()
        self._launch("down", inner, self.rows, False, dense)
        return self.rows

    def _launch(
        self, name: str, x: Tensor, out: Tensor, fused: bool, dense: tuple[Tensor, Tensor, Tensor] | None
    ) -> None:
        from expertflow_quant.kernels.grouped_kernel import grouped_kernel

        blocks, table, down = self.blocks, self.table, name == "down"
        out_features, in_features = table.shape.matrices[name]
        tiling = self._tiling(dense is not None)
        count = blocks.expert.shape[0]
        weight, index_of = (x, self.row_of) if dense is None else (dense[int(down)], dense[2])
        grouped_kernel[(count * -(-out_features // tiling.wide),)](
            x,
            out,
            blocks.order,
            blocks.expert,
            blocks.start,
            blocks.end,
            self.addresses,
            self.row_of,
            table.rows,
            weight,
            index_of,
            count,
            CODES=COLUMNS.index(f"{name}.codes"),
            BIAS=COLUMNS.index(f"{name}.bias"),
            GROUP_AT=COLUMNS.index(f"{name}.group_units"),
            TOP_K=blocks.top_k,
            ROWS=out_features,
            DEPTH_ALL=in_features,
            DOWN=down,
            FUSED=fused,
            DENSE=dense is not None,
            WIDTHS=0 if dense else sum(1 << bits for bits in table.widths),
            HAS_ZEROS=table.has_zeros,
            HAS_INPUT_SCALE=table.has_input_scale and not down,
            HAS_BIAS=table.shape.has_bias,
            GROUP=common_group(table, name),
            BLOCK=blocks.block_tokens,
            WIDE=tiling.wide,
            DEPTH=tiling.depth,
            GROUP_BLOCKS=tiling.group_blocks,
            WIDEN=interpreted() and x.dtype == torch.bfloat16,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )

    def _tiling(self, dense: bool) -> Tiling:
        if self.tiling is not None:
            return self.tiling
        if self.hidden.dtype == torch.float32:
            return FLOAT32
        return (DENSE if dense else CODED)[self.blocks.block_tokens]


def common_group(table: LayoutTable, name: str) -> int:
    """Units of eight columns that share a scale in matrix ``name`` if all layouts with codes agree, else 0."""
    columns = table.shape.matrices[name][1]
    groups = {layout.format.columns_per_group(columns) // 8 for layout in table.layouts if layout.format.has_codes}
    return groups.pop() if len(groups) == 1 else 0


def _check(hidden: Tensor, blocks: Blocks, addresses: Tensor, row_of: Tensor, table: LayoutTable, rows: Tensor) -> None:
    if hidden.dtype not in DTYPES or rows.dtype != hidden.dtype:
        raise ExpertFlowError(
            f"hidden is {hidden.dtype}, rows {rows.dtype}: both must be the same of float32, bfloat16, float16"
        )
    pairs = blocks.order.shape[0]
    if hidden.shape != (pairs // blocks.top_k, table.shape.hidden) or rows.shape != (pairs, table.shape.hidden):
        raise ExpertFlowError(
            f"hidden {tuple(hidden.shape)} and rows {tuple(rows.shape)} do not fit {pairs} pairs of top "
            f"{blocks.top_k} and {table.shape}: hidden has one row per token, rows one per pair"
        )
    if addresses.dtype != torch.int64 or row_of.dtype != torch.int32 or addresses.shape != row_of.shape:
        raise ExpertFlowError(
            f"addresses are {addresses.dtype} {tuple(addresses.shape)}, row_of {row_of.dtype} {tuple(row_of.shape)}: "
            "they are int64 and int32 of one entry per expert"
        )
    devices = {tensor.device for tensor in (hidden, rows, addresses, row_of, blocks.order, table.rows)}
    if len(devices) != 1:
        raise ExpertFlowError(f"tensors lie on {', '.join(sorted(map(str, devices)))}: move them to one device")
    if not all(tensor.is_contiguous() for tensor in (hidden, rows, addresses, row_of)):
        raise ExpertFlowError("hidden, rows, addresses and row_of must be contiguous: call .contiguous()")


def _check_dense(hidden: Tensor, gate_up: Tensor, down: Tensor, index_of: Tensor, table: LayoutTable) -> None:
    matrices = {"gate_up": gate_up, "down": down}
    for name, matrix in matrices.items():
        if matrix.shape[1:] != table.shape.matrices[name] or matrix.dtype != hidden.dtype or not matrix.is_contiguous():
            raise ExpertFlowError(
                f"{name} is {matrix.dtype} {tuple(matrix.shape)}: it must be contiguous {hidden.dtype} "
                f"[n, {', '.join(map(str, table.shape.matrices[name]))}]"
            )
    if index_of.dtype != torch.int32 or not index_of.is_contiguous():
        raise ExpertFlowError(f"index_of is {index_of.dtype}: it must be contiguous int32, one entry per expert")
