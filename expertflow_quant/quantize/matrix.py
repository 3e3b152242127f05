"""What every quantizer returns: one weight matrix as codes, scales and zeros, checked where it is made."""

from dataclasses import dataclass

import torch
from torch import Tensor

from expertflow_quant.formats import SCALE_DTYPE, ExpertFlowError, Format
from expertflow_quant.quantize.nf4 import decode_nf4


@dataclass(frozen=True)
class QuantizedMatrix:
    """Codes uint8 ``[O, I]`` (one code per byte), scales fp16 ``[O, G]``, zeros uint8 ``[O, G]``.

    Symmetric formats have no zeros (None). Raises ExpertFlowError when the parts do not belong together or a
    code exceeds the format's width.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: Format

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or not self.format.has_codes:
            raise ExpertFlowError(
                f"codes {tuple(self.codes.shape)} in {self.format.name}: needs a matrix in a format with codes"
            )
        rows, columns = self.codes.shape
        per_group = (rows, self.format.groups(columns))
        self._check("codes", self.codes, (rows, columns), torch.uint8)
        self._check("scales", self.scales, per_group, SCALE_DTYPE)
        if (self.zeros is None) != self.format.symmetric:
            raise ExpertFlowError(f"{self.format.name} has zeros: {not self.format.symmetric}; pass them accordingly")
        if self.zeros is not None:
            self._check("zeros", self.zeros, per_group, torch.uint8)
        if self.codes.numel() and int(self.codes.max()) >= self.format.levels:
            raise ExpertFlowError(
                f"code {int(self.codes.max())} in {self.format.name}: the largest is {self.format.levels - 1}"
            )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights ``[O, I]``: ``(code - zero) * scale`` (nf4: value * scale), computed in float32 and rounded once
        to ``dtype``."""
        if not self.format.is_int:
            return decode_nf4(self.codes.view(*self.scales.shape, -1), self.scales).view(self.codes.shape).to(dtype)
        grouped = self.codes.view(*self.scales.shape, -1).to(torch.float32)
        zeros = self.format.levels // 2 if self.zeros is None else self.zeros.float().unsqueeze(-1)
        return ((grouped - zeros) * self.scales.float().unsqueeze(-1)).view(self.codes.shape).to(dtype)

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ExpertFlowError(
                f"{name} are {tensor.dtype} {tuple(tensor.shape)}: {self.format.name} of "
                f"{tuple(self.codes.shape)} needs {dtype} {shape}"
            )
