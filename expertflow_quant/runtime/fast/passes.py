"""One pass of a model through our attention and experts functions: what they find when transformers calls them.

transformers hands a registered function the module and its tensors, nothing else. Which rows of the KV memory and
which way of multiplying experts are meant is a matter of the pass under way, so the pass is put where the functions
can find it, for the thread that runs the model and only while it does.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Routes = Callable[[int, Tensor], Tensor]
"""(MoE layer, routed ids ``[T, K]``) -> ids that run instead: how benchmarks make random weights follow a trace."""


@dataclass(frozen=True)
class AttentionOptions:
    """What a model asks of attention besides its tensors. ``window``: tokens seen, itself included; ``sinks
    [heads]``: logits that only take part in the softmax's sum."""

    scaling: float
    window: int | None = None
    sinks: Tensor | None = None


class Pass(Protocol):
    """Answers a model's attention and experts modules during one forward pass."""

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        """``q [B, heads, W, D]``, ``k``, ``v [B, kv_heads, W, D]`` -> ``[B, W, heads, D]``."""
        ...

    def experts(self, layer: int, module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """``hidden [T, H]``, ``ids`` and ``weights [T, K]`` -> ``[T, H]``; layer counts MoE layers."""
        ...


class _Current(threading.local):
    running: Pass | None = None


_current = _Current()


@contextmanager
def running(the_pass: Pass) -> Iterator[None]:
    """Inside, this thread's forward passes belong to ``the_pass``."""
    before, _current.running = _current.running, the_pass
    try:
        with torch.inference_mode():
            yield
    finally:
        _current.running = before


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, this thread's current CUDA device is ``device``: Triton and graphs launch there, wherever tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def current() -> Pass | None:
    """The pass under way in this thread, if any."""
    return _current.running
