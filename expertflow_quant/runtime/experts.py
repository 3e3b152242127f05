"""The experts function: what transformers calls in place of a model's own loop over its experts.

``fn(module, hidden[T, H], top_k_index[T, k], top_k_weights[T, k]) -> [T, H]``. Tokens are sorted by expert,
experts are fetched from the cache in pieces that fit its slots (resident ones first, so that the others load
meanwhile), and every (token, k) row is kept and added up in top-k order at the end: the budget changes when
an expert runs, never what it multiplies nor the order of a sum, so any budget gives the same bits.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertflow_quant.formats.errors import ExpertFlowError
from expertflow_quant.kernels import expert_product, expert_weights
from expertflow_quant.offload.cache import ExpertCache
from expertflow_quant.runtime.fast import passes
from expertflow_quant.runtime.waited import waited_for

NAME = "expertflow"
"""Under which transformers knows the function."""

SUM_TOKENS = 1024
"""Tokens whose rows are added up at once, in float32: bounds the size of that copy."""


@dataclass(frozen=True)
class LayerExperts:
    """What an experts module has instead of weights: which MoE layer it is, and the cache of the plain path. Without
    one, the module runs on the fast path alone (fast/passes.py)."""

    cache: ExpertCache | None
    layer: int


def attach(module: Any, experts: LayerExperts) -> None:
    """Give ``module`` its experts; from now on ``experts_forward`` can run it."""
    setattr(module, NAME, experts)


def attached(model: Any) -> list[Any]:
    """The experts modules of ``model`` that were given experts, in the checkpoint's order."""
    found = [module for module in model.modules() if isinstance(getattr(module, NAME, None), LayerExperts)]
    return sorted(found, key=lambda module: getattr(module, NAME).layer)


@torch.compiler.disable
def experts_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The weighted sum of every token's experts, ``[T, H]`` in hidden's dtype, on the cache's device.

    Ids at or above ``module.num_experts`` mark (token, k) pairs that belong to nobody here and add nothing, and tokens
    that nobody waits for (waited.py) have no others.
    Raises ExpertFlowError in training mode, on another device, or when no checkpoint is attached. During a pass of the
    fast path the pass answers instead.
    """
    if (fast := passes.current()) is not None:
        return fast.experts(getattr(module, NAME).layer, module, hidden, top_k_index, top_k_weights)
    experts = _attached(module, hidden)
    if (waited := waited_for(len(top_k_index))) is not None:
        top_k_index = top_k_index.masked_fill(~waited.to(top_k_index.device)[:, None], module.num_experts)
    with torch.no_grad():
        rows = _expert_rows(module, experts, hidden, top_k_index).view(*top_k_index.shape, hidden.shape[1])
        sums = [
            (some.float() * weights.float().unsqueeze(-1)).sum(dim=1).to(hidden.dtype)
            for some, weights in zip(torch.split(rows, SUM_TOKENS), torch.split(top_k_weights, SUM_TOKENS))
        ]
        return torch.cat(sums)


def fetch(experts: LayerExperts, wanted: Iterable[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Each wanted expert once, resident ones first, with the fields of its record on the device.

    The fields are valid until the next expert is asked for.
    """
    cache, layer, asked = cache_of(experts), experts.layer, list(wanted)
    cache.begin_layer(layer, asked)
    pieces = cache.pieces(layer, asked)
    for place, piece in enumerate(pieces, 1):
        in_use = {(layer, expert) for expert in piece}
        for expert in piece:
            cache.begin(layer, expert, in_use)
        if place == len(pieces):
            cache.fetch_ahead(asked)
        for expert in piece:
            yield expert, cache.finish_views(layer, expert)


def cache_of(experts: LayerExperts) -> ExpertCache:
    """The plain path's cache. Raises ExpertFlowError for experts that only the fast path can reach."""
    if experts.cache is None:
        raise ExpertFlowError(
            "this model was loaded for the fast path: ask its engine, or load it with fast=False to call it directly"
        )
    return experts.cache


def _attached(module: Any, hidden: Tensor) -> LayerExperts:
    experts: LayerExperts | None = getattr(module, NAME, None)
    if experts is None:
        raise ExpertFlowError(
            f"{type(module).__name__} has no experts attached: load a checkpoint with expertflow_quant.load, "
            "or with from_pretrained after `import expertflow_quant`"
        )
    if module.training:
        raise ExpertFlowError("quantized experts are for inference only: call model.eval()")
    if hidden.device != (device := cache_of(experts).device):
        raise ExpertFlowError(
            f"hidden states are on {hidden.device}, the experts' slots on {device}: "
            f"load with device_map={str(hidden.device)!r} instead of moving the model"
        )
    return experts


def _expert_rows(module: Any, experts: LayerExperts, hidden: Tensor, top_k_index: Tensor) -> Tensor:
    """Every (token, k) pair's expert output, ``[T * k, H]``, zero where the id is no expert of this
    module."""
    gate = module._apply_gate if module.has_gate else module.act_fn
    ids = top_k_index.reshape(-1)
    order = ids.argsort(stable=True)
    counts = ids.bincount(minlength=module.num_experts).tolist()
    inputs = torch.split(hidden.index_select(0, order // top_k_index.shape[1]), counts)
    outputs = hidden.new_zeros(ids.shape[0], hidden.shape[1])
    targets = torch.split(outputs, counts)
    wanted = [expert for expert, count in enumerate(counts[: module.num_experts]) if count]
    for expert, views in fetch(experts, wanted):
        weights = expert_weights(views, cache_of(experts).store.layout(experts.layer, expert), hidden.dtype)
        targets[expert].copy_(expert_product(inputs[expert], weights, gate))
    return outputs[order.argsort()]
