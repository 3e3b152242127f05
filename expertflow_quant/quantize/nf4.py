"""nf4's codes as bitsandbytes makes them, in plain PyTorch: the nearest of sixteen normal quantiles.

A group's magnitudes are divided by the largest in float32 (by its inverse, as there); the codes change where a quotient
passes the middle between two values, the middle itself going down. The scale is stored as fp16, as all scales are.
"""

import torch
from torch import Tensor

from expertflow_quant.formats import NF4_VALUES, SCALE_DTYPE
from expertflow_quant.quantize.grid import require_reached

SMALLEST = 1e-38
"""Below it a group counts as nothing but zeros."""


def encode_nf4(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 codes ``[..., columns per group]`` and fp16 scales ``[...]`` of float32 ``grouped``.

    Raises ScaleRangeError for weights beyond what a scale can be.
    """
    largest = grouped.abs().amax(-1)
    scales = largest.to(SCALE_DTYPE)
    require_reached(scales, largest, "nf4")
    values = torch.tensor(NF4_VALUES, dtype=torch.float32, device=grouped.device)
    quotients = (grouped * (1.0 / largest.clamp(min=SMALLEST)).unsqueeze(-1)).clamp(-1, 1)
    codes = torch.bucketize(quotients, (values[:-1] + values[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8), scales


def decode_nf4(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 values of ``codes [..., columns per group]`` with fp16 scales ``[...]``."""
    values = torch.tensor(NF4_VALUES, dtype=torch.float32, device=codes.device)
    return values[codes.int()] * scales.to(torch.float32).unsqueeze(-1)
