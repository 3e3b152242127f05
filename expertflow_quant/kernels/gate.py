"""What an expert does between its two products, as kernels need to know it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

FUSED = ("silu",)
"""Activations that kernels compute themselves, for rows ``[gate; up]``: ``act(gate) * up``."""


@dataclass(frozen=True)
class Gate:
    """``apply`` maps gate_up's output ``[n, 2I]`` (``[n, I]`` without a gate) to ``[n, I]``, in any dtype.

    ``fused`` names the same function where a kernel may compute it in its own registers, in float32, with the gate
    rows first and the up rows after them; None: the kernel writes gate_up's output and ``apply`` is called.
    """

    apply: Callable[[Tensor], Tensor]
    fused: str | None = None

    def __post_init__(self) -> None:
        if self.fused is not None and self.fused not in FUSED:
            raise ValueError(f"activation {self.fused!r} is not fused: use one of {', '.join(FUSED)} or None")
