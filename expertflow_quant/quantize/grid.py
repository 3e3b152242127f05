"""From a group of weights to its grid: the scale and zero, already rounded to the dtypes that are stored.

The range of a group is cut into ``2 ** bits`` levels. Symmetric: the range is ``[-absmax, absmax]`` and the
zero is fixed in the middle, so ``scale = 2 * absmax / (2 ** bits - 1)`` and no weight is off by more than
half a scale; asymmetric: ``[min(w, 0), max(w, 0)]``. Both as in the code published with GPTQ (Frantar et al.
2022).
"""

from typing import Literal

import torch
from torch import Tensor

from expertflow_quant.formats import SCALE_DTYPE, ExpertFlowError, Format

ScaleRule = Literal["absmax", "mse"]
SHRINK_STEPS = 80  # the mse rule tries ranges of 100 %, 99 %, ... 21 %


class ScaleRangeError(ExpertFlowError):
    """Weights that need a scale which fp16 does not reach; ``matrix``: which of a batch."""

    def __init__(self, message: str, matrix: int) -> None:
        super().__init__(message)
        self.matrix = matrix

    def at(self, place: str) -> "ScaleRangeError":
        """The same with ``place`` in front, for callers that know it."""
        return ScaleRangeError(f"{place}: {self}", self.matrix)


def fit_grid(groups: Tensor, format: Format, rule: ScaleRule = "absmax") -> tuple[Tensor, Tensor]:
    """Scales fp16 ``[...]`` and zeros uint8 ``[...]`` for weights ``[..., columns of one group]`` (float32).

    ``absmax`` spans the whole range; ``mse`` shrinks it where that lowers the group's squared error. Raises
    ScaleRangeError for weights beyond what a scale can be.
    """
    low, high = _range(groups, format.symmetric)
    scales, zeros = _grid(low, high, format)
    if rule == "absmax":
        return scales, zeros
    if rule != "mse":
        raise ExpertFlowError(f"scale rule {rule!r} is not known: use 'absmax' or 'mse'")
    best = _squared_error(groups, scales, zeros, format)
    for step in range(1, SHRINK_STEPS):
        shrink = 1 - step / 100
        tried_scales, tried_zeros = _grid(low * shrink, high * shrink, format)
        error = _squared_error(groups, tried_scales, tried_zeros, format)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, tried_scales, scales), torch.where(better, tried_zeros, zeros)
    return scales, zeros


def encode(values: Tensor, scales: Tensor, zeros: Tensor, format: Format) -> Tensor:
    """uint8 codes of float32 ``values``, all three broadcast together: the nearest level, ties to even."""
    return (torch.round(values / scales.float()) + zeros.float()).clamp_(0, format.levels - 1).to(torch.uint8)


def decode(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """float32 values of uint8 ``codes``, all three broadcast together."""
    return (codes.float() - zeros.float()) * scales.float()


def require_finite(**tensors: Tensor) -> None:
    """Raises ExpertFlowError naming the first tensor that holds NaN or infinity, and how many."""
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ExpertFlowError(
                f"{name} {tuple(tensor.shape)} holds {bad} values that are NaN or infinite: "
                "only finite numbers can be quantized; check the checkpoint and the dtype it was run in"
            )


def require_reached(scales: Tensor, largest: Tensor, format_name: str) -> None:
    """Raises ScaleRangeError for scales fp16 ``[E, ...]`` that are infinite, of groups whose ``largest`` weights,
    of the same shape, are not."""
    beyond = torch.isinf(scales)
    if bool(beyond.any()):
        raise ScaleRangeError(
            f"weights as large as {float(largest[beyond][0]):.3g} need a scale beyond "
            f"{torch.finfo(SCALE_DTYPE).max:.0f} in {format_name}: scales are stored as fp16, use bf16",
            int(beyond.nonzero()[0, 0]),
        )


def _range(groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(groups, dim=-1)
    if symmetric:
        high = torch.maximum(high, -low)
        return -high, high
    return low.clamp_(max=0), high.clamp_(min=0)


def _grid(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    scales = ((high - low) / (format.levels - 1)).to(SCALE_DTYPE)
    require_reached(scales, torch.maximum(high, -low), format.name)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)  # nothing but zeros: any scale will do
    if format.symmetric:
        return scales, torch.full_like(scales, format.levels // 2, dtype=torch.uint8)
    zeros = torch.round(-low / scales.float()).clamp_(0, format.levels - 1)
    return scales, zeros.to(torch.uint8)


def _squared_error(groups: Tensor, scales: Tensor, zeros: Tensor, format: Format) -> Tensor:
    scales, zeros = scales.unsqueeze(-1), zeros.unsqueeze(-1)
    return (decode(encode(groups, scales, zeros, format), scales, zeros) - groups).square().sum(-1)
