"""Rounding to nearest: every weight to the closest level of its group's grid. Needs no data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError, Format
from expertflow_quant.quantize.grid import ScaleRule, decode, encode, fit_grid, require_finite
from expertflow_quant.quantize.matrix import QuantizedMatrix
from expertflow_quant.quantize.nf4 import decode_nf4, encode_nf4


@torch.no_grad()
def quantize_rtn(weight: Tensor, format: Format, *, scales: ScaleRule = "absmax") -> QuantizedMatrix:
    """``weight [O, I]`` of any floating dtype in ``format``; ``scales="mse"`` searches each group's range.

    nf4 gives the codes of bitsandbytes and knows no other scales. Raises ExpertFlowError for NaN or infinity, or a
    format that cannot code I columns.
    """
    require_codes(format, "rounding")
    if weight.ndim != 2:
        raise ExpertFlowError(f"weight {tuple(weight.shape)} is not a matrix: pass [out, in], one expert at a time")
    require_finite(weight=weight)
    return Rounded.of(weight.to(torch.float32).contiguous()[None], format, scales).matrices()[0]


@dataclass(frozen=True)
class Rounded:
    """Matrices of one shape side by side, not checked: codes uint8 ``[E, O, G, columns per group]``, scales fp16 and
    zeros uint8 ``[E, O, G]`` (nf4: nothing but 0)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    format: Format

    @classmethod
    def of(cls, weight: Tensor, format: Format, rule: ScaleRule) -> "Rounded":
        """Float32 ``weight [E, O, I]`` rounded."""
        return cls.of_groups(in_groups(weight, format), format, rule)

    @classmethod
    def of_groups(cls, grouped: Tensor, format: Format, rule: ScaleRule) -> "Rounded":
        """Float32 ``grouped [E, O, G, columns per group]`` rounded."""
        if not format.is_int:
            if rule != "absmax":
                raise ExpertFlowError(f"scale rule {rule!r} is not there for {format.name}: use 'absmax'")
            codes, scales = encode_nf4(grouped)
            return cls(codes, scales, torch.zeros_like(scales, dtype=torch.uint8), format)
        scales, zeros = fit_grid(grouped, format, rule)
        codes = encode(grouped, scales.unsqueeze(-1), zeros.unsqueeze(-1), format)
        return cls(codes, scales, zeros, format)

    def groups(self) -> Tensor:
        """The values, float32 in the shape of the codes."""
        if not self.format.is_int:
            return decode_nf4(self.codes, self.scales)
        return decode(self.codes, self.scales.unsqueeze(-1), self.zeros.unsqueeze(-1))

    def values(self) -> Tensor:
        """The values as matrices, float32 ``[E, O, I]``."""
        return self.groups().flatten(-2)

    def matrices(self) -> list[QuantizedMatrix]:
        codes = self.codes.flatten(-2)
        return [
            QuantizedMatrix(
                codes[expert].contiguous(),
                self.scales[expert].contiguous(),
                None if self.format.symmetric else self.zeros[expert].contiguous(),
                self.format,
            )
            for expert in range(len(codes))
        ]

    def where(self, chosen: Tensor, other: "Rounded") -> "Rounded":
        """These matrices where ``chosen [E]``, else the other's."""
        mask = chosen[:, None, None]
        return Rounded(
            torch.where(mask.unsqueeze(-1), self.codes, other.codes),
            torch.where(mask, self.scales, other.scales),
            torch.where(mask, self.zeros, other.zeros),
            self.format,
        )


def in_groups(matrix: Tensor, format: Format) -> Tensor:
    """``[..., I]`` as ``[..., G, columns per group]``."""
    columns = matrix.shape[-1]
    return matrix.reshape(*matrix.shape[:-1], format.groups(columns), format.columns_per_group(columns))


def require_codes(format: Format, method: str) -> None:
    """Raises ExpertFlowError for bf16, which no quantizer produces."""
    if not format.has_codes:
        raise ExpertFlowError(f"{method} makes codes, not {format.name}: store bf16 weights as they are")
