"""AWQ's clip search: give up a group's few largest weights where finer levels for the rest pay more.

As in the code published with AWQ (Lin et al. 2023, arXiv 2306.00978): ranges of 100 %, 95 %, ... 55 % of a
group's largest magnitude are tried and judged by the group's own output error, groups and rows independent of
each other. The sum over tokens is taken through each group's Hessian, so every token counts and none has to
be sampled.
"""

import torch
from torch import Tensor

from expertflow_quant.formats import Format
from expertflow_quant.quantize.grid import ScaleRule, decode, encode, fit_grid
from expertflow_quant.quantize.matrix import QuantizedMatrix
from expertflow_quant.quantize.rtn import quantize_rtn

STEPS = 20
TRIED = 10  # ranges shrink to no less than half


def clip_search(weight: Tensor, inputs: Tensor, format: Format, scales: ScaleRule = "absmax") -> QuantizedMatrix:
    """Round float32 ``weight [O, I]``, each group clipped to what suits float32 ``inputs [T, I]`` best."""
    rows, columns = weight.shape
    grouped = weight.view(rows, format.groups(columns), -1).transpose(0, 1)  # [G, O, columns per group]
    pieces = inputs.view(-1, grouped.shape[0], grouped.shape[2]).transpose(0, 1)  # [G, T, columns per group]
    hessians = pieces.transpose(1, 2) @ pieces
    limits = grouped.abs().amax(dim=-1, keepdim=True)
    best, kept = torch.full_like(limits, float("inf")), grouped
    for step in range(TRIED):
        limit = limits * (1 - step / STEPS)
        clipped = grouped.clamp(-limit, limit)
        change = _rounded(clipped, format, scales) - grouped
        error = ((change @ hessians) * change).sum(dim=-1, keepdim=True)
        better = error < best
        best, kept = torch.where(better, error, best), torch.where(better, clipped, kept)
    return quantize_rtn(kept.transpose(0, 1).reshape(rows, columns), format, scales=scales)


def _rounded(grouped: Tensor, format: Format, scales: ScaleRule) -> Tensor:
    group_scales, zeros = (part.unsqueeze(-1) for part in fit_grid(grouped, format, scales))
    return decode(encode(grouped, group_scales, zeros, format), group_scales, zeros)
