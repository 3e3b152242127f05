"""The k largest of short rows: routers pick a few experts of at most some hundreds, in one small program per row."""

import torch
from torch import Tensor

from expertflow_quant.formats import ExpertFlowError
from expertflow_quant.kernels.launch import use_triton

MAX_ROW = 1024
MAX_K = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Those whose numbers are numbers of float32 too, in which the kernel compares."""


def fits_topk(columns: int, k: int) -> bool:
    """Whether ``small_topk`` takes the ``k`` largest of rows of ``columns``."""
    return 1 <= k <= min(columns, MAX_K) and columns <= MAX_ROW


def small_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values ``[T, k]`` in scores' dtype and int64 indices ``[T, k]`` of each row's k largest, largest first.

    ``scores [T, columns]`` of one of ``DTYPES``, without NaN. Among equal values the smallest index comes first.
    Raises ExpertFlowError for rows or k that ``fits_topk`` refuses, and for other dtypes.
    """
    if scores.ndim != 2 or not fits_topk(scores.shape[1], k) or scores.dtype not in DTYPES:
        raise ExpertFlowError(
            f"the {k} largest of {tuple(scores.shape)} {scores.dtype}: small_topk takes rows of up to {MAX_ROW} "
            f"numbers in float32 or narrower floats, and k up to {MAX_K}"
        )
    if not use_triton(scores):
        return small_topk_reference(scores, k)
    from expertflow_quant.kernels.topk_kernel import topk_kernel

    scores = scores.contiguous()
    values = torch.empty(scores.shape[0], k, dtype=scores.dtype, device=scores.device)
    indices = torch.empty(scores.shape[0], k, dtype=torch.int64, device=scores.device)
    columns = scores.shape[1]
    topk_kernel[(scores.shape[0],)](
        scores, values, indices, columns, K=k, COLUMNS_PAD=1 << (columns - 1).bit_length(), num_warps=1
    )
    return values, indices


def small_topk_reference(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The plain PyTorch twin of ``small_topk``."""
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), indices[:, :k].contiguous()
