"""Where a kernel runs: Triton on a GPU, its PyTorch twin elsewhere; Triton's interpreter where it is switched on."""

import os

from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    """Whether work on ``tensor`` goes to a Triton kernel.

    True on CUDA, and on the CPU under TRITON_INTERPRET=1, which is how tests run kernels without a GPU.
    """
    return tensor.is_cuda or interpreted()


def interpreted() -> bool:
    """Whether Triton's interpreter is switched on. Its ``tl.dot`` takes bfloat16 for integers, so kernels widen
    their operands there."""
    return os.environ.get("TRITON_INTERPRET") == "1"
