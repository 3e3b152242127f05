"""Weights and statistics in, codes and scales out: pure tensors, no model, no file."""

from expertflow_quant.quantize.awq import AWQResult, search_awq, search_awq_batch
from expertflow_quant.quantize.fields import expert_fields
from expertflow_quant.quantize.folding import Gate, scalable_rows
from expertflow_quant.quantize.gptq import quantize_gptq
from expertflow_quant.quantize.grid import ScaleRangeError, ScaleRule
from expertflow_quant.quantize.hessian import (
    HessianReport,
    accumulate_hessian,
    examine_hessian,
    shrink_hessian,
)
from expertflow_quant.quantize.matrix import QuantizedMatrix
from expertflow_quant.quantize.rtn import quantize_rtn

__all__ = [
    "AWQResult",
    "Gate",
    "HessianReport",
    "QuantizedMatrix",
    "ScaleRangeError",
    "ScaleRule",
    "accumulate_hessian",
    "examine_hessian",
    "expert_fields",
    "quantize_gptq",
    "quantize_rtn",
    "scalable_rows",
    "search_awq",
    "search_awq_batch",
    "shrink_hessian",
]
