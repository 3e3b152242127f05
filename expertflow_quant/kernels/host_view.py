"""A record on the CPU, found by its address: how the PyTorch twins follow the pointers that kernels are given."""

import ctypes

import torch
from torch import Tensor


def record_at(address: int, nbytes: int) -> Tensor:
    """uint8 ``[nbytes]`` over the host memory at ``address``, which the caller keeps alive while the view is used.

    Nothing is copied and nothing can be checked: an address that is no record's is the caller's bug. ``nbytes`` is
    at least 1.
    """
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
