"""Rounding to nearest: every weight to the closest level of its group's grid. Needs no data."""

import torch
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError, Format
from expertflow_quant.quantize.grid import ScaleRule, encode, fit_grid, require_finite
from expertflow_quant.quantize.matrix import QuantizedMatrix


@torch.no_grad()
def quantize_rtn(weight: Tensor, format: Format, *, scales: ScaleRule = "absmax") -> QuantizedMatrix:
    """``weight [O, I]`` of any floating dtype in ``format``; ``scales="mse"`` searches each group's range.

    Raises ExpertFlowError for NaN or infinity, or a format that cannot code I columns.
    """
    require_int(format, "rounding")
    if weight.ndim != 2:
        raise ExpertFlowError(f"weight {tuple(weight.shape)} is not a matrix: pass [out, in], one expert at a time")
    require_finite(weight=weight)
    rows, columns = weight.shape
    grouped = weight.to(torch.float32).contiguous().view(rows, format.groups(columns), -1)
    group_scales, zeros = fit_grid(grouped, format, scales)
    codes = encode(grouped, group_scales.unsqueeze(-1), zeros.unsqueeze(-1), format)
    return QuantizedMatrix(codes.view(rows, columns), group_scales, None if format.symmetric else zeros, format)


def require_int(format: Format, method: str) -> None:
    """Raises ExpertFlowError for bf16, which no quantizer produces."""
    if not format.is_int:
        raise ExpertFlowError(f"{method} makes integer codes, not {format.name}: store bf16 weights as they are")
