"""GPTQ's inner loop: a few columns rounded one after the other, each one's error spread over the rest of them.

On a GPU one launch does a span of columns for all rows of all experts, with the weights in registers; on the CPU, and
as its twin, every column is a handful of PyTorch operations. Both round alike at every step, so they agree bit by bit.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from expertflow_quant.formats import Format
from expertflow_quant.quantize.grid import decode, encode

TILE_ROWS = 32
"""Rows of a matrix that one program takes."""
NUM_WARPS = 4


def round_span(
    work: Tensor, factor: Tensor, span: slice, scales: Tensor, zeros: Tensor, codes: Tensor, format: Format
) -> Tensor:
    """Round the columns ``span`` of float32 ``work [E, I, O]`` into uint8 ``codes [E, I, O]``; work stays as it is.

    ``factor [E, I, I]`` is float32 and upper triangular, ``scales`` fp16 and ``zeros`` uint8 ``[E, span, O]`` (any
    strides over experts and columns). Returns the columns' errors over the factor's diagonal, float32 ``[E, span, O]``.
    """
    if (work.is_cuda and _has_triton()) or os.environ.get("TRITON_INTERPRET") == "1":
        return _launch(work, factor, span, scales, zeros, codes, format)
    return round_span_reference(work, factor, span, scales, zeros, codes, format)


def round_span_reference(
    work: Tensor, factor: Tensor, span: slice, scales: Tensor, zeros: Tensor, codes: Tensor, format: Format
) -> Tensor:
    """Twin of ``round_span`` in plain PyTorch, on any device."""
    left = work[:, span].clone()
    spread = factor[:, span, span].unsqueeze(-1)  # [E, span, span, 1]
    errors = torch.empty_like(left)
    for column in range(left.shape[1]):
        grid = scales[:, column], zeros[:, column]
        rounded = encode(left[:, column], *grid, format)
        codes[:, span.start + column] = rounded
        error = (left[:, column] - decode(rounded, *grid)) / spread[:, column, column]
        left[:, column + 1 :] -= spread[:, column, column + 1 :] * error[:, None]
        errors[:, column] = error
    return errors


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _launch(
    work: Tensor, factor: Tensor, span: slice, scales: Tensor, zeros: Tensor, codes: Tensor, format: Format
) -> Tensor:
    from expertflow_quant.quantize.spans_kernel import round_span_kernel

    experts, columns, rows = work.shape
    count = span.stop - span.start
    errors = work.new_empty(experts, count, rows)
    zeros = zeros.expand(scales.shape)
    round_span_kernel[(-(-rows // TILE_ROWS), experts)](
        work,
        factor,
        scales,
        zeros,
        codes,
        errors,
        span.start,
        count,
        rows,
        columns,
        scales.stride(0),
        scales.stride(1),
        zeros.stride(0),
        zeros.stride(1),
        TOP=format.levels - 1,
        SPAN=max(16, 1 << (count - 1).bit_length()),
        ROWS=TILE_ROWS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return errors
