"""Decoder layers compiled for the time of a pass: norms, rotary embeddings and routers become few kernels.

Layers of one class share their compiled code. Attention and experts are calls that the compiler leaves alone, so
every layer becomes a handful of small graphs, which compile in seconds: one set for each size of captured steps, one
for prompts of any size. Outside ``compiled`` the model is as it was.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from expertflow_quant.kernels import TOPK_DTYPES, fits_topk, small_topk

GEMV_ROWS = 1
"""Batch sizes up to this one have their matrix products generated: a library's cost a third more for one row."""


_KEPT = "_expertflow_compiled"


@torch.library.custom_op("expertflow::small_topk", mutates_args=())
def _small_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return small_topk(scores, k)


@_small_topk.register_fake
def _(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[0], k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


@contextmanager
def compiled(layers: Sequence[Any], rows: int | None) -> Iterator[None]:
    """Inside, ``layers`` run compiled: for decode steps of ``rows`` rows, or for prompts of any size (None)."""
    for layer in layers:
        layer._compiled_call_impl = _compiled_call(layer, rows)
    try:
        with torch._dynamo.config.patch(automatic_dynamic_shapes=rows is None, recompile_limit=256):
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def _compiled_call(layer: Any, rows: int | None) -> Any:
    """What ``layer.compile`` makes, made once."""
    made: dict[int | None, Any] = layer.__dict__.setdefault(_KEPT, {})
    if rows not in made:
        layer.compile(backend=_backend(rows is not None and rows <= GEMV_ROWS), dynamic=rows is None)
        made[rows] = layer._compiled_call_impl
    return made[rows]


@lru_cache(maxsize=2)
def _backend(tuned: bool) -> Callable[[fx.GraphModule, Sequence[Any]], Any]:
    """Inductor, after short rows' topk was given to our kernel. One object each, so that compiled code is shared."""

    def compile_graph(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        replace_topk(module)
        return compile_fx(module, inputs, config_patches={"coordinate_descent_tuning": tuned})

    return compile_graph


def replace_topk(module: fx.GraphModule) -> int:
    """Give every topk over the last dimension of short rows to ``small_topk``; how many there were."""
    found = [node for node in module.graph.nodes if _short_topk(node)]
    for node in found:
        k = node.args[1] if len(node.args) > 1 else node.kwargs["k"]
        with module.graph.inserting_before(node):
            ours = module.graph.call_function(torch.ops.expertflow.small_topk.default, (node.args[0], k))
        node.replace_all_uses_with(ours)
        module.graph.erase_node(node)
    if found:
        module.recompile()
    return len(found)


def _short_topk(node: fx.Node) -> bool:
    called = (node.op, node.target) in (("call_function", torch.topk), ("call_method", "topk"))
    if not called or not all(user.target is operator.getitem for user in node.users):
        return False
    given = node.args[0] if node.args else None
    scores = given.meta.get("example_value") if isinstance(given, fx.Node) else None
    k = node.args[1] if len(node.args) > 1 else node.kwargs.get("k")
    options = {**dict(zip(("dim", "largest", "sorted"), node.args[2:], strict=False)), **node.kwargs}
    if not isinstance(scores, Tensor) or not isinstance(k, int) or scores.ndim != 2:
        return False
    largest = options.get("largest", True) is True
    fits = scores.dtype in TOPK_DTYPES and fits_topk(scores.shape[1], k)
    return largest and options.get("dim", -1) in (-1, 1) and fits
