"""GPTQ (Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv 2210.17323), batched over the experts of a layer.

Columns are rounded one after the other; each column's rounding error is spread over the columns not yet
rounded so that the output error ``tr(D H D^T)``, ``D`` being the change of the weights and ``H = sum of c^2 x
x^T``, grows least. With ``H^-1 = R^T R``, R upper triangular, column i's error ``e = (w_i - q_i) / R_ii``
changes the later columns by ``-e R_i,later``: within a block at once (``spans``), behind it in one product
per block. A group's scales come from its weights as they stand when its first column is reached, all updates
applied, so no block reaches beyond its group.

Two choices differ from the published code, for the sake of experts that few tokens reach. A dead column (no
input ever, zero on H's diagonal) keeps its weights and is rounded plainly instead of being set to zero. And
the dampening is a fraction of the mean over live columns only, so the result does not depend on H's scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError, Format
from expertflow_quant.quantize.grid import ScaleRule, fit_grid, require_finite
from expertflow_quant.quantize.hessian import inverse_factor
from expertflow_quant.quantize.matrix import QuantizedMatrix
from expertflow_quant.quantize.rtn import require_codes
from expertflow_quant.quantize.spans import round_span


@torch.no_grad()
def quantize_gptq(
    weight: Tensor,
    hessian: Tensor,
    format: Format,
    damp: float = 0.01,
    *,
    block: int = 128,
    act_order: bool = False,
    scales: ScaleRule = "absmax",
) -> QuantizedMatrix | list[QuantizedMatrix]:
    """One matrix ``[O, I]`` with ``hessian [I, I]``; a batch ``[E, O, I]`` with ``[E, I, I]`` gives a list.

    ``act_order`` rounds the columns with the largest Hessian diagonal first; group scales are then fixed
    beforehand from the original weights, and groups stay contiguous, so the result needs no column index.
    Raises ExpertFlowError for NaN or infinity, shapes that do not match, a dampening that is not positive, or
    a Hessian that is not positive semidefinite. Rank-deficient and zero Hessians are fine (zero: plain
    rounding).
    """
    require_codes(format, "GPTQ")
    if not format.is_int:
        raise ExpertFlowError(f"GPTQ makes integer codes, not {format.name}: use rtn or AWQ, or an integer format")
    _check(weight, hessian, format, damp, block)
    if weight.ndim == 2:
        return _quantize(weight[None], hessian[None], format, damp, block, act_order, scales)[0]
    return _quantize(weight, hessian, format, damp, block, act_order, scales)


def _quantize(
    weight: Tensor,
    hessian: Tensor,
    format: Format,
    damp: float,
    block: int,
    act_order: bool,
    scales: ScaleRule,
) -> list[QuantizedMatrix]:
    columns = weight.shape[-1]
    work = weight.to(torch.float32).transpose(1, 2).contiguous()  # [E, I, O]: a column is contiguous
    grids: _ReachedGroups | _FixedGroups
    if act_order:
        order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)  # [E, I]
        grids = _FixedGroups(work, format, scales, order)
        work = _permute_rows(work, order)
        hessian = _permute_rows(_permute_rows(hessian, order).transpose(1, 2), order)
        spans = _spans(columns, columns, block)
    else:
        grids = _ReachedGroups(format, scales)
        spans = _spans(columns, format.columns_per_group(columns), block)
    codes = _sweep(work, inverse_factor(hessian, damp), grids, spans, format)
    if act_order:
        codes = _permute_rows(codes, order.argsort(dim=-1))
    group_scales, zeros = grids.all()  # [E, G, O]
    return [
        QuantizedMatrix(
            codes[expert].T.contiguous(),
            group_scales[expert].T.contiguous(),
            None if format.symmetric else zeros[expert].T.contiguous(),
            format,
        )
        for expert in range(weight.shape[0])
    ]


def _sweep(
    work: Tensor,
    factor: Tensor,
    grids: "_ReachedGroups | _FixedGroups",
    spans: Iterator[slice],
    format: Format,
) -> Tensor:
    """Round every column of ``work [E, I, O]`` in order, spreading the errors; uint8 codes ``[E, I, O]``."""
    codes = torch.empty_like(work, dtype=torch.uint8)
    for span in spans:
        errors = round_span(work, factor, span, *grids.of(span, work), codes, format)
        behind = slice(span.stop, work.shape[1])
        work[:, behind] -= factor[:, span, behind].mT @ errors
    return codes


def _spans(columns: int, group: int, block: int) -> Iterator[slice]:
    """At most ``block`` columns each, none across the end of a group."""
    for first in range(0, columns, group):
        for start in range(first, first + group, block):
            yield slice(start, min(start + block, first + group))


@dataclass
class _ReachedGroups:
    """Grids made from the weights as they stand when a group's first column is reached."""

    format: Format
    rule: ScaleRule
    scales: list[Tensor] = field(default_factory=list)  # [E, O] each
    zeros: list[Tensor] = field(default_factory=list)

    def of(self, span: slice, work: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros ``[E, span, O]``."""
        group = self.format.columns_per_group(work.shape[1])
        if span.start % group == 0:
            reached = work[:, span.start : span.start + group].transpose(1, 2)
            scales, zeros = fit_grid(reached, self.format, self.rule)
            self.scales.append(scales)
            self.zeros.append(zeros)
        count = span.stop - span.start
        scales, zeros = (grids[-1].unsqueeze(1).expand(-1, count, -1) for grids in (self.scales, self.zeros))
        return scales, zeros

    def all(self) -> tuple[Tensor, Tensor]:
        return torch.stack(self.scales, dim=1), torch.stack(self.zeros, dim=1)


class _FixedGroups:
    """Grids made from the original weights, looked up through the order in which columns are taken."""

    def __init__(self, work: Tensor, format: Format, rule: ScaleRule, order: Tensor) -> None:
        experts, columns, rows = work.shape
        grouped = work.view(experts, format.groups(columns), -1, rows).transpose(2, 3)
        self._scales, self._zeros = fit_grid(grouped, format, rule)  # [E, G, O]
        self._group = order // format.columns_per_group(columns)  # [E, I]
        self._expert = torch.arange(experts, device=work.device).unsqueeze(-1)

    def of(self, span: slice, work: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros ``[E, span, O]``."""
        place = (self._expert, self._group[:, span])
        return self._scales[place], self._zeros[place]

    def all(self) -> tuple[Tensor, Tensor]:
        return self._scales, self._zeros


def _permute_rows(tensor: Tensor, order: Tensor) -> Tensor:
    """Rows of ``tensor [E, N, M]`` in each expert's own ``order [E, N]``."""
    return tensor.gather(1, order.unsqueeze(-1).expand_as(tensor))


def _check(weight: Tensor, hessian: Tensor, format: Format, damp: float, block: int) -> None:
    columns = weight.shape[-1]
    if weight.ndim not in (2, 3) or hessian.shape != (*weight.shape[:-2], columns, columns):
        raise ExpertFlowError(
            f"weight {tuple(weight.shape)} with Hessian {tuple(hessian.shape)}: pass [O, I] with [I, I], "
            "or [E, O, I] with [E, I, I]"
        )
    format.validate_for(columns)
    if not damp > 0:
        raise ExpertFlowError(f"dampening {damp} must be above 0 (0.01 is usual): few tokens leave H singular")
    if block < 1:
        raise ExpertFlowError(f"block of {block} columns must be at least 1 (128 is usual)")
    require_finite(weight=weight, hessian=hessian)
