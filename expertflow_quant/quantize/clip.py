"""AWQ's clip search: give up a group's few largest weights where finer levels for the rest pay more.

As in the code published with AWQ (Lin et al. 2023, arXiv 2306.00978): ranges of 100 %, 95 %, ... 55 % of a
group's largest magnitude are tried and judged by the group's own output error, groups and rows independent of
each other. The sum over tokens is taken through each group's Hessian, so every token counts and none has to
be sampled.
"""

import torch
from torch import Tensor

from expertflow_quant.formats import Format
from expertflow_quant.quantize.grid import ScaleRule
from expertflow_quant.quantize.rtn import Rounded, in_groups

STEPS = 20
TRIED = 10  # ranges shrink to no less than half


def clip_search(weight: Tensor, inputs: Tensor, format: Format, scales: ScaleRule = "absmax") -> Rounded:
    """Round float32 ``weight [E, O, I]``, each group clipped to what suits float32 ``inputs [E, T, I]`` best."""
    grouped = in_groups(weight, format)  # [E, O, G, columns per group]
    pieces = in_groups(inputs, format).transpose(1, 2)  # [E, G, T, columns per group]
    hessians = pieces.mT @ pieces
    limits = grouped.abs().amax(dim=-1, keepdim=True)
    best, kept = torch.full_like(limits, float("inf")), limits
    for step in range(TRIED):
        limit = limits * (1 - step / STEPS)
        clipped = grouped.clamp(-limit, limit)
        change = (Rounded.of_groups(clipped, format, scales).groups() - grouped).transpose(1, 2)  # [E, G, O, columns]
        error = ((change @ hessians) * change).sum(dim=-1, keepdim=True).transpose(1, 2)
        better = error < best
        best, kept = torch.where(better, error, best), torch.where(better, limit, kept)
    return Rounded.of_groups(grouped.clamp(-kept, kept), format, scales)
