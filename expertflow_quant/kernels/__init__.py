"""Products with experts' weights, and the small kernels around them. Import from here, never from a kernel's file:
nothing here needs Triton until a kernel runs."""

from expertflow_quant.kernels.attention import PROGRAMS as ATTENTION_PROGRAMS
from expertflow_quant.kernels.attention import decode_attention
from expertflow_quant.kernels.blocks import BLOCK_TOKENS, Blocks, Sorted, blocks_of, plan_blocks, sort_pairs
from expertflow_quant.kernels.few import Tile, few_product
from expertflow_quant.kernels.gate import Gate
from expertflow_quant.kernels.grouped import Tiling, combine, grouped_dense, grouped_rows
from expertflow_quant.kernels.host_view import record_at
from expertflow_quant.kernels.launch import use_triton
from expertflow_quant.kernels.reference import ExpertWeights, dequantize, expert_product, expert_weights
from expertflow_quant.kernels.table import UNIT, LayoutTable
from expertflow_quant.kernels.topk import DTYPES as TOPK_DTYPES
from expertflow_quant.kernels.topk import fits_topk, small_topk
from expertflow_quant.kernels.unpack import unpack_records

__all__ = [
    "ATTENTION_PROGRAMS",
    "BLOCK_TOKENS",
    "TOPK_DTYPES",
    "UNIT",
    "Blocks",
    "ExpertWeights",
    "Gate",
    "LayoutTable",
    "Sorted",
    "Tile",
    "Tiling",
    "blocks_of",
    "combine",
    "decode_attention",
    "dequantize",
    "expert_product",
    "expert_weights",
    "few_product",
    "fits_topk",
    "grouped_dense",
    "grouped_rows",
    "plan_blocks",
    "record_at",
    "small_topk",
    "sort_pairs",
    "unpack_records",
    "use_triton",
]
